"""A worker that has done a thousand shards takes as much memory as one that has done two hundred."""

import gc
import re
import shutil
from pathlib import Path

import pytest

from reinforce.config import Recipe, RunOptions
from reinforce.data.shards import Shard
from reinforce.run.worker import Worker
from tests import tiny

SHARDS, WARM = 1000, 200


def resident_kib() -> int:
    gc.collect()
    found = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_thousand_shards_in_one_worker(recipe: Recipe, tmp_path: Path) -> None:
    first = tiny.tar(tmp_path / "in/00000.tar", 8)
    worker = Worker(recipe, str(tmp_path / "s"), RunOptions(device="cpu"))
    warm = 0
    for number in range(SHARDS):
        tar = shutil.copy(first, tmp_path / f"in/{number:05d}.tar") if number else first
        assert not worker.reinforce(Shard(f"{number:05d}", str(tar))).error
        if number + 1 == WARM:
            warm = resident_kib()
    end = resident_kib()
    print(f"{warm} KiB after {WARM} shards, {end} after {SHARDS}")
    assert end < 1.01 * warm
