"""What a training reports while it runs: its progress, and its curves as JSON lines and more."""

import json
import logging
import time
import uuid
from pathlib import Path
from typing import Any

from torch import Tensor

from reinforce.errors import MissingExtra
from reinforce.progress import Progress
from train.collapse import Watch
from train.config import LoopConfig

METRICS = "metrics.jsonl"
WANDB_ID = "wandb_id.txt"
SHOWN = 16  # pictures of a batch
_WORTH_TELLING = 0.05  # of the time, spent waiting for data
_NOT_OF_A_STEP = ("step", "samples_per_s", "data_wait_share")
_OF_A_COLLAPSE = ("spread", "image_cosine", "text_cosine")
log = logging.getLogger(__name__)


class Journal:
    """The curves of a run, in `folder`: `metrics.jsonl`, and what `report_to` names. `silent`: all ranks but one."""

    def __init__(
        self,
        folder: Path,
        config: LoopConfig,
        step: int,
        num_steps: int,
        samples_per_step: int,
        silent: bool = False,
    ) -> None:
        """`step`: the first of this run."""
        self._config, self._silent = config, silent
        self._num_steps, self._first, self._samples_per_step = num_steps, step, samples_per_step
        self._start = time.monotonic()
        self._wait_s = 0.0
        self.waits_for = "data"  # or what else the next step needs
        self._progress = Progress(num_steps, "step", done=step, silent=silent, waits_for=lambda: self.waits_for)
        self._watch = Watch()
        self.last_metrics: dict[str, float] = {}  # of the last step that a run before has written
        self.collapse: dict[str, float] | None = None  # of the step that was warned of, in this run or one before
        if silent:
            return
        self._file, lines = _resumed(folder / METRICS, step)
        for line in lines:
            if "loss" in line:
                self.last_metrics = {name: value for name, value in line.items() if name not in _NOT_OF_A_STEP}
            elif "collapse/spread" in line:
                self.collapse = {name.removeprefix("collapse/"): value for name, value in line.items()}
        self._tensorboard = _tensorboard(folder, step) if "tensorboard" in config.report_to else None
        self._wandb = _wandb(folder, config) if "wandb" in config.report_to else None

    def step(self, step: int, metrics: dict[str, float], wait_s: float) -> None:
        """Step number `step` is done. `wait_s`: how long it waited for its data."""
        self._wait_s += wait_s
        _, rate, wait = self.speed(step + 1).values()
        told = f"loss {metrics['loss']:.3f}, {rate:.0f} samples/s"
        told += f", spread {metrics['spread']:.2f}" if "spread" in metrics else ""
        self._progress.add(told + (f", {wait:.0%} waiting" if wait >= _WORTH_TELLING else ""))
        if (step + 1) % self._config.log_every_n_steps == 0 or step + 1 == self._num_steps:
            self.write(step + 1, {**metrics, "samples_per_s": rate, "data_wait_share": wait})
        if "spread" in metrics and self._watch.collapsed(step + 1, metrics["spread"]) and not self.collapse:
            self._warn(step + 1, {name: metrics[name] for name in _OF_A_COLLAPSE})

    def _warn(self, step: int, found: dict[str, float]) -> None:
        """Once in a training: the collapse goes into the curves, from where a run that goes on takes it up again."""
        self.collapse = {"step": step, **found}
        self.write(step, {f"collapse/{name}": value for name, value in found.items()})
        if not self._silent:
            log.warning(
                "step %d: this student tells its samples hardly apart: spread %.3f, mean cosine of different images "
                "%.3f, of different texts %.3f. It may come free again, so the training goes on. If spread stays so "
                "low, start it anew: with a lower lr, a longer warmup, or from weights that have learned "
                "(--student FOLDER); see 'Read the curves' in docs/training.md",
                *(step, found["spread"], found["image_cosine"], found["text_cosine"]),
            )

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """One point of each curve, after `step` steps."""
        if self._silent:
            return
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        if self._tensorboard:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(metrics, step=step)

    def pictures(self, step: int, images: Tensor, keys: list[str]) -> None:
        """Some of what the student sees at a step, where `report_to` can show it: uint8 (B, H, W, 3) and B names."""
        if self._silent:
            return
        images, keys = images[:SHOWN].cpu(), keys[:SHOWN]
        if self._tensorboard:
            self._tensorboard.add_images("batch/images", images, step, dataformats="NHWC")
            self._tensorboard.add_text("batch/keys", ", ".join(f"`{key}`" for key in keys), step)
        if self._wandb:
            import wandb

            shown = [wandb.Image(image.numpy(), caption=key) for image, key in zip(images, keys, strict=True)]
            self._wandb.log({"batch": shown}, step=step)

    def speed(self, step: int) -> dict[str, float]:
        """Of this run up to `step`: seconds, samples per second, share of the time that was spent waiting for data."""
        passed_s = max(time.monotonic() - self._start, 1e-9)
        samples = (step - self._first) * self._samples_per_step
        return {"seconds": passed_s, "samples_per_s": samples / passed_s, "data_wait_share": self._wait_s / passed_s}

    def close(self) -> None:
        self._progress.close()
        if self._silent:
            return
        self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


def check_reporters(config: LoopConfig) -> None:
    """Before any work. Raises MissingExtra where one that is asked for is not installed."""
    try:
        if "tensorboard" in config.report_to:
            import tensorboard  # noqa: F401
        if "wandb" in config.report_to:
            import wandb  # noqa: F401
    except ImportError as error:
        raise MissingExtra(
            f"{error.name} is not installed: pip install {error.name}, or leave it out of report_to"
        ) from None


def _resumed(path: Path, step: int) -> tuple[Any, list[dict[str, Any]]]:
    """The file of curves, without what a run that was stopped wrote after its last checkpoint; and its lines."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    path.write_text("".join(line + "\n" for line in kept))
    return path.open("a"), [json.loads(line) for line in kept]


def _tensorboard(folder: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)


def _wandb(folder: Path, config: LoopConfig) -> Any:
    import wandb

    # A training that goes on is the run that it was; another one in a folder of that name is another run.
    id_file = folder / WANDB_ID
    if not id_file.exists():
        id_file.write_text(f"{uuid.uuid4().hex[:16]}\n")
    return wandb.init(
        dir=str(folder),
        name=folder.name,
        config=config.model_dump(mode="json"),
        resume="allow",
        id=id_file.read_text().strip(),
    )
