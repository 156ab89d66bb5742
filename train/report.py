"""Trainings side by side, as one page for a browser: what they differ in, what came out, and their curves."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reinforce import page
from reinforce.errors import ConfigError
from train.logs import METRICS

TEMPLATE = Path(__file__).with_name("report.html")
MOST = 400  # points of a curve in the page


@dataclass(frozen=True)
class Trainings:
    """What was written."""

    file: str
    bytes: int
    trainings: int


def report(folders: Iterable[str], out: str) -> Trainings:
    """Write the page. A training that goes on has curves and no results yet.

    Raises ConfigError where a folder holds no training, or the page cannot be written.
    """
    paths = [Path(folder) for folder in folders]
    flat = [_flat(_json(path / "config.json", path)) for path in paths]
    differ = [name for name in sorted(set().union(*flat)) if len({json.dumps(of.get(name)) for of in flat}) > 1]
    names = _names(paths)
    trainings = [
        {
            "name": name,
            "folder": str(path),
            "settings": of,
            "curves": _curves(path / METRICS),
            "report": _json(path / "report.json", path) if (path / "report.json").exists() else None,
        }
        for name, path, of in zip(names, paths, flat, strict=True)
    ]
    size = page.write(out, TEMPLATE, {"trainings": trainings, "differ": differ})
    return Trainings(out, size, len(trainings))


def _json(path: Path, folder: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{folder} holds no training: {path.name} cannot be read ({error}); give what fit had as --out"
        ) from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{folder} holds no training: {path.name} is not what fit writes")
    return tree


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    return {
        name: node
        for key, branch in tree.items()
        for name, node in _flat(branch, f"{prefix}.{key}" if prefix else key).items()
    }


def _names(paths: list[Path]) -> list[str]:
    """As short as tells them apart: the last parts of their paths."""
    parts = [path.resolve().parts for path in paths]
    for num in range(1, max(map(len, parts)) + 1):
        names = ["/".join(of[-num:]) for of in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [str(path) for path in paths]


def _curves(path: Path) -> dict[str, list[list[float]]]:
    """Of each metric points (step, value), fewer where there are many. A line that a kill has cut is left out."""
    curves: dict[str, list[list[float]]] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found = json.loads(line)
            step = found.pop("step")
        except (ValueError, KeyError, AttributeError):
            continue
        for name, value in found.items():
            if isinstance(value, int | float):
                curves.setdefault(name, []).append([step, value])
    return {name: _thinned(points) for name, points in curves.items()}


def _thinned(points: list[list[float]]) -> list[list[float]]:
    """Every so many, and the last."""
    step = max(1, -(-len(points) // MOST))
    return points[::step] + (points[-1:] if (len(points) - 1) % step else [])
