"""A store becomes what others read."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from reinforce.config import ORIGINAL
from reinforce.data import shards
from reinforce.data.shards import Shard
from reinforce.data.status import Status
from reinforce.errors import ConfigError, ManifestMismatch, ShardError, StoreError
from reinforce.exchange import datacompdr
from reinforce.exchange.datacompdr import Embeddings, Record
from reinforce.progress import Progress
from reinforce.store.columns import DIGEST, KEY, STATUS, Column
from reinforce.store.manifest import Manifest
from reinforce.store.store import Store


@dataclass
class ExportReport:
    """`failed` says of each shard that was not written why."""

    out: str
    shards: int
    written: int = 0
    samples: int = 0
    already_there: int = 0
    failed: list[str] = field(default_factory=list)


def export_datacompdr(store_url: str, images: str, out: Path, embeddings: Embeddings, view_set: str) -> ExportReport:
    """Write a tar of DataCompDR for each of the store's shards that `images` names: image, caption and record of every
    good sample. A tar that is there stays.

    Raises ConfigError where the store has no such view set, or lacks what a record needs; shards that fail are in the
    report.
    """
    store = Store(store_url)
    manifest = store.promised()
    recipe = manifest.parsed_recipe()
    if view_set not in recipe.view_sets:
        raise ConfigError(f"{store_url} has no view set '{view_set}'; it has {', '.join(recipe.view_sets)}")
    if recipe.view_sets[view_set].num_ops != 2:
        raise ConfigError(f"a view of DataCompDR has two operations, and {view_set} has other ones")
    if not recipe.text_teachers or not recipe.captioners or not recipe.num_original_captions:
        raise ConfigError(f"{store_url}: DataCompDR has teachers, synthetic and original captions, and one is missing")
    listed = shards.expand(images)
    report = ExportReport(str(out), len(listed))
    out.mkdir(parents=True, exist_ok=True)
    with Progress(len(listed), "shard") as progress, ThreadPoolExecutor(os.cpu_count()) as pool:
        for shard in listed:
            path = out / f"{shard.name}.tar"
            if path.exists():
                report.already_there += 1
            else:
                try:
                    report.samples += _export(store, manifest, shard, view_set, embeddings, path, pool)
                    report.written += 1
                except (ShardError, StoreError, OSError) as error:
                    report.failed.append(f"{shard.name}: {error}")
            progress.add(f"{report.samples} samples, {len(report.failed)} failed")
    return report


def _export(
    store: Store,
    manifest: Manifest,
    shard: Shard,
    view_set: str,
    embeddings: Embeddings,
    path: Path,
    pool: ThreadPoolExecutor,
) -> int:
    """Gives how many samples were written."""
    good = np.flatnonzero(store.read(shard.name, STATUS) == Status.GOOD)
    records = _stored(store, manifest, shard, view_set, good)
    rendered = pool.map(lambda record: datacompdr.render(record, embeddings), records)
    keys = store.read(shard.name, KEY)[good].tolist()
    digests = store.read(shard.name, DIGEST)[good].tolist() if DIGEST in manifest.columns() else len(keys) * [None]
    captions = store.read(shard.name, Column("text", ORIGINAL, "caption"), 0)[good].tolist()
    shown = _images(shard, set(keys))

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for key, digest, caption, files in zip(keys, digests, captions, rendered, strict=True):
            found, extension, image = next(shown, ("", "", b""))
            if found != key or digest not in (None, shards.image_digest(image)):
                raise ManifestMismatch(
                    f"{shard.url} is not the tar that was reinforced: '{key}' is not there as it was"
                )
            yield key, {extension: image, "txt": caption.encode(), **files}

    partial = path.with_suffix(".partial")
    try:
        shards.write(str(partial), samples())
        os.replace(partial, path)  # whole or not at all
    finally:
        partial.unlink(missing_ok=True)
    return len(keys)


def _images(shard: Shard, wanted: set[str]) -> Iterator[tuple[str, str, bytes]]:
    """Key, extension and bytes of the images of these keys, the first of each."""
    seen: set[str] = set()
    for key, parts in shards.read_parts(shard, shards.IMAGES):
        extension = next((extension for extension in shards.IMAGES if extension in parts), None)
        if extension and key in wanted and key not in seen:
            seen.add(key)
            yield key, extension, parts[extension]


def _stored(store: Store, manifest: Manifest, shard: Shard, view_set: str, good: np.ndarray) -> Iterator[Record]:
    """The records of the rows `good`, in order."""
    recipe = manifest.parsed_recipe()

    def column(kind: str, name: str, part: str) -> np.ndarray:
        """(good, items, ..)"""
        return np.moveaxis(store.read(shard.name, Column.at(f"{kind}/{name}/{part}"))[:, good], 0, 1)

    def embeddings(kind: str, name: str) -> np.ndarray:
        return np.concatenate([column(kind, name, teacher) for teacher in recipe.text_teachers], axis=-1)

    params, image = column("view", view_set, "augment"), embeddings("view", view_set)
    texts = {name: embeddings("text", name) for name in recipe.text_sets}
    captions = {name: column("text", name, "caption") for name in recipe.captioners}
    for row in range(len(good)):
        yield Record(
            params[row],
            {name: of[row].tolist() for name, of in captions.items()},
            image[row],
            {name: of[row] for name, of in texts.items()},
        )
