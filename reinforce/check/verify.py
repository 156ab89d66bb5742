"""Checks a store: are all columns there, whole, this store's and plausible? Is it of these tars, and can its views be
made again from them? One damage never hides another."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from reinforce.check.info import groups
from reinforce.check.replay import replay
from reinforce.config import ORIGINAL, Recipe
from reinforce.data import shards
from reinforce.data.shards import Shard
from reinforce.data.status import Status
from reinforce.errors import ConfigError, NotCommitted, ShardError, StoreError
from reinforce.progress import Progress
from reinforce.store.columns import DIGEST, KEY, STATUS, Column
from reinforce.store.manifest import Manifest
from reinforce.store.metadata import GROUP, METADATA, group_objects
from reinforce.store.store import Store

_NORM_TOLERANCE = 0.01  # a unit vector rounded to bfloat16 stays well inside
_MIN_COSINE = 0.999  # between a stored embedding and the same view encoded again; rounding to bfloat16 stays inside
_AT_ONCE = 4  # groups that are read side by side
_CAPTION = Column("text", ORIGINAL, "caption")


@dataclass
class VerifyReport:
    """`corrupt` and `missing` name columns as shard/column, `foreign` files and folders that are no part of the store,
    `other_tars` how tars differ from what was reinforced, `unchecked` what could not be compared and why.
    `replay` is None where no replay was asked."""

    store: str
    columns_checked: int = 0
    corrupt: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    other_tars: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    replay: dict[str, Any] | None = None

    @property
    def sound(self) -> bool:
        """Nothing is damaged, missing or different; what is foreign or unchecked does no harm."""
        if self.corrupt or self.missing or self.other_tars:
            return False
        if self.replay is None:
            return True
        cosine = self.replay["cosine_min"]
        return self.replay["pixel_equal"] == self.replay["views"] and (cosine is None or cosine >= _MIN_COSINE)


def verify(url: str, patterns: str | None, num_replays: int, device: str = "auto") -> VerifyReport:
    """Check every column of every group; with the shards that `patterns` names, compare every image and caption with
    the store; with `num_replays`, replay so many views.

    Raises ConfigError where a replay is asked for and no shards are given, and where `device` is not on this machine.
    """
    if num_replays and not patterns:
        raise ConfigError("--replay needs the shards the store was made from: --shards 'dir/{00000..00003}.tar'")
    if device == "cuda":  # a missing GPU is an error now, and not after hours of reading
        from reinforce.models.device import pick_device  # loads torch

        pick_device(device)
    listed = shards.expand(patterns) if patterns else None
    store = Store(url)
    manifest = store.promised()
    report = VerifyReport(url)
    if manifest.format_version == 1:
        report.unchecked.append("format 1 knows its tars by keys and sizes only, not by content: see docs/store.md")
    of_groups = list(groups(store, manifest))
    with Progress(len(of_groups), "group", title="columns") as progress, ThreadPoolExecutor(_AT_ONCE) as pool:
        for found in pool.map(lambda group: _checked(store, manifest, *group), of_groups):
            report.columns_checked += found.columns_checked
            report.corrupt += found.corrupt
            report.missing += found.missing
            report.foreign += found.foreign
            progress.add()
    report.foreign += [name for name in store.objects.files("") if name not in store.manifests]
    if listed is not None:
        _compare_tars(store, manifest, listed, report)
        if num_replays:
            damaged = {fault.partition("/")[0].partition(":")[0] for fault in report.corrupt + report.other_tars}
            damaged |= {path.partition("/")[0].partition(":")[0] for path in report.missing}
            whole = [shard for shard in listed if shard.name not in damaged]
            if {shard.name for shard in whole} & set(store.shards()):
                report.replay, left_out = replay(store, manifest, whole, num_replays, device)
                report.unchecked += left_out
            else:
                report.unchecked.append("replay: none of the shards given is whole in the store")
    return report


def _checked(store: Store, manifest: Manifest, group: str, wanted: list[Column]) -> VerifyReport:
    """The faults of one group."""
    absent = set(store.missing(group, wanted))
    report = VerifyReport(store.url, missing=[f"{group}/{column}" for column in wanted if column in absent])
    present = [column for column in wanted if column not in absent]
    report.columns_checked = len(present)
    report.corrupt = [f"{group}/{column}: {fault}" for column, fault in _faults(store, manifest, group, present)]
    groups = {path for column in wanted for path in group_objects(f"{group}/{column}")}
    for path in sorted(groups) if present else []:
        try:
            if store.objects.get(path) != GROUP:
                report.corrupt.append(f"{path}: is not as it was written")
        except FileNotFoundError:
            report.missing.append(path)
    folders = {f"{group}/{column}" for column in wanted}
    for path in store.objects.tree(group):
        folder, _, name = f"{group}/{path}".rpartition("/")
        if f"{folder}/{name}" not in groups and not (folder in folders and (name == METADATA or name.startswith("c."))):
            report.foreign.append(f"{folder}/{name}")
    return report


def _faults(store: Store, manifest: Manifest, group: str, present: list[Column]) -> Iterator[tuple[Column, str]]:
    recipe, data = manifest.parsed_recipe(), _identity(store, group)
    good: np.ndarray | None = None  # of the rows, those that hold a sample; known from the column `status` on
    for column in present:
        try:
            store.check(group, column)
            array = store.read(group, column, None, data)
        except StoreError as error:
            yield column, str(error).removeprefix(f"{store.url}: ").removeprefix(f"{group}/{column}: ")
            continue
        if column == STATUS:
            good = array == Status.GOOD
        elif column.kind == "class":
            good = np.ones(len(recipe.class_sets[column.set].classnames), bool)
        if good is None:
            continue
        rows = array.swapaxes(0, column.row_axis)
        if len(rows) != len(good):
            yield column, f"{len(rows)} rows, {'the manifest' if column.kind == 'class' else 'status'} has {len(good)}"
        elif fault := _implausible(column, array, rows[good], recipe):
            yield column, fault


def _identity(store: Store, group: str) -> str | None:
    """What the columns of a shard must belong to; None where there is nothing to tell it by. Damage of the keys or the
    digests is told when they are read as columns."""
    try:
        return store.identity(group)
    except StoreError:
        return None


def _implausible(column: Column, array: np.ndarray, rows: np.ndarray, recipe: Recipe) -> str:
    """What is wrong with the values of a column that is whole, or nothing."""
    if column.kind in ("view", "text") and len(array) != column.num_items(recipe):
        return f"{len(array)} items, the recipe has {column.num_items(recipe)}"
    if column.teacher:
        norms = np.linalg.norm(rows.astype(np.float32), axis=-1)
        if not np.all(np.abs(norms - 1) < _NORM_TOLERANCE):
            return "embeddings of good samples that are not unit vectors"
    return ""


# -- tars ------------------------------------------------------------------------------------------------------------


def _compare_tars(store: Store, manifest: Manifest, listed: list[Shard], report: VerifyReport) -> None:
    """Every sample of the tars against the store, and the set of shards against the store's groups."""
    there = set(store.shards())
    names = {shard.name for shard in listed}
    report.missing += sorted(f"{name}: its whole group, which was lost or never written" for name in names - there)
    report.unchecked += sorted(f"{name}: its tar was not given" for name in there - names)
    with Progress(len(listed), "shard", title="tars") as progress, ThreadPoolExecutor(_AT_ONCE) as pool:
        for faults in pool.map(lambda shard: list(_tar_faults(store, manifest, shard)), listed):
            report.other_tars += faults
            progress.add()


