"""What every command of the project shares: how trees and errors are shown, and `--json`."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from reinforce.errors import ConfigError, Corrupt, MissingExtra, ReinforceError, StoreError

JsonOption = Annotated[bool, typer.Option("--json", help="print exactly one JSON object on stdout")]


def print_tree(tree: dict[str, Any], indent: str = "") -> None:
    """Names and values, what is inside another indented."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            print(f"{indent}{name}:")
            print_tree(value, indent + "  ")
        elif isinstance(value, list) and value:
            print(f"{indent}{name}:")
            for item in value:
                print(f"{indent}  {'  '.join(item.values()) if isinstance(item, dict) else item}")
        else:
            print(f"{indent}{name}: {'none' if value in ([], {}, None) else value}")


@contextmanager
def errors_as_sentences() -> Iterator[None]:
    """Exit code 2 for a wrong request, 1 for what went wrong on the way, each with a sentence on stderr."""
    try:
        yield
    except ReinforceError as error:
        print(f"error: {error}", file=sys.stderr)
        request_was_wrong = isinstance(error, (ConfigError, MissingExtra, StoreError)) and not isinstance(
            error, Corrupt
        )
        raise typer.Exit(2 if request_was_wrong else 1) from None
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        raise typer.Exit(130) from None
