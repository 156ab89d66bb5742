"""The loop: next batch, loss, step, log, evaluate, save."""

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from reinforce.errors import ConfigError, Diverged
from train import checkpoint, students
from train.config import TrainConfig
from train.data.loader import Batch, Loader
from train.data.sources import Source, source_of
from train.distributed import Ranks, joined
from train.evaluation.sets import EvalSet
from train.logs import Journal
from train.objective import ClipTrainee, Trainee, backward
from train.students import Student, scan

REPORT = "report.json"
_SOFTWARE = ("torch", "open_clip_torch", "timm", "numpy", "pillow")


def fit(config: TrainConfig, out: Path) -> dict[str, Any]:
    """Train a student into `out`: `config.json`, `metrics.jsonl`, `checkpoints/`, `student/` (an open_clip folder) and
    `report.json`, which is returned. Called again it goes on where it stopped, or finds that all is done.

    Raises ConfigError and StoreError before any work, Diverged where a loss is no number.
    """
    with joined(config.device) as ranks:
        return _Training(config, out, ranks).run()


def lr_at(step: int, num_steps: int, config: TrainConfig) -> float:
    """Linear from lr / warmup to lr in `warmup` steps, then a cosine to min_lr (open_clip's schedule)."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    share = (step - config.warmup) / max(1, num_steps - config.warmup)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * share))


class _Training:
    def __init__(self, config: TrainConfig, out: Path, ranks: Ranks) -> None:
        self.config, self.out, self.ranks = config, out, ranks
        _check_split(config, ranks)
        self.eval_sets = {name: EvalSet(url) for name, url in config.eval_sets.items()}
        self.source = source_of(config)
        self.student = students.create(config.student, config.seed)
        self.trainee = _trainee(self.student, self.source, config, self.eval_sets).to(ranks.device)
        if config.grad_checkpointing:
            self.student.model.set_grad_checkpointing(True)
        if config.torchcompile:
            self.student.model.compile()
        self.optimizer = torch.optim.AdamW(
            _groups(self.trainee, config.wd), lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps
        )
        self.average = _copy(self.trainee.lasting) if config.ema_decay else {}
        self.loader = Loader(
            self.source,
            self.student.image_px,
            self.student.tokenizer,
            config.global_batch_size,
            config.streams,
            config.seed,
            config.accum_freq,
            config.workers,
            ranks.rank,
            ranks.world_size,
        )
        self.num_steps = config.steps or max(1, round(config.epochs * self.loader.steps_per_epoch))

    def run(self) -> dict[str, Any]:
        found = checkpoint.latest(self.out / "checkpoints")
        step = 0
        if found:
            step = checkpoint.load(
                found, self.config, self.source.fingerprint, self.trainee, self.optimizer, self.average
            )
        if self.ranks.is_first:
            self.out.mkdir(parents=True, exist_ok=True)
            saved = {"config": self.config.model_dump(mode="json"), "commit": _commit(), "software": _software()}
            (self.out / "config.json").write_text(json.dumps(saved, indent=1) + "\n")
            print(
                f"{self.student.name} on {self.ranks.device} ({scan.describe(self.ranks.device)}): "
                f"{self.loader.order.num_samples} samples, {self.source.num_skipped} left out, "
                f"steps {step} to {self.num_steps} of {self.config.global_batch_size}",
                file=sys.stderr,
            )
        module: Trainee | DistributedDataParallel = self.trainee
        if self.ranks.world_size > 1:
            module = DistributedDataParallel(self.trainee)
        journal = Journal(self.out, self.config, step, self.num_steps, silent=not self.ranks.is_first)
        try:
            return self._loop(module, journal, step)
        finally:
            journal.close()

    def _loop(self, module: Trainee | DistributedDataParallel, journal: Journal, step: int) -> dict[str, Any]:
        if step == self.num_steps and (self.out / REPORT).is_file():
            done: dict[str, Any] = json.loads((self.out / REPORT).read_text())
            return done
        metrics: dict[str, float] = {}
        pieces = self.loader.batches(step, self.num_steps)
        with _stop_signals() as stop_asked:
            while step < self.num_steps:
                before = time.monotonic()
                batches = list(islice(pieces, self.config.accum_freq))
                wait_s = time.monotonic() - before
                metrics, stop = self._step(module, batches, step, stop_asked())
                journal.step(step, metrics, wait_s)
                step += 1
                last = step == self.num_steps
                if last or stop or step % self.config.save_every_n_steps == 0:
                    self._save(step)
                if stop and not last:
                    raise KeyboardInterrupt
                every = self.config.eval_every_n_steps
                if every and step % every == 0 and not last:
                    self._evaluate(step, journal)
        return self._report(step, metrics, self._evaluate(step, journal), journal)

    def _step(
        self, module: Trainee | DistributedDataParallel, batches: list[Batch], step: int, stop: bool
    ) -> tuple[dict[str, float], bool]:
        """One step of the optimiser: the means over ranks of its metrics, and whether any rank was asked to stop."""
        self.trainee.train()
        batches = [_on(batch, self.ranks.device) for batch in batches]
        self.optimizer.zero_grad(set_to_none=True)
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(step, self.num_steps, self.config)
        seed = ((self.config.seed * 1_000_003 + step) * self.ranks.world_size + self.ranks.rank) * len(batches)
        parts = backward(module, batches, self.trainee.loss, seed)
        norm = nn.utils.clip_grad_norm_(self.trainee.parameters(), self.config.grad_clip_norm or math.inf)
        told = torch.stack([*parts.values(), norm.detach(), torch.tensor(float(stop), device=self.ranks.device)])
        *values, asked = self.ranks.mean(told).tolist()
        metrics = dict(zip([*parts, "grad_norm"], values, strict=True))
        if not all(map(math.isfinite, values)):
            self._give_up(step, metrics, batches)
        self.optimizer.step()
        with torch.no_grad():
            self.student.model.logit_scale.clamp_(0, math.log(100))
            for name, tensor in self.trainee.lasting.state_dict().items() if self.average else ():
                if tensor.is_floating_point():
                    self.average[name].lerp_(tensor, 1 - self.config.ema_decay)
                else:
                    self.average[name].copy_(tensor)
        metrics |= {"lr": lr_at(step, self.num_steps, self.config)}
        metrics |= {"logit_scale": self.student.model.logit_scale.exp().item()}
        return metrics, asked > 0

    def _give_up(self, step: int, metrics: dict[str, float], batches: list[Batch]) -> None:
        keys = [key for batch in batches for key in batch.keys]
        path = self.out / f"diverged_step_{step}_rank_{self.ranks.rank}.json"
        path.write_text(json.dumps({"step": step, "metrics": {k: str(v) for k, v in metrics.items()}, "keys": keys}))
        bad = ", ".join(f"{name} {value}" for name, value in metrics.items() if not math.isfinite(value))
        raise Diverged(
            f"step {step}: {bad}; its {len(keys)} samples, from {keys[0]} to {keys[-1]}, are listed in {path}. "
            "No weight was changed by it. Lower lr or lengthen warmup; the newest checkpoint is from before"
        )

    def _evaluate(self, step: int, journal: Journal) -> dict[str, Any]:
        """Metrics of every evaluation set, of the averaged weights where there are such. The first rank's work."""
        if not self.eval_sets or not self.ranks.is_first:
            return {}
        with _weights(self.trainee.lasting, self.average):
            evaluated = self.trainee.evaluate(self.eval_sets)
        journal.write(step, _flat(evaluated))
        return evaluated

    def _save(self, step: int) -> None:
        if self.ranks.is_first:
            state = (self.trainee, self.optimizer, self.average)
            checkpoint.save(self.out / "checkpoints", step, self.config, self.source.fingerprint, *state)

    def _report(
        self, step: int, metrics: dict[str, float], evaluated: dict[str, Any], journal: Journal
    ) -> dict[str, Any]:
        report = {
            "student": self.student.name,
            "out": str(self.out),
            "steps": step,
            "samples_seen": step * self.config.global_batch_size,
            "samples": self.loader.order.num_samples,
            "skipped": self.source.num_skipped,
            "device": str(self.ranks.device),
            "scans": scan.describe(self.ranks.device),
            **journal.speed(step),
            "metrics": metrics,
            "evaluated": evaluated,
        }
        if self.ranks.is_first:
            with _weights(self.trainee.lasting, self.average):
                self.trainee.save(self.out / "student")
            (self.out / REPORT).write_text(json.dumps(report, indent=1) + "\n")
        return report


