"""The bundled samples from store to student, and what the student is compared with.

Command: make train
Machine: 2 CPU cores, no GPU; about 5 minutes.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from pipelines.experiments import bundled, steps
from reinforce.recipes import load_recipe
from reinforce.terminal import typed
from train import students
from train.config import load_training
from train.evaluation.metrics import evaluate
from train.evaluation.sets import EvalSet

SHARDS = "samples/train/{00000..00003}.tar"
HELDOUT = "samples/heldout/00000.tar"
RECALLS = tuple(f"{way}_retrieval_recall@{k}" for way in ("text", "image") for k in (1, 5, 10))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines sample", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    training = load_training("sample")
    parser.add_argument(
        "--student", default=training.student, help=f"one of {', '.join(students.names())}, or a folder"
    )
    parser.add_argument("--store", default="stores/samples.zarr")
    parser.add_argument("--out", type=Path, help="folder that is written (default: runs/STUDENT)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    asked = parser.parse_args(argv)
    bundled()
    students.find(asked.student)
    out: Path = asked.out or Path("runs") / Path(asked.student).name
    print(f"the store {asked.store}: what is missing is written now", file=sys.stderr)
    steps.write_store(SHARDS, asked.store, load_recipe("sample"), workers=2)
    training = training.but(shards=SHARDS, student=asked.student, store=asked.store, eval_sets={"heldout": HELDOUT})
    runs = {"distilled": training, "contrastive": training.but(distill=0)}
    reports = steps.fit_all(runs, out, f"{asked.student}, distilled and, to compare, from captions alone", at_once=2)
    found: dict[str, Any] = {
        "untrained": evaluate(students.create(asked.student), {"heldout": EvalSet(HELDOUT)})["heldout"],
        **{name: report["evaluated"]["heldout"] for name, report in reports.items()},
    }
    print(json.dumps(found) if asked.json else _table(found, out))


def _table(found: dict[str, Any], out: Path) -> str:
    heads = "".join(f"{name.replace('_retrieval_recall', ' retrieval'):>20}" for name in RECALLS)
    lines = [f"{HELDOUT}: recall in percent, 120 pictures", f"{'':12}{heads}"]
    lines += [f"{n:12}" + "".join(f"{100 * m[name]:20.1f}" for name in RECALLS) for n, m in found.items()]
    lines += [
        "",
        f"Student: {out}/distilled/student, an open_clip folder; curves: tensorboard --logdir {out}",
        f"Next:    {typed('clip-train')} eval {out}/distilled/student heldout={HELDOUT}",
        f"         {typed('clip-train')} export {out}/distilled/student {out}/export",
    ]
    return "\n".join(lines)
