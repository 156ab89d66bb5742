"""A store of format 1 becomes one of format 2, beside it: its columns as they are, and what was missing from the tars.

Format 1 knew its tars by keys and sizes. So before a tar's digests are taken, view 0 of each of its samples is made
again and compared with the hash of its pixels: that proves that these are the images that were reinforced.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np

from reinforce.data import augment, images, shards
from reinforce.data.shards import Sample, Shard
from reinforce.data.status import Status
from reinforce.errors import ConfigError, ReplayError, SampleError, ShardError, StoreError
from reinforce.progress import Progress
from reinforce.store.columns import CLASSES, DIGEST, FORMAT_VERSION, KEY, PLACE, STATUS, Column
from reinforce.store.manifest import Manifest
from reinforce.store.store import Store, identity, said_of

_AT_ONCE = 64  # samples that are decoded side by side


@dataclass
class UpgradeReport:
    """`failed` says of each shard that is not in the new store why."""

    store: str
    shards: int
    done: int = 0
    failed: list[str] = field(default_factory=list)


def upgrade(url: str, new: str, patterns: str) -> UpgradeReport:
    """Write a store of format 2 at `new`; one that was begun is gone on with. The old one is only read.

    Raises ConfigError where the store is of format 2 already, StoreError where one of the two cannot be used.
    """
    old, made = Store(url), Store(new)
    manifest = old.promised()
    if manifest.format_version == FORMAT_VERSION:
        raise ConfigError(f"{url} is of format {FORMAT_VERSION} already; there is nothing to upgrade")
    made.promise(replace(manifest, format_version=FORMAT_VERSION))
    for column in made.missing(CLASSES, manifest.class_columns()):
        old.check(CLASSES, column)
        made.commit(CLASSES, column, old.read(CLASSES, column))
    tars = {shard.name: shard for shard in shards.expand(patterns)}
    names = old.shards()
    report = UpgradeReport(new, len(names))
    with Progress(len(names), "shard") as progress, ThreadPoolExecutor(os.cpu_count()) as pool:
        for name in names:
            try:
                if name not in tars:
                    raise ConfigError(f"no {name}.tar among the shards given")
                _upgrade(old, made, manifest, tars[name], pool)
                report.done += 1
            except (ConfigError, StoreError, ShardError, ReplayError) as error:
                report.failed.append(f"{name}: {error}")
            progress.add(f"{len(report.failed)} failed")
    made.objects.sweep()
    return report


def _upgrade(old: Store, made: Store, manifest: Manifest, shard: Shard, pool: ThreadPoolExecutor) -> None:
    columns = manifest.columns()
    if absent := old.missing(shard.name, columns):
        raise StoreError(f"{shard.name}/{absent[0]} is missing; finish the run first, with the same recipe")
    if not made.missing(shard.name, made.promised().columns()):
        return
    for column in columns:
        old.check(shard.name, column)
    keys = old.read(shard.name, KEY).tolist()
    found = list(_digests(old, manifest, shard, keys, pool))
    digests = np.array([digest for digest, _ in found], np.uint64)
    new = {DIGEST: digests, PLACE: np.array([place for _, place in found], np.int64).reshape(-1, 2)}
    data, stamp = identity(keys, digests), shards.stamp(shard.url)
    for column in made.promised().columns():
        if not made.has(shard.name, column):
            array = new[column] if column in new else old.read(shard.name, column)
            about = {} if column.part == "pixels" else said_of(column, array, stamp)  # hashed as format 1 did
            made.commit(shard.name, column, array, data, **about)


def _digests(
    old: Store, manifest: Manifest, shard: Shard, keys: list[str], pool: ThreadPoolExecutor
) -> Iterator[tuple[int, tuple[int, int]]]:
    """The digest of every sample's image and where it lies in the tar; 0 of those in quarantine. Raises ReplayError
    where an image is not the one that was stored."""
    recipe = manifest.parsed_recipe()
    name, view_set = next(iter(recipe.view_sets.items()))
    params, hashes = (old.read(shard.name, Column("view", name, part), 0) for part in ("augment", "pixels"))
    status = old.read(shard.name, STATUS)

    def digest(numbered: tuple[int, Sample]) -> tuple[int, tuple[int, int]]:
        row, sample = numbered
        if row >= len(keys) or sample.key != keys[row]:
            raise ReplayError(f"{shard.url}: row {row} is '{sample.key}', and another in the store")
        if status[row] != Status.GOOD:
            return 0, (0, 0)
        try:
            picture = images.decode(sample.image)
            view = augment.replay(picture, params[row], (picture.height, picture.width), view_set.view_px)
        except SampleError as error:
            raise ReplayError(f"{shard.url}: {sample.key}: {error}") from error
        if augment.pixel_hash(view, augment.OLD_PIXEL_HASH) != int(hashes[row]):
            raise ReplayError(f"{shard.url}: {sample.key} is another image than the one that was reinforced")
        return shards.image_digest(sample.image), (sample.offset, len(sample.image))

    samples, found = enumerate(shards.read(shard, recipe.caption_files)), 0
    while group := list(islice(samples, _AT_ONCE)):
        found += len(group)
        yield from pool.map(digest, group)
    if found != len(keys):
        raise ReplayError(f"{shard.url} has {found} samples, and the store {len(keys)}")
