"""Reinforcements that others made become a store, beside the tars with their images."""

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from reinforce.config import ORIGINAL, Captioner, Recipe, ViewSet
from reinforce.data import shards
from reinforce.data.shards import Shard
from reinforce.errors import ConfigError, ManifestMismatch, ShardError
from reinforce.exchange import datacompdr
from reinforce.exchange.datacompdr import NoRecord, Record
from reinforce.exchange.imported_shard import ImportedShard, RecordOf
from reinforce.models.frozen import embedding_width
from reinforce.progress import Progress
from reinforce.run.batches import ROOM_BYTES, Room, batches
from reinforce.run.reports import RunReport, ShardReport
from reinforce.store.columns import DIGEST, Column
from reinforce.store.manifest import Manifest
from reinforce.store.store import Store, identity, said_of

LOGIT_SCALE = 100.0  # of both of DataCompDR's teachers
_AT_ONCE = 64  # images that are decoded side by side


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
    made = ImportedShard(recipe, widths, source.of_shard(shard), source.absent)
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
