"""The replay proof: views are made again from the tars and compared with what the store holds of them."""

import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from reinforce.config import CaptionFiles, Recipe
from reinforce.data import augment, images, shards
from reinforce.data.shards import Shard
from reinforce.data.status import Status
from reinforce.errors import ConfigError, MissingExtra
from reinforce.store.columns import KEY, STATUS, Column
from reinforce.store.manifest import Manifest
from reinforce.store.store import Store, pixel_hash_of

if TYPE_CHECKING:
    from reinforce.models.teacher import Teacher


@dataclass(frozen=True)
class _Ask:
    """One view to be made again."""

    row: int
    set_name: str
    index: int

    def column(self, part: str) -> Column:
        return Column("view", self.set_name, part)


def replay(
    store: Store, manifest: Manifest, listed: list[Shard], num: int, device: str
) -> tuple[dict[str, Any], list[str]]:
    """Counts of `num` views spread over the store, made again from the shards `listed`, with the teachers at hand; and
    why the others are left out.

    Raises ConfigError where the shards are not those of the store.
    """
    recipe = manifest.parsed_recipe()
    by_name = {shard.name: shard for shard in listed}
    asks = _choose(store, manifest, [name for name in store.shards() if name in by_name], num)
    if not asks:
        raise ConfigError(f"none of the shards given has good samples in {store.url}; give those it was made from")
    left_out: list[str] = []
    teachers = _teachers(manifest, recipe, device, left_out)
    num_views = num_equal = 0
    cosines: list[float] = []
    again = (view for name in asks for view in _again(store, recipe, by_name[name], asks[name], teachers))
    while batch := list(islice(again, recipe.batch_size)):
        num_views += len(batch)
        num_equal += sum(view.pixels_equal for view in batch)
        for name, teacher in teachers.items():
            encoded = teacher.encode_images(np.stack([view.pixels[name] for view in batch]))
            cosines += [_cosine(a, view.stored[name]) for a, view in zip(encoded, batch, strict=True)]
    counts = {
        "views": num_views,
        "pixel_equal": num_equal,
        "cosine_mean": float(np.mean(cosines)) if cosines else None,
        "cosine_min": float(np.min(cosines)) if cosines else None,
    }
    return counts, left_out


@dataclass(frozen=True)
class _View:
    """A view made again: by teacher, its pixels and the embedding that is stored."""

    pixels_equal: bool
    pixels: dict[str, np.ndarray]
    stored: dict[str, np.ndarray]


def _again(
    store: Store, recipe: Recipe, shard: Shard, asks: list[_Ask], teachers: dict[str, "Teacher"]
) -> Iterator[_View]:
    keys = store.read(shard.name, KEY)
    parts = ("augment", "pixels", *teachers)
    wanted = {(ask.column(part), ask.index) for ask in asks for part in parts}
    stored = {(column, index): store.read(shard.name, column, index) for column, index in wanted}
    kinds = {
        column: pixel_hash_of(store.attributes(shard.name, column)) for column in {ask.column("pixels") for ask in asks}
    }
    for row, picture in _pictures(shard, recipe.caption_files, keys, {ask.row for ask in asks}):
        for ask in (ask for ask in asks if ask.row == row):
            size = (picture.height, picture.width)
            params = stored[ask.column("augment"), ask.index][row]
            view = augment.replay(picture, params, size, recipe.view_sets[ask.set_name].view_px)
            yield _View(
                augment.pixel_hash(view, kinds[ask.column("pixels")])
                == int(stored[ask.column("pixels"), ask.index][row]),
                {name: augment.replay(picture, params, size, teacher.image_px) for name, teacher in teachers.items()},
                {name: stored[ask.column(name), ask.index][row] for name in teachers},
            )


def _choose(store: Store, manifest: Manifest, names: list[str], num: int) -> dict[str, list[_Ask]]:
    """`num` views spread over all shards, samples, sets and indices; the same ones each time."""
    whole = [name for name in names if not store.missing(name, manifest.columns())]
    good = {name: np.flatnonzero(store.read(name, STATUS) == Status.GOOD) for name in whole}
    places = [(name, int(row)) for name in whole for row in good[name]]
    kinds = [
        (set_name, index) for set_name, v in manifest.parsed_recipe().view_sets.items() for index in range(v.num_views)
    ]
    total = len(places) * len(kinds)
    chosen = random.Random(0).sample(range(total), min(num, total))
    asks: dict[str, list[_Ask]] = defaultdict(list)
    for number in sorted(chosen):
        (name, row), (set_name, index) = places[number // len(kinds)], kinds[number % len(kinds)]
        asks[name].append(_Ask(row, set_name, index))
    return asks


def _teachers(manifest: Manifest, recipe: Recipe, device: str, left_out: list[str]) -> dict[str, "Teacher"]:
    """The teachers that are at hand and are those of the manifest; pixels alone can be compared without them. Why the
    others are not goes into `left_out`."""
    from reinforce.models.device import pick_device

    where = pick_device(device)
    try:
        from reinforce.models.teacher import Teacher
    except MissingExtra as error:
        left_out.append(f"cosines: {error}")
        return {}
    teachers = {}
    for name, config in recipe.teachers.items():
        digest = manifest.models["teachers"][name].get("weights_sha256")
        if digest is None:
            left_out.append(f"cosines of teacher {name}: what it said was imported, and its weights are not known")
            continue
        try:
            teacher = Teacher(config, recipe.batch_size, where, recipe.random_seed)
        except ConfigError as error:
            left_out.append(f"cosines of teacher {name}, which is not at hand: {error}")
            continue
        if teacher.frozen.digest == digest:
            teachers[name] = teacher
        else:
            left_out.append(f"cosines of teacher {name}: the one at hand has other weights than the store's")
    return teachers


def _pictures(
    shard: Shard, files: CaptionFiles | None, keys: np.ndarray, rows: set[int]
) -> Iterator[tuple[int, Image.Image]]:
    for row, sample in enumerate(shards.read(shard, files)):
        if row >= len(keys) or sample.key != keys[row]:
            raise ConfigError(f"{shard.url} is not the tar that group {shard.name} was made from: row {row} differs")
        if row in rows:
            yield row, images.decode(sample.image)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
