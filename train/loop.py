"""What every training does: next batch, step, watch for NaN, log, evaluate, save, stop when asked to, go on later.

A metric of a step is a number with a name. What `backward` gives goes into the curves, and that of the last step into
the report; logs.py decides what the bar shows beside the count. A GPU is waited for once a step, for all metrics.
"""

import json
import math
import shutil
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from reinforce import process, signals
from reinforce.errors import Diverged
from reinforce.lines import say
from reinforce.terminal import own_version
from train import checkpoint
from train.average import Average
from train.config import LoopConfig
from train.distributed import Ranks
from train.evaluation.metrics import Metrics
from train.folder import alone
from train.logs import Journal

_SOFTWARE = ("torch", "open_clip_torch", "timm", "numpy", "pillow")


class Piece(Protocol):
    """A batch, or a piece of one: what it is made of is the training's own affair."""

    @property
    def keys(self) -> list[str]: ...


P = TypeVar("P", bound=Piece)


@dataclass(frozen=True)
class Ended:
    """A training that has come to its end: metrics of its last step, and of its evaluation sets; and, where it was
    warned of a collapse, step and metrics of that moment."""

    metrics: dict[str, float]
    evaluated: dict[str, Metrics]
    speed: dict[str, float]
    collapse: dict[str, float] | None


