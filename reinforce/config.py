"""Every knob of the writer on one page.

A `Recipe` holds what decides the bytes of a store; it is saved in the manifest and a later run must agree with it.
`RunOptions` holds what does not: how many workers, on which device, how many tries.
"""

import difflib
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    field_validator,
    model_validator,
)

from reinforce.errors import ConfigError
from reinforce.lines import without_secrets

ORIGINAL = "original"  # the text set of the captions that came with the images
RESERVED = {"augment", "pixels", "caption", "name", ORIGINAL}  # what columns and sets are called by themselves
Packing = Literal["bf16", "bf16-pco", "int8"]  # how embeddings are stored (store/packing.py)


def _column_name(name: str) -> str:
    if not name.replace("_", "").replace("-", "").isalnum() or name in RESERVED:
        raise ValueError(
            f"'{name}' cannot name a column: use letters, digits, '-' and '_', and none of {sorted(RESERVED)}"
        )
    return name


def check_name(option: str, name: str) -> None:
    """Raises ConfigError where what an option gives cannot name a column."""
    try:
        _column_name(name)
    except ValueError as error:
        raise ConfigError(f"{option} {name}: {error}") from None


Name = Annotated[str, AfterValidator(_column_name)]
Precision = Literal["auto", "fp32", "bf16"]


