"""SIGINT and SIGTERM: a command ends within ten seconds, wherever it waits, and leaves no process behind.

The first signal raises `Stopped` in the main thread. What then still waits (for a thread that reads a slow tar, say) is
interrupted once a second, and after END_S the process ends without asking anybody: stores, checkpoints and pages are
written whole or not at all, so nothing is torn. A second signal ends it at once. A thread sees to this, since the main
thread may be deep in a library. Its children are killed with the process, those of a private Ray among them: they may
have had the signal as well, and what they say on their way down is not for the user.
"""

import ctypes
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum, auto
from pathlib import Path
from types import FrameType
from typing import NoReturn

STOPPED = "stopped; run the same command again to go on"
SECOND_S = 1.0  # `timeout`, make and schedulers send one signal twice: to the process, and to its group
PATIENCE_S = 5.0  # for what is `finishing`
END_S = 8.0
_NUMBERS = (signal.SIGINT, signal.SIGTERM)
_PR_SET_CHILD_SUBREAPER = 36  # of Linux
_GIVEN_BACK = b"\0"  # in the pipe, where else numbers of signals are


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM has come."""


class _Held(Enum):
    NOT = auto()
    FINISHING = auto()
    WHOLE = auto()


class _Taken:
    """The signals of this process while they are ours. `ends`: it is a command of ours, and not a user's program."""

    def __init__(self, ends: bool) -> None:
        self.ends, self.held, self.told = ends, _Held.NOT, False
        self.number, self._since = 0, 0.0  # of the first signal
        self._main = threading.get_ident()
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._fd_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._before = {number: signal.getsignal(number) for number in (*_NUMBERS, signal.SIGALRM)}
        self.handle()
        if ends:
            _adopt()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def handle(self) -> None:
        for number in _NUMBERS:
            signal.signal(number, self._came)
        signal.signal(signal.SIGALRM, self._interrupt)

    def give_back(self) -> None:
        self.held = _Held.WHOLE
        signal.set_wakeup_fd(self._fd_before)
        os.write(self._write, _GIVEN_BACK)  # to close it would not do: children that were forked have it open
        self._watcher.join()  # before the handlers go: its SIGALRM would end the process
        os.close(self._write)
        os.close(self._read)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def interrupt(self) -> None:
        """Raises Stopped where a signal has come and nothing is held against it."""
        patient = self.held is _Held.FINISHING and time.monotonic() - self._since < PATIENCE_S
        if self.number and self.held is not _Held.WHOLE and not patient:
            raise Stopped

    def end(self) -> NoReturn:
        self.held = _Held.WHOLE
        if threading.get_ident() == self._main:
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # torch raises where a worker of its loader is killed
        if not self.told:
            os.write(2, f"{STOPPED}\n".encode())
        until = time.monotonic() + 1
        while (there := _descendants()) and time.monotonic() < until:
            for child in there:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(child, signal.SIGKILL)
            time.sleep(0.01)
        os._exit(128 + self.number)

    def _came(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self._since, self.number = time.monotonic(), number
        self.interrupt()

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.interrupt()

    def _watch(self) -> None:
        heard_at = 0.0
        while True:
            ready, _, _ = select.select([self._read], [], [], 1.0 if heard_at else None)
            heard = os.read(self._read, 64) if ready else b""
            number = next((number for number in _NUMBERS if number in heard), None)
            passed = time.monotonic() - heard_at
            over = passed > END_S and self.held is not _Held.WHOLE
            if number and not heard_at:
                heard_at = time.monotonic()
                self._begin_to_end(number)
            elif heard_at and self.ends and (over or (number and passed > SECOND_S)):
                self.end()
            elif not ready:
                signal.pthread_kill(self._main, signal.SIGALRM)
            if _GIVEN_BACK in heard:
                return

    def _begin_to_end(self, number: int) -> None:
        if not self.number:  # the main thread is in a library, and has not heard of it yet
            self._since, self.number = time.monotonic(), number
        if self.ends:
            logging.disable(logging.CRITICAL)
            sys.unraisablehook = _say_nothing
            threading.excepthook = _say_nothing


_taken: _Taken | None = None


@contextmanager
def taken(ends: bool = False) -> Iterator[None]:
    """For a while SIGINT and SIGTERM raise Stopped in this thread, where it is the main one; Python lets no other see
    signals. `ends`: this is all that the process does. Where they are taken already, nothing changes."""
    global _taken
    if _taken or threading.current_thread() is not threading.main_thread():
        yield
        return
    _taken = _Taken(ends)
    try:
        yield
    finally:
        ended, _taken = _taken, None
        ended.give_back()
        if ended.number and ends:
            ended.end()


def take_again() -> None:
    """After a library has put handlers of its own in the place of ours: Ray does when it starts."""
    if _taken and threading.current_thread() is threading.main_thread():
        _taken.handle()


def number() -> int:
    """Of the signal that has come while they are taken, or 0."""
    return _taken.number if _taken else 0


def told() -> None:
    """The user knows that the command has stopped."""
    if _taken:
        _taken.told = True


@contextmanager
def finishing() -> Iterator[Callable[[], bool]]:
    """What is under way is finished first, within PATIENCE_S. Gives a function: whether a signal has come."""
    with _held(_Held.FINISHING):
        yield lambda: number() > 0


@contextmanager
def whole() -> Iterator[None]:
    """What happens in here happens whole; Stopped is raised after it."""
    with _held(_Held.WHOLE):
        yield
    if _taken:
        _taken.interrupt()


@contextmanager
def _held(how: _Held) -> Iterator[None]:
    if not _taken:
        yield
        return
    taken, before = _taken, _taken.held
    taken.held = how
    try:
        yield
    finally:
        taken.held = before


def _say_nothing(fault: object) -> None: ...


def _adopt() -> None:
    """Children of children whose parents end become ours (Linux), so that none is out of sight."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _descendants() -> set[int]:
    """The children of this process, their children, and so on, that are alive."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            state, parent, *_ = path.read_text().rpartition(")")[2].split()
            if state not in "ZX":
                children.setdefault(int(parent), []).append(int(path.parent.name))
    found, todo = set[int](), [os.getpid()]
    while todo:
        of_one = children.get(todo.pop(), [])
        found.update(of_one)
        todo += of_one
    return found
