"""Runs on a real local Ray: the same bytes for any number of workers and any order; what is done is not done again."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.cluster_utils import Cluster

from reinforce.check.info import refused
from reinforce.config import Recipe, RunOptions
from reinforce.data.shards import Shard
from reinforce.errors import ConfigError, DeviceLost, ManifestMismatch, ReinforceError
from reinforce.run import cluster as cluster_room
from reinforce.run import driver
from reinforce.run import on_ray as on_ray_room
from reinforce.run.reports import ShardReport
from reinforce.store.store import Store
from tests import tiny
from tests.processes import Run, kill


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Five shards: longer than a batch, a last batch of one, shorter than a batch, empty, one with a bad image."""
    folder = tmp_path_factory.mktemp("tars")
    sizes = [(11, 0), (9, 0), (3, 0), (1, 0), (10, 1)]
    return [tiny.tar(folder / f"{i:05d}.tar", good, bad, seed=i) for i, (good, bad) in enumerate(sizes)]


@pytest.fixture(scope="module")
def cluster():
    """One Ray for all runs of this file that bring none of their own; a run connects to it and leaves it running."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "num_gpus": 0, "include_dashboard": False})
    yield made
    made.shutdown()


@pytest.fixture
def on_ray(cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)


@pytest.fixture(scope="module")
def alone(recipe: Recipe, tars: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The store that one worker without Ray makes, in the given order."""
    store = tmp_path_factory.mktemp("alone") / "s"
    report = driver.run("::".join(tars), str(store), recipe, RunOptions(workers="0", device="cpu"))
    assert (report.done, report.samples, report.valid, report.failed) == (5, 35, 34, [])
    return tiny.tree(store)


@pytest.mark.parametrize(
    "workers",
    [*(pytest.param(num, marks=pytest.mark.slow) for num in "123"), "1:3"],
)
def test_same_bytes_for_any_number_of_workers_and_any_order(
    on_ray: None, recipe: Recipe, tars: list[str], alone: dict[str, bytes], tmp_path: Path, workers: str
) -> None:
    options = RunOptions(workers=workers, device="cpu")
    report = driver.run("::".join(reversed(tars)), str(tmp_path / "s"), recipe, options)
    assert report.done == 5 and sum(report.quarantined.values()) == 1
    assert tiny.tree(tmp_path / "s") == alone


