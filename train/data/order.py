"""Which samples a step is made of: a pure function of (seed, step), whoever computes it.

An epoch's order is one long sequence: the shards in a drawn order, and in each shard its good rows in a drawn order.
The sequence is cut into as many equal lengths as there are streams. A step takes the next few samples of every stream,
so that each batch mixes shards that are far apart, while a stream reads one shard after the other. A rank works on some
of the streams; how many ranks there are changes who reads, and not what a step is made of.

What is left at the end of an epoch and fills no whole step is not seen in it; the next epoch draws another order.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np

from reinforce.data import draws
from reinforce.errors import ConfigError


@dataclass(frozen=True)
class Piece:
    """Rows of one shard that a stream takes one after the other. `epoch`: which of all passes over this shard it is, so
    that each shows the next view; that of the training, where an epoch goes through it once."""

    epoch: int
    shard: str
    rows: np.ndarray


@dataclass(frozen=True)
class GoodRows:
    """The rows of a shard that can be used: all of its `num_rows` but the `bad` ones. Most shards have none, so that a
    billion samples take some megabytes, and not eight gigabytes. An epoch goes through them so many `times`: 2.5 are
    two whole passes, and half of the rows, other ones in every epoch."""

    num_rows: int
    bad: np.ndarray | None = None
    times: float = 1.0

    def __len__(self) -> int:
        return self.num_rows - (0 if self.bad is None else len(self.bad))

    @property
    def rows(self) -> np.ndarray:
        """In the tar's order."""
        every = np.arange(self.num_rows)
        return every if self.bad is None else np.delete(every, self.bad)

    @property
    def passes(self) -> list[int]:
        """How many rows each of an epoch's passes takes."""
        whole = int(self.times)
        rest = round((self.times - whole) * len(self))
        return [len(self)] * whole + [rest] * (rest > 0)

    @classmethod
    def of(cls, usable: np.ndarray) -> Self:
        """`usable` (N,): whether each row can be used."""
        bad = np.flatnonzero(~usable)
        return cls(len(usable), bad if len(bad) else None)


class Order:
    """`good_rows`: for every shard, the rows that can be used. `batch_size` is that of all ranks together."""

    def __init__(self, good_rows: dict[str, GoodRows], batch_size: int, streams: int, seed: int) -> None:
        self.good_rows = good_rows
        passes = {shard: rows.passes for shard, rows in good_rows.items()}
        self.num_samples = sum(map(sum, passes.values()))  # of an epoch
        self._passes = [(shard, number, len(of), num) for shard, of in passes.items() for number, num in enumerate(of)]
        self.steps_per_epoch = self.num_samples // batch_size
        self.stream_batch = batch_size // streams
        self.seed = seed
        if not self.steps_per_epoch:
            fits = self.num_samples // streams * streams
            raise ConfigError(
                f"an epoch of the shards has {self.num_samples} good samples, fewer than one batch of {batch_size}; "
                + (f"a batch (global_batch_size) of {fits} fits; or " if fits > 1 else "")
                + "give more shards"
            )

    def stream(self, stream: int, step: int) -> Iterator[Piece]:
        """What a stream takes from `step` on, without end; each piece ends where its shard or the epoch does."""
        epoch, step = divmod(step, self.steps_per_epoch)
        while True:
            length = self.steps_per_epoch * self.stream_batch
            low, high = stream * length + step * self.stream_batch, (stream + 1) * length
            start = 0
            for shard, number, per_epoch, num in self._permuted(f"{epoch}", self._passes):
                end = start + num
                if low < end and start < high and num:
                    visit = epoch * per_epoch + number
                    order = self._permuted(f"{visit}/{shard}", self.good_rows[shard].rows.tolist())[:num]
                    yield Piece(visit, shard, np.array(order[max(low - start, 0) : high - start]))
                start = end
            epoch, step = epoch + 1, 0

    def _permuted(self, name: str, items: list) -> list:
        order = np.argsort(draws.uniforms(self.seed, "train/order", name, 0, len(items)), kind="stable")
        return [items[i] for i in order]
