"""Commands of the project as steps of a journey: side by side, one thread each, what each says in a file of its own."""

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from reinforce.errors import ReinforceError

Step = tuple[Path, list[str]]  # the file that is there when it is done; what follows `python -m`


class StepFailed(ReinforceError):
    """A command of a journey ended with an error; its own words are in the message."""


def run(steps: Sequence[Step], title: str, at_once: int = 1) -> None:
    """Run those steps whose file is not there. Raises StepFailed with the last lines of the first that fails."""
    todo = [step for step in steps if not step[0].exists()]
    print(f"{title}: {len(todo) or 'none'} of {len(steps)} to do", file=sys.stderr)
    with (
        ThreadPoolExecutor(at_once) as pool,
        tqdm(total=len(todo), unit="step", disable=not sys.stderr.isatty()) as bar,
    ):
        ended = pool.map(lambda step: do(step[1], step[0].parent / "log.txt"), todo)
        try:
            for i, _ in enumerate(ended):
                bar.update()
                if bar.disable:
                    print(f"  {i + 1}/{len(todo)} {todo[i][0].parent}", file=sys.stderr)
        finally:
            pool.shutdown(cancel_futures=True)


def do(command: list[str], log: Path) -> None:
    """Run `python -m COMMAND` on one thread, what it says in `log`. Raises StepFailed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        ended = subprocess.run(
            [sys.executable, "-m", *command],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=False,
        )
    if ended.returncode:
        last = "\n".join(log.read_text().splitlines()[-5:])
        raise StepFailed(f"`python -m {' '.join(command)}` ended with {ended.returncode}: {last}\nAll is in {log}")
