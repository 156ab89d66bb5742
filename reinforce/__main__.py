"""Write what teachers know about an image-text dataset into a store, once; students learn from it as often as you like.

Exit codes: 0 done; 1 some shards failed, a check found faults, or a disk or the network was in the way; 2 the request
was wrong, nothing was done; 130 and 143 stopped by Ctrl-C or SIGTERM (run it again).
"""

import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reinforce.check import commands as checking
from reinforce.config import Model, Recipe, RunOptions, parse
from reinforce.errors import ConfigError
from reinforce.exchange import commands
from reinforce.lines import say
from reinforce.recipes import choice, listed, load_recipe, overridden
from reinforce.run.reports import RunReport
from reinforce.terminal import (
    DeviceOption,
    JsonOption,
    SetOption,
    StoreOption,
    VersionOption,
    WorkersOption,
    errors_as_sentences,
    show,
    start,
    typed,
)

if TYPE_CHECKING:
    from reinforce.exchange.captions import CaptionReport

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
app.command()(commands.pack)
app.add_typer(commands.importing, name="import")
app.add_typer(commands.exporting, name="export")

ShardsArgument = Annotated[
    list[str],
    typer.Argument(metavar="SHARDS", help="tars: braces, '*', several, also joined by '::'; paths or fsspec URLs"),
]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        help="name of a recipe (`clip-reinforce recipes` lists them), or a path: mine.py, mine.json; by default the "
        "store's own",
        autocompletion=lambda: list(listed()),
    ),
]
MaxInvalidOption = Annotated[
    float, typer.Option(help="a shard with a larger share of bad samples than this is refused")
]
AttemptsOption = Annotated[int, typer.Option(help="tries per shard")]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        help="threads per worker that decode and augment; by default 2, and with a GPU its share of the cores, at "
        "most 8"
    ),
]
BytesOption = Annotated[
    int | None,
    typer.Option(
        help="bytes that a worker's decoded pictures may take ahead of need, by default 1 GiB, and with a GPU 8 GiB; "
        "what finds no room is decoded again",
        min=1 << 20,
    ),
]
HungOption = Annotated[
    float | None,
    typer.Option(
        help="seconds of silence after which a worker is given up; by default ten times what the slowest shard took, "
        "and at least 300"
    ),
]
StatisticsOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="add a line of JSON for each shard: samples, bad ones by reason, seconds, tries, and why it failed",
    ),
]
_DEFAULTS = RunOptions()


@app.callback()
def _all(version: VersionOption = False) -> None: ...


@app.command()
def run(
    shards: ShardsArgument,
    store: StoreOption,
    recipe: RecipeOption = None,
    set_: SetOption = [],
    texts: Annotated[
        list[str],
        typer.Option(metavar="NAME=FILE", help="captions that were written elsewhere, as for `import captions`"),
    ] = [],
    workers: WorkersOption = _DEFAULTS.workers,
    device: DeviceOption = _DEFAULTS.device,
    max_invalid: MaxInvalidOption = _DEFAULTS.max_invalid,
    attempts: AttemptsOption = _DEFAULTS.attempts,
    decode_threads: ThreadsOption = _DEFAULTS.decode_threads,
    decode_bytes: BytesOption = _DEFAULTS.decode_bytes,
    hung_after: HungOption = _DEFAULTS.hung_after,
    statistics: StatisticsOption = _DEFAULTS.statistics,
    json_: JsonOption = False,
) -> None:
    """Write what the teachers of a recipe know about SHARDS into a store. Run it again to go on where it stopped."""
    options = {"max_invalid": max_invalid, "attempts": attempts, "hung_after": hung_after, "statistics": statistics}
    options |= {"decode_threads": decode_threads, "decode_bytes": decode_bytes}
    _run("::".join(shards), store, recipe, set_, json_, texts, workers=workers, device=device, **options)


@app.command()
def extend(
    shards: ShardsArgument,
    store: StoreOption,
    recipe: RecipeOption = None,
    set_: SetOption = [],
    workers: WorkersOption = _DEFAULTS.workers,
    device: DeviceOption = _DEFAULTS.device,
    max_invalid: MaxInvalidOption = _DEFAULTS.max_invalid,
    attempts: AttemptsOption = _DEFAULTS.attempts,
    decode_threads: ThreadsOption = _DEFAULTS.decode_threads,
    decode_bytes: BytesOption = _DEFAULTS.decode_bytes,
    hung_after: HungOption = _DEFAULTS.hung_after,
    statistics: StatisticsOption = _DEFAULTS.statistics,
    json_: JsonOption = False,
) -> None:
    """Add teachers, view sets, captioners or class sets to a store, as --set 'teachers.NAME={"model": ..}'. What is
    there stays as it is, and may be read meanwhile."""
    options = {"max_invalid": max_invalid, "attempts": attempts, "hung_after": hung_after, "statistics": statistics}
    options |= {"decode_threads": decode_threads, "decode_bytes": decode_bytes, "extend": True}
    _run("::".join(shards), store, recipe, set_, json_, [], workers=workers, device=device, **options)


