"""An elastic crew of workers, one Ray actor each; with cluster.py, which imports it, all that a run knows of Ray.

Names of shards and counts travel through Ray, never pixels or embeddings, so that its object store stays empty.
"""

import contextlib
import logging
import math
import os
import statistics
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reinforce.config import Recipe, RunOptions
from reinforce.data.shards import Shard
from reinforce.errors import ConfigError, DeviceLost, ManifestMismatch, ReinforceError, Unwritable
from reinforce.progress import tell
from reinforce.run.cluster import joined
from reinforce.run.remote_worker import RemoteWorker
from reinforce.run.reports import ShardReport

log = logging.getLogger(__name__)

_TICK_S = 1.0  # how often the crew is checked when nothing happens
_POISONED = 3  # calls of one worker that raise one after the other: the worker is at fault, and not its shards
_COUNT_S = 2.0  # how often workers are asked how far they are
_HUNG_TIMES, _HUNG_LEAST_S = 10.0, 300.0  # a worker that is silent for so long is given up: see RunOptions.hung_after
_LATE_TIMES, _LATE_LEAST_S = 2.0, 10.0  # a shard that takes so many times what others take: an idle worker does it, too
_MAX_FAILED_STARTS = 3  # workers in a row that died before they were ready


@dataclass
class _Member:
    """One actor: not ready while `loading` is set; `shards` are the calls it has not answered, `given` when they were
    made, `heard` when it last came on or was given something to do after it had nothing, `raised` the shards of its
    last calls, all of which raised. `counting` is a call that asks for its `samples`, `begun` whether one was answered:
    before, it may have no node yet."""

    actor: Any
    loading: Any
    shards: dict[Any, Shard] = field(default_factory=dict)
    given: dict[Any, float] = field(default_factory=dict)
    heard: float = field(default_factory=time.monotonic)
    raised: list[str] = field(default_factory=list)
    hired: float = field(default_factory=time.monotonic)
    counting: Any = None
    begun: bool = False
    samples: int = 0


