"""Write what teachers know about an image-text dataset into a store, once; students learn from it as often as you like.

Exit codes: 0 done; 1 done, but some shards failed or a check found faults; 2 the request was wrong, nothing was done;
130 and 143 stopped by Ctrl-C or SIGTERM (run it again).
"""

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reinforce.config import Model, Packing, Recipe, RunOptions, parse
from reinforce.errors import ConfigError
from reinforce.exchange import commands
from reinforce.lines import say
from reinforce.recipes import choice, listed, load_recipe, overridden
from reinforce.run.reports import RunReport
from reinforce.terminal import (
    DeviceOption,
    JsonOption,
    SetOption,
    VersionOption,
    errors_as_sentences,
    show,
    start,
    typed,
)

if TYPE_CHECKING:
    from reinforce.check.repair import RepairReport
    from reinforce.exchange.captions import CaptionReport

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
app.command()(commands.pack)
app.add_typer(commands.importing, name="import")
app.add_typer(commands.exporting, name="export")

ShardsArgument = Annotated[
    str, typer.Argument(metavar="SHARDS", help="tars: braces, '*', several joined by '::', paths or fsspec URLs")
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
        help="threads per worker that decode and, without view processes, augment; by default 2, and with a GPU its "
        "share of the cores, at most 8"
    ),
]
ProcessesOption = Annotated[
    int | None,
    typer.Option(
        help="processes per worker that make the views; by default none, and with a GPU its share of the cores, at "
        "most 16"
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
StoreOption = Annotated[str, typer.Option("--store", help="the store: a local path or an fsspec URL")]
StoreArgument = Annotated[str, typer.Argument(metavar="STORE", help="the store: a local path or an fsspec URL")]
WorkersOption = Annotated[
    str, typer.Option(help="Ray workers: a number, MIN:MAX, auto, or 0 for none: all work in this process")
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
    view_processes: ProcessesOption = _DEFAULTS.view_processes,
    decode_bytes: BytesOption = _DEFAULTS.decode_bytes,
    hung_after: HungOption = _DEFAULTS.hung_after,
    json_: JsonOption = False,
) -> None:
    """Write what the teachers of a recipe know about SHARDS into a store. Run it again to go on where it stopped."""
    options = {"max_invalid": max_invalid, "attempts": attempts, "hung_after": hung_after}
    options |= {"decode_threads": decode_threads, "view_processes": view_processes, "decode_bytes": decode_bytes}
    _run(shards, store, recipe, set_, json_, texts, workers=workers, device=device, **options)


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
    view_processes: ProcessesOption = _DEFAULTS.view_processes,
    decode_bytes: BytesOption = _DEFAULTS.decode_bytes,
    hung_after: HungOption = _DEFAULTS.hung_after,
    json_: JsonOption = False,
) -> None:
    """Add teachers, view sets, captioners or class sets to a store, as --set 'teachers.NAME={"model": ..}'. What is
    there stays as it is, and may be read meanwhile."""
    options = {"max_invalid": max_invalid, "attempts": attempts, "hung_after": hung_after}
    options |= {"decode_threads": decode_threads, "view_processes": view_processes}
    options |= {"decode_bytes": decode_bytes, "extend": True}
    _run(shards, store, recipe, set_, json_, [], workers=workers, device=device, **options)


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
    from reinforce.check.plan import plan as reckon

    with errors_as_sentences():
        loaded = _recipe(recipe, store, set_)
        asked = {"workers": workers, "device": device, "extend": True, "max_invalid": 1}
        show(asdict(reckon(shards, store, loaded, parse(RunOptions, asked, "the request"), card)), json_)


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
        loaded = _recipe(recipe, store, set_)
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


def _recipe(name: str | None, store: str, overrides: list[str]) -> Recipe:
    """The recipe that is named, or that of the store, where there is one."""
    from reinforce.check.info import stored_recipe

    if name is not None:
        return load_recipe(name, overrides)
    stored = stored_recipe(store)
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


@app.command()
def info(
    store: StoreArgument,
    json_: JsonOption = False,
    quarantine: Annotated[bool, typer.Option("--quarantine", help="list the samples that were set aside")] = False,
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="what each way to store embeddings would take and lose")
    ] = False,
) -> None:
    """Show what a store holds: samples, views, captions, bytes, and the columns that are not there yet."""
    from reinforce.check import info as check

    with errors_as_sentences():
        found = check.info(store)
        if quarantine:
            found["quarantine"] = list(check.quarantine(store))
            found["refused"] = check.refused(store)
        if embeddings:
            from reinforce.check.dial import dial

            found["ways"] = dial(store)
        show(found, json_)


@app.command()
def report(
    store: StoreArgument,
    shards: Annotated[
        str | None, typer.Option(help="the tars that it was made from; without them the page has no pictures")
    ] = None,
    out: Annotated[str, typer.Option("--out", "-o", metavar="FILE", help="the page")] = "report.html",
    samples: Annotated[int, typer.Option(min=1, max=400, help="how many samples are shown")] = 60,
    seed: Annotated[int, typer.Option(min=0, help="draws the samples that are shown for no other reason")] = 0,
    json_: JsonOption = False,
) -> None:
    """Show a store as one page for a browser: samples, their views, what teachers say, near-duplicates, quarantine."""
    from reinforce.check.report import report as page

    with errors_as_sentences():
        show(asdict(page(store, shards, out, samples, seed)), json_)


