"""What a sceptic would ask of reinforcement, each question a grid of trainings on a labelled data set.

Command: python -m pipelines QUESTION --data PREFIX    (a labelled data set: pipelines/experiments/labelled.py)
Machine: 2 CPU cores; an hour or two each, besides teachers and stores, which all share (ready.py).
Result:  OUT/table.md, table.json and pictures; the numbers to expect are in docs/results.

Within a question all students see the same number of samples, at the settings of pipelines/lambda_sweep.py.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

from pipelines.experiments import charts, grid, ready
from pipelines.experiments.grid import Row, Table
from train.config import TrainConfig, load_training
from train.evaluation.metrics import Metrics

METRICS = {"top1": "top-1", "mean_per_class": "mean per class", "coarse_top1": "coarse top-1"}
REINFORCED = 0.75  # lambda of the students that learn from teachers, where lambda is not the question

# Seeds by length in steps and by lambda: more where it is decided whether teachers pay.
SEEDS = {400: {0.0: 5, 0.25: 3, 0.75: 5, 1.0: 3}, 800: {0.0: 3, 0.75: 3, 1.0: 3}}
STUDENTS = ("mamba_tiny", "mobileclip_s0_tiny", "vit_tiny")
FEATURE_WEIGHTS = (0.5, 2.0)


def lambda_sweep(training: TrainConfig, noise: str) -> list[Row]:
    """How much should a Mamba student listen to its teachers? DM-CLIP's first question."""
    return [
        Row(
            group=f"{steps} steps, {_wrong(noise)}",
            label=f"λ = {weight:g}",
            folder=f"{noise}_{steps}_{weight:g}",
            config=training.but(steps=steps, warmup=steps // 4, distill=weight),
            num_seeds=num_seeds,
            against=f"{noise}_{steps}_0" if weight else None,
        )
        for steps, seeds in SEEDS.items()
        for weight, num_seeds in seeds.items()
    ]


def many_students(training: TrainConfig, noise: str) -> list[Row]:
    """Does one store serve students of every kind? What each gains over captions alone."""
    return [
        Row(
            group=f"{student}, {_wrong(noise)}",
            label=f"λ = {weight:g}" if weight else "captions alone",
            folder=f"{noise}_{student}_{weight:g}",
            config=training.but(student=student, distill=weight),
            num_seeds=3,
            against=f"{noise}_{student}_0" if weight else None,
        )
        for student in STUDENTS
        for weight in (0.0, REINFORCED)
    ]


def feature_distance(training: TrainConfig, noise: str) -> list[Row]:
    """Is it better to imitate the teachers' features (CLIP-KD) than their similarities, or both?"""
    rows = [("captions alone", 0.0, 0.0), (f"λ = {REINFORCED:g}", REINFORCED, 0.0)]
    rows += [(f"features, {weight:g}", 0.0, weight) for weight in FEATURE_WEIGHTS]
    rows += [(f"λ = {REINFORCED:g} and features, {weight:g}", REINFORCED, weight) for weight in FEATURE_WEIGHTS]
    return [
        Row(
            group=_wrong(noise),
            label=label,
            folder=f"{noise}_{distill:g}_{feature_mse:g}",
            config=training.but(distill=distill, feature_mse=feature_mse),
            num_seeds=3,
            against=f"{noise}_0_0" if distill + feature_mse else None,
        )
        for label, distill, feature_mse in rows
    ]


QUESTIONS: dict[str, Callable[[TrainConfig, str], list[Row]]] = {
    question.__name__: question for question in (lambda_sweep, many_students, feature_distance)
}


def main(name: str, argv: list[str]) -> None:
    """Run the question `name`, from the labelled data to the table."""
    options = _parser(name).parse_args(argv)
    out: Path = options.out or Path("runs") / Path(options.data).name / name
    made = ready.make(options.data, out.parent, options.split, options.at_once)
    training = load_training("lambda_sweep", options.set)
    rows = [
        row
        for noise in ready.NOISES
        for row in QUESTIONS[name](training.but(shards=made.shards[noise], store=made.stores[noise]), noise)
        if re.search(options.only, row.folder)
    ]
    table = grid.run(rows, made.sets, options.split, options.seeds, out, options.at_once, "students")
    found = {"question": name, "data": options.data, "split": options.split, "teachers": made.teachers, "rows": table}
    groups = grid.grouped(table)
    text = _markdown(made.teachers, groups, options.split)
    (out / "table.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "table.md").write_text(text)
    _draw(groups, out, options.split)
    print(json.dumps(found) if options.json else text)


def _markdown(teachers: dict[str, Metrics], groups: dict[str, Table], split: str) -> str:
    """A table for each group, the teachers' own figures, and what it cost."""
    tables = [f"{group}:\n\n{grid.markdown(lines, METRICS)}" for group, lines in groups.items()]
    scores = "; ".join(
        f"{name} " + ", ".join(f"{heading} {100 * of[key]:.1f}" for key, heading in METRICS.items() if key in of)
        for name, of in teachers.items()
    )
    seconds = [s for lines in groups.values() for line in lines for s in line["seconds"]]
    cost = f"{len(seconds)} trainings, {sum(seconds) / 60:.0f} minutes of one core in all."
    return "\n".join([*tables, f"On {split}, teachers: {scores}.", cost, ""])


def _wrong(noise: str) -> str:
    return f"{ready.NOISES[noise]:.0%} of captions wrong"


def _draw(groups: dict[str, Table], out: Path, split: str) -> None:
    charts.bars(out / "bars.png", groups, "top1", f"top-1 on {split}", "percent")
    for number, (group, lines) in enumerate(groups.items()):
        charts.curves(out / f"curves_{number}.png", lines, f"{group}: top-1 on validation", "percent")


def _parser(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m pipelines {name}",
        description=f"{QUESTIONS[name].__doc__}\n\n{__doc__}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", required=True, metavar="PREFIX", help="tars in PREFIX_train, PREFIX_validation and PREFIX_test")
    add(
        "--out",
        type=Path,
        help="folder that is written (default: runs/DATA/QUESTION); teachers and stores lie beside it",
    )
    add(
        "--split",
        choices=("validation", "test"),
        default="test",
        help="what is reported; choose settings on validation",
    )
    add("--seeds", type=int, default=99, help="at most so many trainings per row")
    add("--only", default="", metavar="REGEX", help="rows whose folder's name it is found in, as 'clean_400_(0|0.75)$'")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of all students; may be repeated")
    add("--at-once", type=int, default=2, help="trainings side by side, one thread each (default: 2)")
    add("--json", action="store_true", help="print one JSON object")
    return parser
