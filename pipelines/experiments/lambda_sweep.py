"""How much should a Mamba student listen to its teachers? DM-CLIP's first question, on clean and on noisy captions.

Command: python -m pipelines lambda_sweep --data FOLDER   (clothing_train and clothing_test, see clothing.py)
Machine: 2 CPU cores. Two teachers learn from clean captions; one store is written for the clean tars and one for the
         noisy; for each, one student is trained per lambda and seed, all for the same number of steps.
Result:  OUT/table.md and OUT/table.json; the numbers to expect are in docs/results/lambda.md.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from pipelines.experiments import clothing, steps
from pipelines.lambda_sweep import VIEWS
from reinforce.config import Recipe, Teacher
from train.config import load_training

LAMBDAS = (0.0, 0.25, 0.75, 1.0)
NOISES = {"clean": 0.0, "noisy": 0.4}
NUM_TEACHERS = 2
TEACHER = {
    "student": "resnet_tiny",
    "distill": 0,
    "global_batch_size": 128,
    "steps": 900,
    "lr": 1e-3,
    "warmup": 50,
}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines lambda_sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with clothing_train and clothing_test")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/lambda_sweep"),
        help="folder that is written (default: runs/lambda_sweep)",
    )
    parser.add_argument("--seeds", type=int, default=3, help="trainings per lambda (default: 3)")
    parser.add_argument("--at-once", type=int, default=2, help="trainings side by side, one thread each")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    out: Path = options.out
    clothing.write(clothing.read(options.data), out, NOISES)
    training = load_training("lambda_sweep").but(eval_sets={"test": f"{out}/test"})
    from_clean = training.but(**TEACHER, shards=f"{out}/clean/*.tar")
    teachers = {f"teacher_{seed}": from_clean.but(seed=seed) for seed in range(NUM_TEACHERS)}
    found = steps.fit_all(teachers, out, "teachers", options.at_once)
    for noise in NOISES:
        steps.write_store(f"{out}/{noise}/*.tar", f"{out}/{noise}.zarr", _recipe(out), options.at_once)
    students = {
        _name(noise, weight, seed): training.but(
            shards=f"{out}/{noise}/*.tar", store=f"{out}/{noise}.zarr", distill=weight, seed=seed
        )
        for seed in range(options.seeds)
        for noise in NOISES
        for weight in LAMBDAS
    }
    found |= steps.fit_all(students, out, "students", options.at_once)
    top1 = {name: 100 * float(report["evaluated"]["test"]["top1"]) for name, report in found.items()}
    table = _table(top1, options.seeds)
    (out / "table.json").write_text(json.dumps(table, indent=1) + "\n")
    (out / "table.md").write_text(markdown(table))
    print(json.dumps(table) if options.json else markdown(table))


def _name(noise: str, weight: float, seed: int) -> str:
    return f"{noise}_lambda_{weight}_seed_{seed}"


def _recipe(out: Path) -> Recipe:
    return Recipe(
        name="lambda_sweep",
        teachers={f"conv_{i}": Teacher(model=f"local-dir:{out}/teacher_{i}/student") for i in range(NUM_TEACHERS)},
        view_sets={"base": VIEWS},
        captioners={},
    )


def _table(top1: dict[str, float], num_seeds: int) -> dict[str, Any]:
    """From top-1 in percent by the name of the training: by noise and lambda the mean and the spread over seeds, and
    the same of the gain, which is the difference to lambda = 0 with the same seed."""
    rows = []
    for noise, share in NOISES.items():
        plain = [top1[_name(noise, 0.0, seed)] for seed in range(num_seeds)]
        for weight in LAMBDAS:
            found = [top1[_name(noise, weight, seed)] for seed in range(num_seeds)]
            gained = [a - b for a, b in zip(found, plain, strict=True)]
            rows.append(
                {"wrong_captions": share, "lambda": weight, "top1": found}
                | {"mean": statistics.mean(found), "spread": _spread(found)}
                | {"gain": statistics.mean(gained), "gain_spread": _spread(gained)}
            )
    return {"teachers_top1": [top1[f"teacher_{i}"] for i in range(NUM_TEACHERS)], "seeds": num_seeds, "rows": rows}


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def markdown(table: dict[str, Any]) -> str:
    """The table as docs/results/lambda.md shows it."""
    lines = ["| wrong captions | λ | top-1 by seed | mean ± spread | against λ = 0, paired |", "|---|---|---|---|---|"]
    for row in table["rows"]:
        gain = f"{row['gain']:+.1f} ± {row['gain_spread']:.1f}" if row["lambda"] else ""
        found = ", ".join(f"{top1:.1f}" for top1 in row["top1"])
        mean = f"{row['mean']:.1f} ± {row['spread']:.1f}"
        lines.append(f"| {row['wrong_captions']:.0%} | {row['lambda']} | {found} | {mean} | {gain} |")
    return "\n".join(lines) + "\n"
