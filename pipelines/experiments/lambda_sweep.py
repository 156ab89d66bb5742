"""How much should a Mamba student listen to its teachers? DM-CLIP's first question, with right and with wrong captions.

Command: python -m pipelines lambda_sweep --data PREFIX    (a labelled data set: pipelines/experiments/labelled.py)
Machine: 2 CPU cores; about two hours, most of it once for each data set and shared (pipelines/experiments/ready.py).
Result:  OUT/lambda_sweep/table.md, table.json, and pictures; the numbers to expect are in docs/results/lambda.md.

A student for each lambda, kind of captions, length and seed. Of one length, all see the same number of samples.
"""

import argparse
import json
from pathlib import Path

from pipelines.experiments import charts, grid, ready, steps
from pipelines.experiments.grid import Row, Table
from train.config import TrainConfig, load_training

# Seeds by length in steps and by lambda: more where it is decided whether teachers pay.
SEEDS = {400: {0.0: 5, 0.25: 3, 0.75: 5, 1.0: 3}, 800: {0.0: 3, 0.75: 3, 1.0: 3}}
METRICS = {"top1": "top-1", "mean_per_class": "mean per class", "coarse_top1": "coarse top-1"}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines lambda_sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    steps.add_options(parser)
    parser.add_argument("--steps", type=int, choices=SEEDS, action="append", help="only this length; may be repeated")
    parser.add_argument("--lambda", type=float, action="append", dest="weights", help="only this λ; may be repeated")
    options = parser.parse_args(argv)
    out: Path = options.out or Path("runs") / Path(options.data).name / "lambda_sweep"
    made = ready.make(options.data, out.parent, options.split, options.at_once)
    training = load_training("lambda_sweep", options.set)
    rows = [
        row
        for length in options.steps or SEEDS
        for noise in ready.NOISES
        for row in _rows(training.but(shards=made.shards[noise], store=made.stores[noise], steps=length), noise)
        if not options.weights or row.config.distill in options.weights
    ]
    table = grid.run(rows, made.sets, options.split, options.seeds, out, options.at_once, "students")
    found = {"data": options.data, "split": options.split, "teachers": made.teachers, "rows": table}
    ready.write_table(out, found, _markdown(table))
    _draw(table, rows, out, options.split)
    print(json.dumps(found) if options.json else _markdown(table))


def _rows(training: TrainConfig, noise: str) -> list[Row]:
    """A row for each lambda, compared with captions alone."""
    assert training.steps
    seeds, folder = SEEDS[training.steps], f"{noise}_{training.steps}"
    return [
        Row(
            f"λ = {weight:g}",
            f"{folder}_{weight:g}",
            training.but(distill=weight),
            num_seeds,
            f"{folder}_0" if weight else None,
        )
        for weight, num_seeds in seeds.items()
    ]


def _groups(table: Table) -> dict[str, Table]:
    """The table's lines by length and kind of captions."""
    groups: dict[str, Table] = {}
    for line in table:
        noise = str(line["folder"]).partition("_")[0]
        groups.setdefault(f"{line['steps']} steps, {ready.NOISES[noise]:.0%} wrong", []).append(line)
    return groups


def _markdown(table: Table) -> str:
    return "\n".join(f"{name}:\n\n{grid.markdown(lines, METRICS)}" for name, lines in _groups(table).items())


def _draw(table: Table, rows: list[Row], out: Path, split: str) -> None:
    groups = _groups(table)
    charts.bars(out / "bars.png", groups, "top1", f"Top-1 on {split}, by λ", "percent")
    for name, lines in groups.items():
        folders = [line["folder"] for line in lines]
        of_group = [row for row in rows if row.folder in folders]
        path = out / f"curves_{folders[0].rpartition('_')[0]}.png"
        charts.curves(path, of_group, out, "validation/top1", f"{name}: top-1 on validation", "percent")
