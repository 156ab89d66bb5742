"""One shard in, its missing columns out. Knows nothing of Ray.

A worker that is given two shards at a time reads the one while it computes the other, and computes while it writes.
"""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeAlias

import ml_dtypes
import numpy as np
import torch

from reinforce import process
from reinforce.config import ORIGINAL, Recipe, RunOptions
from reinforce.data import augment, shards
from reinforce.data.shards import Shard
from reinforce.errors import ConfigError, ManifestMismatch, ShardError
from reinforce.models.captioner import Captioner
from reinforce.models.device import card, device_fault, pick_device
from reinforce.models.ensemble import Answers, Ensemble
from reinforce.models.teacher import Teacher
from reinforce.run.batches import Batch, Rows, View, ahead, batches, views
from reinforce.run.reports import ShardReport
from reinforce.run.view_processes import ViewProcesses
from reinforce.store import arrays
from reinforce.store.columns import CLASSES, DIGEST, IDENTITY, KEY, PLACE, STATUS, Column, class_columns, columns
from reinforce.store.manifest import Manifest
from reinforce.store.packing import loss
from reinforce.store.store import Store, identity, said_of

Inputs: TypeAlias = dict[str, np.ndarray]
MEASURED = 1024  # samples of a shard of which is told what packed embeddings lose


class Worker:
    """Holds the models of a recipe on one device, and works shards for one store."""

    def __init__(self, recipe: Recipe, store_url: str, options: RunOptions) -> None:
        """Loads the models, compares them with what the store promises, writes the class texts that are missing.

        Raises ConfigError, ManifestMismatch, MissingExtra, DeviceLost.
        """
        if recipe.embeddings == "bf16-pco":
            arrays.pcodec()
        device = pick_device(options.device)
        if device.type == "cpu":
            process.torch_threads(recipe.cpu_threads)
        self.recipe, self.options, self.store = recipe, options, Store(store_url)
        self.threads = options.decode_threads or decode_threads(device)
        self.views_ahead = 2 if device.type == "cpu" else 8
        try:
            self.teachers = {
                name: Teacher(config, recipe.batch_size, device, recipe.random_seed)
                for name, config in recipe.teachers.items()
            }
            self.captioners = {
                name: Captioner(config, recipe.batch_size, device, recipe.random_seed)
                for name, config in recipe.captioners.items()
            }
        except RuntimeError as error:
            fault = device_fault(error)
            if isinstance(fault, OSError):
                fault = ConfigError(f"the models cannot be loaded: {fault}")
            if fault:
                raise fault from error
            raise
        self.ensemble = Ensemble(self.teachers)
        described = {
            "teachers": {name: teacher.describe() for name, teacher in self.teachers.items()},
            "captioners": {name: captioner.describe() for name, captioner in self.captioners.items()},
        }
        self.manifest = Manifest.of(recipe, described, card(device))
        stored = self.store.manifest()
        self.columns = columns(recipe, (stored or self.manifest).format_version)
        self._models = threading.Lock()
        num = view_processes(device) if options.view_processes is None else options.view_processes
        self.view_processes = ViewProcesses(num, recipe.batch_size, self.sides()) if num else None
        classes = self.store.missing(CLASSES, class_columns(recipe))
        if stored or classes:
            self.promise()
        for column in classes:
            self._commit_classes(column)

    def promise(self) -> None:
        """Settle what the store promises. A new store is not bound to a recipe before something is written into it.

        Raises ManifestMismatch.
        """
        self.store.promise(self.manifest, self.options.extend)

    def reinforce(self, shard: Shard) -> ShardReport:
        """Write the columns of `shard` that the store lacks. Safe to call from several threads, and to call again.

        Of a tar that is broken, the report says what is wrong. Raises OSError where another try may succeed, DeviceLost
        where no other call of this process will.
        """
        start = time.monotonic()
        stamp = shards.stamp(shard.url)
        work = _ShardWork(self, shard)
        captioned = self.recipe.num_original_captions > 0
        with ThreadPoolExecutor(self.threads) as pool:
            ready = ahead(work.prepared(batches(shard, work.rows, self.recipe.batch_size, captioned, pool), pool), 2)
            try:
                with self._models:
                    for batch, inputs in ready:
                        work.answer(batch, inputs, pool)
            except (ShardError, ManifestMismatch) as error:
                if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
                    raise  # the network's or the disk's fault, perhaps, and not the tar's: worth another try
                return ShardReport(shard.name, error=str(error), seconds=time.monotonic() - start)
            except RuntimeError as error:
                if fault := device_fault(error):
                    raise fault from error
                raise
        refusal = work.rows.refusal(shard.url, self.options.max_invalid)
        try:
            if not refusal and not work.commit(stamp):
                return self.reinforce(shard)  # another writer's captions were first: embed those
        except ManifestMismatch as error:
            refusal = str(error)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            # To compute it all again, as for another fault, would only find the disk full again.
            refusal = f"no room for its columns in {self.store.url} ({error.strerror}); free some, and run again"
        return ShardReport(
            shard.name,
            read=len(work.rows.keys),
            quarantined=work.rows.quarantined,
            empty_captions=work.empty_captions,
            columns_written=0 if refusal else len(work.wanted),
            seconds=time.monotonic() - start,
            error=refusal,
            embedding_loss={} if refusal else work.lost,
        )

    def sides(self) -> dict[str, set[int]]:
        """In what sizes views of each set can be asked for."""
        of_teachers = {teacher.image_px for teacher in self.teachers.values()}
        return {name: of_teachers | {view_set.view_px} for name, view_set in self.recipe.view_sets.items()}

    def _commit_classes(self, column: Column) -> None:
        classes = self.recipe.class_sets[column.set]
        if column.teacher:
            array = self.teachers[column.teacher].encode_classes(classes)
        else:
            array = np.array(classes.classnames, dtype=object)
        self.store.commit(CLASSES, column, array)


