"""How far some work has come: a bar on a terminal, plain lines elsewhere. All of it on stderr."""

import sys
import threading
import time
from collections.abc import Callable
from typing import Self

from tqdm import tqdm

from reinforce.lines import plain, say, without_secrets

_LOOK_S = 1.0  # how often samples are counted
_SILENT_S = 60.0  # after so long without a plain line there is one; without news it says what it waits for
_QUIET_S = 10.0  # plain lines come no closer together than this, but for the last
# tqdm's own, without its seconds for each unit: 80 columns hold what is said beside the count.
_BAR = "{desc}{n_fmt}/{total_fmt} {unit}s |{bar}| {remaining} left{postfix}"


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
        samples: Callable[[], int] | None = None,
    ) -> None:
        """`done`: units that were done before, and say nothing of the time that is left. `silent`: show nothing.
        `waits_for`: what is under way, told in each minute in which there is no news. `samples`: how many were done,
        also those of units that are under way; asked each second, and shown with their rate."""
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
            bar_format=_BAR,
        )
        self._samples, self._num_samples, self._phrase = samples, 0, ""
        self._closed = threading.Event()
        self._heard = self._start
        if (waits_for or samples) and not silent:
            threading.Thread(target=self._watch, args=(waits_for,), daemon=True).start()

    def _watch(self, waits_for: Callable[[], str] | None) -> None:
        while not self._closed.wait(min(_LOOK_S, _SILENT_S)):
            if self._count():
                self._bar.set_postfix_str(self._beside())
            now = time.monotonic()
            if now - max(self._last_line, self._heard) >= _SILENT_S:
                self._last_line = now
                if waits_for:
                    tell(f"{self._where()}, nothing new for {now - self._heard:.0f} s: waiting for {waits_for()}")
            elif self._prints and now - self._last_line >= _SILENT_S:
                self._last_line = now
                tell(", ".join(filter(None, [self._where(), self._beside()])))

    def _count(self) -> bool:
        """Whether there are more samples."""
        before, self._num_samples = self._num_samples, self._samples() if self._samples else 0
        if more := self._num_samples > before:
            self._heard = time.monotonic()
        return more

    def _where(self) -> str:
        return f"{self._title}{self._unit} {self._done}/{self._total}"

    def _beside(self) -> str:
        rate = self._num_samples / max(self.seconds, 1e-9)
        samples = f"{self._num_samples} samples, {rate:.1f} samples/s" if self._samples else ""
        return ", ".join(filter(None, [samples, self._phrase]))

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
        self._phrase = phrase
        self._count()
        if beside := self._beside():
            self._bar.set_postfix_str(beside, refresh=False)
        self._bar.update()
        now = self._heard = time.monotonic()
        if self._prints and (now - self._last_line > _QUIET_S or self._done == self._total):
            self._last_line = now
            left_s = self.seconds / (self._done - self._first) * (self._total - self._done)
            said = [self._where(), beside, f"about {left_s:.0f} s left"]
            say(", ".join(filter(None, said)), file=sys.stderr)
