"""The columns of a store: what each is called, what it holds, and which of them a recipe asks for."""

from dataclasses import dataclass
from typing import Literal, Self

from reinforce.config import RESERVED, Recipe

FORMAT_VERSION = 2
CLASSES = "__classes__"  # the group of class texts; no shard can be called so


@dataclass(frozen=True)
class Column:
    """`part` of a set. Its `str()` is its path in the group of a shard or, for a class set, in the group CLASSES.

    kind      path                 array
    sample    <part>               (N,), and (N, 2) for `size` and `place`; there is no set
    view      view/<set>/<part>    (A, N) or (A, N, width)
    text      text/<set>/<part>    (C, N) or (C, N, width)
    class     <set>/<part>         (classes,) or (classes, width)

    N are the samples of a shard, A the views and C the captions of the set.
    """

    kind: Literal["sample", "view", "text", "class"]
    set: str
    part: str

    @classmethod
    def at(cls, path: str) -> Self:
        """The column that lies at a path. Raises ValueError for a path that none can have."""
        match path.split("/"):
            case [part] if part:
                return cls("sample", "", part)
            case [name, part]:
                return cls("class", name, part)
            case ["view" | "text" as kind, name, part]:
                return cls(kind, name, part)
        raise ValueError(f"no column lies at '{path}'")

    def __str__(self) -> str:
        match self.kind:
            case "sample":
                return self.part
            case "class":
                return f"{self.set}/{self.part}"
        return f"{self.kind}/{self.set}/{self.part}"

    @property
    def teacher(self) -> str | None:
        """Whose embeddings it holds; None where it holds something else."""
        return None if self.kind == "sample" or self.part in RESERVED else self.part

    @property
    def row_axis(self) -> int:
        """The axis of the samples, or of the classes. What comes before it is the axis of views or captions."""
        return 1 if self.kind in ("view", "text") else 0

    def num_items(self, recipe: Recipe) -> int:
        """Views or captions of its set: the length of the axis before that of the rows."""
        return recipe.view_sets[self.set].num_views if self.kind == "view" else recipe.text_sets[self.set]


KEY, DIGEST, PLACE, STATUS, SIZE = (Column("sample", "", part) for part in ("key", "digest", "place", "status", "size"))
IDENTITY = (KEY, DIGEST)  # of the data: what a shard's other columns belong to


def columns(recipe: Recipe, format_version: int = FORMAT_VERSION) -> list[Column]:
    """The columns of every shard's group, in the order in which they are committed. Format 1 had neither digests nor
    places."""
    views, texts = recipe.view_sets, recipe.text_sets
    return [
        *(KEY, *([DIGEST, PLACE] if format_version > 1 else []), STATUS, SIZE),
        *(Column("text", name, "caption") for name in texts),
        *(Column("view", name, part) for name in views for part in ("augment", "pixels")),
        *(Column("text", name, teacher) for name in texts for teacher in recipe.text_teachers),
        *(Column("view", name, teacher) for name in views for teacher in recipe.teachers),
    ]


def class_columns(recipe: Recipe) -> list[Column]:
    """The columns of the group CLASSES: for each set its names, and the embeddings of each teacher that reads texts."""
    return [Column("class", name, part) for name in recipe.class_sets for part in ("name", *recipe.text_teachers)]
