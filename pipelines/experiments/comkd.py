"""ComKD-CLIP from a store, with small models: how much does each of its two modules add?

Command: python -m pipelines comkd [--data PREFIX], of a labelled data set (pipelines/experiments/labelled.py); without
         it the domain is the bundled emoji, and their classes are the Unicode blocks.
Machine: 2 CPU cores, no GPU.

The recipe, pipelines/comkd.py, is for models of any size. This experiment changes what small models need.

1. A CLIP teacher and a CLIP student learn from captions of the domain, the teacher for longer. For the emoji, the
   teacher is the bundled one.
2. The teacher's prompts learn the base classes (the first half of all) from 16 images each (`clip-train adapt`).
3. The adapted teacher writes into a store: embeddings of every training image's views, and of the texts of all classes.
4. The student learns from the store and from unlabelled images of all classes: with and without each module, with 3
   seeds. Only this step varies with the seed; teacher and store are the same for all.

Run again, it goes on where it stopped, and refuses trainings that were made with other settings.
"""

import argparse
import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipelines.comkd import CLASS_SET
from pipelines.experiments import domains, grid, steps
from reinforce import process
from reinforce.config import ClassSet, Recipe, Teacher, ViewSet
from reinforce.errors import ConfigError
from train import students
from train.comkd.adapt import adapt, load_adaptation
from train.comkd.base_to_novel import base_to_novel
from train.config import ComkdConfig, load_training
from train.evaluation.metrics import embed_classes, embed_images
from train.evaluation.sets import EvalSet

TEACHER = "local-dir:samples/models/teacher_vit"
VIEWS = ViewSet(num_views=4, view_px=64, scale=(0.3, 1.0), num_ops=1)
GENTLE = ViewSet(view_px=64, scale=(0.5, 1.0), num_ops=0)

# Our vocabulary has 6 tokens for "a photo of a", CLIP's 4.
SMALL_ADAPTATION = {"classes": "base", "num_tokens": 6, "views": GENTLE}
SMALL = {"student": "mamba_tiny", "global_batch_size": 32, "precision": "fp32", "workers": 0, "report_to": []}
STEPS = 600
# Settings of the CLIPs to start from, over TRAINING's.
FIRST_STUDENT = SMALL | {"comkd": None, "distill": 0.0, "lr": 7e-4, "fresh_views": VIEWS}
FIRST_TEACHER = FIRST_STUDENT | {
    "student": TEACHER.removeprefix("local-dir:"),
    "global_batch_size": 16,
    "lr": 5e-4,
    "fresh_views": GENTLE,
}
TEACHER_LENGTH = 8  # its training, as a multiple of a student's
SHARP = 0.03

