"""What each way to store embeddings takes: room, and time to write and to read.

    python -m benchmarks.packing [--rows 12500] [--width 768] [--repeats 5] [--json]

One view of a DataCompDR shard: random unit vectors, of which trained embeddings differ by little in room
(`clip-reinforce info STORE --embeddings` says it of a store's own). MB are those of bfloat16, seconds are the CPU's, in
turns: encoding alone; and reading from a store on disk, checksums and what the student gets of int8 included.
"""

import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import Annotated, Any, get_args

import ml_dtypes
import numpy as np
import typer

from reinforce.config import Packing, Recipe, Teacher
from reinforce.store import arrays
from reinforce.store.manifest import Manifest
from reinforce.store.store import Store
from reinforce.terminal import show


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def measure(rows: int, width: int, repeats: int) -> dict[str, Any]:
    drawn = np.random.default_rng(0).normal(size=(1, rows, width)).astype(np.float32)
    exact = (drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)).astype(ml_dtypes.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        stores: dict[Packing, Store] = {}
        for packing in get_args(Packing):
            recipe = Recipe(name="b", teachers={"t": Teacher(model="t")}, captioners={}, embeddings=packing)
            stores[packing] = Store(f"{folder}/{packing}")
            stores[packing].promise(Manifest.of(recipe, {"teachers": {"t": {}}, "captioners": {}}))
            stores[packing].commit("00000", "view/base/t", exact)
        write: dict[str, list[float]] = {packing: [] for packing in stores}
        read: dict[str, list[float]] = {packing: [] for packing in stores}
        for _ in range(repeats):
            for packing, store in stores.items():
                write[packing].append(seconds(lambda packing=packing: arrays.encode(exact, 1, packing)))  # type: ignore[misc]
                read[packing].append(seconds(lambda store=store: store.read("00000", "view/base/t", 0)))  # type: ignore[misc]
        return {
            packing: {
                "of_raw": round(store.stored_bytes("00000", "view/base/t") / exact.nbytes, 3),
                "write_mb_per_s": round(exact.nbytes / 1e6 / median(write[packing])),
                "read_mb_per_s": round(exact.nbytes / 1e6 / median(read[packing])),
            }
            for packing, store in stores.items()
        }


def main(
    rows: int = 12500, width: int = 768, repeats: int = 5, json_: Annotated[bool, typer.Option("--json")] = False
) -> None:
    """Compare the ways to store embeddings."""
    show(measure(rows, width, repeats), json_)


if __name__ == "__main__":
    typer.run(main)