class Training(ABC, Generic[P]):
    """One training, in the folder `out`. Subclasses set what stands here, and say how a step is computed."""

    config: LoopConfig
    out: Path
    ranks: Ranks
    fingerprint: str  # of the data that it learns from
    model: nn.Module  # what a checkpoint holds, the parameters that learn among it
    optimizer: Optimizer
    average: Average | None  # of the weights that are evaluated and kept
    num_steps: int
    samples_per_step: int  # of all ranks
    grad_clip_norm: float = math.inf
    remedy = "Lower lr"  # for a loss that is NaN or infinite

    @abstractmethod
    def describe(self) -> str:
        """What learns, where, and from what: for the line that a run begins with."""

    @abstractmethod
    def batches(self, step: int) -> Generator[list[P], None, None]:
        """From that of step `step` on, each in the pieces that it is computed in. Functions of the seed and the step,
        so that a resumed run sees what the whole one would."""

    @abstractmethod
    def lr_at(self, step: int) -> float: ...

    @abstractmethod
    def backward(self, pieces: list[P], step: int) -> dict[str, Tensor]:
        """Adds this rank's gradients to the parameters. Gives the step's metrics, `loss` among them, each a ()."""

    def after_step(self) -> None:
        """What there is to do when the optimiser has changed the weights."""

    def show(self, pieces: list[P], step: int, journal: Journal) -> None:
        """Put the pictures of a batch into the journal, where there are such."""

    @abstractmethod
    def evaluate(self) -> dict[str, Metrics]:
        """Metrics of every evaluation set, of the model as it is."""

    def resume(self) -> int:
        """Load the newest checkpoint, where there is one. Gives the step to go on with.

        Raises ConfigError where it belongs to another training, Corrupt where it cannot be read.
        """
        found = checkpoint.latest(self.out / "checkpoints")
        if not found:
            return 0
        return checkpoint.load(found, self.config, self.fingerprint, self.model, self.optimizer, self.average)

    def run(self, step: int) -> Ended:
        """From step `step` to the last. Asked to stop by SIGINT or SIGTERM, it saves and raises KeyboardInterrupt.

        Raises Diverged where a loss, or a weight that would be saved, is NaN or infinite, ConfigError where another
        process trains into the same folder.
        """
        process.keep_memory()
        try:
            with alone(self.out) if self.ranks.is_first else nullcontext():
                return self._run(step)
        except OSError as error:
            error.filename = error.filename or str(self.out)  # a full disk does not say which it is
            raise

    def _run(self, step: int) -> Ended:
        if self.ranks.is_first:
            saved = {"config": self.config.model_dump(mode="json"), "commit": _commit(), "software": _software()}
            (self.out / "config.json").write_text(json.dumps(saved, indent=1) + "\n")
            say(
                f"{self.describe()}, steps {step} to {self.num_steps}, {self.samples_per_step} samples each",
                file=sys.stderr,
            )
        journal = Journal(
            self.out, self.config, step, self.num_steps, self.samples_per_step, silent=not self.ranks.is_first
        )
        try:
            metrics = self._steps(step, journal)
            evaluated = self._evaluate(self.num_steps, journal)
            return Ended(metrics, evaluated, journal.speed(self.num_steps), journal.collapse)
        finally:
            journal.close()

    def averaged(self) -> AbstractContextManager[None]:
        """The model with its averaged weights, where there are such, for a while."""
        return self.average.in_place() if self.average else nullcontext()

    def _steps(self, step: int, journal: Journal) -> dict[str, float]:
        """Gives the metrics of the last step. Asked to stop, it ends the step under way; but where it waits for data,
        evaluates, or a step takes too long, it stops there. What is saved is what it was before that step."""
        metrics = journal.last_metrics  # of a run before, where no step is left
        first = saved = step
        # Closed whatever happens: an exception on its way out keeps it alive, and with it the processes of its loader.
        with signals.taken(), closing(self.batches(step)) as batches:
            try:
                while step < self.num_steps:
                    before, journal.waits_for = time.monotonic(), "data"
                    pieces = next(batches)
                    journal.waits_for = "the step to be computed"
                    wait_s = time.monotonic() - before
                    if step == first:
                        self.show(pieces, step, journal)
                    with signals.finishing() as asked:
                        metrics, stop = self._gradients(pieces, step, asked())
                        with signals.whole():
                            self._update(step)
                            journal.step(step, metrics, wait_s)
                            step += 1
                            last = step == self.num_steps
                            # Of several ranks, the others have to hear of it in the next step.
                            stop = stop or (asked() and self.ranks.world_size == 1)
                            if last or stop or step % self.config.save_every_n_steps == 0:
                                self._save(step)
                                saved = step
                    if stop and not last:
                        raise signals.Stopped
                    every = self.config.eval_every_n_steps
                    if every and step % every == 0 and not last:
                        self._evaluate(step, journal)
            except (KeyboardInterrupt, RuntimeError):  # the latter where another rank has ended before this one
                if signals.number() and step > saved:
                    with signals.whole():
                        self._save(step)
                raise
        return metrics

    def _gradients(self, pieces: list[P], step: int, stop: bool) -> tuple[dict[str, float], bool]:
        """Those of a step: the means over ranks of its metrics, and whether any rank was asked to stop."""
        self.optimizer.zero_grad(set_to_none=True)
        parts = self.backward(pieces, step)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip_norm)
        mine = torch.stack([*parts.values(), norm.detach(), torch.full((), float(stop), device=self.ranks.device)])
        *values, asked = self.ranks.mean(mine).tolist()
        metrics = dict(zip([*parts, "grad_norm"], values, strict=True))
        if not all(map(math.isfinite, values)):
            self._give_up(step, metrics, pieces)
        return metrics | {"lr": self.lr_at(step)}, asked > 0

    def _update(self, step: int) -> None:
        """One step of the optimiser."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr_at(step)
        self.optimizer.step()
        self.after_step()
        if self.average:
            self.average.update(step)

    def _give_up(self, step: int, metrics: dict[str, float], pieces: list[P]) -> None:
        keys = [key for piece in pieces for key in piece.keys]
        self.out.mkdir(parents=True, exist_ok=True)  # on another machine than the first rank's it is not there
        path = self.out / f"diverged_step_{step}_rank_{self.ranks.rank}.json"
        path.write_text(json.dumps({"step": step, "metrics": {k: str(v) for k, v in metrics.items()}, "keys": keys}))
        bad = ", ".join(f"{name} {value}" for name, value in metrics.items() if not math.isfinite(value))
        raise Diverged(
            f"step {step}: {bad}; its {len(keys)} samples, from {keys[0]} to {keys[-1]}, are listed in {path}. "
            f"No weight was changed by it. {self._advice()}"
        )

    def _advice(self) -> str:
        held = checkpoint.latest(self.out / "checkpoints")
        return self.remedy + ("; the newest checkpoint is from before" if held else "")

    def _evaluate(self, step: int, journal: Journal) -> dict[str, Metrics]:
        """Of the averaged weights, where there are such. The first rank's work."""
        if not self.ranks.is_first:
            return {}
        journal.waits_for = "the evaluation"
        with self.averaged():
            evaluated = self.evaluate()
        if evaluated:
            journal.write(step, _flat(evaluated))
        return evaluated

    def _save(self, step: int) -> None:
        """Raises Diverged where a weight is NaN or infinite, which the loss before the update could not tell."""
        if bad := checkpoint.not_finite(self.model, self.average):
            raise Diverged(f"step {step - 1}: it made {bad} NaN or infinite; nothing of it was saved. {self._advice()}")
        if self.ranks.is_first:
            state = (self.model, self.optimizer, self.average)
            checkpoint.save(self.out / "checkpoints", step, self.config, self.fingerprint, *state)


def _flat(evaluated: dict[str, Metrics]) -> dict[str, Any]:
    """Without counts, which are the same at every step, and no curve."""
    return {
        f"{name}/{metric}": value
        for name, found in evaluated.items()
        for metric, value in found.items()
        if not metric.startswith("num")
    }


def _commit() -> str | None:
    """The commit of a checkout; of an installed package there is none, whatever repository it lies in."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists() or not shutil.which("git"):
        return None
    done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _software() -> dict[str, str]:
    return {"clip-reinforce": own_version()} | {package: version(package) for package in _SOFTWARE}
