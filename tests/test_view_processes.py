"""Views that are made in processes are those that are made in threads, and the processes end with their worker."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reinforce.config import Recipe, RunOptions, ViewSet
from reinforce.data import images, resize
from reinforce.data.shards import Sample, expand
from reinforce.errors import DeviceLost
from reinforce.run import batches, loaded
from reinforce.run.batches import Batch, View
from reinforce.run.view_processes import SLOTS, ViewProcesses
from reinforce.run.worker import Worker
from tests import tiny
from tests.processes import ROOT, marked

SETS = {"few": ViewSet(num_views=SLOTS - 1, view_px=16), "many": ViewSet(num_views=SLOTS + 4, view_px=24, num_ops=3)}
SIDES = {"few": {16}, "many": {24, 32}}
BATCH = 7


def batch(num: int, seed: int) -> Batch:
    encoded = [tiny.picture(100 * seed + i) for i in range(num)]
    samples = [Sample(f"{seed}-{i}", image, ("a picture",)) for i, image in enumerate(encoded)]
    pictures = [images.decode(image) for image in encoded]
    sizes = [(picture.height, picture.width) for picture in pictures]
    return Batch(list(range(num)), samples, sizes, [{}] * num, list(map(resize.ready, pictures)))


def in_threads(of: Batch, name: str, sides: set[int]) -> list[View]:
    with ThreadPoolExecutor(2) as pool:
        return list(batches.views(of, SETS[name], name, 3, sides, pool, 0))


def same(got: View, expected: View) -> bool:
    assert (got.index, set(got.pixels)) == (expected.index, set(expected.pixels))
    arrays = [(got.params, expected.params), *((got.pixels[side], expected.pixels[side]) for side in got.pixels)]
    return all(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in arrays)


@pytest.fixture(scope="module", params=[1, 3])
def processes(request: pytest.FixtureRequest) -> ViewProcesses:
    return ViewProcesses(request.param, BATCH, SIDES)


@pytest.mark.parametrize("num", [1, 2, BATCH])
@pytest.mark.parametrize(("name", "sides"), [("few", {16}), ("many", {24, 32}), ("many", {32}), ("many", set())])
def test_they_are_those_of_threads(processes: ViewProcesses, num: int, name: str, sides: set[int]) -> None:
    of = batch(num, num)
    got, expected = list(processes.views(of, SETS[name], name, 3, sides)), in_threads(of, name, sides)
    assert len(got) == SETS[name].num_views
    assert all(map(same, got, expected))
    assert got[0].params.tobytes() != got[1].params.tobytes()


def test_two_sets_are_made_at_a_time(processes: ViewProcesses) -> None:
    of = batch(BATCH, 1)
    made: dict[str, Iterator[View]] = {name: processes.views(of, SETS[name], name, 3, SIDES[name]) for name in SETS}
    got = {name: [next(views)] for name, views in made.items()}
    for name, views in made.items():
        got[name] += views
        assert all(map(same, got[name], in_threads(of, name, SIDES[name])))


def test_what_was_left_in_the_middle_does_not_come_into_what_follows(processes: ViewProcesses) -> None:
    for num, seed in ((BATCH, 1), (2, 2), (BATCH, 3), (1, 4), (BATCH, 5)):
        of = batch(num, seed)
        got = list(islice(processes.views(of, SETS["many"], "many", 3, {24}), 2))
        assert all(map(same, got, in_threads(of, "many", {24})))


def test_a_process_that_has_died_is_a_lost_worker() -> None:
    doomed = ViewProcesses(2, BATCH, SIDES)
    list(doomed.views(batch(3, 0), SETS["few"], "few", 3, {16}))
    os.kill(doomed._processes[1].submit(os.getpid).result(), signal.SIGKILL)
    with pytest.raises(DeviceLost, match="a process that makes views has died, perhaps for want of memory; use fewer"):
        list(doomed.views(batch(3, 1), SETS["few"], "few", 3, {16}))


def test_an_error_of_theirs_is_raised_here(processes: ViewProcesses) -> None:
    broken = batch(3, 0)
    broken.samples[1] = Sample("x", b"no image", ())
    with pytest.raises(images.SampleError):
        list(processes.views(broken, SETS["few"], "few", 3, {16}))
    of = batch(3, 1)
    assert all(map(same, processes.views(of, SETS["few"], "few", 3, {16}), in_threads(of, "few", {16})))


@pytest.mark.parametrize("num", [1, 3])
def test_a_store_holds_the_same_bytes(recipe: Recipe, tmp_path: Path, num: int) -> None:
    [shard] = expand(tiny.tar(tmp_path / "00000.tar", 9, 1))
    for name, how_many in (("threads", None), ("processes", num)):
        options = RunOptions(device="cpu", view_processes=how_many, max_invalid=0.5)
        made = Worker(recipe, str(tmp_path / name), options)
        assert bool(made.loaded.view_processes) == (name == "processes")
        assert made.reinforce(shard).error == ""
    assert tiny.tree(tmp_path / "threads") == tiny.tree(tmp_path / "processes")


@pytest.mark.parametrize(
    ("kind", "cores", "gpus", "expected"),
    [("cpu", 64, 0, 0), ("cuda", 16, 1, 14)] + [("cuda", 64, 1, 16), ("cuda", 64, 8, 6), ("cuda", 2, 1, 1)],
)
def test_a_gpu_has_its_share_of_the_cores(
    kind: str, cores: int, gpus: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(loaded, "num_gpus", lambda: gpus)
    device: Any = loaded.torch.device(kind)
    assert loaded.view_processes(device) == expected


WORKER = """
import sys, time
from reinforce.config import ViewSet
from reinforce.run.view_processes import ViewProcesses
made = ViewProcesses(2, 4, {"base": {16}})
for process in made._processes:
    process.submit(int).result()
print("ready", flush=True)
if sys.argv[1] == "waits":
    time.sleep(600)
"""


@pytest.mark.parametrize("ends", ["by itself", "kill -9"])
def test_they_end_with_their_worker(ends: str) -> None:
    mark = f"{os.getpid()}-{ends}"
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, "waits" if ends == "kill -9" else "ends"],
        cwd=ROOT,
        env=os.environ | {"VIEWS_MARK": mark},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    if ends == "kill -9":
        assert len(marked(mark, "VIEWS_MARK")) == 3
        process.kill()
    process.wait(timeout=60)
    deadline = time.monotonic() + 30
    while marked(mark, "VIEWS_MARK") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not marked(mark, "VIEWS_MARK")


def test_pixels_come_as_copies(processes: ViewProcesses) -> None:
    """The next view of the same slot does not change them."""
    of = batch(2, 0)
    first, *_, last = processes.views(of, SETS["many"], "many", 3, {24})
    assert not np.shares_memory(first.pixels[24], last.pixels[24])
