"""Train small image-text models on tars and on what a store knows of them; evaluate, export and time them.

Exit codes: 0 done; 1 something went wrong on the way; 2 the request was wrong, nothing was done; 130 and 143 stopped by
Ctrl-C or SIGTERM (run it again).
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from reinforce.config import CAPTION_FILES, CaptionFiles, parse
from reinforce.errors import ConfigError
from reinforce.lines import say
from reinforce.recipes import choice, listed
from reinforce.terminal import (
    DeviceOption,
    JsonOption,
    SetOption,
    VersionOption,
    errors_as_sentences,
    home,
    show,
    start,
    typed,
)
from train.comkd import commands as comkd
from train.config import TrainConfig, load_training, taking_the_place
from train.options import EVAL_HELP, EvalOption, eval_sets, show_report

if TYPE_CHECKING:
    import torch

    from train.evaluation.metrics import Precision

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

StudentArgument = Annotated[
    str, typer.Argument(metavar="STUDENT", help="a name of the table, or a folder such as runs/NAME/student")
]


@app.callback()
def _all(version: VersionOption = False) -> None: ...


@app.command()
def recipes(json_: JsonOption = False) -> None:
    """List the recipes that `fit --recipe` takes by name."""
    with errors_as_sentences():
        say(*([json.dumps(listed("TRAINING"))] if json_ else choice("TRAINING")))


@app.command()
def fit(
    shards: Annotated[
        str | None, typer.Option(help="tars: braces, '*', several joined by '::', paths or fsspec URLs")
    ] = None,
    store: Annotated[
        str | None, typer.Option(help="what teachers know about these tars; without it, set distill=0")
    ] = None,
    data: Annotated[
        list[str],
        typer.Option(
            metavar="SHARDS::STORE",
            help="in place of both, and may be repeated: several shards with their stores; with nothing after the last "
            "'::', tars without a store",
        ),
    ] = [],
    weight: Annotated[
        list[float],
        typer.Option(help="of each --data, in their order: how often an epoch goes through it; 1 by default"),
    ] = [],
    student: Annotated[str | None, typer.Option(help="a name of the table, or a folder; else the recipe's")] = None,
    out: Annotated[Path, typer.Option(callback=home, help="folder of the run: curves, checkpoints, student")] = Path(
        "runs/latest"
    ),
    recipe: Annotated[
        str | None,
        typer.Option(
            help="name of a recipe (`clip-train recipes`), or a path: mine.py, mine.json; without: the defaults",
            autocompletion=lambda: list(listed("TRAINING")),
        ),
    ] = None,
    eval_: EvalOption = [],
    set_: SetOption = [],
    json_: JsonOption = False,
) -> None:
    """Train a student on tars and what a store knows of them. Run it again to go on where it stopped."""
    with errors_as_sentences():
        config = load_training(recipe, set_)
        asked: dict[str, Any] = {"data": _data(data, weight)} if data or weight else {}
        asked |= taking_the_place(shards, store, asked.get("data"))
        asked |= {"student": student} if student else {}
        asked |= {"eval_sets": eval_sets(eval_)} if eval_ else {}
        config = parse(TrainConfig, config.model_dump() | asked, "the request")
        from train.trainer import fit as fit_student

        report = fit_student(config, out)
        if int(os.environ.get("RANK", 0)) == 0:
            show_report(report, json_, f"{typed('clip-train')} eval {out / 'student'} NAME=SET")


@app.command(name="eval")
def eval_(
    student: StudentArgument,
    sets: Annotated[
        list[str], typer.Argument(metavar="NAME=SET", help=f"{EVAL_HELP}; with --suite the folder of its sets")
    ],
    suite: Annotated[
        Literal["datacomp"] | None, typer.Option(help="DataComp's 38 tasks, as many of them as the folder has")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="images or texts per forward pass")] = 256,
    caption_key: Annotated[
        list[str], typer.Option(help="key of .json under which captions lie in tars; may be repeated")
    ] = list(CAPTION_FILES.keys),
    caption_lines: Annotated[
        bool, typer.Option("--caption-lines", help="in tars, each line of .txt is a caption, and not all of them one")
    ] = False,
    device: DeviceOption = "auto",
    precision: Annotated[
        Literal["fp32", "amp_bf16"], typer.Option(help="arithmetic; amp_bf16 is bfloat16 autocast")
    ] = "fp32",
    json_: JsonOption = False,
) -> None:
    """Score a student: zero-shot classification where images have classes, retrieval where they have captions.

    Scores are in percent, and with --json shares from 0 to 1.

    A student trained with comkd is scored on its own classes, by the base-to-novel protocol.

    With --suite datacomp FOLDER: DataComp's tasks, each by the metric that counts for it, and their average. The exit
    code is 1 if one could not be read.
    """
    with errors_as_sentences():
        from reinforce.models.device import pick_device
        from train.evaluation.metrics import in_percent
        from train.evaluation.sets import EvalSet
        from train.trained import load

        place = pick_device(device)
        files = CaptionFiles(keys=tuple(caption_key), lines=caption_lines)
        if suite:
            _suite(student, place, sets, batch_size, precision, json_)
            return
        opened = {name: EvalSet(url, files=files) for name, url in eval_sets(sets).items()}
        found = load(student, place).evaluate(opened, batch_size, precision)
        show(found if json_ else in_percent(found), json_)


@app.command()
def export(
    student: StudentArgument,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", callback=home, help="folder to write; it must not exist yet, or be empty")
    ],
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="REPO", help="put it on Hugging Face, too, as OWNER/NAME; public, if it is not there yet"),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Write a student as an open_clip folder and as ONNX, and check that both give what the student gives.

    ONNX has both towers, or the classifier of a student trained with comkd.

    If the check finds a difference, the exit code is 1, the files stay in OUT.partial, and none goes to the hub.
    """
    with errors_as_sentences():
        from train.hub import Repository
        from train.trained import load

        loaded = load(student)
        repository = Repository(push_to_hub) if push_to_hub else None
        report = loaded.export(out)
        pushed = {"pushed": repository.push(out)} if repository and not report.faults else {}
        show(asdict(report) | pushed, json_)
    raise typer.Exit(1 if report.faults else 0)


