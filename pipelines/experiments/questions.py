"""What a sceptic would ask of reinforcement, each question a grid of trainings on a labelled data set.

Command: python -m pipelines QUESTION --data PREFIX    (a labelled data set: pipelines/experiments/labelled.py)
Machine: 2 CPU cores; an hour or two each. All share teachers and stores (ready.py), and trainings that several ask for.
Result:  OUT/table.md, table.json and pictures; the numbers to expect are in docs/results.

Within a question all students see the same number of samples, at the settings of pipelines/lambda_sweep.py.
"""

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pipelines.experiments import charts, grid, ready
from pipelines.experiments.grid import Row, Table
from reinforce.errors import ConfigError
from train.config import TrainConfig, load_training
from train.evaluation.metrics import Metrics

METRICS = {"acc1": "top-1", "mean_per_class_recall": "mean per class", "coarse_acc1": "coarse top-1"}
REINFORCED = 0.75  # lambda of the students that learn from teachers, where lambda is not the question

# Seeds by length in steps and by lambda: more where it is decided whether teachers pay.
SEEDS = {400: {0.0: 5, 0.25: 3, 0.75: 5, 1.0: 3}, 800: {0.0: 3, 0.75: 3, 1.0: 3}}
STUDENTS = ("mamba_tiny", "mobileclip_s0_tiny", "vit_tiny")
FEATURE_WEIGHTS = (0.5, 2.0)


def lambda_sweep(training: TrainConfig, noise: str) -> list[Row]:
    """How much should a Mamba student listen to its teachers? DM-CLIP's first question."""
    share = (training.warmup or 0) / (training.steps or 1)  # of a training that is warm-up, whatever its length
    return [
        Row(
            group=f"{steps} steps, {_wrong(noise)}",
            label=f"λ = {weight:g}",
            name=f"{noise}_{steps}_{weight:g}",
            config=training.but(steps=steps, warmup=round(share * steps), distill=weight),
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
            name=f"{noise}_{student}_{weight:g}",
            config=training.but(student=student, distill=weight),
            num_seeds=3,
            against=f"{noise}_{student}_0" if weight else None,
        )
        for student in STUDENTS
        for weight in (0.0, REINFORCED)
    ]


def resolution(training: TrainConfig, noise: str) -> list[Row]:
    """Is a Mamba encoder better than MobileCLIP's where images are larger? DM-CLIP's second question; the milliseconds
    beside it are those of `clip-train latency mamba_tiny mobileclip_s0_tiny --size 64 --size 128 --size 256`."""
    return [
        Row(
            group=f"{size} px, {_wrong(noise)}",
            label=student,
            name=f"{noise}_{student}_{size}",
            config=training.but(student=student, force_image_size=size if size != 64 else None, distill=REINFORCED),
            num_seeds=3,
            against=f"{noise}_mobileclip_s0_tiny_{size}" if student == "mamba_tiny" else None,
        )
        for size in (64, 128)
        for student in ("mobileclip_s0_tiny", "mamba_tiny")
    ]


def encoder(training: TrainConfig, noise: str) -> list[Row]:
    """Does the Mamba encoder learn as much as the first one, in half its time? The milliseconds are those of
    `clip-train latency mamba_small mamba_small_v1 mobileclip_s1 --size 256 --size 512 --size 1024`."""
    return [
        Row(
            group=_wrong(noise),
            label=student,
            name=f"{noise}_{student}",
            config=training.but(student=student, distill=REINFORCED),
            num_seeds=3,
            against=f"{noise}_mamba_tiny_v1" if student == "mamba_tiny" else None,
        )
        for student in ("mamba_tiny_v1", "mamba_tiny")
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
            name=f"{noise}_{distill:g}_{feature_mse:g}",
            config=training.but(distill=distill, feature_mse=feature_mse),
            num_seeds=3,
            against=f"{noise}_0_0" if distill + feature_mse else None,
        )
        for label, distill, feature_mse in rows
    ]


