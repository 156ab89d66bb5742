"""The folder of a training: nothing else lies there, and one process at a time works in it."""

import fcntl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reinforce.errors import ConfigError
from reinforce.lines import say

_LOGS = (".txt", ".log", ".out", ".err")
_OF_A_TRAINING = ("metrics.jsonl", "checkpoints/step_*.safetensors", "diverged_step_*.json", "tensorboard")


def check_folder(out: Path) -> None:
    """Raises ConfigError where a training would put its files among those of something else, such as a data set.

    Logs do not count, which a shell or a scheduler keeps of what a command says, nor do empty files: a training that is
    killed as it begins may leave both.
    """
    if out.is_file():
        raise ConfigError(f"{out} is a file, and a training is a folder; give another --out")
    paths = [path for path in out.iterdir() if path.suffix not in _LOGS] if out.is_dir() else []
    held = sorted(path.name for path in paths if path.is_dir() or path.lstat().st_size)
    if held and not _is_a_training(out):
        raise ConfigError(
            f"{out} holds other things, such as {held[0]}, and no training; give another --out, or an empty folder"
        )


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Make the folder of a training, and keep others out as long as this process is in it. Raises ConfigError where one
    is there already. The lock ends with the process, however that ends, and its loader's processes do not hold it."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ConfigError(f"another process trains into {out}; wait for its end, or give another --out") from None
        except OSError:
            pass  # a file system without locks keeps nobody out
        yield


def say_ended(out: Path) -> None:
    """Of a training that is run again after its end: its report is shown, and is no news."""
    say(f"{out}: this training came to its end before; for a new one give another --out", file=sys.stderr)


def _is_a_training(out: Path) -> bool:
    """Whether a training has begun in this folder, even if it was killed as it wrote its first file.

    `config.json` is a common name, so that its first words count.
    """
    config = out / "config.json"
    return (config.is_file() and config.read_text(errors="replace").startswith('{\n "config": {')) or any(
        next(out.glob(pattern), None) for pattern in _OF_A_TRAINING
    )
