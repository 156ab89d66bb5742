"""What all commands share: how trees and errors are shown, and the options that are the same everywhere."""

import errno
import json
import logging
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from reinforce import signals
from reinforce.errors import ConfigError, Corrupt, MissingExtra, ReinforceError, StoreError
from reinforce.lines import LogFormatter, plain, say, say_error, show_traceback

_ROOM = "free some room there, or write somewhere else, and run the same command again"
_RIGHT = "ask for the right to it, or write somewhere else"
REMEDIES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EACCES: _RIGHT,
    errno.EPERM: _RIGHT,
    errno.EROFS: "it can only be read; write somewhere else",
    errno.EISDIR: "it is a folder; name a file",
    errno.EEXIST: "it is a file; name a folder",
    errno.ENOTDIR: "a part of that path is a file; name another",
}
_ADDRESS = re.compile(r"[\w+.:-]+:/")


def _of_the_machine(error: OSError) -> str:
    """What went wrong, where, and what to do."""
    told = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    return f"{told}; {REMEDIES.get(error.errno or 0, 'see that it can be reached, and run the same command again')}"


def home(path: Path) -> Path:
    """A local path in which `~` stands for the home folder: a shell leaves it where it follows `=`, fsspec does not. An
    address ends the command with a sentence: as a path, it would be a folder `s3:` here."""
    if _ADDRESS.match(str(path)):
        with errors_as_sentences():
            address = str(path).replace(":/", "://", 1)  # a path has lost a slash
            raise ConfigError(f"{address}: a local path is needed here; give one, and copy it to or from that address")
    return path.expanduser()


def own_version() -> str:
    """This package's. A checkout that runs without being installed has none."""
    try:
        return version("clip-reinforce")
    except PackageNotFoundError:
        return "not installed"


def _print_version(asked: bool) -> None:
    if asked:
        say(f"clip-reinforce {own_version()}")
        raise typer.Exit


JsonOption = Annotated[bool, typer.Option("--json", help="print exactly one JSON object on stdout")]
SetOption = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="change the recipe: dotted.key=value; may be repeated")
]
DeviceOption = Annotated[
    Literal["auto", "cpu", "cuda"], typer.Option(help="where it runs; auto: CUDA if there is a card, else the CPU")
]
StoreOption = Annotated[str, typer.Option("--store", help="the store: a local path or an fsspec URL")]
StoreArgument = Annotated[str, typer.Argument(metavar="STORE", help="the store: a local path or an fsspec URL")]
WorkersOption = Annotated[
    str, typer.Option(help="Ray workers: a number, MIN:MAX, auto, or 0 for none: all work in this process")
]
VersionOption = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")
]


def start(app: typer.Typer) -> None:
    """Run a command line: what libraries log below a warning is not for the user. What nobody expected ends as Python
    ends it, with exit code 1 and its traceback, but for the secrets in it."""
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    with signals.taken(ends=True):
        try:
            app()
        except Exception as error:  # typer sets sys.excepthook to its own
            show_traceback(error)
            sys.exit(1)


def typed(command: str) -> str:
    """How a user can type a command of this project here: its name where it is on PATH, else its path."""
    script = Path(sys.executable).with_name(command)
    if shutil.which(command) or not script.exists():
        return command
    return os.path.relpath(script) if script.is_relative_to(Path.cwd()) else str(script)


def show(found: dict[str, Any], json_: bool, following: str = "") -> None:
    """What a command answers: one JSON object, or a tree and what may be typed next."""
    if json_:
        say(json.dumps(found))
        return
    print_tree(found)
    if following:
        say(*f"Next:  {following}".split("\n"))


def print_tree(tree: dict[str, Any], indent: str = "") -> None:
    """Names and values, what is inside another indented."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            say(f"{indent}{name}:")
            print_tree(value, indent + "  ")
        elif isinstance(value, list) and value:
            say(f"{indent}{name}:")
            for item in value:
                say(f"{indent}  {_in_a_line(item) if isinstance(item, dict) else item}")
        else:
            say(f"{indent}{name}: {_shown(value)}")


def _in_a_line(item: dict[str, Any]) -> str:
    return "  ".join(str(_shown(value)) for value in item.values() if value not in ("", [], {}, None))


def _shown(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "none" if value in ([], {}, None) else value


@contextmanager
def errors_as_sentences() -> Iterator[None]:
    """Exit code 2 for a wrong request, 1 for what went wrong on the way, each with a sentence on stderr; 130 and 143
    for SIGINT and SIGTERM."""
    try:
        with _errors_of_stopping():
            yield
    except ReinforceError as error:
        say_error(error)
        request_was_wrong = isinstance(error, (ConfigError, MissingExtra, StoreError)) and not isinstance(
            error, Corrupt
        )
        sys.exit(2 if request_was_wrong else 1)
    except BrokenPipeError:  # whoever read what is printed has seen enough: `.. | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        say_error(plain(_of_the_machine(error)))
        sys.exit(1)
    except KeyboardInterrupt:
        signals.told()
        say(signals.STOPPED, file=sys.stderr)
        sys.exit(128 + (signals.number() or signal.SIGINT))


@contextmanager
def _errors_of_stopping() -> Iterator[None]:
    """Once a signal has come, whatever fails does so because of it: other processes may have had the same signal."""
    try:
        yield
    except Exception:
        if signals.number():
            raise KeyboardInterrupt from None
        raise
