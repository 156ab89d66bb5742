"""A run: shards that the store lacks are handed out to workers, and their reports are counted.

The store is the only record of progress, so a driver can be killed and started again; it finds what is missing and
goes on.
"""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypeVar

from reinforce import process
from reinforce.config import Recipe, RunOptions
from reinforce.data.shards import Shard, expand, stamp, tar_bytes
from reinforce.errors import ConfigError, Corrupt, NotCommitted, ShardError
from reinforce.lines import say
from reinforce.progress import Progress, tell
from reinforce.run.on_ray import Crew
from reinforce.run.reports import Failure, RunReport, ShardReport
from reinforce.store.columns import CLASSES, DIGEST, Column, class_columns, columns
from reinforce.store.store import Store

if TYPE_CHECKING:
    from reinforce.run.worker import Worker

T = TypeVar("T")

_REQUESTS_AT_ONCE = 32


def run(patterns: str, store_url: str, recipe: Recipe, options: RunOptions) -> RunReport:
    """Reinforce every shard that `patterns` names and the store does not hold whole.

    Raises ConfigError, ManifestMismatch and PermissionError before any work, Unwritable where the store's disk is full;
    shards that fail are in the report.
    """
    start = time.monotonic()
    if options.workers != "auto":
        _worker_range(options)  # a wrong request is an error before any work
    if options.statistics and Path(options.statistics).expanduser().is_dir():
        raise ConfigError(f"--statistics {options.statistics} is a folder; name a file in it")
    listed = expand(patterns)
    store = Store(store_url)
    manifest = store.manifest()
    if manifest:
        manifest.check_recipe(recipe, store_url, options.extend)
    wanted = columns(recipe, manifest.format_version) if manifest else columns(recipe)
    lacked = lacking(store, listed, wanted)
    todo, whole = list(lacked), [shard for shard in listed if shard not in lacked]
    others = [failure for failure in _asked(store, partial(_other_tar, store), whole) if failure]
    report = RunReport(store_url, len(listed), len(listed) - len(todo) - len(others), failed=others)
    moved = manifest is not None and not manifest.same_paths(recipe)  # whether they are the same, a worker finds out
    if todo:
        store.objects.check_writable()
    if todo or moved or store.missing(CLASSES, class_columns(recipe)):  # any worker writes the latter
        if not os.environ.get("RAY_ADDRESS"):
            options = options.but(device=_local_device(options))  # a missing GPU is an error before anything starts
        low, high = _worker_range(options)
        crew = Crew(store_url, recipe, options, low, high) if high and todo else _Alone(store_url, recipe, options)
        samples = lambda: max(crew.samples, report.samples)  # noqa: E731
        with (
            _statistics(options) as statistics,
            Progress(len(todo), "shard", waits_for=crew.waits_for, samples=samples) as progress,
        ):
            for shard_report, tries in crew.reinforce(todo):
                report.add(shard_report, tries)
                progress.add(report.phrase())
                if statistics:
                    _add(shard_report.line(tries), statistics)
        report.workers_lost = crew.num_lost
    store.objects.sweep()
    report.seconds = time.monotonic() - start
    return report


@contextmanager
def _statistics(options: RunOptions) -> Iterator[TextIO | None]:
    """The file, where one is asked for. Whether it can be written is known before any work."""
    if not options.statistics:
        yield None
        return
    path = Path(options.statistics).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", buffering=1) as file:
        yield file


def _add(line: str, file: TextIO) -> None:
    try:
        say(line, file=file)
    except OSError as error:
        error.filename = file.name  # a full disk does not say which it is
        raise


def lacking(store: Store, listed: list[Shard], wanted: list[Column]) -> dict[Shard, list[Column]]:
    """What each shard lacks, in their order; those that are whole are not among them."""
    begun = set(store.shards())  # of the others nothing has to be asked

    def absent(shard: Shard) -> list[Column]:
        return store.missing(shard.name, wanted) if shard.name in begun else wanted

    return {shard: found for shard, found in zip(listed, _asked(store, absent, listed), strict=True) if found}


def _asked(store: Store, question: Callable[[Shard], T], listed: list[Shard]) -> list[T]:
    """Its answer for each shard. On a local disk nobody waits, and threads would only stand in each other's way."""
    if store.objects.local:
        return list(map(question, listed))
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        return list(pool.map(question, listed))


