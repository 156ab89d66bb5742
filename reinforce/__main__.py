"""Command line of the writer. Exit codes: 0 done, 1 done but with failures or faults, 2 the request was wrong."""

import json
import logging
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from typing import Annotated, Literal

import typer

from reinforce.config import RunOptions, parse
from reinforce.recipes import load_recipe
from reinforce.run.reports import RunReport
from reinforce.terminal import JsonOption, errors_as_sentences, print_tree

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

StoreOption = Annotated[str, typer.Option("--store", help="local path or fsspec URL of the store")]
StoreArgument = Annotated[str, typer.Argument(metavar="STORE", help="local path or fsspec URL of the store")]
_DEFAULTS = RunOptions()


@app.command()
def run(
    shards: Annotated[str, typer.Argument(help="tars: braces, '*', several joined by '::', paths or fsspec URLs")],
    store: StoreOption,
    recipe: Annotated[str, typer.Option(help="name of a file in pipelines/, or a recipe saved as .json")] = "sample",
    set_: Annotated[list[str], typer.Option("--set", help="dotted.key=value, over the recipe; may be repeated")] = [],
    workers: Annotated[str, typer.Option(help="N, MIN:MAX, auto, or 0 for no Ray")] = _DEFAULTS.workers,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = _DEFAULTS.device,
    max_invalid: Annotated[float, typer.Option(help="share of bad samples at which a shard is refused")] = (
        _DEFAULTS.max_invalid
    ),
    attempts: Annotated[int, typer.Option(help="tries a shard")] = _DEFAULTS.attempts,
    decode_threads: Annotated[int, typer.Option(help="decoding threads of a worker")] = _DEFAULTS.decode_threads,
    json_: JsonOption = False,
) -> None:
    """Write what the teachers of a recipe know about SHARDS into a store. Run it again to go on where it stopped."""
    from reinforce.run.driver import run as run_driver

    with errors_as_sentences():
        loaded = load_recipe(recipe, set_)
        options = parse(
            RunOptions,
            {
                "workers": workers,
                "device": device,
                "max_invalid": max_invalid,
                "attempts": attempts,
                "decode_threads": decode_threads,
            },
            "the request",
        )
        with redirect_stdout(sys.stderr):  # Ray prints news of its workers on stdout, which is for the answer
            report = run_driver(shards, store, loaded, options)
        if json_:
            print(json.dumps(asdict(report)))
        else:
            _print_run(report, shards)
    raise typer.Exit(1 if report.failed else 0)


@app.command()
def info(
    store: StoreArgument,
    json_: JsonOption = False,
    quarantine: Annotated[bool, typer.Option("--quarantine", help="list the samples that were set aside")] = False,
) -> None:
    """What a store holds: counts, sets, bytes, columns not there yet."""
    from reinforce.check import info as room

    with errors_as_sentences():
        found = room.info(store)
        if quarantine:
            found["quarantine"] = list(room.quarantine(store))
        if json_:
            print(json.dumps(found))
        else:
            print_tree(found)


@app.command()
def verify(
    store: StoreArgument,
    shards: Annotated[str | None, typer.Option(help="the tars it was made from, for --replay")] = None,
    replay: Annotated[int, typer.Option(min=0, help="views to make again from the tars and compare")] = 0,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option()] = "auto",
    json_: JsonOption = False,
) -> None:
    """Doubt a store: every column there, whole, and, with --replay, every view the same as when it was stored."""
    from reinforce.check.verify import verify as doubt

    with errors_as_sentences():
        report = doubt(store, shards, replay, device)
        if json_:
            print(json.dumps(asdict(report)))
        else:
            print_tree(asdict(report))
            print("sound" if report.sound else "faults found")
    raise typer.Exit(0 if report.sound else 1)


def _print_run(report: RunReport, shards: str) -> None:
    if report.already_there == report.shards:
        print(f"All {report.shards} shards are in {report.store} already; nothing to do ({report.seconds:.1f} s).")
    else:
        print(
            f"{report.done} of {report.shards} shards reinforced in {report.seconds:.0f} s"
            + (f", {report.already_there} were there already" if report.already_there else "")
            + f": {report.samples} samples read, {report.valid} good"
            + "".join(f", {num} {reason}" for reason, num in report.quarantined.items())
            + "."
        )
    if report.failed:
        print(f"{len(report.failed)} shards failed; nothing of them was written. Run again to try them again:")
        for failure in report.failed:
            print(f"  {failure.shard}  (tries: {failure.attempts})  {failure.reason}")
    print(
        f"Store: {report.store}\n"
        f"Next:  python -m reinforce info {report.store}\n"
        f"       python -m reinforce verify {report.store} --shards '{shards}' --replay 100"
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    app()