SCORES = ("base", "novel", "hm", "acc1")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines comkd", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", metavar="PREFIX", help="tars in PREFIX_train and PREFIX_test (default: the bundled emoji)"
    )
    parser.add_argument("--out", type=Path, help="folder that is written (default: runs/DATA/comkd, runs/emoji/comkd)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings per variant (default: 3)")
    parser.add_argument(
        "--steps",
        type=int,
        default=STEPS,
        help=f"of each training of the student (default: {STEPS}); the teacher's is {TEACHER_LENGTH} times as long",
    )
    parser.add_argument("--at-once", type=int, default=2, help="trainings side by side, one thread each")
    parser.add_argument(
        "--eval",
        action="append",
        default=[],
        metavar="NAME=SET",
        help="another test set with the same classes, a folder in CLIP_benchmark's layout; may be repeated",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    out: Path = options.out or Path("runs") / Path(options.data or "emoji").name / "comkd"
    more = {name: url for name, _, url in (text.partition("=") for text in options.eval)}
    if not all([*more, *more.values()]):
        raise ConfigError(f"--eval {' '.join(options.eval)}: write NAME=SET")
    table = _Experiment(options.data, out, options.steps, options.at_once, more).run(range(1, options.seeds + 1))
    (out / "table.json").write_text(json.dumps(table, indent=1) + "\n")
    (out / "table.md").write_text(markdown(table))
    print(json.dumps(table) if options.json else markdown(table))


def variants(num_classes: int) -> dict[str, dict[str, Any]]:
    """What each row of the table changes.

    With the default C, the square root of the width, the attention over unit features is flat: all classes have almost
    the same weight. SHARP is a C at which they differ from the start. PromptKD's weight is 1000, for a KL divergence
    that is divided by the number of classes.
    """
    return {
        "KL only": {"align": 0.0, "attention": False},
        "KL + IFAlign": {"attention": False},
        "KL + IFAlign, as a mean": {"attention": False, "align_average": True},
        "KL + IFAlign, for each image": {"attention": False, "align_over": "width"},
        "KL + IFAlign, for each image, as a mean": {"attention": False, "align_over": "width", "align_average": True},
        "KL + EduAttention": {"align": 0.0},
        f"KL + EduAttention, C = {SHARP}": {"align": 0.0, "attention_scale": SHARP},
        "full": {},
        "full, PromptKD's weight": {"kl": 1000 / num_classes},
    }


class _Experiment:
    def __init__(self, data: str | None, out: Path, num_steps: int, at_once: int, more: Mapping[str, str]) -> None:
        self.out, self.num_steps, self.at_once = out, num_steps, at_once
        self.training = load_training("comkd")
        self.domain = domains.of_labelled(data, out / "data") if data else domains.of_emoji(out / "data")
        self.sets = {"test": str(self.domain.labelled)}
        self.sets |= {name: str(folder) for name, folder in self.domain.shifted.items()} | dict(more)
        self.learns_teacher = data is not None
        self.images, self.store = f"{self.domain.labelled}/train/*.tar", str(out / "store.zarr")

    def run(self, seeds: range) -> dict[str, Any]:
        """Run every step; gives the table. Its `rows` hold the scores of each seed, by variant and evaluation set."""
        captioned = self.training.but(shards=self.domain.captioned)
        starts = {"student": captioned.but(**FIRST_STUDENT, steps=self.num_steps)}
        if self.learns_teacher:
            starts["teacher"] = captioned.but(**FIRST_TEACHER, steps=TEACHER_LENGTH * self.num_steps)
        steps.fit_all(starts, self.out, "CLIPs to start from", self.at_once)
        adapted = self._adapt()
        steps.write_store(self.images, self.store, self._recipe, workers=0)
        begun = self.out / "student/student"
        changes_of = variants(len(self.domain.classes))
        own = SMALL | {"student": str(begun), "steps": self.num_steps, "eval_sets": self.sets}
        from_store = self.training.but(**own, shards=self.images, store=self.store)
        runs = {
            _slug(variant, seed): from_store.but(seed=seed, comkd=ComkdConfig(class_set=CLASS_SET, **changes))
            for seed in seeds
            for variant, changes in changes_of.items()
        }
        reports = steps.fit_all(runs, self.out, "students", self.at_once)
        rows = {"zero-shot student": {name: [found] for name, found in _zero_shot(begun, self.sets).items()}}
        for variant in changes_of:
            of_seeds = [reports[_slug(variant, seed)]["evaluated"] for seed in seeds]
            rows[variant] = {name: [evaluated[name] for evaluated in of_seeds] for name in self.sets}
        return {
            "classes": self.domain.classes,
            "steps": self.num_steps,
            "seeds": len(seeds),
            "teacher": adapted["evaluated"],
            "rows": rows,
        }

    @property
    def _teacher(self) -> Teacher:
        return Teacher(model=f"local-dir:{self.out}/teacher/student" if self.learns_teacher else TEACHER)

    @property
    def _prompts(self) -> Path:
        return self.out / "adapted/prompts.safetensors"

    @property
    def _recipe(self) -> Recipe:
        return Recipe(
            name="comkd",
            teachers={"clip": self._teacher.but(prompts=str(self._prompts))},
            view_sets={"base": VIEWS},
            captioners={},
            num_original_captions=0,
            class_sets={CLASS_SET: ClassSet(classnames=tuple(self.domain.classes), templates=("{}.",))},
        )

    def _adapt(self) -> dict[str, Any]:
        config = load_adaptation("comkd").but(
            **SMALL_ADAPTATION, teacher=self._teacher, data=str(self.domain.labelled), eval_sets=self.sets
        )
        job = {self._prompts.parent: partial(adapt, config, self._prompts)}
        return steps.side_by_side(job, "prompts of the teacher", 1)[0]


def _slug(variant: str, seed: int) -> str:
    return f"{re.sub('[^a-z]+', '_', variant.lower()).strip('_')}_{seed}"


def markdown(found: dict[str, Any]) -> str:
    """The table of the test set, and of top-1 on the other sets."""
    others = [name for name in found["rows"]["full"] if name != "test"]
    lines = [
        "| | base | novel | HM |" + "".join(f" {name}, top-1 |" for name in ("test", *others)),
        "|---|---|---|---|" + "---|" * (1 + len(others)),
    ]
    for kind in ("frozen", "adapted"):
        scores = {name: [by_kind[kind]] for name, by_kind in found["teacher"].items()}
        lines.append(_line(f"teacher, {kind}", scores, others))
    lines += [_line(variant, scores, others) for variant, scores in found["rows"].items()]
    return "\n".join(lines) + "\n"


def _line(name: str, scores: dict[str, list[dict[str, float]]], others: list[str]) -> str:
    cells = [grid.percent([run[score] for run in scores["test"]]) for score in SCORES]
    cells += [grid.percent([run["acc1"] for run in scores[other]]) for other in others]
    return f"| {name} | " + " | ".join(cells) + " |"


def _zero_shot(folder: Path, sets: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """The student before stage 2, with its own text tower."""
    process.torch_threads(1)
    student, scores = students.create(str(folder)), {}
    student.model.eval()
    for name, url in sets.items():
        eval_set = EvalSet(url)
        loaded = eval_set.load(student.preprocess_cfg)
        classes = embed_classes(student, eval_set.prompts or [], 256)
        scores[name] = base_to_novel(embed_images(student, loaded.images, 256), torch.tensor(loaded.truth), classes)
    return scores
