"""How far a run has come: a bar on a terminal, plain lines elsewhere. All of it on stderr."""

import sys
import time

from tqdm import tqdm

from reinforce.run.reports import ShardReport

_QUIET_S = 10.0  # plain lines come no closer together than this, but for the last


class Progress:
    """Counts shard reports as they come in. Use as a context manager."""

    def __init__(self, num_shards: int) -> None:
        self.num_shards, self.num_done, self.num_failed, self.num_samples = num_shards, 0, 0, 0
        self._start = self._last_line = time.monotonic()
        self._bar = tqdm(total=num_shards, unit="shard", disable=not sys.stderr.isatty(), dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, report: ShardReport) -> None:
        """One shard is done, or refused for good."""
        self.num_done += 1
        self.num_failed += bool(report.error)
        self.num_samples += report.read
        now = time.monotonic()
        rate = self.num_samples / max(now - self._start, 1e-9)
        self._bar.set_postfix_str(f"{rate:.1f} samples/s, {self.num_failed} failed", refresh=False)
        self._bar.update()
        if self._bar.disable and (now - self._last_line > _QUIET_S or self.num_done == self.num_shards):
            self._last_line = now
            left_s = (now - self._start) / self.num_done * (self.num_shards - self.num_done)
            print(
                f"{self.num_done}/{self.num_shards} shards, {self.num_samples} samples, {rate:.1f} samples/s, "
                f"{self.num_failed} failed, about {left_s:.0f} s left",
                file=sys.stderr,
            )