def test_a_whole_store_needs_neither_ray_nor_models(
    recipe: Recipe, tars: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = RunOptions(workers="0", device="cpu")
    driver.run(tars[2], str(tmp_path / "s"), recipe, options)
    monkeypatch.setattr(driver, "Crew", None)
    report = driver.run(tars[2], str(tmp_path / "s"), recipe, RunOptions(workers="2"))
    assert (report.already_there, report.done, report.failed) == (1, 0, [])


def test_failed_shards_are_told_and_the_others_done(
    on_ray: None, recipe: Recipe, tars: list[str], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.tar"
    broken.write_bytes(Path(tars[0]).read_bytes()[:3000])
    bad = tiny.tar(tmp_path / "bad.tar", 2, 2, seed=8)
    report = driver.run(
        f"{broken}::{tars[1]}::{bad}", str(tmp_path / "s"), recipe, RunOptions(workers="1", device="cpu")
    )
    assert report.done == 1
    assert {failure.shard: failure.attempts for failure in report.failed} == {"broken": 1, "bad": 1}
    assert "2 of 4 samples are invalid" in next(f.reason for f in report.failed if f.shard == "bad")
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["00001", "__refused__", "zarr.json"]
    assert {shard: told["quarantined"] for shard, told in refused(str(tmp_path / "s")).items()} == {
        "bad": {"unknown_image_format": 2},
        "broken": {},
    }


@pytest.mark.parametrize("faults", [1, 9])
def test_a_fault_of_the_disk_gets_another_try(
    recipe: Recipe, tars: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faults: int
) -> None:
    """Not so a broken tar, which would be read again for nothing."""
    commit, calls = Store.commit, 0

    def failing(*arguments: Any, **more: Any) -> bool:
        nonlocal calls
        calls += 1
        if calls <= faults:
            raise OSError(5, "Input/output error")
        return commit(*arguments, **more)

    monkeypatch.setattr(Store, "commit", failing)
    report = driver.run(tars[2], str(tmp_path / "s"), recipe, RunOptions(workers="0", device="cpu", attempts=3))
    if faults == 1:
        assert (report.done, report.failed) == (1, [])
    else:
        assert report.done == 0
        assert [(f.attempts, "Input/output error" in f.reason) for f in report.failed] == [(3, True)]


def test_what_each_shard_had_is_written_where_it_is_asked_for(recipe: Recipe, tars: list[str], tmp_path: Path) -> None:
    """A line for each shard that a run had to do, which add up to its report; another run adds its own."""
    lines = tmp_path / "new" / "shards.jsonl"
    options = RunOptions(workers="0", device="cpu", statistics=str(lines))
    broken = tmp_path / "broken.tar"
    broken.write_bytes(b"no tar")
    report = driver.run("::".join([*tars, str(broken)]), str(tmp_path / "s"), recipe, options)
    told = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [line["shard"] for line in told] == [*(Path(tar).stem for tar in tars), "broken"]
    assert [line["shard"] for line in told if line["error"]] == ["broken"]
    assert sum(line["read"] for line in told) == report.samples == 35
    assert sum(line["valid"] for line in told) == report.valid == 34
    assert [line["quarantined"] for line in told if line["quarantined"]] == [report.quarantined]
    assert all(line["seconds"] > 0 and line["tries"] == 1 for line in told if not line["error"])
    driver.run("::".join([*tars, str(broken)]), str(tmp_path / "s"), recipe, options)
    assert [json.loads(line)["shard"] for line in lines.read_text().splitlines()[6:]] == ["broken"]
    with pytest.raises(ConfigError, match="--statistics .* is a folder; name a file in it"):
        driver.run(str(broken), str(tmp_path / "s"), recipe, options.but(statistics=str(tmp_path)))


def test_a_recipe_that_disagrees_stops_before_any_work(recipe: Recipe, tars: list[str], tmp_path: Path) -> None:
    options = RunOptions(workers="0", device="cpu")
    driver.run(tars[2], str(tmp_path / "s"), recipe, options)
    before = tiny.tree(tmp_path / "s")
    other = Recipe.model_validate(recipe.model_dump() | {"seed": 9})
    with pytest.raises(ManifestMismatch, match="the store has 0, this run asks for 9"):
        driver.run(tars[0], str(tmp_path / "s"), other, options)
    assert tiny.tree(tmp_path / "s") == before


def test_a_wrong_model_ends_a_ray_run_with_its_sentence(
    on_ray: None, recipe: Recipe, tars: list[str], tmp_path: Path
) -> None:
    tree = recipe.model_dump()
    tree["teachers"]["vit"]["model"] = "local-dir:nowhere"
    with pytest.raises(ConfigError, match="no open_clip_config.json in .*nowhere"):
        driver.run(tars[2], str(tmp_path / "s"), Recipe.model_validate(tree), RunOptions(workers="1", device="cpu"))
    assert not (tmp_path / "s").exists()


def test_a_gpu_that_the_cluster_does_not_have_is_told_before_any_worker_starts(
    on_ray: None, recipe: Recipe, tars: list[str], tmp_path: Path
) -> None:
    """The cluster of these tests has none, whatever this machine has."""
    start = time.monotonic()
    with pytest.raises(ConfigError, match=r"no GPU: the cluster at .* has 3 CPUs \(nodes: 1\)") as told:
        driver.run(tars[2], str(tmp_path / "s"), recipe, RunOptions(workers="1", device="cuda"))
    assert time.monotonic() - start < 30
    assert "minReplicas" in str(told.value) and not (tmp_path / "s").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("workers", ["auto", "0", "2"])
def test_a_gpu_that_this_machine_does_not_have_is_told_before_ray_starts(
    recipe: Recipe, tars: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: str
) -> None:
    monkeypatch.setattr(on_ray_room, "joined", None)
    with pytest.raises(ConfigError, match=r"device cuda was asked for, and torch \S+ finds no GPU"):
        driver.run(tars[2], str(tmp_path / "s"), recipe, RunOptions(workers=workers, device="cuda"))
    assert not (tmp_path / "s").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.chaos
def test_a_worker_with_a_gpu_that_its_torch_cannot_use_ends_the_run(
    recipe: Recipe, tars: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node says that it has a GPU, and torch is a build for the CPU: the run does not go on there without a word."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1, "include_dashboard": False})
    try:
        monkeypatch.setenv("RAY_ADDRESS", made.address)
        with pytest.raises(ConfigError, match=r"device cuda was asked for, and torch \S+ finds no GPU"):
            driver.run(tars[2], str(tmp_path / "s"), recipe, RunOptions(workers="1"))
    finally:
        made.shutdown()
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("workers", ["x", "3:2", "0:2", "-1", "1:2:3"])
def test_wrong_numbers_of_workers_get_a_sentence(recipe: Recipe, tmp_path: Path, workers: str) -> None:
    with pytest.raises(ConfigError, match="--workers"):
        driver.run("x.tar", str(tmp_path / "s"), recipe, RunOptions(workers=workers))


@pytest.mark.chaos
@pytest.mark.parametrize(("workers", "lost"), [("1", 1), ("2", 0)])
def test_a_worker_that_hangs_does_not_hold_up_the_others(
    recipe: Recipe, tmp_path: Path, workers: str, lost: int
) -> None:
    """Stopped, it is as one whose file system or GPU never answers. Alone it is replaced; an idle one does its shards
    before that. Woken up later, it changes nothing."""
    tars = "::".join(tiny.tar(tmp_path / f"in/{i:05d}.tar", 9, seed=i) for i in range(6))
    driver.run(tars, str(tmp_path / "calm"), recipe, RunOptions(workers="0", device="cpu"))
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    run = Run(tars, tmp_path / "s", tmp_path / "recipe.json", workers, "--hung-after", "15")
    while not list((tmp_path / "s").glob("0*/key/zarr.json")) and run.process.poll() is None:
        time.sleep(0.02)
    stopped = run.workers(at_a_shard=True)[0]  # one that still loads its models holds nothing up
    assert os.getpriority(os.PRIO_PROCESS, stopped) == os.getpriority(os.PRIO_PROCESS, 0)  # Ray's own way is 15 nicer
    os.kill(stopped, signal.SIGSTOP)
    code, out, err = run.wait()
    assert code == 0, err
    told = json.loads(out)
    assert (told["done"], told["failed"], told["workers_lost"]) == (6, [], lost), err
    assert ("it has been silent for" in err) == bool(lost)
    run.gone()
    Store(str(tmp_path / "s")).objects.sweep()  # as the next run does: it was killed in mid-write, and died late
    assert tiny.tree(tmp_path / "s") == tiny.tree(tmp_path / "calm")


class WithOneBadGpu(on_ray_room.RemoteWorker):
    """The first actor that asks loses its GPU at its first shard; a process that has lost it fails at once for ever."""

    def reinforce(self, shard: Shard) -> ShardReport:
        try:
            Path(self.worker.store.url, "..", "lost").resolve().touch(exist_ok=False)
            self.lost = True
        except FileExistsError:
            pass
        if getattr(self, "lost", False):
            raise DeviceLost("the GPU has failed: CUDA error: an illegal memory access was encountered")
        return super().reinforce(shard)


def test_a_worker_that_has_lost_its_gpu_is_replaced(
    on_ray: None,
    recipe: Recipe,
    tars: list[str],
    alone: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(on_ray_room, "RemoteWorker", WithOneBadGpu)
    report = driver.run("::".join(tars), str(tmp_path / "s"), recipe, RunOptions(workers="1", device="cpu"))
    assert (report.done, report.failed, report.workers_lost) == (5, [], 1)
    assert tiny.tree(tmp_path / "s") == alone


class WithOneThatAlwaysFails(on_ray_room.RemoteWorker):
    """Of the actors, the first that loads raises at whatever it is asked, at once; its process lives."""

    def load(self, recipe: Recipe, store_url: str, *arguments: Any) -> None:
        super().load(recipe, store_url, *arguments)
        Path(store_url).parent.joinpath("loaded").mkdir(exist_ok=True)
        self.poisoned = not list(Path(store_url).parent.glob("loaded/*"))
        Path(store_url).parent.joinpath("loaded", str(os.getpid())).touch()

    def reinforce(self, shard: Shard) -> ShardReport:
        if self.poisoned:
            raise RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED")
        return super().reinforce(shard)


@pytest.mark.chaos
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_worker_that_always_fails_leaves_and_costs_no_shard(
    on_ray: None, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: str
) -> None:
    tars = "::".join(tiny.tar(tmp_path / f"in/{i:05d}.tar", 3, seed=i) for i in range(8))
    monkeypatch.setattr(on_ray_room, "RemoteWorker", WithOneThatAlwaysFails)
    report = driver.run(tars, str(tmp_path / "s"), recipe, RunOptions(workers=workers, device="cpu"))
    assert (report.done, report.failed, report.workers_lost) == (8, [], 1)


class WithOneSlow(on_ray_room.RemoteWorker):
    """Of the actors, the first that loads takes a minute for a shard."""

    def load(self, recipe: Recipe, store_url: str, *arguments: Any) -> None:
        super().load(recipe, store_url, *arguments)
        self.slow = not list(Path(store_url).parent.glob("loaded"))
        Path(store_url).parent.joinpath("loaded").touch()

    def reinforce(self, shard: Shard) -> ShardReport:
        time.sleep(60 if self.slow else 0)
        return super().reinforce(shard)


def test_what_a_slow_worker_has_in_hand_is_done_by_one_that_is_idle(
    on_ray: None,
    recipe: Recipe,
    tars: list[str],
    alone: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody waits for it, and it counts as no failure."""
    monkeypatch.setattr(on_ray_room, "RemoteWorker", WithOneSlow)
    monkeypatch.setattr(on_ray_room, "_LATE_LEAST_S", 1.0)
    report = driver.run("::".join(tars), str(tmp_path / "s"), recipe, RunOptions(workers="2", device="cpu"))
    assert (report.done, report.samples, report.failed, report.workers_lost) == (5, 35, [], 0)
    assert report.seconds < 55
    assert tiny.tree(tmp_path / "s") == alone


class WithOneStopped(WithOneSlow):
    """The first that loads stops at its first shard."""

    def reinforce(self, shard: Shard) -> ShardReport:
        if self.slow:
            os.kill(os.getpid(), signal.SIGSTOP)
        return on_ray_room.RemoteWorker.reinforce(self, shard)


class WithOneTenTimesSlower(WithOneSlow):
    """The process of the first that loads is stopped for nine tenths of the time."""

    def load(self, *arguments: Any) -> None:
        super().load(*arguments)
        if self.slow:
            pid = os.getpid()
            subprocess.Popen(
                ["bash", "-c", f"while kill -STOP {pid}; do sleep .9; kill -CONT {pid}; sleep .1; done"],
                stderr=subprocess.DEVNULL,
            )

    def reinforce(self, shard: Shard) -> ShardReport:
        return on_ray_room.RemoteWorker.reinforce(self, shard)


@pytest.mark.chaos
@pytest.mark.timeout(1200)
def test_one_bad_worker_of_four_costs_little(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 1.3 times what three good ones take, to the same bytes. It is timed: nothing else may run beside it."""
    tars = "::".join(tiny.tar(tmp_path / f"in/{i:05d}.tar", 40, seed=i) for i in range(60))
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "num_gpus": 0, "include_dashboard": False})
    monkeypatch.setenv("RAY_ADDRESS", made.address)

    def seconds(name: str, num_workers: int) -> float:
        folder = tmp_path / name
        folder.mkdir()
        options = RunOptions(workers=str(num_workers), device="cpu")
        report = driver.run(tars, str(folder / "s"), recipe, options)
        assert (report.done, report.failed) == (60, [])
        objects, deadline = Store(str(folder / "s")).objects, time.monotonic() + 20
        while objects.files(".partial") and time.monotonic() < deadline:  # of a worker that is being killed
            objects.sweep()  # as the next run does
            time.sleep(0.2)
        print(f"{name}: {report.seconds:.1f} s, {report.workers_lost} workers lost", flush=True)
        return report.seconds

    try:
        calm_s = seconds("calm", 3)
        for kind in (WithOneTenTimesSlower, WithOneStopped, WithOneThatAlwaysFails):
            monkeypatch.setattr(on_ray_room, "RemoteWorker", kind)
            assert seconds(kind.__name__, 4) < 1.3 * calm_s
            assert tiny.tree(tmp_path / kind.__name__ / "s") == tiny.tree(tmp_path / "calm/s")
    finally:
        made.shutdown()


class WithOneStoppedInLoading(on_ray_room.RemoteWorker):
    """Of the actors, the first that loads stops its process some seconds later."""

    def load(self, recipe: Recipe, store_url: str, *arguments: Any) -> None:
        try:
            Path(store_url).parent.joinpath("stopped").touch(exist_ok=False)
        except FileExistsError:
            super().load(recipe, store_url, *arguments)
        else:
            time.sleep(8)
            os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.chaos
def test_a_worker_that_is_stopped_while_it_loads_is_given_up(
    on_ray: None, recipe: Recipe, tars: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_ray_room, "RemoteWorker", WithOneStoppedInLoading)
    monkeypatch.setattr(on_ray_room, "_HUNG_LEAST_S", 6.0)
    report = driver.run(tars[2], str(tmp_path / "s"), recipe, RunOptions(workers="1", device="cpu"))
    assert (report.done, report.failed, report.workers_lost) == (1, [], 1)


class ThatDiesInLoading(on_ray_room.RemoteWorker):
    def load(self, *_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does where memory is short


@pytest.mark.chaos
def test_workers_that_die_in_loading_end_the_run_with_what_they_need(
    on_ray: None, recipe: Recipe, tars: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_ray_room, "RemoteWorker", ThatDiesInLoading)
    with pytest.raises(ReinforceError, match=r"3 workers in a row died .* a worker needs 0\.00 GB to load them"):
        driver.run(tars[2], str(tmp_path / "s"), recipe, RunOptions(workers="1", device="cpu"))


class WithADeadlyShard(on_ray_room.RemoteWorker):
    def reinforce(self, shard: Shard) -> ShardReport:
        if shard.name == "00002":
            os._exit(1)
        return super().reinforce(shard)


@pytest.mark.chaos
def test_a_shard_that_kills_its_workers_is_set_aside_by_name(
    on_ray: None, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no other shard, not even one that a worker held beside it."""
    tars = "::".join(tiny.tar(tmp_path / f"in/{i:05d}.tar", 3, seed=i) for i in range(6))
    monkeypatch.setattr(on_ray_room, "RemoteWorker", WithADeadlyShard)
    report = driver.run(tars, str(tmp_path / "s"), recipe, RunOptions(workers="1", device="cpu"))
    assert (report.done, report.workers_lost) == (5, 3)
    assert [(f.shard, f.attempts, f.reason[:24]) for f in report.failed] == [("00002", 3, "3 workers that had it di")]


def test_a_cluster_that_does_not_answer_is_a_sentence(
    recipe: Recipe, tars: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_room, "_ANSWER_S", 0.5)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"nobody answers at RAY_ADDRESS=127.0.0.1:9: .*refused.*; see that the"):
        driver.run(tars[2], str(tmp_path / "s"), recipe, RunOptions(workers="1", device="cpu"))


@pytest.mark.chaos
@pytest.mark.parametrize("victim", ["driver", "worker", "everything"])
def test_killed_once_and_run_again(
    recipe: Recipe, tars: list[str], alone: dict[str, bytes], tmp_path: Path, victim: str
) -> None:
    """One kill each, as soon as the first column is there; `make chaos` kills at random moments, many times."""
    path = tmp_path / "recipe.json"
    path.write_text(recipe.model_dump_json())
    run = Run("::".join(tars), tmp_path / "s", path)
    while not list(tmp_path.glob("s/*/key")) and run.process.poll() is None:
        time.sleep(0.02)
    if victim == "worker":
        workers = run.workers()
        assert workers, "the run was over before a worker could be killed"
        kill(workers[:1])
        code, out, err = run.wait()
        assert code == 0, err
        assert json.loads(out)["workers_lost"] >= 1
    else:
        run.kill_driver() if victim == "driver" else run.kill_everything()
        run.gone()
        again = Run("::".join(tars), tmp_path / "s", path)
        code, out, err = again.wait()
        assert code == 0, err
        assert json.loads(out)["failed"] == []
    assert tiny.tree(tmp_path / "s") == alone
