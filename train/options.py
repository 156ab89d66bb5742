"""What commands of `clip-train` share: evaluation sets that are named, and the report of a training."""

from typing import Annotated, Any

import typer

from reinforce.errors import ConfigError
from reinforce.terminal import show

EVAL_HELP = "a folder in CLIP_benchmark's layout, or tars with captions; may be repeated"
EvalOption = Annotated[list[str], typer.Option("--eval", metavar="NAME=SET", help=EVAL_HELP)]


def eval_sets(texts: list[str]) -> dict[str, str]:
    """NAME=SET -> addresses by name. Raises ConfigError."""
    sets: dict[str, str] = {}
    for text in texts:
        name, equals, url = text.partition("=")
        if not (name and equals and url):
            raise ConfigError(f"{text}: write an evaluation set as NAME=SET, such as heldout=samples/heldout/00000.tar")
        if name in sets:
            raise ConfigError(f"two evaluation sets are called '{name}': {sets[name]} and {url}; rename one")
        sets[name] = url
    return sets


def show_report(report: dict[str, Any], json_: bool, following: str) -> None:
    """Of a training: what it was evaluated at is in percent for who reads it, and in shares as JSON."""
    from train.evaluation.metrics import in_percent

    show(report if json_ else report | {"evaluated": in_percent(report["evaluated"])}, json_, following)