class Config(BaseModel):
    """Settings that are checked when they are made, and never changed after that. Their numbers are finite: with one
    that is not, work would fail far from its cause."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def but(self, **changes: Any) -> Self:
        """The same settings with some of them replaced, checked as new ones are.

        Raises ConfigError for a key that does not exist and for a value that does not fit. (Pydantic's
        `model_copy(update=..)` checks neither: a misspelt key is lost without a word.)
        """
        kept = {name: getattr(self, name) for name in type(self).model_fields}
        return parse(type(self), kept | changes, f"{type(self).__name__}.but")


T = TypeVar("T", bound=Config)
# Where data lies. As JSON, in which settings are saved and sent, it has no secrets.
Address = Annotated[str, PlainSerializer(without_secrets, when_used="json")]


class ViewSet(Config):
    """Views drawn together: RandomResizedCrop, then RandAugment (MobileCLIP, DataCompDR settings by default)."""

    num_views: int = Field(10, ge=1)
    view_px: int = Field(224, ge=8, description="side of the view at drawing time; the replay proof is taken at it")
    scale: tuple[float, float] = Field((0.08, 1.0), description="share of the image's area that a crop covers")
    ratio: tuple[float, float] = Field((3 / 4, 4 / 3), description="width over height of a crop")
    num_ops: int = Field(2, ge=0, description="RandAugment operations per view")
    magnitude: int = Field(9, ge=0, le=30, description="RandAugment's bin, of 31")

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale {self.scale} must rise from above 0 to at most 1")
        if not 1e-3 <= self.ratio[0] <= self.ratio[1] <= 1e3:
            raise ValueError(f"ratio {self.ratio} must rise from at least 0.001 to at most 1000")
        return self


TIMM = "timm:"  # before the name of an image encoder of timm


class Model(Config):
    """An open_clip model. `pretrained` is a tag or a file; a `local-dir:` or `hf-hub:` model brings its own weights."""

    model: str
    pretrained: str | None = None
    precision: Precision = Field("auto", description="auto: bf16 on CUDA, fp32 elsewhere; the manifest says which")


class Teacher(Model):
    """A frozen CLIP or SigLIP of open_clip; or `timm:NAME`, an image encoder of timm (DINOv2, RADIO), which reads no
    texts. Preprocessing comes with the weights; but a bare checkpoint file whose weights were not trained with OpenAI's
    mean and std needs `image_mean` and `image_std` here (MobileCLIP: 0 and 1)."""

    image_px: int | None = Field(
        None, ge=1, description="side of the images it sees, in place of the one it was trained at (DINOv2: 518)"
    )
    image_mean: tuple[float, float, float] | None = None
    image_std: tuple[float, float, float] | None = None
    prompts: str | None = Field(None, description="a file made by `clip-train adapt`: the teacher adapted to a domain")

    @property
    def reads_texts(self) -> bool:
        return not self.model.startswith(TIMM)

    @model_validator(mode="after")
    def _prompts_need_texts(self) -> Self:
        if self.prompts and not self.reads_texts:
            raise ValueError(f"{self.model} reads no texts, and prompts are for a teacher that does")
        return self


class CaptionFiles(Config):
    """How captions lie in the files of a sample."""

    keys: tuple[str, ...] = ("caption", "captions")
    lines: bool = False


CAPTION_FILES = CaptionFiles()


def _one_or_more(names: Any) -> Any:
    return (names,) if isinstance(names, str) else names


# What a recipe and a training say of the files that captions come in.
CaptionKeys = Annotated[
    tuple[str, ...],
    BeforeValidator(_one_or_more),
    Field(min_length=1, description="the keys of a sample's .json under which captions lie, in their order"),
]
CaptionLines = Annotated[
    bool, Field(description="each line of a sample's .txt is a caption; by default all of them are one")
]


class Captioner(Model):
    """A CoCa and how it is sampled (defaults: the published DataCompDR-style settings, nucleus sampling)."""

    num_captions: int = Field(5, ge=1)
    sampling: Literal["top_p", "top_k", "greedy"] = "top_p"
    top_p: float = Field(0.9, gt=0, le=1)
    top_k: int = Field(50, ge=1)
    temperature: float = Field(1.0, ge=1e-3, le=1e3)
    max_tokens: int = Field(30, ge=3, description="length with start and end token")
    min_tokens: int = Field(5, ge=1, description="the fewest tokens before the end token, with the start token")


class Texts(Config):
    """Captions that were written elsewhere, and imported: `clip-reinforce import captions`."""

    num_captions: int = Field(ge=1)
    source: str = Field("", description="who wrote them, in words")
    sha256: str = Field(description="of the file they came in")


def _lines_of(names: Any) -> Any:
    if not isinstance(names, str):
        return names
    try:
        return [line.strip() for line in Path(names).read_text("utf-8-sig").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"class names cannot be read from '{names}': {error}") from None


class ClassSet(Config):
    """Classes whose texts every teacher embeds once for the whole store: the mean over the templates."""

    classnames: Annotated[tuple[str, ...], BeforeValidator(_lines_of)] = Field(
        description="the names, or a file with one per line; the manifest holds the names"
    )
    templates: tuple[str, ...] = Field(
        ("a photo of a {}.",),
        min_length=1,
        description="`{}` or `{c}` stands for the name; with an adapted teacher leave out 'a photo of a', which its "
        "prompts replace",
    )

    @field_validator("classnames")
    @classmethod
    def _named_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(names) < 2 or "" in names:
            raise ValueError("must name at least two classes, and no name may be empty")
        if twice := [name for name, num in Counter(names).items() if num > 1]:
            raise ValueError(f"names '{twice[0]}' twice; tell the two apart")
        return names

    @field_validator("templates")
    @classmethod
    def _with_a_place(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        for template in templates:
            if "{}" not in template and "{c}" not in template:
                raise ValueError(f"'{template}' has no place for the class; write {{}} in it")
        return templates

    def texts(self) -> list[str]:
        """Class by class, every template."""
        return [t.replace("{c}", name).replace("{}", name) for name in self.classnames for t in self.templates]


class Recipe(Config):
    """What a store holds. Everything here is in the fingerprint except `name`, which is a label."""

    name: str
    seed: int = Field(0, ge=0)
    teachers: dict[Name, Teacher] = Field(min_length=1)
    view_sets: dict[Name, ViewSet] = Field(default={"base": ViewSet()}, min_length=1)
    captioners: dict[Name, Captioner] = Field(description="synthetic text sets, by name")
    texts: dict[Name, Texts] = Field({}, description="text sets that were imported, by name; an import writes this")
    class_sets: dict[Name, ClassSet] = Field({}, description="classes whose texts are embedded, once per store")
    num_original_captions: int = Field(
        1, ge=0, description="how many of the captions that came with an image are kept; 0: images need no caption"
    )
    caption_keys: CaptionKeys = CAPTION_FILES.keys
    caption_lines: CaptionLines = CAPTION_FILES.lines
    embeddings: Packing = Field(
        "bf16",
        description="how they are stored: bfloat16; the same bits in pcodec, which fewer programs read; or a byte for "
        "each number, in half the room",
    )
    batch_size: int = Field(
        64, ge=1, description="images per forward pass; it changes the last bits, since kernels depend on it"
    )
    cpu_threads: int = Field(1, ge=1, description="torch threads of a CPU worker; it changes the last bits, too")
    weights: Literal["pretrained", "random"] = Field(
        "pretrained", description="random: architectures without their weights, to try shapes and memory"
    )

    @model_validator(mode="after")
    def _one_text_set_a_name(self) -> Self:
        if both := self.captioners.keys() & self.texts.keys():
            raise ValueError(f"'{min(both)}' names a captioner and an imported text set; rename one")
        return self

    @property
    def text_sets(self) -> dict[str, int]:
        """Number of captions by text set: the original ones, where they are kept, each captioner's, the imported."""
        original = {ORIGINAL: self.num_original_captions} if self.num_original_captions else {}
        return original | {name: made.num_captions for name, made in (self.captioners | self.texts).items()}

    @property
    def text_teachers(self) -> list[str]:
        """Those that embed texts, too."""
        return [name for name, teacher in self.teachers.items() if teacher.reads_texts]

    @property
    def caption_files(self) -> CaptionFiles | None:
        """How to read the captions that came with the images; None where they are not asked for."""
        if not self.num_original_captions:
            return None
        return CaptionFiles(keys=self.caption_keys, lines=self.caption_lines)

    @property
    def random_seed(self) -> int | None:
        """What the models' weights are drawn from, where they are not read."""
        return self.seed if self.weights == "random" else None


