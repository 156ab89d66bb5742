"""ComKD-CLIP from a store (arXiv 2408.04145), on a domain of ours: from a small CLIP to the table of its two modules.

Command: python -m pipelines comkd [--data FOLDER]; FOLDER holds clothing_train and clothing_test, without it the domain
         is the bundled emoji by Unicode block.
Machine: 2 CPU cores, no GPU.

1. A CLIP teacher and a CLIP student learn from captions of the domain: of clothing half of them name a wrong class; of
   the emoji the teacher is the bundled one.
2. The teacher's prompts learn the base classes, the first half, from 16 images each (`train adapt`).
3. The adapted teacher writes embeddings of every training image's views and the texts of all classes into a store.
4. The student learns from the store, unlabelled images of all classes, with and without each module, by 3 seeds. What
   varies with the seed is this step; teacher and store are the same for all.

A step that is done is not done again.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from reinforce.config import ClassSet, Recipe, Teacher, ViewSet
from reinforce.errors import ConfigError
from train.config import AdaptConfig, ComkdConfig, TrainConfig

CLASS_SET = "domain"
TEACHER = "local-dir:samples/models/teacher_vit"
VIEWS = ViewSet(num_views=4, view_px=64, scale=(0.3, 1.0), num_ops=1)

ADAPTATION = AdaptConfig(teacher=Teacher(model=TEACHER), classes="base", views=ViewSet(scale=(0.5, 1.0), num_ops=0))
PRETRAINING = TrainConfig(
    student="mamba_tiny",
    fresh_views=VIEWS,
    distill=0,
    global_batch_size=64,
    steps=200,
    warmup=20,
    precision="fp32",
    workers=0,
    report_to=[],
)
TRAINING = PRETRAINING.model_copy(update={"distill": 1.0, "lr": 5e-4, "comkd": ComkdConfig(class_set=CLASS_SET)})

VARIANTS: dict[str, dict[str, Any]] = {
    "KL only": {"align": 0.0, "attention": False},
    "KL + IFAlign": {"attention": False},
    "KL + EduAttention": {"align": 0.0},
    "full": {},
}
SCORES = ("base", "novel", "hm", "top1")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines comkd", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder with clothing_train and clothing_test; none: the emoji")
    parser.add_argument("--out", type=Path, help="folder that is written (default: runs/comkd_clothing, .._emoji)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of a variant")
    parser.add_argument("--steps", type=int, default=PRETRAINING.steps, help="length of each training")
    parser.add_argument(
        "--eval",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="another set with the same classes to test on, in CLIP_benchmark's layout; may be repeated",
    )
    asked = parser.parse_args(argv)
    out = asked.out or Path("runs/comkd_clothing" if asked.data else "runs/comkd_emoji")
    more: dict[str, str] = dict(text.partition("=")[::2] for text in asked.eval)
    if "" in more or not all(more.values()):
        raise ConfigError(f"--eval {' '.join(asked.eval)}: write NAME=FOLDER")
    found = journey(asked.data, out, asked.seeds, asked.steps, more)
    (out / "comkd.json").write_text(json.dumps(found, indent=1) + "\n")
    text = markdown(found)
    (out / "comkd.md").write_text(text)
    print(text, end="")


def journey(data: Path | None, out: Path, seeds: int, steps: int, more: dict[str, str]) -> dict[str, Any]:
    """All steps; `rows` of what it gives are scores by variant and evaluation set, a list over seeds."""
    from pipelines import domains

    domain = domains.of_clothing(data, out / "data") if data else domains.of_emoji(out / "data")
    sets = {"test": str(domain.labelled)} | {name: str(folder) for name, folder in domain.shifted.items()} | more
    captioned = PRETRAINING.model_copy(update={"steps": steps})
    starts = {"student": captioned}
    if data:
        starts["teacher"] = captioned.model_copy(update={"student": TEACHER.removeprefix("local-dir:")})
    _fit_all({name: (config, domain.captioned, None) for name, config in starts.items()}, out)
    teacher = Teacher(model=f"local-dir:{out / 'teacher/student'}" if data else TEACHER)
    prompts = out / "prompts.safetensors"
    adapted = _adapt(ADAPTATION.model_copy(update={"teacher": teacher}), domain.labelled, sets, prompts)
    images, store = f"{domain.labelled}/train/*.tar", str(out / "store.zarr")
    _reinforce(teacher.model_copy(update={"prompts": str(prompts)}), domain.classes, images, store, out)
    runs: dict[str, tuple[TrainConfig, str, str | None]] = {}
    for seed in range(1, seeds + 1):
        for variant, changes in VARIANTS.items():
            comkd = ComkdConfig(class_set=CLASS_SET, **changes)
            update = {"student": str(out / "student/student"), "seed": seed, "comkd": comkd, "steps": steps}
            config = TRAINING.model_copy(update=update | {"eval_sets": sets})
            runs[_slug(variant, seed)] = (config, images, store)
    reports = _fit_all(runs, out)
    rows = {"zero-shot student": {name: [scores] for name, scores in _zero_shot(out / "student/student", sets).items()}}
    for variant in VARIANTS:
        of_seeds = [reports[_slug(variant, seed)]["evaluated"] for seed in range(1, seeds + 1)]
        rows[variant] = {name: [evaluated[name] for evaluated in of_seeds] for name in sets}
    return {
        "classes": domain.classes,
        "steps": steps,
        "seeds": seeds,
        "teacher": adapted["evaluated"],
        "rows": rows,
    }


def _slug(variant: str, seed: int) -> str:
    return f"{variant.lower().replace(' + ', '_').replace(' ', '_')}_{seed}"


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
    cells = [_cell([run[score] for run in scores["test"]]) for score in SCORES]
    cells += [_cell([run["top1"] for run in scores[other]]) for other in others]
    return f"| {name} | " + " | ".join(cells) + " |"


def _cell(values: list[float]) -> str:
    """Mean in percent, and the sample standard deviation where there are several."""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{spread}"


def _fit_all(runs: dict[str, tuple[TrainConfig, str, str | None]], out: Path) -> dict[str, dict[str, Any]]:
    """The report of each training, made now or before; two at a time."""

    def fit(name: str) -> dict[str, Any]:
        config, shards, store = runs[name]
        folder = out / name
        asked = config.model_copy(update={"shards": shards, "store": store}).model_dump(mode="json")
        saved = folder / "config.json"
        if not (folder / "report.json").is_file() or json.loads(saved.read_text())["config"] != asked:
            recipe = _saved(config, out / f"{name}.json")
            print(f"fit {name}", flush=True)
            _python("train", "fit", "--shards", shards, *(("--store", store) if store else ()), "--recipe", recipe,
                    "--out", str(folder))  # fmt: skip
        report: dict[str, Any] = json.loads((folder / "report.json").read_text())
        return report

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(runs, pool.map(fit, runs), strict=True))


def _adapt(config: AdaptConfig, labelled: Path, sets: Mapping[str, str], prompts: Path) -> dict[str, Any]:
    config = config.model_copy(update={"eval_sets": dict(sets)})
    print("adapt", flush=True)
    told = _python(
        "train", "adapt", str(labelled), "--recipe", _saved(config, prompts.with_suffix(".json")), "--out",
        str(prompts), "--json",
    )  # fmt: skip
    report: dict[str, Any] = json.loads(told)
    return report


def _reinforce(teacher: Teacher, classes: list[str], images: str, store: str, out: Path) -> None:
    recipe = Recipe(
        name="comkd",
        teachers={"clip": teacher},
        view_sets={"base": VIEWS},
        captioners={},
        num_original_captions=0,
        class_sets={CLASS_SET: ClassSet(classnames=tuple(classes), templates=("{}.",))},
    )
    print("reinforce", flush=True)
    _python(
        "reinforce", "run", images, "--store", store, "--recipe", _saved(recipe, out / "recipe.json"), "--workers", "0"
    )


def _zero_shot(folder: Path, sets: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """The student before stage 2, with its own text tower."""
    import torch

    from train import students
    from train.evalsets import EvalSet
    from train.evaluate import embed_classes, embed_images
    from train.protocol import base_to_novel

    torch.set_num_threads(1)
    student, scores = students.create(str(folder)), {}
    student.model.eval()
    for name, url in sets.items():
        eval_set = EvalSet(url)
        loaded = eval_set.load(student.preprocess_cfg)
        classes = embed_classes(student, eval_set.prompts or [], 256)
        scores[name] = base_to_novel(embed_images(student, loaded.images, 256), torch.tensor(loaded.said), classes)
    return scores


def _saved(config: Any, path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(config.model_dump_json(indent=1) + "\n")
    return str(path)


def _python(*arguments: str) -> str:
    """What a command of this project prints on stdout; it runs on one thread. Raises ConfigError with its error."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("error:")] or done.stderr.splitlines()[-3:]
        raise ConfigError(f"python -m {' '.join(arguments)}: {' '.join(said)}")
    return done.stdout


if __name__ == "__main__":
    main(sys.argv[1:])
