"""Reinforcements that others made become a store, beside the tars with their images."""

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from reinforce.config import ORIGINAL, Captioner, Recipe, ViewSet
from reinforce.data import augment, shards
from reinforce.data.resize import Picture
from reinforce.data.shards import Sample, Shard
from reinforce.data.status import Status
from reinforce.errors import ConfigError, ManifestMismatch, ReplayError, ShardError
from reinforce.exchange import datacompdr
from reinforce.exchange.datacompdr import NoRecord, Record
from reinforce.models.frozen import embedding_width
from reinforce.progress import Progress
from reinforce.run.batches import ROOM_BYTES, Batch, Room, Rows, batches
from reinforce.run.reports import RunReport, ShardReport
from reinforce.store.columns import DIGEST, KEY, PLACE, SIZE, STATUS, Column
from reinforce.store.manifest import Manifest
from reinforce.store.store import Store, identity, said_of

LOGIT_SCALE = 100.0  # of both of DataCompDR's teachers
_AT_ONCE = 64  # images that are decoded side by side
_LEAST_REACH = 0.9  # of thirty crops one nearly always comes to the right and lower edge

# Of a sample whose image has this (height, width): its record, or None.
RecordOf: TypeAlias = Callable[[Sample, tuple[int, int]], Record | None]


@dataclass(frozen=True)
class Source:
    """Whose records they are. `of_shard` is asked once for each tar of images; `absent` is what is said of an image
    without a record; `measured`: crops were drawn in pixels of images that may have been smaller than these."""

    of_shard: Callable[[Shard], RecordOf]
    absent: str
    measured: bool


def import_datacompdr(
    records: str,
    images: str,
    store_url: str,
    recipe: Recipe,
    widths: dict[str, int],
    max_invalid: float = 0.1,
) -> RunReport:
    """Write the records of DataCompDR's tars into a store. A store that was begun is gone on with.

    `images`: the tars of the images, which may be the same; a tar of records belongs to the tar of images of its name,
    a record to the image of its key. `recipe` names teachers and captioner; how many views and captions there are, the
    first record says. `widths`: of each teacher's part of an embedding, in the recipe's order; none: that of its
    model, or an equal part where that is not known.
    Raises ConfigError and ManifestMismatch before any work; shards that fail are in the report.
    """
    told = {shard.name: shard for shard in shards.expand(records)}
    listed = shards.expand(images)
    if alone := [shard for shard in listed if shard.name not in told]:
        raise ConfigError(
            f"{alone[0].url}: no tar of records is called {alone[0].name}.tar; give it, or leave this out"
        )
    first = _first(list(told.values()))
    recipe = _as_found(recipe, first)
    widths = _widths(recipe, widths, first.image.shape[1])

    def of_shard(shard: Shard) -> RecordOf:
        records, names = dict(_records(told[shard.name])), _names(shard)
        return lambda sample, _: records.get(names.get(sample.key, sample.key))

    source = Source(of_shard, "no record of this key or uid", measured=True)
    return write_records(source, listed, store_url, recipe, widths, LOGIT_SCALE, max_invalid)


