"""Bytes read for one epoch's views of a shard: one view from the store, against all of them.

    python -m benchmarks.slab [--rows 2048] [--views 30] [--width 768] [--json]

A per-sample file with all views of a sample, as reinforced datasets are published today, has to be read whole for the
one view that a step uses. Bytes are those the process asked the kernel for (/proc/self/io, Linux).
"""

import tempfile
from pathlib import Path
from typing import Annotated

import ml_dtypes
import numpy as np
import typer

from reinforce.store.store import Store
from reinforce.terminal import show


def read_so_far() -> int:
    """Bytes this process has read, cached or not."""
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counters["rchar"])


def main(
    rows: int = 2048, views: int = 30, width: int = 768, json_: Annotated[bool, typer.Option("--json")] = False
) -> None:
    """Compare what is read for one view and for all."""
    rng = np.random.default_rng(0)
    array = rng.normal(size=(views, rows, width)).astype(np.float32)
    array /= np.linalg.norm(array, axis=-1, keepdims=True)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        store.commit("00000", "view/base/teacher", array.astype(ml_dtypes.bfloat16))
        store.read("00000", "view/base/teacher", 0)  # imports and first calls read files of their own
        before = read_so_far()
        store.read("00000", "view/base/teacher", 1)
        one = read_so_far() - before
        before = read_so_far()
        store.read("00000", "view/base/teacher")
        everything = read_so_far() - before
        stored = store.stored_bytes("00000", "view/base/teacher")
    raw = array.size * 2
    told = {
        "rows": rows,
        "views": views,
        "width": width,
        "raw_bytes": raw,
        "stored_bytes": stored,
        "stored_over_raw": round(stored / raw, 4),
        "one_view_bytes": one,
        "all_views_bytes": everything,
        "all_over_one": round(everything / one, 2),
    }
    show(told, json_)


if __name__ == "__main__":
    typer.run(main)