@app.command()
def plan(
    shards: ShardsArgument,
    store: StoreOption,
    recipe: RecipeOption = None,
    set_: SetOption = [],
    workers: WorkersOption = _DEFAULTS.workers,
    device: DeviceOption = _DEFAULTS.device,
    card: Annotated[
        str | None, typer.Option(help="reckon with this GPU in place of measuring: A100, H100, H200, L4, L40S, RTX4090")
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Say what a run would cost, and write nothing: samples, bytes, hours of each model, memory. A few samples are
    reinforced to know."""
    from reinforce.check.plan import in_words
    from reinforce.check.plan import plan as reckon

    with errors_as_sentences():
        loaded = _recipe(recipe, store, set_)
        asked = {"workers": workers, "device": device, "extend": True, "max_invalid": 1}
        found = reckon("::".join(shards), store, loaded, parse(RunOptions, asked, "the request"), card)
        show(asdict(found) if json_ else in_words(found), json_)


def _run(
    shards: str,
    store: str,
    recipe: str | None,
    set_: list[str],
    json_: bool,
    texts: Sequence[str],
    **options: Any,
) -> None:
    from reinforce.exchange.captions import run_with_captions
    from reinforce.run.driver import run as run_driver

    with errors_as_sentences():
        loaded = _recipe(recipe, store, set_, extends=options.get("extend", False))
        asked = parse(RunOptions, options, "the request")
        files = commands.files_of("--texts", texts)
        captions: list[CaptionReport] = []
        with redirect_stdout(sys.stderr):  # Ray prints news of its workers on stdout, which is for the answer
            if files:
                report, captions = run_with_captions(shards, store, loaded, files, asked)
            else:
                report = run_driver(shards, store, loaded, asked)
        if json_:
            told = {"captions": [asdict(written) for written in captions]} if captions else {}
            say(json.dumps({"recipe": loaded.name} | asdict(report) | told))
        else:
            for written in captions:
                say(
                    f"Captions '{written.text_set}': {written.num_captions} for each of {written.samples} samples; "
                    f"{written.without_caption} have none, {written.without_image} are of no sample"
                )
            training = f"--recipe {recipe}" if recipe in listed("TRAINING") else "--student mamba_small"
            _print_run(report, shards, loaded, training)
    raise typer.Exit(1 if report.failed else 0)


def _recipe(name: str | None, store: str, overrides: list[str], extends: bool = False) -> Recipe:
    """The recipe that is named, or that of the store, where there is one. `extends`: there has to be a store."""
    from reinforce.check.info import stored_recipe

    stored = stored_recipe(store) if extends or name is None else None
    if extends and stored is None:
        raise ConfigError(f"there is no store at {store} to extend; `{typed('clip-reinforce')} run` makes one")
    if name is not None:
        return load_recipe(name, overrides)
    if stored is None:
        raise ConfigError("name a recipe with --recipe: one of these, or a path to your own", *choice())
    return overridden(stored, overrides, f"the recipe of {store}")


@app.command()
def recipes(json_: JsonOption = False) -> None:
    """List the recipes that `run --recipe` takes by name."""
    with errors_as_sentences():
        say(*([json.dumps(listed())] if json_ else choice()))


@app.command()
def recipe(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="name of a recipe, or a path", autocompletion=lambda: list(listed()))
    ],
    set_: SetOption = [],
) -> None:
    """Print a recipe as JSON, to read it or to begin your own: `clip-reinforce recipe NAME > mine.json`."""
    with errors_as_sentences():
        say(*load_recipe(name, set_).model_dump_json(indent=1).split("\n"))


for command in checking.COMMANDS:
    app.command()(command)


def _print_run(report: RunReport, shards: str, recipe: Recipe, training: str) -> None:
    store = quote(report.store)
    fit = f"{typed('clip-train')} fit --shards '{shards}' --store {store} {training}"
    weights = ", random weights" if recipe.weights == "random" else ""
    say(
        *report.in_words(),
        f"Recipe: {recipe.name}{weights}",
        f"        teachers {_models(recipe.teachers)}",
        f"        captioners {_models(recipe.captioners)}",
    )
    if not (report.done or report.already_there):
        say("Store:  nothing was written")
        return
    say(
        f"Store:  {report.store}",
        f"Next:   {typed('clip-reinforce')} info {store}",
        f"        {typed('clip-reinforce')} verify {store} --shards '{shards}' --replay 100",
        *([] if report.failed else [f"        {fit}"]),
    )


def _models(models: dict[str, Any]) -> str:
    def described(model: Model) -> str:
        return model.model + (f",{model.pretrained}" if model.pretrained else "")

    return "; ".join(f"{name} ({described(model)})" for name, model in models.items()) or "none"


def main() -> None:
    """The command `clip-reinforce`."""
    start(app)


if __name__ == "__main__":
    main()
