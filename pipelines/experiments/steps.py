"""Steps of an experiment: trainings side by side, and the writing of a store.

No step remembers that it was done. Each looks at what is there, refuses what was made with other settings, and does
what is left: of a training that has come to its end, nothing but to open it.
"""

import multiprocessing
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from reinforce import process
from reinforce.config import Recipe, RunOptions
from reinforce.errors import ReinforceError
from reinforce.progress import Progress
from reinforce.run import driver
from train.config import TrainConfig
from train.trainer import fit

LOG = "log.txt"
FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload([__name__])  # torch is imported once, and not by every training
T = TypeVar("T")


class StepFailed(ReinforceError):
    """A step of an experiment ended without its result."""


def fit_all(trainings: Mapping[str, TrainConfig], out: Path, title: str, at_once: int) -> dict[str, dict[str, Any]]:
    """The report of each training, by its name; `out/NAME` is its folder. Raises what `train.trainer.fit` does."""
    reports = side_by_side({out / name: partial(fit, c, out / name) for name, c in trainings.items()}, title, at_once)
    return dict(zip(trainings, reports, strict=True))


def side_by_side(jobs: Mapping[Path, Callable[[], T]], title: str, at_once: int) -> list[T]:
    """What each job returns, in their order. Each runs in a process of its own, on one thread, and what it prints goes
    into `log.txt` in its folder. After the first that fails no other is begun. Raises what the job raises."""
    print(f"{title}: {len(jobs)}; what each prints is in {LOG} of its folder", file=sys.stderr)
    results = []
    with ThreadPoolExecutor(at_once) as pool, Progress(len(jobs), "step") as progress:
        for folder, result in zip(jobs, pool.map(_alone, jobs, jobs.values()), strict=True):
            results.append(result)
            progress.add(str(folder))
    return results


def write_store(shards: str, store: str, recipe: Recipe, workers: int) -> None:
    """Reinforce `shards` into `store`. Raises what `reinforce.run.driver.run` does, StepFailed where a shard failed."""
    with redirect_stdout(sys.stderr):  # Ray prints on stdout, which is for the table
        report = driver.run(shards, store, recipe, RunOptions(workers=str(workers)))
    if report.failed:
        first = report.failed[0]
        raise StepFailed(f"{len(report.failed)} shards failed; of {first.shard} it says: {first.reason}")


def _alone(folder: Path, job: Callable[[], T]) -> T:
    try:
        with ProcessPoolExecutor(1, FORK_SERVER) as process:
            return process.submit(_logged, folder, job).result()
    except BrokenProcessPool:
        raise StepFailed(
            f"{folder}: its process was killed, perhaps for want of memory; {folder / LOG} holds what it printed. "
            "Run the same command again to go on"
        ) from None


def _logged(folder: Path, job: Callable[[], T]) -> T:
    process.torch_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG).open("a", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):  # line by line
        return job()
