"""The real commands: in this process, in one of their own, and in processes that can be found and killed, because all
of a run carry a mark in their environment."""

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import typer
from typer.testing import CliRunner

ROOT = Path(__file__).parent.parent


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
    """`python -m reinforce run ...` on a private local Ray, started at once."""

    def __init__(self, shards: str, store: Path, recipe: Path, workers: str = "2", *more: str) -> None:
        self.mark = uuid.uuid4().hex
        environment = os.environ | {"RUN_MARK": self.mark, "RAY_ADDRESS": ""}
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


def kill(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
