import os

# Read once, when these libraries are first imported; the commands that tests start inherit them. One thread: the models
# are tiny, and two processes of tests run side by side.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("RAY_ADDRESS", None)  # a cluster of the user's is none of the tests'

from dataclasses import dataclass
from pathlib import Path

import pytest

from reinforce.config import Recipe, RunOptions
from reinforce.run import driver
from tests import tiny

# Files that `make test-fast` leaves out: Ray, trainings, exports, processes of their own. In other files, single tests
# are marked as heavy. A file that is named to pytest runs whole.
HEAVY = {
    "test_adapt",
    "test_api",
    "test_broken",
    "test_chaos",
    "test_cluster",
    "test_comkd_journey",
    "test_distilled",
    "test_device",
    "test_docs",
    "test_door",
    "test_driver",
    "test_dying",
    "test_experiments",
    "test_export",
    "test_latency",
    "test_plan",
    "test_process",
    "test_repair",
    "test_s3",
    "test_samples",
    "test_signals",
    "test_simulation",
    "test_start",
    "test_students",
    "test_train_cli",
    "test_trainer",
    "test_wheel",
}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Not even imported, which loads Ray, ONNX and a server of S3 for seconds."""
    return (collection_path.stem in HEAVY and "not heavy" in config.option.markexpr) or None


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Two tiny teachers of different kinds and a tiny captioner: 3 views, 2 captions, batches of 4."""
    return tiny.models(tmp_path_factory.mktemp("models") / "tiny")


@dataclass(frozen=True)
class Reinforced:
    """Three tars of 13, 9 and 10 good samples, two bad ones in the second, a store of them, and a tiny student."""

    shards: str
    store: str
    student: str


@pytest.fixture(scope="session")
def reinforced(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Reinforced:
    folder = tmp_path_factory.mktemp("reinforced")
    tars = [tiny.tar(folder / f"{i:05d}.tar", num, 2 * (i == 1), seed=i) for i, num in enumerate([13, 9, 10])]
    options = RunOptions(workers="0", device="cpu", max_invalid=0.5)
    report = driver.run("::".join(tars), str(folder / "store"), recipe, options)
    assert (report.valid, report.failed) == (32, [])
    return Reinforced("::".join(tars), str(folder / "store"), tiny.student(folder / "student"))
