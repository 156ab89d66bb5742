"""Tables of trainings as pictures: bars of what they reach, curves of how they get there."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from textwrap import wrap

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipelines.experiments import grid
from pipelines.experiments.grid import Table

COLOURS = ("#9aa5b1", "#7fb3d5", "#2166ac", "#08306b", "#d6604d", "#5aae61", "#762a83")
WORDS = 100  # letters that fit side by side below the bars
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
    width = round(WORDS / len(groups))
    axes.set_xticks(range(len(groups)), ["\n".join(wrap(name.replace("_", " "), width)) for name in groups], fontsize=8)
    _save(figure, axes, path)


def curves(path: Path, table: Table, title: str, ylabel: str) -> None:
    """Top-1 on validation against samples seen, for each row: the mean over seeds thick, each seed thin. Percent."""
    figure, axes = _page(title, ylabel)
    for index, line in enumerate(table):
        colour = COLOURS[index % len(COLOURS)]
        for curve in line["curves"]:
            axes.plot(list(curve), [100 * acc1 for acc1 in curve.values()], color=colour, lw=0.6, alpha=0.5)
        mean = grid.mean_curve(line["curves"])
        axes.plot(list(mean), [100 * acc1 for acc1 in mean.values()], color=colour, lw=2, label=line["label"])
    axes.set_xlabel("samples seen")
    _save(figure, axes, path)


def _page(title: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, color=INK, fontsize=11)
    axes.set_ylabel(ylabel)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, axes: Axes, path: Path) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
