"""The commands that look at a store and mend it: `info`, `report`, `verify`, `repair`, `redo`, `upgrade`, `repack`."""

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from reinforce.config import Packing, RunOptions, parse
from reinforce.lines import say
from reinforce.terminal import (
    DeviceOption,
    JsonOption,
    StoreArgument,
    WorkersOption,
    errors_as_sentences,
    show,
    typed,
)

if TYPE_CHECKING:
    from reinforce.check.repack import RepackReport
    from reinforce.check.repair import RepairReport
    from reinforce.check.upgrade import UpgradeReport

_DEFAULTS = RunOptions()


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
                say(f"Next:  {typed('clip-reinforce')} repair {quote(store)} --shards '{shards or 'DIR/*.tar'}'")
    raise typer.Exit(0 if sound else 1)


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
        again = f"{typed('clip-reinforce')} repair {quote(store)} --shards 'DIR/*.tar'   computes again what is left"
        if report.imported:
            names = dict.fromkeys(path.split("/")[2] for path in report.imported)
            imports = f"{typed('clip-reinforce')} import captions FILE --store {quote(store)} --name"
            again = "\n       ".join([*(f"{imports} {name}" for name in names), again])
        shown = asdict(report)
        if report.run and not json_:
            failed = [f"{failure['shard']}: {failure['reason']}" for failure in report.run["failed"]]
            shown["run"] = {"done": report.run["done"], "seconds": report.run["seconds"], "failed": failed}
        show(shown, json_, "" if report.sound else again)
        if not json_:
            say("sound" if report.sound else "not all is mended")
    raise typer.Exit(0 if report.sound else 1)


def upgrade(
    store: StoreArgument,
    to: Annotated[str, typer.Option("--to", help="where the new store goes")],
    shards: Annotated[str, typer.Option(help="the tars that it was made from")],
    json_: JsonOption = False,
) -> None:
    """Make a store of format 2 out of one that version 0.1 wrote: the same columns, and digests from the tars."""
    from reinforce.check.upgrade import upgrade as renew

    with errors_as_sentences():
        _show_new(renew(store, to, shards), json_)


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
        _show_new(again(store, to, embeddings), json_)


def _show_new(report: "UpgradeReport | RepackReport", json_: bool) -> None:
    """What was made beside a store; exit code 1 where a part of it could not be."""
    show(asdict(report), json_)
    raise typer.Exit(1 if report.failed else 0)


COMMANDS = (info, report, verify, repair, redo, upgrade, repack)