def write_records(
    source: Source,
    listed: list[Shard],
    store_url: str,
    recipe: Recipe,
    widths: dict[str, int],
    logit_scale: float,
    max_invalid: float,
) -> RunReport:
    """Write the records of all images of the tars. A store that was begun is gone on with.

    Raises ManifestMismatch before any work; shards that fail are in the report.
    """
    start = time.monotonic()
    store, manifest = Store(store_url), Manifest.of(recipe, _models(recipe, widths, logit_scale))
    store.promise(manifest)
    columns = manifest.columns()
    report = RunReport(store_url, len(listed), 0)
    with (
        Progress(len(listed), "shard", samples=lambda: report.samples) as progress,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        for shard in listed:
            if not store.missing(shard.name, columns):
                report.already_there += 1
            else:
                try:
                    done = _import(store, columns, recipe, widths, source, shard, max_invalid, pool)
                except (ShardError, ManifestMismatch) as error:
                    done = ShardReport(shard.name, error=str(error))
                report.add(done, 1)
            progress.add(report.phrase())
    store.objects.sweep()
    report.seconds = time.monotonic() - start
    return report


def _first(told: list[Shard]) -> Record:
    """The first record that can be read. Raises ConfigError where the first tars have none."""
    reason = "they are empty"
    for shard in told[:3]:
        for key, parts in shards.read_parts(shard, datacompdr.FILES):
            try:
                return datacompdr.parse(parts)
            except NoRecord as error:
                reason = f"{key}: {error}"
    raise ConfigError(f"{told[0].url} holds no records of DataCompDR; the last one looked at is {reason}")


def _as_found(recipe: Recipe, first: Record) -> Recipe:
    """With as many views, and captions of as many kinds, as a record has."""
    [view_set, *_] = recipe.view_sets.values() or [ViewSet()]
    captioner = next(iter(recipe.captioners.values()), Captioner(model="unknown"))
    return recipe.but(
        name="datacompdr",
        num_original_captions=len(first.texts[ORIGINAL]),
        view_sets={"base": view_set.but(num_views=len(first.params), view_px=datacompdr.VIEW_PX)},
        captioners={name: captioner.but(num_captions=len(texts)) for name, texts in first.captions.items()},
        class_sets={},
    )


def _widths(recipe: Recipe, given: dict[str, int], whole: int) -> dict[str, int]:
    names = list(recipe.teachers)
    widths = given or {
        name: embedding_width(teacher) or whole // len(names) for name, teacher in recipe.teachers.items()
    }
    if list(widths) != names or sum(widths.values()) != whole:
        told = ", ".join(f"{name}={width}" for name, width in widths.items())
        raise ConfigError(
            f"embeddings are {whole} numbers wide, and the teachers' parts are {told}; "
            f"name the recipe with the teachers that made them, --recipe, or say how wide those of {', '.join(names)} "
            "are, in this order: --width NAME=NUMBER"
        )
    return widths


def _models(recipe: Recipe, widths: dict[str, int], logit_scale: float) -> dict[str, dict[str, Any]]:
    """What is known of models that are not here."""
    return {
        "teachers": {
            name: {"weights": "imported", "width": width, "logit_scale": logit_scale} for name, width in widths.items()
        },
        "captioners": {name: {"weights": "imported"} for name in recipe.captioners},
    }


def _import(
    store: Store,
    columns: list[Column],
    recipe: Recipe,
    widths: dict[str, int],
    source: Source,
    shard: Shard,
    max_invalid: float,
    pool: Executor,
) -> ShardReport:
    start = time.monotonic()
    stamp = shards.stamp(shard.url)
    made = _Columns(recipe, widths, source.of_shard(shard), source.absent)
    room = Room(ROOM_BYTES)
    for batch in batches(shard, made.rows, _AT_ONCE, recipe.caption_files, pool, room):
        made.take(batch, pool)
        del batch  # its pictures make room for the next
    rows = made.rows
    error = (source.measured and made.enlarged(shard)) or rows.refusal(shard.url, max_invalid)
    report = ShardReport(shard.name, len(rows.keys), rows.quarantined, seconds=time.monotonic() - start, error=error)
    if error:
        return report
    arrays = made.arrays()
    data = identity(rows.keys, arrays[DIGEST])
    for column in columns:
        if not store.has(shard.name, column):
            store.commit(shard.name, column, arrays[column], data, **said_of(column, arrays[column], stamp))
    return report


def _records(told: Shard) -> Iterator[tuple[str, Record]]:
    """Those that can be read, by key."""
    for key, parts in shards.read_parts(told, datacompdr.FILES):
        with suppress(NoRecord):
            yield key, datacompdr.parse(parts)


def _names(shard: Shard) -> dict[str, str]:
    """What records call the images of a tar that has keys of its own: img2dataset writes a number as the key, and the
    `uid` into json."""
    names = {}
    for key, parts in shards.read_parts(shard, ("json",)):
        with suppress(ValueError, AttributeError, KeyError):
            names[key] = str(json.loads(parts["json"])["uid"])
    return names


class _Columns:
    """The columns of one shard, filled batch by batch of its images."""

    def __init__(self, recipe: Recipe, widths: dict[str, int], record_of: RecordOf, absent: str) -> None:
        self.recipe, self.widths, self.record_of, self.absent = recipe, widths, record_of, absent
        self.rows = Rows()
        self.found: dict[int, tuple[Record, list[str], np.ndarray]] = {}  # by row, with captions and pixel hashes
        self.reaches: list[float] = []

    def take(self, batch: Batch, pool: Executor) -> None:
        """The good samples of a batch, of which those without a fitting record are none."""
        [view_set] = self.recipe.view_sets.values()

        def hashes(index: int, record: Record | None) -> np.ndarray | None:
            if record is None:
                return None

            def of_views(picture: Picture) -> np.ndarray:
                views = (augment.replay(picture, p, batch.sizes[index], view_set.view_px) for p in record.params)
                return np.array([augment.pixel_hash(view) for view in views], np.uint64)

            try:
                return batch.use(index, of_views)
            except ReplayError:
                return None

        records = [self._record(sample, row) for sample, row in zip(batch.samples, batch.rows, strict=True)]
        hashed = pool.map(hashes, range(len(batch.rows)), records)
        for row, sample, record, pixels in zip(batch.rows, batch.samples, records, hashed, strict=True):
            if record is None or pixels is None:
                self._leave_out(row, Status.OTHER_SIZE if record else Status.NO_RECORD, sample.key)
                continue
            self.found[row] = (record, sample.repeated(self.recipe.num_original_captions), pixels)
            ends = (record.params[:, :2] + record.params[:, 2:4]).max(0) / self.rows.sizes[row]
            self.reaches.append(float(ends.min()))

    def enlarged(self, shard: Shard) -> str:
        """Why these cannot be the images that were reinforced, or nothing: crops stay far from their edges."""
        if len(self.reaches) < 20 or np.median(self.reaches) > _LEAST_REACH:
            return ""
        return (
            f"the crops reach over {np.median(self.reaches):.0%} of the images of {shard.url} only: they are larger "
            "than those that were reinforced; give the images in their original size"
        )

    def arrays(self) -> dict[Column, np.ndarray]:
        """Rows that are left out hold NaN, 0 or an empty text."""
        recipe, rows, good = self.recipe, self.rows, sorted(self.found)
        found = [self.found[row] for row in good]
        num = len(rows.keys)

        def spread(values: list[Any], empty: np.ndarray) -> np.ndarray:
            """Of the good rows as (items, good, ..), among all."""
            if values:
                empty[:, good] = np.stack(values, axis=1)
            return empty

        [(view_name, view_set)] = recipe.view_sets.items()
        views, fields = view_set.num_views, len(augment.fields(view_set))
        arrays = {
            KEY: np.array(rows.keys, dtype=object),
            DIGEST: np.array(rows.digests, np.uint64),
            PLACE: np.array(rows.places, np.int64).reshape(-1, 2),
            STATUS: np.array(rows.statuses, np.uint8),
            SIZE: np.array(rows.sizes, np.int32).reshape(-1, 2),
            Column("view", view_name, "augment"): spread(
                [record.params for record, _, _ in found], np.full((views, num, fields), np.nan, np.float32)
            ),
            Column("view", view_name, "pixels"): spread(
                [pixels for _, _, pixels in found], np.zeros((views, num), np.uint64)
            ),
        }
        for name, count in recipe.text_sets.items():
            texts = [np.array(own if name == ORIGINAL else record.captions[name], object) for record, own, _ in found]
            arrays[Column("text", name, "caption")] = spread(texts, np.full((count, num), "", dtype=object))
        start = 0
        for teacher, width in self.widths.items():
            part = slice(start, start + width)
            start += width
            empty = np.full((views, num, width), np.nan, ml_dtypes.bfloat16)
            arrays[Column("view", view_name, teacher)] = spread([r.image[:, part] for r, _, _ in found], empty)
            for name, count in recipe.text_sets.items():
                empty = np.full((count, num, width), np.nan, ml_dtypes.bfloat16)
                values = [record.texts[name][:, part] for record, _, _ in found]
                arrays[Column("text", name, teacher)] = spread(values, empty)
        return arrays

    def _record(self, sample: Sample, row: int) -> Record | None:
        """That of an image, where there is one as large as the store's first."""
        record = self.record_of(sample, self.rows.sizes[row])
        return record if record and self._fits(record) else None

    def _fits(self, record: Record) -> bool:
        [view_set] = self.recipe.view_sets.values()
        return (
            record.params.shape == (view_set.num_views, len(augment.fields(view_set)))
            and record.image.shape[1] == sum(self.widths.values())
            and {name: len(texts) for name, texts in record.texts.items()} == self.recipe.text_sets
            and all(texts.shape[1] == record.image.shape[1] for texts in record.texts.values())
        )

    def _leave_out(self, row: int, status: Status, key: str) -> None:
        rows = self.rows
        why = "a crop is not within it" if status == Status.OTHER_SIZE else self.absent
        rows.details.setdefault(status, f"{key}: {why}")
        rows.statuses[row], rows.digests[row], rows.places[row] = status, 0, (0, 0)
