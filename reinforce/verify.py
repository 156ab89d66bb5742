"""Reads a store and doubts it: are all columns there, whole and sane, and do the views come back from the tars?"""

import logging
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from reinforce import augment, images, shards
from reinforce.config import Recipe
from reinforce.errors import ConfigError, Corrupt, MissingExtra
from reinforce.info import promised
from reinforce.manifest import Manifest, columns
from reinforce.shards import Shard, Status
from reinforce.store import Store

if TYPE_CHECKING:
    from reinforce.teachers import Teacher

log = logging.getLogger(__name__)

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

    Raises ConfigError where a replay is asked for and the shards are not given or are not those of the store.
    """
    if num_replays and not patterns:
        raise ConfigError("--replay needs the shards the store was made from: --shards 'dir/{00000..00003}.tar'")
    store = Store(url)
    manifest = promised(store)
    recipe = manifest.parsed_recipe()
    report = VerifyReport(url)
    for shard in store.shards():
        absent = store.missing(shard, columns(recipe))
        report.missing += [f"{shard}/{column}" for column in absent]
        present = [column for column in columns(recipe) if column not in absent]
        report.columns_checked += len(present)
        report.corrupt += [f"{shard}/{column}: {fault}" for column, fault in _faults(store, shard, present, recipe)]
    if num_replays and patterns:
        report.replay = _replay(store, manifest, shards.expand(patterns), num_replays, device)
    return report


def _faults(store: Store, shard: str, present: list[str], recipe: Recipe) -> Iterator[tuple[str, str]]:
    good: np.ndarray | None = None
    for column in present:
        try:
            store.check(shard, column)
            array = store.read(shard, column)
        except Corrupt as error:
            yield column, str(error)
            continue
        if column == "status":
            good = array == Status.GOOD
        if good is None or column in ("key", "status"):
            continue
        rows = array if column == "size" else array.swapaxes(0, 1)
        if len(rows) != len(good):
            yield column, f"{len(rows)} rows, status has {len(good)}"
        elif column.rsplit("/", 1)[-1] in recipe.teachers:
            norms = np.linalg.norm(rows[good].astype(np.float32), axis=-1)
            if not np.all(np.abs(norms - 1) < _NORM_TOLERANCE):
                yield column, "embeddings of good samples that are not unit vectors"


@dataclass(frozen=True)
class _Ask:
    """One view to be made again."""

    row: int
    set_name: str
    index: int


def _replay(store: Store, manifest: Manifest, listed: list[Shard], num: int, device: str) -> dict[str, Any]:
    recipe = manifest.parsed_recipe()
    by_name = {shard.name: shard for shard in listed}
    asks = _choose(store, recipe, [name for name in store.shards() if name in by_name], num)
    if not asks:
        raise ConfigError(f"none of the shards given has good samples in {store.url}; give those it was made from")
    teachers = _teachers(manifest, recipe, device)
    num_views = num_equal = 0
    cosines: list[float] = []
    for name, wanted in asks.items():
        keys = store.read(name, "key")
        for row, picture in _pictures(by_name[name], keys, {ask.row for ask in wanted}):
            for ask in (ask for ask in wanted if ask.row == row):
                num_views += 1
                prefix = f"view/{ask.set_name}"
                size = (picture.height, picture.width)
                params = store.read(name, f"{prefix}/augment", ask.index)[row]
                view = augment.replay(picture, params, size, recipe.view_sets[ask.set_name].view_px)
                num_equal += augment.pixel_hash(view) == int(store.read(name, f"{prefix}/pixels", ask.index)[row])
                for teacher_name, teacher in teachers.items():
                    again = teacher.encode_images(augment.replay(picture, params, size, teacher.image_px)[None])[0]
                    stored = store.read(name, f"{prefix}/{teacher_name}", ask.index)[row]
                    cosines.append(_cosine(again, stored))
    return {
        "views": num_views,
        "pixel_equal": num_equal,
        "cosine_mean": float(np.mean(cosines)) if cosines else None,
        "cosine_min": float(np.min(cosines)) if cosines else None,
    }


def _choose(store: Store, recipe: Recipe, names: list[str], num: int) -> dict[str, list[_Ask]]:
    """`num` views spread over all shards, samples, sets and indices; the same ones each time."""
    whole = [name for name in names if not store.missing(name, columns(recipe))]
    good = {name: np.flatnonzero(store.read(name, "status") == Status.GOOD) for name in whole}
    places = [(name, int(row)) for name in whole for row in good[name]]
    kinds = [(set_name, index) for set_name, v in recipe.view_sets.items() for index in range(v.num_views)]
    total = len(places) * len(kinds)
    chosen = random.Random(0).sample(range(total), min(num, total))
    asks: dict[str, list[_Ask]] = defaultdict(list)
    for number in sorted(chosen):
        (name, row), (set_name, index) = places[number // len(kinds)], kinds[number % len(kinds)]
        asks[name].append(_Ask(row, set_name, index))
    return asks


def _teachers(manifest: Manifest, recipe: Recipe, device: str) -> dict[str, "Teacher"]:
    """The teachers that are at hand and are those of the manifest; pixels alone can be compared without them."""
    try:
        from reinforce.models import pick_device
        from reinforce.teachers import Teacher
    except MissingExtra as error:
        log.warning("cosines are left out: %s", error)
        return {}
    teachers = {}
    seed = recipe.seed if recipe.weights == "random" else None
    for name, config in recipe.teachers.items():
        try:
            teacher = Teacher(config, recipe.batch_size, pick_device(device), seed)
        except ConfigError as error:
            log.warning("teacher %s is not at hand, its cosine is left out: %s", name, error)
            continue
        if teacher.frozen.digest == manifest.models["teachers"][name]["weights_sha256"]:
            teachers[name] = teacher
        else:
            log.warning("teacher %s at hand has other weights than the store's; its cosine is left out", name)
    return teachers


def _pictures(shard: Shard, keys: np.ndarray, rows: set[int]) -> Iterator[tuple[int, Image.Image]]:
    for row, sample in enumerate(shards.read(shard)):
        if row >= len(keys) or sample.key != keys[row]:
            raise ConfigError(f"{shard.url} is not the tar that group {shard.name} was made from: row {row} differs")
        if row in rows:
            yield row, images.decode(sample.image)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
