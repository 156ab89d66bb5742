"""One shard in the making: what its batches ask of the models, and the columns that come of the answers."""

from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np
from PIL import Image

from reinforce.config import ORIGINAL
from reinforce.data import augment
from reinforce.data.shards import Shard
from reinforce.errors import ManifestMismatch
from reinforce.models.ensemble import Answers
from reinforce.run.batches import Batch, Rows, Seen, View, ahead, views
from reinforce.run.loaded import Loaded
from reinforce.store.columns import DIGEST, IDENTITY, KEY, PLACE, STATUS, Column
from reinforce.store.packing import MEASURED, loss
from reinforce.store.refused import accept, refuse
from reinforce.store.store import Store, identity, said_of


class ShardWork:
    """The columns of one shard in the making: answers are gathered batch by batch, and committed when all are there."""

    def __init__(
        self, loaded: Loaded, store: Store, columns: list[Column], shard: Shard, promise: Callable[[], None]
    ) -> None:
        """`promise` is asked for before the first column is written: Store.promise."""
        self.loaded, self.recipe, self.store, self.shard, self.promise = loaded, loaded.recipe, store, shard, promise
        missing = store.missing(shard.name, columns)
        self.committed = set(columns) - set(missing)
        # Captions are imported when a shard's keys are there: what needs them waits.
        self.awaited = {
            column.set for column in missing if column.part == "caption" and column.set in self.recipe.texts
        }
        self.wanted = [column for column in missing if not (column.kind == "text" and column.set in self.awaited)]
        self.rows = Rows()
        self.good: list[int] = []
        self.answers: dict[Column, dict[int, list[np.ndarray]]] = {column: {} for column in self.wanted}
        self._read: dict[Column, np.ndarray] = {}
        self.empty_captions = 0
        self.lost: dict[str, dict[str, float]] = {}

    def lacks(self) -> str:
        """Which captions it waits for, or nothing."""
        sets = ", ".join(f"'{name}'" for name in sorted(self.awaited))
        return sets and (
            f"{self.shard.name} has no captions of {sets} yet; all that needs none is there: import them with "
            "`clip-reinforce import captions`, and go on with `clip-reinforce extend`"
        )

    def see(self, picture: Image.Image) -> Seen:
        """What the captioners that are wanted see of a picture: uint8 (side, side, 3)."""
        return {
            name: captioner.preprocess(picture)
            for name, captioner in self.loaded.captioners.items()
            if Column("text", name, "caption") in self.answers
        }

    def answer(self, batch: Batch, pool: Executor) -> None:
        """Ask the models for all that is missing about one batch."""
        self.good += batch.rows
        views_ahead = {name: self._views_ahead(name, batch, pool) for name in self.recipe.view_sets}
        originals = self._original_captions(batch)
        captions = Column("text", ORIGINAL, "caption")
        if captions in self.committed and self._stored(captions)[:, batch.rows].tolist() != originals:
            raise self._other_tar("its captions differ")
        texts = {ORIGINAL: originals}
        for name in (name for name in self.recipe.text_sets if name != ORIGINAL):
            if any(column.kind == "text" and column.set == name for column in self.wanted):
                texts[name] = self._captions(name, batch)
        tokens = pool.submit(self._tokens, texts)  # meanwhile the device works at the views
        for name, views_of_set in views_ahead.items():
            self._views(name, batch, views_of_set)
        self._texts(texts, tokens.result())

    def commit(self, stamp: dict[str, int | str]) -> bool:
        """Write the wanted columns. Rows in quarantine hold NaN, 0 or an empty text.

        Gives False where another writer has committed other captions meanwhile, so that their embeddings are not ours.
        Raises ManifestMismatch where the columns that are there are of another tar.
        """
        for column in IDENTITY:
            if column in self.committed and not np.array_equal(self._stored(column), self._known(column)):
                raise self._other_tar("its keys differ" if column == KEY else "its images differ")
        self.promise()
        data = identity(self.rows.keys, self._known(DIGEST))
        self.lost = self._loss()
        for column in self.wanted:
            known = column.kind == "sample"
            items = self._known(column) if known else self._items(column)
            if not self.store.commit(self.shard.name, column, items, data, **said_of(column, items, stamp)):
                if known:
                    raise self._other_tar("another run has just reinforced another tar of that name")
                if column.part == "caption":
                    return False
        accept(self.store.objects, self.shard.name)
        return True

    def refuse(self, why: str) -> None:
        """Leave a note of what is wrong with the samples; nothing else is written."""
        refuse(self.store.objects, self.shard.name, {"why": why} | self.rows.told())

    def _known(self, column: Column) -> np.ndarray:
        if column == KEY:
            return np.array(self.rows.keys, dtype=object)
        if column == DIGEST:
            return np.array(self.rows.digests, dtype=np.uint64)
        if column == PLACE:
            return np.array(self.rows.places, dtype=np.int64).reshape(-1, 2)
        if column == STATUS:
            return np.array(self.rows.statuses, dtype=np.uint8)
        return np.array(self.rows.sizes, dtype=np.int32).reshape(-1, 2)

    def _stored(self, column: Column) -> np.ndarray:
        """A column that was committed before, read once."""
        if column not in self._read:
            self._read[column] = self.store.read(self.shard.name, column)
        return self._read[column]

    def _other_tar(self, why: str) -> ManifestMismatch:
        return ManifestMismatch(
            f"{self.shard.url} is not the tar that group {self.shard.name} was made from: {why}; use another STORE"
        )

    # -- questions -----------------------------------------------------------------------------------------------

    def _original_captions(self, batch: Batch) -> list[list[str]]:
        """C lists of n captions."""
        num = self.recipe.num_original_captions
        for sample in batch.samples if num else []:
            if len(sample.captions) < num:
                self.rows.notes.add("fewer_captions", sample.key)
        return [list(row) for row in zip(*(sample.repeated(num) for sample in batch.samples), strict=True)]

    def _captions(self, name: str, batch: Batch) -> list[list[str]]:
        """C lists of n captions, drawn now or, where a run before committed them, read back."""
        column = Column("text", name, "caption")
        if column in self.committed:
            return [list(row) for row in self._stored(column)[:, batch.rows]]
        keys = [sample.key for sample in batch.samples]
        pixels = np.stack([seen[name] for seen in batch.seen])
        captions = self.loaded.captioners[name].caption(pixels, self.recipe.seed, name, keys)
        for row in captions:
            for i, caption in enumerate(row):
                if not caption:  # the model wrote nothing: the image's own caption, if any, is the best there is
                    row[i] = next(iter(batch.samples[i].captions), "")
                    self.empty_captions += 1
        return captions

    def _tokens(self, texts: dict[str, list[list[str]]]) -> list[dict[str, np.ndarray]]:
        """Of every row of every set, in that order. In one thread: not all tokenizers may be used in two."""
        tokens = self.loaded.ensemble.tokens
        return [tokens(self._asked("text", name).values(), row) for name, rows in texts.items() for row in rows]

    def _texts(self, texts: dict[str, list[list[str]]], tokens: list[dict[str, np.ndarray]]) -> None:
        items = [(name, index, row) for name, rows in texts.items() for index, row in enumerate(rows)]
        asked = {name: self._asked("text", name) for name in texts}
        answers = [
            self.loaded.ensemble.encode_tokens(asked[name].values(), of_row, len(row))
            for (name, _, row), of_row in zip(items, tokens, strict=True)
        ]
        for (name, index, row), encoded in zip(items, answers, strict=True):
            self._add(Column("text", name, "caption"), index, np.array(row, dtype=object))
            self._add_all(asked[name], index, encoded())

    def _views_ahead(self, name: str, batch: Batch, pool: Executor) -> Iterator[View]:
        """The views that are wanted, which begin to be made now."""
        view_set = self.recipe.view_sets[name]
        sides = {self.loaded.teachers[teacher].image_px for teacher in self._asked("view", name).values()}
        hashed = view_set.view_px if Column("view", name, "pixels") in self.answers else None
        if hashed:
            sides.add(hashed)
        if not sides and Column("view", name, "augment") not in self.answers:
            return iter(())
        num_bytes = self.loaded.room.num_bytes // len(self.recipe.view_sets)
        made = views(batch, view_set, name, self.recipe.seed, sides, pool, num_bytes, hashed)
        return ahead(made, self.loaded.views_ahead)

    def _views(self, name: str, batch: Batch, views_of_set: Iterator[View]) -> None:
        asked, augment_column = self._asked("view", name), Column("view", name, "augment")
        before: tuple[int, Answers] | None = None  # taken one view late, so that the device always has work
        for view in views_of_set:
            if augment_column in self.committed and not np.array_equal(
                self._stored(augment_column)[view.index, batch.rows], view.params
            ):
                raise self._other_tar("its views have other parameters now: its images have other sizes")
            encoded = self.loaded.ensemble.encode_images(asked.values(), view.pixels)
            self._add(augment_column, view.index, view.params)
            self._add(Column("view", name, "pixels"), view.index, view.hashes)
            if before:
                self._add_all(asked, before[0], before[1]())
            before = view.index, encoded
        if before:
            self._add_all(asked, before[0], before[1]())

    def _asked(self, kind: Literal["view", "text"], name: str) -> dict[Column, str]:
        """The teachers whose embeddings of a set are wanted, by their columns."""
        return {
            column: teacher
            for teacher in self.loaded.teachers
            if (column := Column(kind, name, teacher)) in self.answers
        }

    # -- columns -------------------------------------------------------------------------------------------------

    def _add(self, column: Column, index: int, part: np.ndarray) -> None:
        if column in self.answers:
            self.answers[column].setdefault(index, []).append(part)

    def _add_all(self, asked: dict[Column, str], index: int, encoded: dict[str, np.ndarray]) -> None:
        for column, teacher in asked.items():
            self._add(column, index, encoded[teacher])

    def _loss(self) -> dict[str, dict[str, float]]:
        """What int8 will lose, by teacher, of view 0 and caption 0 of the first samples; nothing where one of the two
        was committed before."""
        found, texts = {}, next(iter(self.recipe.text_sets), None)
        if self.recipe.embeddings == "int8" and texts:
            for name in self.recipe.text_teachers:
                pair = [Column("view", next(iter(self.recipe.view_sets)), name), Column("text", texts, name)]
                parts = [self.answers.get(column, {}).get(0, []) for column in pair]
                if all(parts):
                    images, captions = (np.concatenate(of)[:MEASURED] for of in parts)
                    scale = self.loaded.teachers[name].logit_scale
                    found[name] = loss(images, captions, scale, "int8")
        return found

    def _items(self, column: Column) -> "_Items":
        """The views (captions) of a column, each with its batches put where they belong among all N rows. They are let
        go of on the way: of a shard of 12,500 samples and 30 views they are half a gigabyte for each teacher."""
        parts, num_rows = self.answers.pop(column), len(self.rows.keys)

        def item(index: int) -> np.ndarray:
            if column.teacher:
                width = self.loaded.teachers[column.teacher].width
                whole = np.full((num_rows, width), np.nan, ml_dtypes.bfloat16)
            elif column.part == "caption":
                whole = np.full(num_rows, "", dtype=object)
            elif column.part == "pixels":
                whole = np.zeros(num_rows, np.uint64)
            else:
                fields = augment.fields(self.recipe.view_sets[column.set])
                whole = np.full((num_rows, len(fields)), np.nan, np.float32)
            if index in parts:
                whole[self.good] = np.concatenate(parts.pop(index))
            return whole

        return _Items(column.num_items(self.recipe), item)


@dataclass(frozen=True)
class _Items:
    """What a column is made of: made when they are asked for, once."""

    num: int
    make: Callable[[int], np.ndarray]

    def __len__(self) -> int:
        return self.num

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self.make, range(self.num))