def decode_threads(device: torch.device) -> int:
    """Two for a CPU worker, whose models need the core. A GPU waits for two: its share of the cores, less those of the
    models and of writing, and at most 8, beyond which they stand in each other's way (docs/results/gpu-h200.md)."""
    if device.type != "cuda":
        return 2
    return min(8, max(2, len(os.sched_getaffinity(0)) // torch.cuda.device_count() - 2))


def view_processes(device: torch.device) -> int:
    """A CPU worker's two threads do; a GPU takes more views than threads can make."""
    if device.type != "cuda":
        return 0
    return min(16, max(1, len(os.sched_getaffinity(0)) // torch.cuda.device_count() - 2))


class _ShardWork:
    """The columns of one shard in the making: answers are gathered batch by batch, and committed when all are there."""

    def __init__(self, worker: Worker, shard: Shard) -> None:
        self.worker, self.recipe, self.store, self.shard = worker, worker.recipe, worker.store, shard
        self.wanted = self.store.missing(shard.name, worker.columns)
        self.committed = set(worker.columns) - set(self.wanted)
        self.rows = Rows()
        self.good: list[int] = []
        self.answers: dict[Column, dict[int, list[np.ndarray]]] = {column: {} for column in self.wanted}
        self._read: dict[Column, np.ndarray] = {}
        self.empty_captions = 0
        self.lost: dict[str, dict[str, float]] = {}

    def prepared(self, found: Iterable[Batch], pool: Executor) -> Iterator[tuple[Batch, Inputs]]:
        """Batches with what the captioners see of them: uint8 (n, side, side, 3) for each that is wanted."""
        captioners = {
            name: captioner
            for name, captioner in self.worker.captioners.items()
            if Column("text", name, "caption") in self.answers
        }
        for batch in found:
            yield (
                batch,
                {name: np.stack(list(pool.map(c.preprocess, batch.pictures))) for name, c in captioners.items()},
            )

    def answer(self, batch: Batch, inputs: Inputs, pool: Executor) -> None:
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
                texts[name] = self._captions(name, batch, inputs)
        tokens = pool.submit(self._tokens, texts)  # meanwhile the device works at the views
        for name, views_of_set in views_ahead.items():
            self._views(name, batch, views_of_set, pool)
        self._texts(texts, tokens.result())

    def commit(self, stamp: dict[str, int | str]) -> bool:
        """Write the wanted columns. Rows in quarantine hold NaN, 0 or an empty text.

        Gives False where another writer has committed other captions meanwhile, so that their embeddings are not ours.
        Raises ManifestMismatch where the columns that are there are of another tar.
        """
        for column in IDENTITY:
            if column in self.committed and not np.array_equal(self._stored(column), self._known(column)):
                raise self._other_tar("its keys differ" if column == KEY else "its images differ")
        self.worker.promise()
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
        return True

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
        return [list(row) for row in zip(*(sample.repeated(num) for sample in batch.samples), strict=True)]

    def _captions(self, name: str, batch: Batch, inputs: Inputs) -> list[list[str]]:
        """C lists of n captions, drawn now or, where a run before committed them, read back."""
        column = Column("text", name, "caption")
        if column in self.committed:
            return [list(row) for row in self._stored(column)[:, batch.rows]]
        if name not in self.worker.captioners:
            raise ShardError(
                f"{self.shard.name} has no captions of '{name}' yet: `clip-reinforce import captions` writes them"
            )
        keys = [sample.key for sample in batch.samples]
        captions = self.worker.captioners[name].caption(inputs[name], self.recipe.seed, name, keys)
        for row in captions:
            for i, caption in enumerate(row):
                if not caption:  # the model wrote nothing: the image's own caption, if any, is the best there is
                    row[i] = next(iter(batch.samples[i].captions), "")
                    self.empty_captions += 1
        return captions

    def _tokens(self, texts: dict[str, list[list[str]]]) -> list[dict[str, np.ndarray]]:
        """Of every row of every set, in that order. In one thread: not all tokenizers may be used in two."""
        tokens = self.worker.ensemble.tokens
        return [tokens(self._asked("text", name).values(), row) for name, rows in texts.items() for row in rows]

    def _texts(self, texts: dict[str, list[list[str]]], tokens: list[dict[str, np.ndarray]]) -> None:
        items = [(name, index, row) for name, rows in texts.items() for index, row in enumerate(rows)]
        asked = {name: self._asked("text", name) for name in texts}
        answers = [
            self.worker.ensemble.encode_tokens(asked[name].values(), of_row, len(row))
            for (name, _, row), of_row in zip(items, tokens, strict=True)
        ]
        for (name, index, row), encoded in zip(items, answers, strict=True):
            self._add(Column("text", name, "caption"), index, np.array(row, dtype=object))
            self._add_all(asked[name], index, encoded())

    def _views_ahead(self, name: str, batch: Batch, pool: Executor) -> Iterator[View]:
        """The views that are wanted, which begin to be made now."""
        view_set = self.recipe.view_sets[name]
        sides = {self.worker.teachers[teacher].image_px for teacher in self._asked("view", name).values()}
        if Column("view", name, "pixels") in self.answers:
            sides.add(view_set.view_px)
        if not sides and Column("view", name, "augment") not in self.answers:
            return iter(())
        processes = self.worker.view_processes
        if processes:
            made = processes.views(batch, view_set, name, self.recipe.seed, sides)
        else:
            made = views(batch, view_set, name, self.recipe.seed, sides, pool)
        return ahead(made, self.worker.views_ahead)

    def _views(self, name: str, batch: Batch, views_of_set: Iterator[View], pool: Executor) -> None:
        asked, view_px = self._asked("view", name), self.recipe.view_sets[name].view_px
        augment_column, pixels_column = Column("view", name, "augment"), Column("view", name, "pixels")
        before: tuple[int, Answers] | None = None  # taken one view late, so that the device always has work
        for view in views_of_set:
            if augment_column in self.committed and not np.array_equal(
                self._stored(augment_column)[view.index, batch.rows], view.params
            ):
                raise self._other_tar("its views have other parameters now: its images have other sizes")
            encoded = self.worker.ensemble.encode_images(asked.values(), view.pixels)
            self._add(augment_column, view.index, view.params)
            if pixels_column in self.answers:
                hashes = pool.map(augment.pixel_hash, view.pixels[view_px])
                self._add(pixels_column, view.index, np.fromiter(hashes, np.uint64))
            if before:
                self._add_all(asked, before[0], before[1]())
            before = view.index, encoded
        if before:
            self._add_all(asked, before[0], before[1]())

    def _asked(self, kind: Literal["view", "text"], name: str) -> dict[Column, str]:
        """The teachers whose embeddings of a set are wanted, by their columns."""
        return {
            column: teacher
            for teacher in self.worker.teachers
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
            for name, teacher in self.worker.teachers.items():
                pair = [Column("view", next(iter(self.recipe.view_sets)), name), Column("text", texts, name)]
                parts = [self.answers.get(column, {}).get(0, []) for column in pair]
                if all(parts):
                    images, captions = (np.concatenate(of)[:MEASURED] for of in parts)
                    found[name] = loss(images, captions, teacher.logit_scale, "int8")
        return found

    def _items(self, column: Column) -> "_Items":
        """The views (captions) of a column, each with its batches put where they belong among all N rows. They are let
        go of on the way: of a shard of 12,500 samples and 30 views they are half a gigabyte for each teacher."""
        parts, num_rows = self.answers.pop(column), len(self.rows.keys)

        def item(index: int) -> np.ndarray:
            if column.teacher:
                width = self.worker.teachers[column.teacher].width
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
