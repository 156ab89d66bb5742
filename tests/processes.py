"""The real commands: in this process, in one of their own, and in processes that can be found and killed, because all
of a run carry a mark in their environment."""

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Self

import typer
from typer.testing import CliRunner

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


def here(app: typer.Typer, *arguments: str) -> tuple[int, str, str]:
    """A command in this process: exit code, stdout, stderr. An error that it turns into no sentence is raised."""
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


def python_m(*arguments: str) -> tuple[int, str, str]:
    """`python -m ...` in a process of its own: exit code, stdout, stderr."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


class Run:
    """`python -m reinforce run ...`, started at once, on the Ray at `address` or on a private one."""

    def __init__(
        self, shards: str, store: Path, recipe: Path, workers: str = "2", *more: str, address: str = ""
    ) -> None:
        self.mark = uuid.uuid4().hex
        environment = os.environ | {"RUN_MARK": self.mark, "RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled"}
        command = [sys.executable, "-m", "reinforce", "run", shards, "--store", str(store), "--recipe", str(recipe)]
        self.process = subprocess.Popen(
            [*command, "--workers", workers, "--device", "cpu", "--json", *more],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a group of its own, to send a signal to
        )

    def wait(self) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        out, err = self.process.communicate(timeout=400)
        return self.process.returncode, out, err

    def workers(self, *, at_a_shard: bool = False) -> list[int]:
        """Processes of the actors; or of those that are at a shard now, which Ray writes into their titles."""
        title = "ray::RemoteWorker.reinforce" if at_a_shard else "ray::RemoteWorker"
        return [pid for pid in marked(self.mark) if title in command_line(pid)]

    def kill_driver(self) -> None:
        self.process.kill()
        self.process.wait()

    def kill_everything(self) -> None:
        kill(marked(self.mark))
        self.process.wait()

    def gone(self) -> None:
        """Wait until no worker is alive, so that the next run is alone: they die with their driver within seconds. Two
        idle agents of Ray's stay for a while, and are removed."""
        deadline = time.monotonic() + 60
        while self.workers() and time.monotonic() < deadline:
            time.sleep(0.2)
        kill(marked(self.mark))


def free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


class Node:
    """`ray start`, in the foreground, with a mark on all its processes."""

    def __init__(self, temp: Path, *arguments: str) -> None:
        self.mark = uuid.uuid4().hex
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {
            "NODE_MARK": self.mark,
            "RAY_AUTH_MODE": "disabled",
            "PATH": f"{BIN}:{os.environ['PATH']}",
        }
        port = [f"--dashboard-agent-listen-port={free_port('127.0.0.1')}"]  # else all of a machine ask for the same one
        self.log = (temp / f"{self.mark}.log").open("w")
        self.process = subprocess.Popen(
            [str(BIN / "ray"), "start", "--block", "--disable-usage-stats", "--num-cpus=1", *port, *arguments],
            env=environment,
            stdout=self.log,
            stderr=self.log,
        )

    def started(self) -> bool:
        return "Ray runtime started" in Path(self.log.name).read_text()

    def pids(self) -> list[int]:
        return marked(self.mark, "NODE_MARK")

    def workers(self) -> list[int]:
        return [pid for pid in self.pids() if "ray::RemoteWorker" in command_line(pid)]

    def kill(self) -> None:
        kill(self.pids())
        self.process.wait()
        self.log.close()


class TwoNodes:
    """A Ray of a head and a second node, with one core each, on two addresses of loopback."""

    def __init__(self, folder: Path, *of_head: str) -> None:
        self.folder, self.of_head = folder, of_head
        self.port = free_port("127.0.0.2")
        self.address = f"127.0.0.2:{self.port}"

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self.head.kill()
        self.second.kill()

    def _start(self) -> None:
        temp = Path(f"/tmp/ray-{uuid.uuid4().hex[:8]}")  # short: Ray puts sockets there, whose paths have a limit
        temp.mkdir()
        asked = ("--head", "--node-ip-address=127.0.0.2", f"--port={self.port}", f"--temp-dir={temp}")
        self.head = Node(self.folder, *asked, *(self.of_head or ("--include-dashboard=false",)))
        wait_for(self.head.started, 120, "the head")
        self._start_second()

    def _start_second(self) -> None:
        self.second = Node(self.folder, f"--address={self.address}", "--node-ip-address=127.0.0.3")
        wait_for(self.second.started, 120, "the second node")

    def workers(self) -> list[int]:
        """Processes of the actors on both."""
        return self.head.workers() + self.second.workers()

    def lose_the_second(self, number: signal.Signals = signal.SIGKILL) -> None:
        """All its processes; or, asked to end, it does so itself. Another one takes its place."""
        if number == signal.SIGTERM:
            self.second.process.terminate()
            self.second.process.wait(60)
        self.second.kill()
        self._start_second()

    def lose_both(self) -> None:
        self.head.kill()
        self.second.kill()
        self._start()

    def idle(self) -> None:
        """Wait until no worker is alive: they die with their driver within seconds."""
        wait_for(lambda: not self.workers(), 60, "the workers' end")


def wait_for(condition, timeout_s: float, what: str, job: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if job and job.poll() is not None:
            raise AssertionError(f"the job ended while waiting for {what}: {job.stdout.read()}")
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s} s for {what}")
        time.sleep(0.05)


def connects(address: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((address, port)) == 0


def marked(mark: str, name: str = "RUN_MARK") -> list[int]:
    """Processes with the mark in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{name}={mark}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # gone meanwhile
    return found


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def kill(pids: list[int], number: signal.Signals = signal.SIGKILL) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
