"""Checks a store: are all columns there, whole and plausible, and can its views be made again from the tars?"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from reinforce.check.info import groups
from reinforce.check.replay import replay
from reinforce.config import Recipe
from reinforce.data import shards
from reinforce.data.shards import Status
from reinforce.errors import ConfigError, Corrupt
from reinforce.store.columns import STATUS, Column
from reinforce.store.store import Store

_NORM_TOLERANCE = 0.01  # a unit vector rounded to bfloat16 stays well inside
_MIN_COSINE = 0.999  # between a stored embedding and the same view encoded again; rounding to bfloat16 stays inside


@dataclass
class VerifyReport:
    """`corrupt` and `missing` name columns as shard/column; `replay` is None where no replay was asked."""

    store: str
    columns_checked: int = 0
    corrupt: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    replay: dict[str, Any] | None = None

    @property
    def sound(self) -> bool:
        if self.corrupt or self.missing:
            return False
        if self.replay is None:
            return True
        cosine = self.replay["cosine_min"]
        return self.replay["pixel_equal"] == self.replay["views"] and (cosine is None or cosine >= _MIN_COSINE)


def verify(url: str, patterns: str | None, num_replays: int, device: str = "auto") -> VerifyReport:
    """Check every column of every group; with `num_replays`, replay so many views from the shards `patterns` names.

    Raises ConfigError where a replay is asked for and the shards are not given or are not those of the store, and where
    `device` is not on this machine.
    """
    if num_replays and not patterns:
        raise ConfigError("--replay needs the shards the store was made from: --shards 'dir/{00000..00003}.tar'")
    if device == "cuda":  # a missing GPU is an error now, and not after hours of reading
        from reinforce.models.device import pick_device  # loads torch

        pick_device(device)
    store = Store(url)
    manifest = store.promised()
    recipe = manifest.parsed_recipe()
    report = VerifyReport(url)
    for group, wanted in groups(store, recipe):
        absent = store.missing(group, wanted)
        report.missing += [f"{group}/{column}" for column in absent]
        present = [column for column in wanted if column not in absent]
        report.columns_checked += len(present)
        report.corrupt += [f"{group}/{column}: {fault}" for column, fault in _faults(store, group, present, recipe)]
    if num_replays and patterns:
        report.replay = replay(store, manifest, shards.expand(patterns), num_replays, device)
    return report


def _faults(store: Store, group: str, present: list[Column], recipe: Recipe) -> Iterator[tuple[Column, str]]:
    good: np.ndarray | None = None  # of the rows, those that hold a sample; known from the column `status` on
    for column in present:
        try:
            store.check(group, column)
            array = store.read(group, column)
        except Corrupt as error:
            yield column, str(error)
            continue
        if column.kind == "class":
            good = np.ones(len(recipe.class_sets[column.set].classnames), bool)
        elif column == STATUS:
            good = array == Status.GOOD
        if good is None:
            continue
        rows = array.swapaxes(0, column.row_axis)
        if len(rows) != len(good):
            yield column, f"{len(rows)} rows, {'the manifest' if column.kind == 'class' else 'status'} has {len(good)}"
        elif column.teacher:
            norms = np.linalg.norm(rows[good].astype(np.float32), axis=-1)
            if not np.all(np.abs(norms - 1) < _NORM_TOLERANCE):
                yield column, "embeddings of good samples that are not unit vectors"