@app.command()
def report(
    trainings: Annotated[list[str], typer.Argument(metavar="TRAINING", help="folders that fit has written, --out")],
    out: Annotated[str, typer.Option("--out", "-o", metavar="FILE", help="the page")] = "trainings.html",
    json_: JsonOption = False,
) -> None:
    """Show trainings side by side as one page for a browser: results, curves, and the settings in which they differ."""
    with errors_as_sentences():
        from train.report import report as page

        show(asdict(page(trainings, out)), json_)


@app.command()
def latency(
    students: Annotated[list[str], typer.Argument(metavar="STUDENT", help="names of the table, or folders")],
    size: Annotated[
        list[int],
        typer.Option(min=1, help="pixels per side of an image; may be repeated (default: each student's own)"),
    ] = [],
    batch: Annotated[list[int], typer.Option(min=1, help="images or texts per call; may be repeated")] = [1],
    repeats: Annotated[int, typer.Option(min=2, help="calls that are timed, after the warm-up")] = 20,
    device: DeviceOption = "auto",
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="type of weights and activations")] = "fp32",
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="of a CPU (default: all cores)")] = None,
    compiled: Annotated[bool, typer.Option("--compiled", help="run every tower through torch.compile")] = False,
    json_: JsonOption = False,
) -> None:
    """Measure students: parameters, FLOPs and milliseconds per call of each tower, in the form used for inference."""
    with errors_as_sentences():
        from reinforce.models.device import pick_device
        from reinforce.process import torch_threads
        from train.latency import measure, table

        if threads:
            torch_threads(threads)
        rows = measure(students, size, batch, repeats, str(pick_device(device)), precision, compiled)
        say(*(json.dumps({"rows": [asdict(row) for row in rows]}) if json_ else table(rows)).split("\n"))


for command in comkd.COMMANDS:
    app.command()(command)


def _suite(
    student: str, device: "torch.device", folders: list[str], batch_size: int, precision: "Precision", json_: bool
) -> None:
    from train.evaluation.suite import evaluate_suite
    from train.students import Student
    from train.trained import load

    if len(folders) != 1:
        raise ConfigError("--suite takes one folder: clip-train eval STUDENT --suite datacomp FOLDER")
    loaded = load(student, device)
    if not isinstance(loaded, Student):
        raise ConfigError(f"{student} knows its own classes only; a suite needs a student of two towers")
    report = evaluate_suite(loaded, folders[0], batch_size, precision)
    say(*([json.dumps(asdict(report))] if json_ else report.table().split("\n")))
    if report.failed:
        raise typer.Exit(1)


def _data(texts: list[str], weights: list[float]) -> list[dict[str, Any]]:
    if weights and len(weights) != len(texts):
        raise ConfigError(f"{len(weights)} --weight for {len(texts)} --data: give each one, in the same order, or none")
    parts = []
    for text, weight in zip(texts, weights or [1.0] * len(texts), strict=True):
        shards, _, store = text.rpartition("::")
        if not shards or store.endswith(".tar"):
            raise ConfigError(f"{text}: write data as SHARDS::STORE, or as SHARDS:: for tars without a store")
        parts.append({"shards": shards, "store": store or None, "weight": weight})
    return parts


def main() -> None:
    """The command `clip-train`."""
    start(app)


if __name__ == "__main__":
    main()