class Crew:
    """Between `low` and `high` actors. One that is lost is replaced, and its shards are tried again. At the end, what a
    slow one still has in hand is given to an idle one as well: the store takes what comes first, and the bytes are the
    same."""

    def __init__(self, store_url: str, recipe: Recipe, options: RunOptions, low: int, high: int) -> None:
        self.recipe, self.store_url = recipe, _absolute(store_url)
        self.options, self.low, self.high = options, low, high
        self.members: list[_Member] = []
        self.num_lost = 0
        self._failed_starts = 0
        self._took: list[float] = []  # seconds of each shard that was answered
        self._counted, self._samples_of_lost = 0.0, 0

    def reinforce(self, todo: list[Shard]) -> Iterator[tuple[ShardReport, int]]:
        """Each shard's last report and its number of tries, as they come.

        Raises ConfigError before any worker starts where the cluster has no GPU and one was asked for.
        """
        self.queue = deque(todo)
        self.left = {shard.name for shard in todo}
        self.tries: Counter[str] = Counter()
        self.deaths: Counter[str] = Counter()  # of workers that had it
        with joined(self.high) as self.cluster:
            self.ray = self.cluster.ray
            device = self.cluster.device(self.options.device)
            self.needs = {"num_gpus": 1} if device == "cuda" else {"num_cpus": 1}
            self.found = self.cluster.has()
            tell(f"Ray: {self.found}; {self._asks()}")
            self.remote = self.ray.remote(**self.needs, max_concurrency=self.options.shards_in_flight + 1)(RemoteWorker)
            # The device and not `auto`: a worker with a GPU that its torch cannot use must fail, not go on without it.
            self.arguments = (self.recipe, self.store_url, self.options.but(device=device), str(Path.cwd()))
            yield from self._rounds()
            for member in self.members:
                if member.shards:  # others were faster: it may be stopped, and would hold up the end
                    self.ray.kill(member.actor)

    def _rounds(self) -> Iterator[tuple[ShardReport, int]]:
        while self.left:
            self.cluster.check()
            self._hire(len(self.left))
            self._assign()
            calls = [ref for m in self.members for ref in ([m.loading] if m.loading else m.shards)]
            done, _ = self.ray.wait(calls, timeout=_TICK_S)
            self._count()
            for report in (*self._answers(done), *self._hung()):
                yield report, self.tries[report.shard]

    @property
    def samples(self) -> int:
        """How many were answered so far, also those of shards that are under way."""
        return self._samples_of_lost + sum(member.samples for member in list(self.members))

    def _count(self) -> None:
        """Ask, and take what has been answered; nobody is waited for."""
        if time.monotonic() - self._counted < _COUNT_S:
            return
        self._counted = time.monotonic()
        asked = [member.counting for member in self.members if member.counting]
        done = set(self.ray.wait(asked, num_returns=len(asked), timeout=0)[0]) if asked else set()
        for member in self.members:
            if member.counting in done:
                with contextlib.suppress(self.ray.exceptions.RayError):  # it is lost, as its other calls will tell
                    before, member.samples, member.begun = member.samples, self.ray.get(member.counting), True
                    if member.loading or member.samples > before:
                        member.heard = time.monotonic()
                member.counting = None
            member.counting = member.counting or member.actor.samples.remote()

    def _hire(self, num_left: int) -> None:
        """As many actors as the run asks for, and more while the cluster has room for them at once."""
        wanted = min(self.low, num_left)
        if len(self.members) < min(self.high, num_left) and not any(m.loading for m in self.members):
            wanted = max(wanted, min(self.high, num_left, len(self.members) + self._free()))
        while len(self.members) < wanted:
            self.found = self.cluster.has()
            actor = self.remote.remote()
            self.members.append(_Member(actor, actor.load.remote(*self.arguments)))

    def _free(self) -> int:
        resource = "GPU" if "num_gpus" in self.needs else "CPU"
        return int(self.ray.available_resources().get(resource, 0))

    def _assign(self) -> None:
        """Everyone one shard first; a second to read ahead only while there is enough for all."""
        ready = [member for member in self.members if not member.loading]
        for depth in range(1, self.options.shards_in_flight + 1):
            for member in ready:
                if len(member.shards) < depth and (depth == 1 or len(self.queue) >= len(self.members)):
                    self._give(member, alone=len(ready) == 1)
        for member in ready:
            if not member.shards:
                self._back_up(member)

    def _give(self, member: _Member, alone: bool) -> None:
        """The next shard that this worker may have: one that has raised here goes to another, where there is another;
        one that a worker has died of is nobody's second, so that no other shard dies with it again."""
        if any(self.deaths[shard.name] for shard in member.shards.values()):
            return
        for shard in self.queue:
            if (alone or shard.name not in member.raised) and not (self.deaths[shard.name] and member.shards):
                break
        else:
            return
        self.queue.remove(shard)
        self.tries[shard.name] += 1
        self._call(member, shard)

    def _back_up(self, member: _Member) -> None:
        """Of what others have in hand for too long, the shard that has waited longest."""
        if not self._took:
            return
        since = time.monotonic() - max(_LATE_LEAST_S, _LATE_TIMES * statistics.median(self._took))
        calls = [(m.given[ref], shard) for m in self.members for ref, shard in m.shards.items()]
        hands = Counter(shard.name for _, shard in calls)
        late = [
            (given, shard)
            for given, shard in calls
            if given < since and shard.name in self.left and hands[shard.name] == 1 and not self.deaths[shard.name]
        ]
        if late:
            self._call(member, min(late, key=lambda call: call[0])[1])

    def _call(self, member: _Member, shard: Shard) -> None:
        now = time.monotonic()
        if not member.shards:
            member.heard = now
        ref = member.actor.reinforce.remote(shard)
        member.shards[ref], member.given[ref] = shard, now

    def _answers(self, done: list[Any]) -> Iterator[ShardReport]:
        for member in list(self.members):
            for ref in [ref for ref in done if ref is member.loading or ref in member.shards]:
                if member not in self.members:
                    break  # lost a moment ago, and its shards are in the queue again
                try:
                    answer = self.ray.get(ref)
                except self.ray.exceptions.RayTaskError as error:
                    yield from self._raised(member, ref, error)
                except self.ray.exceptions.RayError as error:
                    yield from self._lost(member, error)
                else:
                    member.heard = time.monotonic()
                    if member.loading:
                        member.loading, self._failed_starts = None, 0
                        num_ready = sum(not m.loading for m in self.members)
                        seconds = time.monotonic() - member.hired
                        tell(f"worker {num_ready} of {len(self.members)} is ready, after {seconds:.0f} s")
                    else:
                        member.raised = []
                        del member.shards[ref], member.given[ref]
                        if answer.shard in self.left:  # else another worker was faster
                            self._took += [] if answer.error else [answer.seconds]
                            self.left.remove(answer.shard)
                            yield answer

    def _hung(self) -> Iterator[ShardReport]:
        """Give up workers that have answered no sample for far longer than any shard has taken: a stopped process, a
        file system or a GPU that never answers. Their shards are tried again; should they wake up, they change nothing.
        While nothing is known of how long a shard takes nobody is given up, and of those that load only who once has
        answered and does no longer: others may download, or wait for a node."""
        slowest_s = max(self._took, default=math.inf)
        of_shards_s = self.options.hung_after or max(_HUNG_LEAST_S, _HUNG_TIMES * slowest_s)
        for member in list(self.members):
            limit_s = of_shards_s if member.shards else _HUNG_LEAST_S if member.loading and member.begun else math.inf
            silent_s = time.monotonic() - member.heard
            if silent_s > limit_s:
                self.ray.kill(member.actor)
                yield from self._lost(member, TimeoutError(f"it has been silent for {silent_s:.0f} s"))

    def _raised(self, member: _Member, ref: Any, error: Any) -> Iterator[ShardReport]:
        """The worker lives, its call raised. A request that is wrong ends the run, a shard gets another try, and a
        worker that has lost its GPU or raises again and again is let go: it would fail at every shard that is left."""
        if isinstance(error.cause, DeviceLost):
            self.ray.kill(member.actor)
            yield from self._lost(member, error.cause)
            return
        if member.loading or isinstance(error.cause, (ConfigError, ManifestMismatch, Unwritable)):
            raise error.cause if isinstance(error.cause, ReinforceError) else error
        shard = member.shards.pop(ref)
        del member.given[ref]
        member.heard = time.monotonic()
        member.raised.append(shard.name)
        yield from self._again(shard, f"{type(error.cause).__name__}: {error.cause}")
        if len(member.raised) >= _POISONED:
            for other in list(member.shards.values()):  # is not to blame, and counts no try
                if self._is_free(other, member):
                    self.tries[other.name] -= 1
                    self.queue.append(other)
            member.shards.clear()
            self.ray.kill(member.actor)
            told = (
                f"its last {_POISONED} shards all failed, the last one with {type(error.cause).__name__}: {error.cause}"
            )
            yield from self._lost(member, ReinforceError(told))

    def _lost(self, member: _Member, error: Exception) -> Iterator[ShardReport]:
        """The worker or its node is gone."""
        self.members.remove(member)
        self.num_lost += 1
        self._samples_of_lost += member.samples
        self._failed_starts += bool(member.loading)
        if self._failed_starts >= _MAX_FAILED_STARTS:
            raise ReinforceError(
                f"{self._failed_starts} workers in a row died while they loaded the models: "
                f"{str(error).splitlines()[0]}; {self._needs()}"
            )
        log.warning("lost a worker with %d shards: %s", len(member.shards), str(error).splitlines()[0])
        for shard in member.shards.values():
            self.deaths[shard.name] += 1
            yield from self._again(
                shard,
                f"{self.deaths[shard.name]} workers that had it died or hung (out of memory, killed, stopped, or their "
                "node lost); it was set aside",
            )

    def waits_for(self) -> str:
        """Workers that load, and shards that are at work."""
        members = list(self.members)  # this is asked in another thread
        loading = sum(bool(member.loading) for member in members)
        at_work = sorted({shard.name for member in members for shard in list(member.shards.values())})
        parts = [f"workers that load the models: {loading} ({self.found})"] if loading else []
        parts += [f"shards: {', '.join(at_work[:8])}{', ..' * (len(at_work) > 8)}"] if at_work else []
        return "; ".join(parts) or "Ray"

    def _asks(self) -> str:
        of = "GPU" if "num_gpus" in self.needs else "CPU core"
        if self.low == self.high == 1:
            return f"1 worker, with one {of}"
        return f"{self.low}{' or more' * (self.high > self.low)} workers, each with one {of}"

    def _needs(self) -> str:
        """Loads torch and open_clip: asked when a run ends."""
        from reinforce.models import needs

        return needs.told(self.recipe, "num_gpus" in self.needs)

    def _is_free(self, shard: Shard, of: _Member | None = None) -> bool:
        """Whether it is to be done still, and nobody (but `of`) has it in hand."""
        hands = (s.name for member in self.members if member is not of for s in member.shards.values())
        return shard.name in self.left and shard.name not in hands

    def _again(self, shard: Shard, reason: str) -> Iterator[ShardReport]:
        if not self._is_free(shard):
            return
        if self.tries[shard.name] < self.options.attempts:
            self.queue.append(shard)
        else:
            self.left.remove(shard.name)
            yield ShardReport(shard.name, error=reason)


def _absolute(url: str) -> str:
    """As fsspec takes it in this process: in a worker's, `.` is another folder."""
    return url if "://" in url or "::" in url else os.path.abspath(os.path.expanduser(url))