NAMED = ("teachers", "view_sets", "captioners", "texts", "class_sets")  # the parts of a recipe that a store can grow by


class RunOptions(Config):
    """How a run is carried out. Nothing here changes a byte."""

    workers: str = Field("auto", description="number of Ray workers, MIN:MAX for an elastic pool, 0 for no Ray")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_invalid: float = Field(
        0.1, ge=0, le=1, description="share of a shard's samples that may be bad before it is refused"
    )
    attempts: int = Field(3, ge=1, description="tries per shard")
    decode_threads: int | None = Field(
        None,
        ge=1,
        description="threads of a worker that decode and augment; by default 2, and with a GPU its share of the cores, "
        "at most 8",
    )
    decode_bytes: int | None = Field(
        None,
        ge=1 << 20,
        description="bytes that the decoded pictures of a worker may take ahead of need, by default 1 GiB, and with a "
        "GPU 8 GiB; what finds no room is decoded again when its views are made",
    )
    hung_after: float | None = Field(
        None,
        gt=0,
        description="seconds of silence after which a worker is given up; by default ten times what the slowest shard "
        "took, and at least 300",
    )
    statistics: str | None = Field(
        None, description="file to which a line of JSON is added for each shard that was done or has failed"
    )
    extend: bool = Field(
        False, description="add what the recipe has and the store has not: teachers, captioners, view sets, class sets"
    )
    shards_in_flight: int = Field(2, ge=1, description="shards a worker holds: one computes, the next is being read")


def parse(kind: type[T], tree: Any, where: str) -> T:
    """A config from its JSON form. Raises ConfigError with every fault on a line of its own."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{where} is not valid:", *sentences(error, kind)) from None


def sentences(error: ValidationError, kind: type[Config] = Config) -> list[str]:
    """Every fault that pydantic found, an indented line each; of an unknown key, the keys of `kind` that come near."""
    faults = [(".".join(map(str, fault["loc"])), _plain(fault, kind)) for fault in error.errors()]
    return ["  " + ": ".join(filter(None, fault)) for fault in faults]


def near(key: str, node: Any) -> str:
    """`; did you mean ..?`, or what keys there are."""
    keys = list(node) if isinstance(node, dict) else []
    close = difflib.get_close_matches(key, keys, n=3)
    return f"; did you mean {' or '.join(close)}?" if close else f"; there are: {', '.join(keys) or 'none'}"


def _plain(fault: Any, kind: Any) -> str:
    """A fault without pydantic's own words for what kind of error it is."""
    if fault["type"] != "extra_forbidden":
        return str(fault["msg"]).removeprefix("Value error, ")
    *path, key = fault["loc"]
    for step in path:  # down to the settings that the key is in; the name of an item, such as a teacher's, is no step
        if field := kind.model_fields.get(step):
            inner = (field.annotation, *get_args(field.annotation))  # `ComkdConfig | None`, `dict[Name, Teacher]`
            kind = next((each for each in inner if hasattr(each, "model_fields")), Config)
    return f"unknown key{near(str(key), kind.model_fields)}" if kind.model_fields else "unknown key"