def _trainee(student: Student, source: Source, config: TrainConfig, eval_sets: dict[str, EvalSet]) -> Trainee:
    if config.comkd is None:
        return ClipTrainee(student, source.teachers, config)
    from train.comkd.trainee import ComkdTrainee

    return ComkdTrainee(student, source.teachers, config, eval_sets)


def _check_split(config: TrainConfig, ranks: Ranks) -> None:
    world = ranks.world_size
    if config.streams % world or (config.global_batch_size // world) % config.accum_freq:
        raise ConfigError(
            f"{world} ranks cannot share the work evenly: streams ({config.streams}) has to be a multiple of them, "
            f"and each rank's share of global_batch_size ({config.global_batch_size}) one of accum_freq "
            f"({config.accum_freq})"
        )


def _groups(trainee: nn.Module, wd: float) -> list[dict[str, Any]]:
    """Weight decay for matrices and kernels; none for gains, biases and `logit_scale`, as in open_clip."""
    parameters = [p for p in trainee.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": wd},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def _on(batch: Batch, device: torch.device) -> Batch:
    def move(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}

    return Batch(
        batch.keys,
        batch.images.to(device, non_blocking=True),
        move(batch.tokens),
        move(batch.image_targets),
        {name: move(said) for name, said in batch.text_targets.items()},
    )


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@contextmanager
def _weights(model: nn.Module, average: dict[str, Tensor]) -> Iterator[None]:
    """The model with its averaged weights, where there are such, for a while."""
    if not average:
        yield
        return
    own = _copy(model)
    model.load_state_dict(average)
    try:
        yield
    finally:
        model.load_state_dict(own)


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM has come; the step under way is finished and saved first."""
    came: list[int] = []
    kept = {number: signal.signal(number, lambda n, _: came.append(n)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _flat(evaluated: dict[str, Any]) -> dict[str, float]:
    return {f"{name}/{metric}": value for name, found in evaluated.items() for metric, value in found.items()}


def _commit() -> str | None:
    done = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None


def _software() -> dict[str, str]:
    return {package: version(package) for package in _SOFTWARE}
