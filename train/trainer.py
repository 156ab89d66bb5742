"""`fit`: a student learns from tars and what a store knows of them."""

import json
import logging
import math
import os
import sys
from collections.abc import Generator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from reinforce.errors import ConfigError
from reinforce.lines import say
from train import students
from train.average import Average
from train.config import TrainConfig
from train.data.loader import Batch, Loader
from train.data.mixture import source_of
from train.data.sources import Source
from train.distributed import Ranks, joined
from train.evaluation.metrics import Metrics
from train.evaluation.sets import EvalSet
from train.folder import check_folder, say_ended
from train.logs import Journal, check_reporters
from train.loop import Ended, Training
from train.objective import ClipTrainee, Trainee, backward
from train.students import Student, scan

REPORT = "report.json"
log = logging.getLogger(__name__)


def fit(config: TrainConfig, out: Path) -> dict[str, Any]:
    """Train a student into `out`: `config.json`, `metrics.jsonl`, `checkpoints/`, `student/` (an open_clip folder) and
    `report.json`, which is returned. Called again it goes on where it stopped, or finds that all is done; sets that it
    was not evaluated on before are then evaluated, and a `student/` that is gone is written again.

    Raises ConfigError and StoreError before any work, Diverged where a loss is NaN or infinite.
    """
    check_folder(out)
    with joined(config.device) as ranks:
        training = _Fit(config, out, ranks)
        step = training.resume()
        if step == training.num_steps and (report := _report_of(out)):
            return training.done(report)
        if training.student.scans and ranks.is_first:
            say(scan.describe(ranks.device), file=sys.stderr)
        return training.report(training.run(step))


def lr_at(step: int, num_steps: int, config: TrainConfig) -> float:
    """Linear from lr / warm-up to lr in the warm-up's steps, then a cosine to min_lr (open_clip's schedule)."""
    warmup = warmup_steps(num_steps, config)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    share = (step - warmup) / max(1, num_steps - warmup)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * share))


def warmup_steps(num_steps: int, config: TrainConfig) -> int:
    return min(num_steps // 10, 1000) if config.warmup is None else config.warmup


class _Fit(Training[Batch]):
    remedy = "Lower lr or lengthen warmup"

    def __init__(self, config: TrainConfig, out: Path, ranks: Ranks) -> None:
        self.config: TrainConfig = config
        self.out, self.ranks = out, ranks
        check_reporters(config)
        _check_split(config, ranks)
        self.eval_sets = {name: EvalSet(url, files=config.caption_files) for name, url in config.eval_sets.items()}
        self.source = source_of(config)
        self.fingerprint = self.source.fingerprint
        self.student = students.create(config.student, config.seed, config.force_image_size)
        self.model: Trainee = _trainee(self.student, self.source, config, self.eval_sets).to(ranks.device)
        if config.grad_checkpointing:
            self.student.model.set_grad_checkpointing(True)
        if config.torchcompile:
            self.student.model.compile()
        self.optimizer = torch.optim.AdamW(
            _groups(self.model, config.wd), lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps
        )
        self.average = Average(self.model.lasting, lambda _: 1 - config.ema_decay) if config.ema_decay else None
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
        if warmup_steps(self.num_steps, config) > self.num_steps:  # of as many steps, the last has lr
            log.warning(
                "warm-up takes %d steps and the training %d: the learning rate never reaches lr; --set warmup=%d",
                *(config.warmup, self.num_steps, self.num_steps // 10),
            )
        self.samples_per_step = config.global_batch_size
        self.grad_clip_norm = config.grad_clip_norm or math.inf
        self.module = DistributedDataParallel(self.model) if ranks.world_size > 1 else self.model

    def describe(self) -> str:
        return (
            f"{self.student.name} on {self.ranks.device}: "
            f"{self.loader.order.num_samples} samples, {self.source.num_skipped} left out"
        )

    def batches(self, step: int) -> Generator[list[Batch], None, None]:
        with closing(self.loader.batches(step, self.num_steps)) as pieces:
            while batch := list(islice(pieces, self.config.accum_freq)):
                yield batch

    def lr_at(self, step: int) -> float:
        return lr_at(step, self.num_steps, self.config)

    def backward(self, pieces: list[Batch], step: int) -> dict[str, Tensor]:
        self.model.train()
        pieces = [piece.map(lambda x: x.to(self.ranks.device, non_blocking=True)) for piece in pieces]
        seed = ((self.config.seed * 1_000_003 + step) * self.ranks.world_size + self.ranks.rank) * len(pieces)
        metrics = backward(self.module, pieces, self.model.loss, seed % 2**63)  # torch takes seeds below 2**64
        return metrics | {"logit_scale": self.student.model.logit_scale.detach().exp()}

    @torch.no_grad()
    def after_step(self) -> None:
        self.student.model.logit_scale.clamp_(0, math.log(100))

    def show(self, pieces: list[Batch], step: int, journal: Journal) -> None:
        journal.pictures(step, pieces[0].images, pieces[0].keys)

    def evaluate(self) -> dict[str, Metrics]:
        return self.model.evaluate(self.eval_sets) if self.eval_sets else {}

    def report(self, ended: Ended) -> dict[str, Any]:
        """Keep the student, and what there is to say of it."""
        report = {
            "student": self.student.name,
            "out": str(self.out),
            "steps": self.num_steps,
            "samples_seen": self.num_steps * self.config.global_batch_size,
            "samples": self.loader.order.num_samples,
            "skipped": self.source.num_skipped,
            "device": str(self.ranks.device),
            "scans": scan.describe(self.ranks.device) if self.student.scans else None,
            **ended.speed,
            "metrics": ended.metrics,
            "collapse": ended.collapse,
            "eval_sets": self._addresses,
            "evaluated": ended.evaluated,
        }
        if self.ranks.is_first:
            self._keep()
            self._write(report)
        return report

    def done(self, report: dict[str, Any]) -> dict[str, Any]:
        """The report of a training that had come to its end before, with the sets that are new to it."""
        if self.ranks.is_first:
            say_ended(self.out)
            if not (self.out / "student").exists():
                say(f"{self.out}/student was gone, and is written again from the last checkpoint", file=sys.stderr)
                self._keep()
        # Reports written before there was `eval_sets` name their sets, and not where these lie.
        known = report.setdefault("eval_sets", {n: self._addresses.get(n) for n in report["evaluated"]})
        new = {name: url for name, url in self._addresses.items() if known.get(name) != url}
        if new and self.ranks.is_first:
            with self.averaged():
                report["evaluated"] |= self.model.evaluate({name: self.eval_sets[name] for name in new})
            known |= new
            self._write(report)
        return report

    def _keep(self) -> None:
        with self.averaged():
            self.model.save(self.out / "student")

    @property
    def _addresses(self) -> dict[str, str]:
        """Of the evaluation sets, as they are saved."""
        return dict(self.config.model_dump(mode="json")["eval_sets"])

    def _write(self, report: dict[str, Any]) -> None:
        partial = self.out / f"{REPORT}.partial"
        partial.write_text(json.dumps(report, indent=1) + "\n")
        os.replace(partial, self.out / REPORT)  # whole or not at all: a run that is killed here must not break the next


def _report_of(out: Path) -> dict[str, Any] | None:
    """Of a training that has come to its end; None where there is none, or it is damaged and has to be made again."""
    try:
        report = json.loads((out / REPORT).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return report if isinstance(report, dict) else None


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