def _other_tar(store: Store, shard: Shard) -> Failure | None:
    """Of a shard that is whole in the store: whether the tar is another one now. Only its length, and the ends of a
    local one, are looked at; training compares every image that it decodes, and `verify --shards` all of them."""
    try:
        of_store = store.attributes(shard.name, DIGEST)["tar"]
        of_tar = stamp(shard.url) if os.path.isfile(shard.url) else {"bytes": tar_bytes(shard.url)}
    except NotCommitted:  # format 1
        return None
    except (ShardError, Corrupt) as error:
        return Failure(shard.name, 0, str(error))
    if of_store | of_tar == of_store:
        return None
    lengths = of_tar["bytes"], of_store["bytes"]
    differs = "it begins or ends with other bytes"
    if lengths[0] != lengths[1]:
        differs = f"it has {lengths[0]} bytes, and that one had {lengths[1]}"
    return Failure(
        shard.name,
        0,
        f"{shard.url} is not the tar that group {shard.name} was made from: {differs}; use another STORE, or reinforce "
        "this tar in its place with `clip-reinforce redo`",
    )


class _Alone:
    """One worker in this process, in place of a crew: without Ray."""

    num_lost = 0

    def __init__(self, store_url: str, recipe: Recipe, options: RunOptions) -> None:
        self.store_url, self.recipe, self.options = store_url, recipe, options
        self.worker: Worker | None = None
        self.at_work: list[str] = []

    def reinforce(self, todo: list[Shard]) -> Iterator[tuple[ShardReport, int]]:
        """As Crew.reinforce."""
        from reinforce.run.worker import Worker  # loads torch and open_clip: not for a run that finds nothing to do

        with process.torch_threads_kept():  # a worker on a CPU sets their number, and this process may be the user's
            tell(f"loading the models of {self.recipe.name}")
            self.worker = Worker(self.recipe, self.store_url, self.options)
            with ThreadPoolExecutor(self.options.shards_in_flight) as pool:
                yield from pool.map(partial(self._tried, self.worker), todo)

    def _tried(self, worker: "Worker", shard: Shard) -> tuple[ShardReport, int]:
        self.at_work.append(shard.name)
        try:
            for attempt in range(1, self.options.attempts + 1):
                try:
                    return worker.reinforce(shard), attempt
                except OSError as error:
                    reason = f"{type(error).__name__}: {error}"
            return ShardReport(shard.name, error=reason), self.options.attempts
        finally:
            self.at_work.remove(shard.name)

    @property
    def samples(self) -> int:
        return self.worker.samples if self.worker else 0

    def waits_for(self) -> str:
        at_work = list(self.at_work)  # this is asked in another thread
        return f"shard {', '.join(at_work)}" if at_work else "the models to load"


def num_workers(options: RunOptions) -> int:
    """How many workers a run would have; 1 where it works without Ray."""
    low, high = _worker_range(options)
    return max(1, high if high < 1_000_000 else low)


def _worker_range(options: RunOptions) -> tuple[int, int]:
    """`N`, `MIN:MAX` or `auto` -> (low, high); high is 0 for no Ray."""
    if options.workers == "auto":
        return (1, 1_000_000) if os.environ.get("RAY_ADDRESS") else (1, _num_local_devices(options))
    low, colon, high = options.workers.partition(":")
    if not low.isdigit() or (colon and not high.isdigit()):
        raise ConfigError(f"--workers {options.workers}: write a number, MIN:MAX, auto, or 0 for no Ray")
    bounds = int(low), int(high) if colon else int(low)
    if bounds[0] > bounds[1] or (colon and not bounds[0]):
        raise ConfigError(f"--workers {options.workers}: MIN must be at least 1 and at most MAX")
    return bounds


def _local_device(options: RunOptions) -> str:
    """`cuda` or `cpu`. Raises ConfigError where this machine does not have what was asked for."""
    from reinforce.models.device import pick_device  # loads torch: not for a run that finds nothing to do

    return pick_device(options.device).type


def _num_local_devices(options: RunOptions) -> int:
    import torch

    return torch.cuda.device_count() if _local_device(options) == "cuda" else os.cpu_count() or 1
