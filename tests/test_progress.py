"""Progress: a bar on a terminal, and elsewhere lines that are few, the last one always among them."""

import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
import time

import pytest

from reinforce import progress
from reinforce.progress import Progress
from reinforce.run.reports import RunReport, ShardReport


def told(monkeypatch: pytest.MonkeyPatch, on_terminal: bool, quiet_s: float, **options) -> str:
    """What four of ten units say, of which six were done before."""
    stderr = io.StringIO()
    stderr.isatty = lambda: on_terminal
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(progress, "_QUIET_S", quiet_s)
    with Progress(10, "step", done=6, **options) as bar:
        for number in range(7, 11):
            bar.add(f"loss {number}")
    return stderr.getvalue()


def test_elsewhere_lines_come_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(monkeypatch, False, 10) == "step 10/10, loss 10, about 0 s left\n"
    lines = told(monkeypatch, False, -1, title="a run").splitlines()
    assert [line.split(", about")[0] for line in lines] == [f"a run: step {n}/10, loss {n}" for n in range(7, 11)]


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    said = told(monkeypatch, True, -1)
    assert "6/10" in said and "10/10" in said and "about" not in said


@pytest.mark.parametrize("on_terminal", [True, False])
def test_silent(monkeypatch: pytest.MonkeyPatch, on_terminal: bool) -> None:
    assert told(monkeypatch, on_terminal, -1, silent=True) == ""


def test_what_is_left_is_reckoned_from_this_run(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Two of four units were there before; one more took 30 s, so that the last takes 30 s."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress(4, "shard", done=2) as bar:
        now[0] = 30.0
        bar.add()
    assert capsys.readouterr().err == "shard 3/4, about 30 s left\n"


def test_a_silence_says_what_it_waits_for(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Again and again, until there is news."""
    monkeypatch.setattr(progress, "_SILENT_S", 0.2)
    with Progress(4, "shard", waits_for=lambda: "shard 00007"):
        time.sleep(0.7)
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert first == second == "shard 0/4, nothing new for 0 s: waiting for shard 00007"
    with Progress(4, "shard", waits_for=lambda: "shard 00007") as bar:
        for _ in range(4):
            time.sleep(0.1)
            bar.add()
    assert "nothing new" not in capsys.readouterr().err


def test_what_a_run_says_beside_the_count() -> None:
    report = RunReport("store", 3, 0)
    report.add(ShardReport("a", read=30), 1)
    assert report.phrase() == ""
    report.add(ShardReport("b", error="broken"), 3)
    assert report.phrase() == "1 failed"


def test_samples_are_shown_also_of_units_under_way(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """They are news: nothing is said to be waited for. Of a unit that is done the line follows at once."""
    monkeypatch.setattr(progress, "_SILENT_S", 0.2)
    num = 0
    with Progress(2, "shard", waits_for=lambda: "shard 00007", samples=lambda: num) as bar:
        for _ in range(10):
            num += 30
            time.sleep(0.05)
        bar.add("1 failed")
        bar.add()
    *under_way, last = capsys.readouterr().err.splitlines()
    assert len(under_way) >= 2
    for line in under_way:
        assert re.fullmatch(r"shard 0/2, [1-9]\d* samples, \d+\.\d samples/s", line)
    assert last.startswith("shard 2/2, 300 samples, ") and last.endswith(", about 0 s left")


def test_a_bar_of_80_columns_holds_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal of that width, which the kernel tells."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with open(its, "w") as stderr, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        with Progress(120000, "step", done=119998) as bar:
            bar.add("loss 4.123, 1234 samples/s, spread 0.52")
            bar.add("loss 4.122, 1234 samples/s, spread 0.52")
    told = b""
    with contextlib.suppress(OSError):  # the other end is closed, and all of it was read
        while more := os.read(ours, 10000):
            told += more
    shown = told.decode().replace("\n", "\r").split("\r")
    assert max(map(len, shown)) <= 80
    assert any(line.endswith("left, loss 4.122, 1234 samples/s, spread 0.52") for line in shown), shown
