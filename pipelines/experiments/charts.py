"""Tables of trainings as pictures: bars of what they reach, curves of how they get there."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipelines.experiments.grid import Row, Table
from train.logs import METRICS

COLOURS = ("#9aa5b1", "#7fb3d5", "#2166ac", "#08306b", "#d6604d", "#5aae61", "#762a83")
INK = "#1f2933"


def bars(path: Path, groups: Mapping[str, Table], metric: str, title: str, ylabel: str) -> None:
    """A group of bars for each table, one for each of its rows, in percent: the mean, a line of one sample deviation to
    either side, a dot for each seed."""
    figure, axes = _page(title, ylabel)
    labels = list(dict.fromkeys(line["label"] for table in groups.values() for line in table))
    named = set[str]()
    for place, table in enumerate(groups.values()):
        width = 0.8 / len(table)
        for index, line in enumerate(table):
            shares, label = [100 * share for share in line["scores"][metric]], line["label"]
            x = place + (index - (len(table) - 1) / 2) * width
            colour = COLOURS[labels.index(label) % len(COLOURS)]
            mean = statistics.fmean(shares)
            axes.bar(x, mean, 0.9 * width, color=colour, label=None if label in named else label)
            if len(shares) > 1:
                axes.errorbar(x, mean, statistics.stdev(shares), color=INK, capsize=3, lw=1)
            axes.plot([x] * len(shares), shares, "o", color=INK, markersize=2.5, alpha=0.6)
            named.add(label)
    axes.set_xticks(range(len(groups)), [name.replace(", ", "\n") for name in groups])
    _save(figure, axes, path)


def curves(path: Path, rows: Sequence[Row], out: Path, metric: str, title: str, ylabel: str) -> None:
    """`metric` of an evaluation set against samples seen: the mean over seeds thick, each seed thin. Percent."""
    figure, axes = _page(title, ylabel)
    for index, row in enumerate(rows):
        seeds = [_curve(path, metric) for path in sorted(out.glob(f"{row.folder}_[0-9]*/{METRICS}"))]
        colour, batch = COLOURS[index % len(COLOURS)], row.config.global_batch_size
        for curve in seeds:
            axes.plot([s * batch for s in curve], [100 * v for v in curve.values()], color=colour, lw=0.6, alpha=0.5)
        mean = {step: statistics.fmean(curve[step] for curve in seeds) for step in seeds[0]}
        axes.plot([s * batch for s in mean], [100 * v for v in mean.values()], color=colour, lw=2, label=row.label)
    axes.set_xlabel("samples seen")
    _save(figure, axes, path)


def _curve(path: Path, metric: str) -> dict[int, float]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["step"]: line[metric] for line in lines if metric in line}


def _page(title: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, color=INK, fontsize=11)
    axes.set_ylabel(ylabel)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, axes: Axes, path: Path) -> None:
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