def ladder(training: TrainConfig, noise: str) -> list[Row]:
    """Which rung of MobileCLIP's ladder pays? Each adds one thing to the one below: captions of a CoCa, distillation
    from one teacher, strong augmentation, a second teacher."""
    rungs: dict[str, dict[str, object]] = {
        "plain": {"distill": 0.0, "text_sets": ["original"], "view_set": "light", "teachers": ["teacher_0"]},
        "+ synthetic captions": {"text_sets": None},
        "+ distillation": {"distill": REINFORCED},
        "+ strong augmentation": {"view_set": "base"},
        "+ a second teacher": {"teachers": None},
    }
    rows = []
    for student in ("mamba_tiny", "vit_tiny"):
        config, below = training.but(student=student), None
        for number, (label, added) in enumerate(rungs.items()):
            config, name = config.but(**added), f"{noise}_{student}_{number}"
            rows.append(Row(f"{student}, {_wrong(noise)}", label, name, config, 3, below))
            below = name
    return rows


def how_many(training: TrainConfig, noise: str) -> list[Row]:
    """How many views and captions does a store need? MobileCLIP's answer is 5 and 2."""
    most = training.but(steps=1200, warmup=300, distill=REINFORCED)
    rows = []
    for what, numbers in (("num_views", (10, 5, 2, 1)), ("num_captions", (5, 2, 1))):
        for number in numbers:
            name, base = f"{noise}_{what}_{number}", f"{noise}_{what}_{numbers[0]}"
            against = base if number != numbers[0] else None
            label = f"{number} {what.removeprefix('num_')}"
            rows.append(Row(f"{what}, {_wrong(noise)}", label, name, most.but(**{what: number}), 2, against))
    return rows


CAPTIONED = ("ladder", "how_many")  # these ask for captions of a CoCa in the store
QUESTIONS: dict[str, Callable[[TrainConfig, str], list[Row]]] = {
    question.__name__: question
    for question in (lambda_sweep, many_students, encoder, resolution, feature_distance, ladder, how_many)
}


def main(name: str, argv: list[str]) -> None:
    """Run the question `name`, from the labelled data to the table."""
    options = _parser(name).parse_args(argv)
    out: Path = options.out or Path("runs") / Path(options.data).name / name
    usual = load_training("lambda_sweep")
    training = load_training("lambda_sweep", options.set)
    asked = {noise: QUESTIONS[name](training, noise) for noise in ready.NOISES}
    asked = {noise: [row for row in rows if options.only.search(row.name)] for noise, rows in asked.items()}
    if not any(asked.values()):
        raise ConfigError(f"--only {options.only.pattern}: in no row of {name} is that found; --only noisy finds some")
    made = ready.make(options.data, out.parent, options.split, options.at_once)
    stores = ready.captioned(made, out.parent, options.at_once) if name in CAPTIONED else made.stores
    rows = [
        replace(row, config=row.config.but(shards=made.shards[noise], store=stores[noise]))
        for noise, of_noise in asked.items()
        for row in of_noise
    ]
    trainings = out.parent / "trainings"
    table = grid.run(rows, usual, made.sets, options.split, options.seeds, trainings, options.at_once, "students")
    found = {"question": name, "data": options.data, "split": options.split, "teachers": made.teachers, "rows": table}
    groups = grid.grouped(table)
    text = _markdown(made.teachers, groups, options.split)
    out.mkdir(parents=True, exist_ok=True)
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
    charts.bars(out / "bars.png", groups, "acc1", f"top-1 on {split}", "percent")
    for number, (group, lines) in enumerate(groups.items()):
        charts.curves(out / f"curves_{number}.png", lines, f"{group}: top-1 on validation", "percent")


def _regex(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"'{text}' is no regular expression: {error}") from None


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
        help="folder that is written (default: runs/DATA/QUESTION); teachers, stores and trainings lie beside it",
    )
    add(
        "--split",
        choices=("validation", "test"),
        default="test",
        help="what is reported; choose settings on validation",
    )
    add("--seeds", type=int, default=99, help="at most so many trainings per row")
    add(
        "--only",
        type=_regex,
        default="",
        metavar="REGEX",
        help="rows whose name it is found in, as 'clean_400_(0|0.75)$'",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of all students, but for what the question itself varies; may be repeated",
    )
    add("--at-once", type=int, default=2, help="trainings side by side, one thread each (default: 2)")
    add("--json", action="store_true", help="print one JSON object")
    return parser
