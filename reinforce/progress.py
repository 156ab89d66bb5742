"""How far some work has come: a bar on a terminal, plain lines elsewhere. All of it on stderr."""

import sys
import time
from typing import Self

from tqdm import tqdm

from reinforce.lines import say

_QUIET_S = 10.0  # plain lines come no closer together than this, but for the last


class Progress:
    """Counts units of work as they are done. Close it, or use it as a context manager."""

    def __init__(self, total: int, unit: str, done: int = 0, title: str = "", silent: bool = False) -> None:
        """`done`: units that were done before, and say nothing of the time that is left. `silent`: show nothing."""
        self._total, self._unit, self._done, self._first = total, unit, done, done
        self._title = f"{title}: " if title else ""
        self._start = self._last_line = time.monotonic()
        on_terminal = sys.stderr.isatty()
        self._prints = not silent and not on_terminal
        self._bar = tqdm(
            total=total,
            desc=title or None,
            initial=done,
            unit=unit,
            disable=silent or not on_terminal,
            dynamic_ncols=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._bar.close()

    @property
    def seconds(self) -> float:
        """Since the work began."""
        return time.monotonic() - self._start

    def add(self, phrase: str = "") -> None:
        """One more unit is done. `phrase`: what is shown beside the count."""
        self._done += 1
        if phrase:
            self._bar.set_postfix_str(phrase, refresh=False)
        self._bar.update()
        now = time.monotonic()
        if self._prints and (now - self._last_line > _QUIET_S or self._done == self._total):
            self._last_line = now
            left_s = self.seconds / (self._done - self._first) * (self._total - self._done)
            count = f"{self._title}{self._unit} {self._done}/{self._total}"
            say(", ".join(filter(None, [count, phrase, f"about {left_s:.0f} s left"])), file=sys.stderr)
