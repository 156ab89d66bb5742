"""What many shards and large ones cost: planning, opening, committing.

    python -m benchmarks.scale [--shards 300] [--rows 12500] [--views 30] [--width 768] [--json]

Planning is a `run` over shards that are whole. Opening is what a training's main process does for a shard and epoch,
with two teachers, beside going through the tar's headers, which the store saves. Committing is the memory of one
teacher's views, over what they take encoded. Seconds are of the CPU, all threads; the best of three.
"""

import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import ml_dtypes
import numpy as np
import typer

from benchmarks.augment import jpeg, photograph
from reinforce.config import Recipe, RunOptions, Teacher, ViewSet
from reinforce.data import augment, shards
from reinforce.run import driver
from reinforce.store.columns import DIGEST, KEY, PLACE, SIZE, STATUS, Column
from reinforce.store.manifest import Manifest
from reinforce.store.store import Store, identity, said_of
from reinforce.terminal import show
from train.config import TrainConfig
from train.data.mixture import source_of

RECIPE = Recipe(
    name="scale",
    teachers={"one": Teacher(model="none"), "two": Teacher(model="none")},
    captioners={},
    view_sets={"base": ViewSet(num_views=2, view_px=224)},
)


@dataclass(frozen=True)
class Drawn:
    """`num` views, made when they are asked for: the first one with its numbers in another order."""

    num: int
    first: np.ndarray

    def __len__(self) -> int:
        return self.num

    def __iter__(self) -> Iterator[np.ndarray]:
        for seed in range(self.num):
            yield self.first[:, np.random.default_rng(seed).permutation(self.first.shape[1])]


def unit_vectors(rows: int, width: int) -> np.ndarray:
    vectors = np.random.default_rng(0).normal(size=(rows, width)).astype(np.float32)
    rounded: np.ndarray = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(ml_dtypes.bfloat16)
    return rounded


def seconds(call: Callable[[], object]) -> float:
    found = []
    for _ in range(3):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return min(found)


def tar_of(path: Path, rows: int) -> str:
    image = jpeg(photograph(0).resize((32, 24)))
    shards.write(str(path), ((f"{i:09d}", {"jpg": image, "txt": b"a picture of nothing"}) for i in range(rows)))
    return str(path)


def reinforced(store: Store, name: str, tar: str, width: int) -> None:
    """Every column of a shard, with drawn vectors for embeddings."""
    places = shards.locate(tar)
    rows, stamp = len(places), shards.stamp(tar)
    params = np.zeros((2, rows, len(augment.fields(RECIPE.view_sets["base"]))), np.float32)
    known = {
        KEY: np.array([place.key for place in places], object),
        DIGEST: np.zeros(rows, np.uint64),
        PLACE: np.array([(place.offset, place.length) for place in places], np.int64),
        STATUS: np.zeros(rows, np.uint8),
        SIZE: np.full((rows, 2), 24, np.int32),
        Column("text", "original", "caption"): np.full((1, rows), "a picture of nothing", object),
        Column("view", "base", "augment"): params,
        Column("view", "base", "pixels"): np.zeros((2, rows), np.uint64),
    }
    data = identity(known[KEY].tolist(), known[DIGEST])
    for column in store.promised().columns():
        items = known.get(column)
        if items is None:
            items = np.stack(list(Drawn(column.num_items(RECIPE), unit_vectors(rows, width))))
        store.commit(name, column, items, data, **said_of(column, items, stamp))


def measured(folder: Path, num_shards: int, rows: int, views: int, width: int) -> dict[str, float]:
    about = {"width": width, "logit_scale": 100.0}
    manifest = Manifest.of(RECIPE, {"teachers": {"one": about, "two": about}, "captioners": {}})
    many, large = Store(str(folder / "many")), Store(str(folder / "large"))
    for store in (many, large):
        store.promise(manifest)
    for i in range(num_shards):
        reinforced(many, f"{i:06d}", tar_of(folder / f"{i:06d}.tar", 4), 8)
    options = RunOptions(workers="0", device="cpu")
    planning = seconds(lambda: driver.run(f"{folder}/0*.tar", many.url, RECIPE, options))
    tar = tar_of(folder / "large.tar", rows)
    reinforced(large, "large", tar, width)
    source = source_of(TrainConfig(student="vit_tiny", shards=tar, store=large.url))
    drawn = Drawn(views, unit_vectors(rows, width))
    tracemalloc.start()
    large.commit("drawn", "view/base/one", drawn)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    encoded = large.stored_bytes("drawn", "view/base/one")
    return {
        "planning_us_per_shard": 1e6 * planning / num_shards,
        "opening_s": seconds(lambda: source.open("large", 0)),
        "headers_s": seconds(lambda: shards.locate(tar)),
        "commit_peak_over_encoded": peak / encoded,
        "encoded_mb": encoded / 1e6,
    }


def main(
    num_shards: Annotated[int, typer.Option("--shards")] = 300,
    rows: int = 12_500,
    views: int = 30,
    width: int = 768,
    json_: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Measure planning over many shards, opening and committing a large one."""
    with tempfile.TemporaryDirectory() as folder:
        told = measured(Path(folder), num_shards, rows, views, width)
    show(told, json_)


if __name__ == "__main__":
    typer.run(main)
