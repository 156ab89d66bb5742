"""The bundled samples: real pictures, two small teachers, a small captioner, small students. Runs anywhere, offline.

Command: make reinforce (the store), make train (the store, if it is not there, then a student and what it is held to)
Machine: 2 CPU cores, no GPU.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from pipelines import steps
from reinforce.config import Captioner, Recipe, Teacher, ViewSet
from train import students
from train.config import TrainConfig
from train.evalsets import EvalSet
from train.evaluate import evaluate

SHARDS = "samples/train/{00000..00003}.tar"
HELDOUT = "samples/heldout/00000.tar"

RECIPE = Recipe(
    name="sample",
    teachers={
        "vit": Teacher(model="local-dir:samples/models/teacher_vit"),
        "conv": Teacher(model="local-dir:samples/models/teacher_conv"),
    },
    view_sets={"base": ViewSet(num_views=4, view_px=64)},
    # A small captioner is unsure of itself: at temperature 1, which the large ones take, it says too much that is odd.
    captioners={"coca": Captioner(model="local-dir:samples/models/coca", num_captions=3, temperature=0.5)},
)

TRAINING = TrainConfig(
    student="mamba_tiny",
    global_batch_size=128,
    epochs=20,
    warmup=20,
    precision="fp32",
    workers=1,
)
RECALLS = tuple(f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines sample", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--student", default=TRAINING.student, help=f"one of {', '.join(students.names())}, or a folder"
    )
    parser.add_argument("--store", default="stores/samples.zarr")
    parser.add_argument("--out", type=Path, help="folder that is written (default: runs/STUDENT)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    asked = parser.parse_args(argv)
    students.find(asked.student)
    out: Path = asked.out or Path("runs") / Path(asked.student).name
    print(f"the store {asked.store}: what is not there is written now", file=sys.stderr)
    command = ["reinforce", "run", SHARDS, "--store", asked.store, "--recipe", "sample", "--workers", "2"]
    steps.do(command, out / "reinforce.log")
    fit = ["train", "fit", "--recipe", "sample", "--shards", SHARDS, "--store", asked.store, "--student", asked.student]
    fit += ["--eval", f"heldout={HELDOUT}"]
    runs = {"distilled": [], "contrastive": ["--set", "distill=0"]}
    todo = [(out / n / "report.json", [*fit, "--out", str(out / n), *more]) for n, more in runs.items()]
    steps.run(todo, f"{asked.student}, distilled and, to compare, from captions alone", at_once=2)
    found: dict[str, Any] = {
        "untrained": evaluate(students.create(asked.student), {"heldout": EvalSet(HELDOUT)})["heldout"],
        **{name: json.loads((out / name / "report.json").read_text())["evaluated"]["heldout"] for name in runs},
    }
    print(json.dumps(found) if asked.json else _table(found, out))


def _table(found: dict[str, Any], out: Path) -> str:
    lines = [f"{HELDOUT}: recall in percent, 120 pictures", f"{'':12}" + "".join(f"{name:>19}" for name in RECALLS)]
    lines += [f"{n:12}" + "".join(f"{100 * m[name]:19.1f}" for name in RECALLS) for n, m in found.items()]
    lines += [
        "",
        f"Student: {out}/distilled/student, an open_clip folder; curves: tensorboard --logdir {out}",
        f"Next:    python -m train eval {out}/distilled/student heldout={HELDOUT}",
        f"         python -m train export {out}/distilled/student {out}/export",
    ]
    return "\n".join(lines)
