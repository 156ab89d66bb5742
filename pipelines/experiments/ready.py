"""A labelled data set made ready for experiments: tars with right and with wrong captions, teachers, stores.

All experiments on one data set share this folder, so that teachers and stores are made once. Teachers learn from right
captions only, as in practice they learn from better data than their students. They are convolutional, of 6.8 M weights.
"""

from dataclasses import dataclass
from pathlib import Path

from pipelines.experiments import labelled, steps
from pipelines.lambda_sweep import VIEWS
from reinforce.config import Recipe, Teacher
from train.config import load_training
from train.evaluation.metrics import Metrics

CLEAN, NOISY = "clean", "noisy"
NOISES = {CLEAN: 0.0, NOISY: 0.4}  # shares of wrong captions
NUM_TEACHERS = 2
TEACHER = {
    "student": "resnet_tiny",
    "distill": 0,
    "global_batch_size": 64,
    "steps": 700,
    "lr": 1e-3,
    "warmup": 70,
    "eval_every_n_steps": None,
}


@dataclass(frozen=True)
class Ready:
    """`shards` and `stores` by the kind of captions, `sets` the evaluation sets by split, `teachers` their scores on
    the split that was asked for."""

    shards: dict[str, str]
    stores: dict[str, str]
    sets: dict[str, str]
    teachers: dict[str, Metrics]


def make(prefix: str, out: Path, split: str, at_once: int) -> Ready:
    """Write into `out` what is not there yet. Raises ConfigError where the data are not there, StepFailed."""
    labelled.write(labelled.read(prefix), out, NOISES)
    shards = {noise: f"{out}/{noise}/*.tar" for noise in NOISES}
    stores = {noise: f"{out}/{noise}.zarr" for noise in NOISES}
    sets = {part: f"{out}/{part}" for part in ("validation", "test")}
    training = load_training("lambda_sweep").but(**TEACHER, shards=shards[CLEAN], eval_sets={split: sets[split]})
    asked = {f"teacher_{seed}": training.but(seed=seed) for seed in range(NUM_TEACHERS)}
    reports = steps.fit_all(asked, out, "teachers", at_once)
    for noise in NOISES:
        steps.write_store(shards[noise], stores[noise], _recipe(out, list(asked)), at_once)
    return Ready(shards, stores, sets, {name: report["evaluated"][split] for name, report in reports.items()})


def _recipe(out: Path, teachers: list[str]) -> Recipe:
    return Recipe(
        name="labelled",
        teachers={name: Teacher(model=f"local-dir:{out}/{name}/student") for name in teachers},
        view_sets={"base": VIEWS},
        captioners={},
    )
