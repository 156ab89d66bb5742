"""How far some work has come: a bar on a terminal, plain lines elsewhere. All of it on stderr."""

import sys
import threading
import time
from collections.abc import Callable
from typing import Self

from tqdm import tqdm

from reinforce.lines import plain, say, without_secrets

_SILENT_S = 60.0  # after so long without a unit it says what it waits for, and then again
_QUIET_S = 10.0  # plain lines come no closer together than this, but for the last


def tell(text: str) -> None:
    """A line on stderr, above a bar where there is one."""
    tqdm.write(plain(without_secrets(text)), file=sys.stderr)


class Progress:
    """Counts units of work as they are done. Close it, or use it as a context manager."""

    def __init__(
        self,
        total: int,
        unit: str,
        done: int = 0,
        title: str = "",
        silent: bool = False,
        waits_for: Callable[[], str] | None = None,
    ) -> None:
        """`done`: units that were done before, and say nothing of the time that is left. `silent`: show nothing.
        `waits_for`: what is under way, told in each minute in which no unit is done."""
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
        self._closed = threading.Event()
        self._heard = self._start
        if waits_for and not silent:
            threading.Thread(target=self._watch, args=(waits_for,), daemon=True).start()

    def _watch(self, waits_for: Callable[[], str]) -> None:
        told = self._heard
        while not self._closed.wait(max(0.1, max(told, self._heard) + _SILENT_S - time.monotonic())):
            now = time.monotonic()
            if now - max(told, self._heard) >= _SILENT_S:
                told = now
                count = f"{self._title}{self._unit} {self._done}/{self._total}"
                tell(f"{count}, nothing new for {now - self._heard:.0f} s: waiting for {waits_for()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._closed.set()
        self._bar.close()

    @property
    def seconds(self) -> float:
        """Since the work began."""
        return time.monotonic() - self._start

    def add(self, phrase: str = "") -> None:
        """One more unit is done. `phrase`: what is shown beside the count."""
        self._done += 1
        self._heard = time.monotonic()
        if phrase:
            self._bar.set_postfix_str(phrase, refresh=False)
        self._bar.update()
        now = time.monotonic()
        if self._prints and (now - self._last_line > _QUIET_S or self._done == self._total):
            self._last_line = now
            left_s = self.seconds / (self._done - self._first) * (self._total - self._done)
            count = f"{self._title}{self._unit} {self._done}/{self._total}"
            say(", ".join(filter(None, [count, phrase, f"about {left_s:.0f} s left"])), file=sys.stderr)