def _tar_faults(store: Store, manifest: Manifest, shard: Shard) -> Iterator[str]:
    recipe = manifest.parsed_recipe()
    columns = [c for c in (KEY, STATUS, DIGEST, _CAPTION) if c in manifest.columns()]
    try:
        stored = {column: store.read(shard.name, column) for column in columns}
        samples = list(_identities(shard, recipe))
    except NotCommitted:
        return  # told as missing
    except (StoreError, ShardError) as error:
        yield f"{shard.name}: cannot be compared: {error}"
        return
    keys = [key for key, _, _ in samples]
    if keys != stored[KEY].tolist():
        yield f"{shard.name}: the keys of {shard.url} are not those of the store"
        return
    for row in np.flatnonzero(stored[STATUS] == Status.GOOD).tolist():
        key, digest, captions = samples[row]
        if DIGEST in stored and digest != int(stored[DIGEST][row]):
            yield f"{shard.name}: row {row} ({key}) is another image"
        elif _CAPTION in stored and captions != stored[_CAPTION][:, row].tolist():
            yield f"{shard.name}: row {row} ({key}) has another caption"


def _identities(shard: Shard, recipe: Recipe) -> Iterator[tuple[str, int, list[str]]]:
    """Key, digest and captions of every sample, as a worker stores them."""
    for sample in shards.read(shard, recipe.caption_files):
        yield sample.key, shards.image_digest(sample.image), sample.repeated(recipe.num_original_captions)