@app.command()
def verify(
    store: StoreArgument,
    shards: Annotated[
        str | None, typer.Option(help="the tars that it was made from: every image and caption is compared")
    ] = None,
    replay: Annotated[int, typer.Option(min=0, help="number of views to make again from the tars and compare")] = 0,
    strict: Annotated[
        bool, typer.Option("--strict", help="exit with 1 also where something could not be compared, or is foreign")
    ] = False,
    device: DeviceOption = "auto",
    json_: JsonOption = False,
) -> None:
    """Check that every column of a store is there, whole and its own; with --shards that it is of these tars, with
    --replay also that views can be made again."""
    from reinforce.check.verify import verify as check

    with errors_as_sentences():
        report = check(store, shards, replay, device)
        sound = report.sound and not (strict and (report.unchecked or report.foreign))
        show(asdict(report), json_)
        if not json_:
            say("sound" if sound else "faults found" if not report.sound else "sound, but not all was compared")
            if report.corrupt or report.missing:
                say(f"Next:  {typed('clip-reinforce')} repair {store} --shards '{shards or 'DIR/*.tar'}'")
    raise typer.Exit(0 if sound else 1)


@app.command()
def repair(
    store: StoreArgument,
    shards: Annotated[str | None, typer.Option(help="the tars that it was made from")] = None,
    remove_foreign: Annotated[
        bool, typer.Option("--remove-foreign", help="also remove files that are no part of the store")
    ] = False,
    workers: WorkersOption = _DEFAULTS.workers,
    device: DeviceOption = "auto",
    json_: JsonOption = False,
) -> None:
    """Take out what `verify` finds damaged, and compute it again from the tars, to the same bytes."""
    from reinforce.check.repair import repair as mend

    _mend(lambda options: mend(store, shards, options, remove_foreign), store, workers, device, json_)


@app.command()
def redo(
    store: StoreArgument,
    names: Annotated[list[str], typer.Argument(metavar="SHARD..", help="names of shards, as 00000017")],
    shards: Annotated[str, typer.Option(help="the tars to make them again from")],
    workers: WorkersOption = _DEFAULTS.workers,
    device: DeviceOption = "auto",
    json_: JsonOption = False,
) -> None:
    """Compute whole shards again, as after a tar was replaced."""
    from reinforce.check.repair import redo as again

    _mend(lambda options: again(store, names, shards, options), store, workers, device, json_)


def _mend(work: Callable[[RunOptions], "RepairReport"], store: str, workers: str, device: str, json_: bool) -> None:
    with errors_as_sentences():
        # Shards that are there were accepted before, whatever their share of bad samples.
        options = parse(RunOptions, {"workers": workers, "device": device, "max_invalid": 1}, "the request")
        with redirect_stdout(sys.stderr):
            report = work(options)
        again = f"{typed('clip-reinforce')} repair {store} --shards 'DIR/*.tar'   computes again what was removed"
        show(asdict(report), json_, "" if report.run else again)
    raise typer.Exit(0 if report.sound else 1)


@app.command()
def upgrade(
    store: StoreArgument,
    to: Annotated[str, typer.Option("--to", help="where the new store goes")],
    shards: Annotated[str, typer.Option(help="the tars that it was made from")],
    json_: JsonOption = False,
) -> None:
    """Make a store of format 2 out of one that version 0.1 wrote: the same columns, and digests from the tars."""
    from reinforce.check.upgrade import upgrade as renew

    with errors_as_sentences():
        report = renew(store, to, shards)
        show(asdict(report), json_)
    raise typer.Exit(1 if report.failed else 0)


@app.command()
def repack(
    store: StoreArgument,
    to: Annotated[str, typer.Option("--to", help="where the new store goes")],
    embeddings: Annotated[Packing, typer.Option(help="how the new one stores them: docs/store.md")],
    json_: JsonOption = False,
) -> None:
    """Store embeddings in another way, in a store of their own; `info STORE --embeddings` says what that takes and
    loses."""
    from reinforce.check.repack import repack as again

    with errors_as_sentences():
        report = again(store, to, embeddings)
        show(asdict(report), json_)
    raise typer.Exit(1 if report.failed else 0)


def _print_run(report: RunReport, shards: str, recipe: Recipe, training: str) -> None:
    if report.already_there == report.shards:
        say(f"All {report.shards} shards are in {report.store} already; nothing to do ({report.seconds:.1f} s).")
    else:
        say(
            f"{report.done} of {report.shards} shards reinforced in {report.seconds:.0f} s"
            + (f", {report.already_there} were there already" if report.already_there else "")
            + f": {report.samples} samples read, {report.valid} good"
            + "".join(f", {num} {reason}" for reason, num in report.quarantined.items())
            + "."
        )
    for kind, num in report.noted.items():
        say(f"Noted:  {num} {kind}, as {report.first[kind]}")
    for final, remedy in ((True, "They stay so until this is mended:"), (False, "Run again to retry:")):
        if failed := [failure for failure in report.failed if failure.final == final]:
            say(f"Failed: {len(failed)} of {report.shards} shards. {remedy}")
        for failure in failed:
            say(f"  {failure.shard}  (tries: {failure.attempts})  {failure.reason}")
            for kind, num in failure.noted.items() if failure.quarantined else ():
                say(f"    {num} {kind}, as {failure.first[kind]}")
    fit = f"{typed('clip-train')} fit --shards '{shards}' --store {report.store} {training}"
    weights = ", random weights" if recipe.weights == "random" else ""
    say(
        f"Recipe: {recipe.name}{weights}",
        f"        teachers {_models(recipe.teachers)}",
        f"        captioners {_models(recipe.captioners)}",
        f"Store:  {report.store}",
        f"Next:   {typed('clip-reinforce')} info {report.store}",
        f"        {typed('clip-reinforce')} verify {report.store} --shards '{shards}' --replay 100",
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
