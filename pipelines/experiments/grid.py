"""A grid of trainings: rows of settings, each with some seeds, run side by side and put into a table.

Every training is evaluated on the validation split. The test split is opened when all are done, and only if it is asked
for: settings are chosen with `--split validation`.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from pipelines.experiments import steps
from train.collapse import LEAST_SPREAD
from train.config import TrainConfig
from train.logs import METRICS

Table = list[dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One line of the table `group`: `num_seeds` trainings of `config`. `against`: the name of the row that it is
    compared with, seed by seed."""

    group: str
    label: str
    name: str
    config: TrainConfig
    num_seeds: int
    against: str | None = None


def training_name(config: TrainConfig, usual: TrainConfig) -> str:
    """The store's name, what differs from the usual settings, and the seed: 'noisy,distill=0.75,seed=3'. Rows of
    several questions that ask for the same training find it under the same name."""
    settings = config.model_dump(exclude={"shards", "store", "eval_sets", "seed"})
    unchanged = usual.model_dump()
    differing = {key: value for key, value in settings.items() if value != unchanged[key]}
    words = [f"{key}={'+'.join(value) if isinstance(value, list) else value}" for key, value in differing.items()]
    return ",".join([Path(config.store or config.shards).stem, *words, f"seed={config.seed}"])


def run(
    rows: Sequence[Row],
    usual: TrainConfig,
    sets: Mapping[str, str],
    split: str,
    most_seeds: int,
    out: Path,
    at_once: int,
    title: str,
) -> Table:
    """Train the seeds of every row, at most `most_seeds`, and tell what came of it. Trainings lie in `out`, by their
    `training_name`; `sets`: the evaluation sets by split, one of them `validation`.

    Gives a dictionary for each row: `trainings`, their names; `scores` on `split`, by metric the shares of each seed;
    `curves` of each seed, by samples seen the top-1 on validation; `warned`, `collapsed` and `seconds` of each seed. A
    row that is compared with another has `gains`, the differences to the same seeds' scores; and `as_good_after`, the
    samples that it had seen when its mean curve first reached the end of the other's, None where it never did.
    Raises what `train.trainer.fit` does.
    """
    seeded = {row.name: [row.config.but(seed=seed) for seed in range(min(row.num_seeds, most_seeds))] for row in rows}
    asked = {
        training_name(config, usual): config.but(eval_sets={"validation": sets["validation"]})
        # seed by seed, so that a run that is cut short has whole ones
        for of_seed in zip_longest(*seeded.values())
        for config in of_seed
        if config
    }
    found = steps.fit_all(asked, out, title, at_once)
    if split != "validation":
        tested = {name: config.but(eval_sets={split: sets[split]}) for name, config in asked.items()}
        found = steps.fit_all(tested, out, f"{title}, on {split}", at_once)
    table: dict[str, dict[str, Any]] = {}
    for row in rows:
        names = [training_name(config, usual) for config in seeded[row.name]]
        reports = [found[name] for name in names]
        of_split = [report["evaluated"][split] for report in reports]
        table[row.name] = {
            "group": row.group,
            "label": row.label,
            "name": row.name,
            "against": row.against,
            "trainings": names,
            "steps": reports[0]["steps"],
            "curves": [_curve(out / name / METRICS, row.config.global_batch_size) for name in names],
            "scores": {metric: [scores[metric] for scores in of_split] for metric in of_split[0]},
            "warned": [report["collapse"] for report in reports],
            "collapsed": [report["metrics"]["spread"] < LEAST_SPREAD for report in reports],
            "seconds": [report["seconds"] for report in reports],
        }
    for line in table.values():
        if line["against"] in table:
            base = table[line["against"]]
            line["gains"] = {
                metric: [mine - other for mine, other in zip(values, base["scores"][metric], strict=False)]
                for metric, values in line["scores"].items()
            }
            end = list(mean_curve(base["curves"]).values())[-1]
            line["as_good_after"] = next((n for n, acc1 in mean_curve(line["curves"]).items() if acc1 >= end), None)
    return list(table.values())


def mean_curve(curves: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Over the seeds, at each place that all have."""
    places = [place for place in curves[0] if all(place in curve for curve in curves)]
    return {place: statistics.fmean(curve[place] for curve in curves) for place in places}


def grouped(table: Table) -> dict[str, Table]:
    """Its lines by group."""
    groups: dict[str, Table] = {}
    for line in table:
        groups.setdefault(line["group"], []).append(line)
    return groups


def markdown(table: Table, metrics: Mapping[str, str]) -> str:
    """The table in percent. `metrics`: their headings by name; those that no row has are left out. The first one is
    shown seed by seed and compared, of the others the mean."""
    there = {name: heading for name, heading in metrics.items() if name in table[0]["scores"]}
    first, *others = there
    heads = ["", f"{there[first]} by seed", "mean ± sd", "gain, paired", *(there[name] for name in others)]
    heads += ["as good after", "collapsed"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for line in table:
        values = line["scores"][first]
        cells = [
            line["label"],
            " ".join(f"{100 * value:.1f}" for value in values),
            percent(values),
            percent(line["gains"][first], signed=True) if "gains" in line else "",
            *(percent(line["scores"][name]) for name in others),
            _share_of_samples(line),
            f"{sum(line['collapsed'])} of {len(values)}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def percent(shares: Sequence[float], signed: bool = False) -> str:
    """The mean of shares in percent, and the sample standard deviation where there are several."""
    mean = 100 * statistics.fmean(shares)
    deviation = f" ± {100 * statistics.stdev(shares):.1f}" if len(shares) > 1 else ""
    return (f"{mean:+.1f}" if signed else f"{mean:.1f}") + deviation


def _share_of_samples(line: dict[str, Any]) -> str:
    if "as_good_after" not in line:
        return ""
    after, seen = line["as_good_after"], max(line["curves"][0])
    return "not" if after is None else f"{after:,} of {seen:,}"


def _curve(path: Path, batch: int) -> dict[int, float]:
    """Top-1 on validation by the number of samples seen."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {batch * line["step"]: line["validation/acc1"] for line in lines if "validation/acc1" in line}
