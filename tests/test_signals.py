"""Real signals, to a process or to its whole group: a command ends within ten seconds wherever it waits, with the
signal's exit code, one sentence, and no process left. A training has saved what it had."""

import functools
import http.server
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from reinforce.config import Recipe
from reinforce.signals import STOPPED
from tests import tiny
from tests.conftest import Reinforced
from tests.processes import ROOT, command_line, kill, marked
from tests.test_trainer import command, config, curve
from train.trainer import fit

TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m")
SENT = [(signal.SIGINT, False), (signal.SIGTERM, True)]  # to the process alone, and to its group


class Begun:
    """A Python process in a group of its own, whose children can be found by a mark in their environment."""

    def __init__(self, *arguments: str) -> None:
        self.mark = uuid.uuid4().hex
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment | {"RUN_MARK": self.mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def send(self, number: signal.Signals, to_group: bool = False) -> None:
        (os.killpg if to_group else os.kill)(self.process.pid, number)

    def after(self, condition: Callable[[], object]) -> None:
        """Wait until something is so."""
        deadline = time.monotonic() + 120
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.process.stderr.read()
            time.sleep(0.05)

    def ended(self) -> tuple[int, float, str]:
        """Exit code, seconds, and stderr; there is no process left."""
        start = time.monotonic()
        _, told = self.process.communicate(timeout=60)
        seconds = time.monotonic() - start
        while (left := marked(self.mark)) and time.monotonic() < start + seconds + 3:  # killed, they take a moment
            time.sleep(0.05)
        names = [command_line(pid) for pid in left]
        kill(left)
        assert not names
        return self.process.returncode, seconds, told


def program(body: str) -> Begun:
    """A command that waits somewhere, and says when it is there."""
    begun = Begun(
        "-c",
        "import os, subprocess, sys, threading, time\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from reinforce import signals\n"
        "from reinforce.terminal import errors_as_sentences\n"
        "with signals.taken(ends=True), errors_as_sentences():\n"
        "    ready = lambda: print('ready', flush=True)\n" + "".join(f"    {line}\n" for line in body.splitlines()),
    )
    assert begun.process.stdout.readline() == "ready\n"
    return begun


WAITS = {
    "for a thread": "pool = ThreadPoolExecutor(1)\nready()\npool.submit(time.sleep, 60).result()",
    "for a thread, while it is cleaned up": "with ThreadPoolExecutor(1) as pool:\n"
    "    pool.submit(time.sleep, 60)\n    ready()\n    time.sleep(60)",
    "for a lock": "lock = threading.Lock()\nlock.acquire()\nready()\nlock.acquire()",
    "for other processes": "for _ in range(2):\n"
    "    subprocess.Popen(['sh', '-c', 'trap \"\" INT TERM; sleep 60 & wait'], start_new_session=True)\n"
    "ready()\ntime.sleep(60)",
    "and does not let go": "said = False\nwhile True:\n    try:\n"
    "        said = said or ready() or True\n        time.sleep(60)\n    except BaseException: pass",
    "in an error that came of it": "try:\n    ready()\n    time.sleep(60)\nfinally:\n    raise ValueError('gone')",
}


@pytest.mark.parametrize(
    ("wait", "number", "to_group"),
    [(wait, *SENT[i % 2]) for i, wait in enumerate(WAITS)]
    + [pytest.param(wait, *SENT[1 - i % 2], marks=pytest.mark.chaos) for i, wait in enumerate(WAITS)],
)
def test_wherever_it_waits_it_ends(wait: str, number: signal.Signals, to_group: bool) -> None:
    begun = program(WAITS[wait])
    begun.send(number, to_group)
    code, seconds, told = begun.ended()
    assert (code, told) == (128 + number, f"{STOPPED}\n")
    assert seconds < 10


def test_a_second_signal_ends_at_once_and_one_that_was_sent_twice_is_no_second() -> None:
    saving = "with signals.whole():\n    ready()\n    time.sleep(3)\n    print('saved', flush=True)\n"
    twice = program(saving)
    for _ in range(2):
        twice.send(signal.SIGTERM)
        time.sleep(0.1)
    assert twice.process.stdout.read() == "saved\n" and twice.ended()[0] == 143
    again = program(saving.replace("3", "60"))
    again.send(signal.SIGINT)
    time.sleep(1.5)
    again.send(signal.SIGTERM)
    code, seconds, told = again.ended()
    assert (code, told) == (130, f"{STOPPED}\n") and seconds < 2


class Stalling(http.server.SimpleHTTPRequestHandler):
    """Answers `free` requests, and the next with a byte a second."""

    free = 0
    stalled = 0

    def log_message(self, *told: Any) -> None: ...

    def do_GET(self) -> None:
        if type(self).free > 0:
            type(self).free -= 1
            return super().do_GET()
        data = Path(self.directory, self.path[1:]).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        type(self).stalled += 1
        try:
            for byte in data:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(1)
        except OSError:
            pass  # nobody listens any more
        return None


@pytest.fixture
def stalling(reinforced: Reinforced) -> Iterator[tuple[str, type[Stalling]]]:
    """The tars of `reinforced` behind a server that stalls."""
    tars = list(map(Path, reinforced.shards.split("::")))

    class Server(Stalling): ...

    handler = functools.partial(Server, directory=str(tars[0].parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield "::".join(f"http://127.0.0.1:{server.server_port}/{tar.name}" for tar in tars), Server
        server.shutdown()


@pytest.mark.parametrize(("number", "to_group"), [pytest.param(*SENT[0], marks=pytest.mark.chaos), SENT[1]])
def test_a_run_that_reads_a_slow_tar(
    recipe: Recipe, stalling: tuple[str, type[Stalling]], tmp_path: Path, number: signal.Signals, to_group: bool
) -> None:
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    url, server = stalling
    server.free = 2  # the first and the last bytes of a tar, which tell whose it is
    asked = ["--store", str(tmp_path / "s"), "--recipe", str(tmp_path / "recipe.json"), "--workers", "0"]
    run = Begun("-m", "reinforce", "run", url, *asked, "--device", "cpu")
    run.after(lambda: server.stalled)
    run.send(number, to_group)
    code, seconds, told = run.ended()
    assert code == 128 + number and told.endswith(f"{STOPPED}\n") and "Traceback" not in told
    assert seconds < 10


@pytest.mark.parametrize(
    ("workers", "number", "to_group"), [pytest.param(0, *SENT[0], marks=pytest.mark.chaos), (1, *SENT[1])]
)
def test_a_training_that_waits_for_data_saves_what_it_has(
    reinforced: Reinforced,
    stalling: tuple[str, type[Stalling]],
    tmp_path: Path,
    workers: int,
    number: signal.Signals,
    to_group: bool,
) -> None:
    """And goes on to the same curve."""
    url, server = stalling
    server.free = 2
    asked = config(reinforced, shards=url, streams=1, global_batch_size=4, cache_dir=str(tmp_path / "cache"))
    out = tmp_path / "run"
    run = Begun("-m", *command(asked.but(workers=workers), out, tmp_path))
    run.after(lambda: server.stalled and (out / "metrics.jsonl").exists() and curve(out))
    time.sleep(0.5)
    run.send(number, to_group)
    code, seconds, told = run.ended()
    assert code == 128 + number and told.endswith(f"{STOPPED}\n") and "Traceback" not in told
    assert seconds < 10
    done = len(curve(out))
    assert [path.stem for path in (out / "checkpoints").iterdir()] == [f"step_{done:08d}"]
    server.free = 10
    fit(asked, out)
    fit(asked.but(shards=reinforced.shards), tmp_path / "calm")
    assert curve(out) == curve(tmp_path / "calm")


@pytest.mark.chaos
@pytest.mark.parametrize("to_group", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["at a shard", "loading", "starting Ray"])
def test_a_run_on_a_ray_of_its_own(
    recipe: Recipe, tmp_path: Path, moment: str, number: signal.Signals, to_group: bool
) -> None:
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    tars = "::".join(tiny.tar(tmp_path / f"{i}.tar", 40, seed=i) for i in range(4))
    asked = ["--store", str(tmp_path / "s"), "--recipe", str(tmp_path / "recipe.json"), "--workers", "2"]
    run = Begun("-m", "reinforce", "run", tars, *asked, "--device", "cpu")
    title = {"at a shard": "RemoteWorker.reinforce", "loading": "RemoteWorker", "starting Ray": "raylet"}[moment]
    run.after(lambda: any(title in command_line(pid) for pid in marked(run.mark)))
    run.send(number, to_group)
    code, seconds, told = run.ended()
    assert code == 128 + number and told.endswith(f"{STOPPED}\n"), told
    assert "Traceback" not in told and "***" not in told and seconds < 10


@pytest.mark.chaos
@pytest.mark.timeout(300)
@pytest.mark.parametrize("to", ["torchrun", "the group", "one rank"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_training_of_two_ranks_saves_once_and_goes_on(
    reinforced: Reinforced, tmp_path: Path, number: signal.Signals, to: str
) -> None:
    """torchrun passes on what it gets; a rank that alone is told tells the others in its next step."""
    asked = config(reinforced, steps=60, save_every_n_steps=1000)
    out = tmp_path / "run"
    run = Begun(*TORCHRUN, *command(asked, out, tmp_path))
    run.after(lambda: (out / "metrics.jsonl").exists() and len(curve(out)) > 3)
    if to == "one rank":
        ranks = [pid for pid in marked(run.mark) if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
        os.kill(ranks[-1], number)
    else:
        run.send(number, to == "the group")
    code, seconds, told = run.ended()
    assert code and seconds < 15, told
    assert f"{STOPPED}\n" in told
    [saved] = (out / "checkpoints").iterdir()
    assert saved.stem == f"step_{len(curve(out)):08d}"
    again = Begun(*TORCHRUN, *command(asked, out, tmp_path))
    assert again.process.wait(120) == 0
    calm = Begun(*TORCHRUN, *command(asked, tmp_path / "calm", tmp_path))
    assert calm.process.wait(120) == 0
    assert curve(out) == curve(tmp_path / "calm")
