"""Recipes, by name or by path: where they lie, what they hold, and `--set` over them.

A recipe is a Python file, or JSON. The file is run as data: it is never imported, so that this package knows nothing of
the one above it, and a user's recipe may lie anywhere. It says up to three things,

    RECIPE      a `Recipe`: what `clip-reinforce run` writes into a store
    TRAINING    settings of `clip-train fit`, a dict
    ADAPTATION  settings of `clip-train adapt`, a dict

of which the last two are read by the trainer, who knows what they mean.
"""

import difflib
import json
import runpy
import sys
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, TypeVar, get_origin

from pydantic import ValidationError

from reinforce.config import Config, Recipe, near, parse, sentences
from reinforce.errors import ConfigError

FOLDER = Path(__file__).parent.parent / "pipelines"
T = TypeVar("T", bound=Config)


def load_recipe(name: str, overrides: list[str] = []) -> Recipe:
    """The `RECIPE` called `name`, with `dotted.key=value` overrides. Raises ConfigError."""
    return load(Recipe, "RECIPE", name, overrides)


def load(kind: type[T], constant: str, name: str | None, overrides: list[str] = []) -> T:
    """The settings of this kind that a recipe has as `constant`, with overrides; without a name, the defaults.

    `name` is that of a recipe of this project, or a path: `mine.py`, or `mine.json` with the settings themselves.
    Raises ConfigError that says what is wrong and which names or keys come near.
    """
    where = "the request" if name is None else f"recipe {name}"
    return overridden(parse(kind, {} if name is None else _tree(constant, name), where), overrides, where)


def overridden(settings: T, overrides: list[str], where: str) -> T:
    """The settings with `dotted.key=value` overrides. Raises ConfigError, which says `where` they are from."""
    tree = settings.model_dump()
    named = [name for name, field in type(settings).model_fields.items() if get_origin(field.annotation) is dict]
    for override in overrides:
        _override(tree, override, named)
    return parse(type(settings), tree, where)


def listed(constant: str = "RECIPE") -> dict[str, str]:
    """Name and first sentence of every recipe of this project that has such a constant."""
    found = {}
    for path in sorted(FOLDER.glob("*.py")):
        if not path.stem.startswith("_") and constant in (values := _values(path)):
            found[path.stem] = (values["__doc__"] or "").strip().partition("\n")[0]
    return found


def choice(constant: str = "RECIPE") -> list[str]:
    """The same as lines of text, for help and messages."""
    recipes = listed(constant)
    width = max(map(len, recipes))
    return [f"  {name.ljust(width)}  {phrase}" for name, phrase in recipes.items()]


def _tree(constant: str, name: str) -> Any:
    """The settings as plain data, not yet checked."""
    if not name:
        raise ConfigError("the recipe has no name; give one of these, or a path to your own", *choice(constant))
    if ("/" in name or name.endswith((".py", ".json"))) and Path(name).is_dir():
        raise ConfigError(f"recipe {name} is a folder; give a file: mine.py or mine.json")
    if name.endswith(".json"):
        tree = _json(Path(name))
        if constant != "RECIPE" and isinstance(tree, dict) and {"teachers", "captioners"} <= tree.keys():
            raise ConfigError(f"recipe {name} says what a store holds (`clip-reinforce run`), and not how to train")
        return tree
    if name.endswith(".py") or "/" in name:
        path = Path(name)
    else:
        path = FOLDER / f"{name}.py"
        if name.startswith("_") or not path.is_file():
            if Path(name).is_file():
                raise ConfigError(f"recipe {name}: the name of a recipe's file ends in .py or .json, and this does not")
            close = difflib.get_close_matches(name, listed(constant), n=3)
            own = f"; did you mean ./{name}.py?" if Path(f"{name}.py").is_file() else ""
            raise ConfigError(
                f"no recipe of this project is called '{name}'"
                + (own or (f"; did you mean {' or '.join(close)}?" if close else "")),
                "Recipes of this project (or give a path to your own):",
                *choice(constant),
            )
    if not path.is_file():
        raise ConfigError(f"recipe {name}: no such file")
    values = _values(path)
    if constant not in values:
        raise ConfigError(
            f"recipe {name} has no {constant}; write one, or take one of these, which lie in {FOLDER.name}/:",
            *choice(constant),
        )
    value = values[constant]
    return value.model_dump() if isinstance(value, Config) else value


def _json(path: Path) -> Any:
    try:
        text = path.read_text("utf-8-sig")
        if not text.strip():
            raise ConfigError(f"recipe {path} is empty; begin with: clip-reinforce recipe NAME > {path}")
        return _loads(text)
    except FileNotFoundError:
        raise ConfigError(f"recipe {path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"recipe {path} is not JSON that can be read: {error}") from None


def _loads(text: str) -> Any:
    """JSON in which no key comes twice: of two, one would be lost without a word. Raises ValueError, RecursionError."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = next((key for key, num in Counter(key for key, _ in pairs).items() if num > 1), None)
        if twice is not None:
            raise ValueError(f"it has the key '{twice}' twice")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=once)


def _values(path: Path) -> dict[str, Any]:
    """What a recipe's file defines. It is a program: whatever it raises is reported as a fault of the recipe.

    It may import files beside it, if no installed module has their name.
    """
    beside = str(path.parent.resolve())
    sys.path.append(beside)
    try:
        with redirect_stdout(sys.stderr):  # stdout is the command's answer
            return runpy.run_path(str(path))
    except ValidationError as error:
        raise ConfigError(f"recipe {path}{_line(error, path)} is not valid:", *sentences(error)) from None
    except (Exception, SystemExit) as error:
        told = f"recipe {path}{_line(error, path)}: {type(error).__name__}: {error}"
        raise ConfigError(*told.split("\n")) from error  # the lines are of our own errors, or of the user's recipe
    finally:
        sys.path.remove(beside)


def _line(error: BaseException, path: Path) -> str:
    """`, line N`: the last line of the file that was run before it raised."""
    number = error.lineno if isinstance(error, SyntaxError) else None
    trace = error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == str(path):
            number = trace.tb_lineno
        trace = trace.tb_next
    return f", line {number}" if number else ""


def _override(tree: dict[str, Any], override: str, named: list[str]) -> None:
    """`named`: settings whose keys are names, such as a teacher's, so that one which is not there yet can be added."""
    dotted, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"--set {override}: write it as dotted.key=value")
    try:
        value = _loads(text)
    except (ValueError, RecursionError) as error:
        if text.startswith(("{", "[")) and ".tar" not in text:  # '{00000..00127}.tar' are tars
            raise ConfigError(
                f"--set {override}: this is broken JSON ({error}); see to its quotes and brackets"
            ) from None
        value = text
    *path, last = dotted.split(".")
    node: Any = tree
    for step in path:
        if not isinstance(node, dict) or step not in node:
            raise ConfigError(f"--set {override}: no key '{step}'{near(step, node)}")
        node = node[step]
    if not isinstance(node, dict) or (last not in node and path not in [[name] for name in named]):
        raise ConfigError(f"--set {override}: no key '{last}'{near(last, node)}")
    node[last] = value
