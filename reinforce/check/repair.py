"""Mends a store: what `verify` finds damaged is taken out, and a run writes it again, to the same bytes.

It adds nothing to what a run does: a column that is not there yet is computed. So a repair may be stopped and started
again, and another run may be at work meanwhile.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from reinforce.check.verify import verify
from reinforce.config import Recipe, RunOptions
from reinforce.data import shards
from reinforce.data.shards import Shard
from reinforce.data.status import Status
from reinforce.errors import ConfigError, ShardError, StoreError
from reinforce.run import driver
from reinforce.store.columns import CLASSES, DIGEST, KEY, Column
from reinforce.store.metadata import GROUP, METADATA
from reinforce.store.store import Store


@dataclass
class RepairReport:
    """`removed` are the damaged columns and objects that were taken out, `missing` what was not there before, `foreign`
    what is no part of the store (still there, unless its removal was asked for), `left` what of all that was missing or
    taken out is not there now, `imported` the captions among these, which no model can write again, `run` what came of
    computing columns again, None where no shards were given."""

    store: str
    removed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    run: dict[str, Any] | None = None
    imported: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        return not self.left and not (self.run and self.run["failed"])


def repair(url: str, patterns: str | None, options: RunOptions, remove_foreign: bool = False) -> RepairReport:
    """Remove what is damaged and, with the shards that `patterns` names, compute it again.

    Raises ConfigError, StoreError where the manifest itself is lost or damaged.
    """
    if patterns:
        shards.expand(patterns)  # a wrong request is an error before anything is removed
    found = verify(url, None, 0)
    store = Store(url)
    report = RepairReport(url, missing=found.missing, foreign=found.foreign)
    for path in [fault.partition(":")[0] for fault in found.corrupt] + found.missing:
        report.removed += _removed(store, path)
    if remove_foreign:
        for path in found.foreign:
            store.objects.remove(path)
    if patterns:
        report.run = asdict(driver.run(patterns, url, store.promised().parsed_recipe(), options))
    _look_again(store, report)
    return report


def redo(url: str, names: list[str], patterns: str, options: RunOptions) -> RepairReport:
    """Take out all columns of the shards `names`, and compute them again from the tars that `patterns` names.

    Raises ConfigError, before anything is removed, where a shard is not in the store, or has no tar with good samples.
    """
    store = Store(url)
    manifest = store.promised()
    tars = {shard.name: shard for shard in shards.expand(patterns)}
    for name in names:
        if name not in (there := store.shards()):
            has = ", ".join(there[:5]) + (f", .. {there[-1]}" if len(there) > 5 else "")
            raise ConfigError(f"{url} has no shard '{name}'; it has {has}")
        if name not in tars:
            raise ConfigError(f"--shards {patterns} has no {name}.tar, and '{name}' is to be made again from it")
    recipe, report = manifest.parsed_recipe(), RepairReport(url)
    same = {name: _is_same(store, tars[name], recipe) for name in names}
    for name in names:
        for column in reversed(manifest.columns()):  # the keys, which say whose the others are, last
            # Imported captions can't be computed. They stay where the images are those that they were written for.
            if not (same[name] and column.part == "caption" and column.set in recipe.texts):
                report.removed += _removed(store, f"{name}/{column}")
    report.run = asdict(driver.run(patterns, url, recipe, options))
    _look_again(store, report)
    return report


def _look_again(store: Store, report: RepairReport) -> None:
    """Note what is not there at the end."""
    paths = dict.fromkeys(path for path in report.missing + report.removed if not path.endswith(METADATA))
    report.left = [path for path in paths if not store.has(*path.split("/", 1))]
    captions = {path: column for path in report.left if (column := Column.at(path.partition("/")[2])).part == "caption"}
    if captions:
        texts = store.promised().parsed_recipe().texts
        report.imported = [path for path, column in captions.items() if column.set in texts]


def _is_same(store: Store, shard: Shard, recipe: Recipe) -> bool:
    """Whether a tar has the keys and good images that the store has of it. Raises ConfigError where it cannot be read,
    or has no good sample."""
    keys, digests, good = [], [], 0
    try:
        for sample in shards.read(shard, recipe.caption_files):
            keys.append(sample.key)
            digests.append(shards.image_digest(sample.image))
            good += sample.status == Status.GOOD
    except ShardError as error:
        raise ConfigError(f"nothing was removed: {error}") from None
    if not good:
        raise ConfigError(f"nothing was removed: {shard.url} has no good sample; give the tar that is to replace it")
    if not all(store.has(shard.name, column) for column in (KEY, DIGEST)):
        return False
    try:
        stored = store.read(shard.name, DIGEST)
        return store.read(shard.name, KEY).tolist() == keys and all(
            has in (0, found) for has, found in zip(stored.tolist(), digests, strict=True)
        )
    except StoreError:  # damaged
        return False


def _removed(store: Store, path: str) -> list[str]:
    """Take out a column `shard/column`, or an object of Zarr's groups, which is written again at once. With captions go
    their embeddings: on another kind of device a captioner may write others."""
    if path.endswith(f"/{METADATA}"):
        store.objects.remove(path)
        store.objects.create(path, GROUP)
        return [path]
    shard, _, name = path.partition("/")
    column = Column.at(name)
    columns = [column]
    if column.part == "caption" and shard != CLASSES:
        columns += [c for c in store.promised().columns() if c.kind == "text" and c.set == column.set and c.teacher]
    there = [c for c in columns if store.has(shard, c)]
    for c in there:
        store.remove(shard, c)
    return [f"{shard}/{c}" for c in there]
