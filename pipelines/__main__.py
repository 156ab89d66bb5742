"""Whole journeys: `python -m pipelines RECIPE [options]`. What is done already is not done again."""

import importlib
import sys
from pathlib import Path

from reinforce.terminal import errors_as_sentences


def journeys() -> list[str]:
    """Files beside this one that can be run."""
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if "\ndef main(argv: list[str])" in p.read_text())


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in journeys():
        print(f"{__doc__}\nRecipes: {', '.join(journeys())}; each explains itself with --help.", file=sys.stderr)
        sys.exit(0 if name in ("", "-h", "--help") else 2)
    with errors_as_sentences():
        importlib.import_module(f"pipelines.{name}").main(sys.argv[2:])


if __name__ == "__main__":
    main()
