"""The commands of ComKD-CLIP: `adapt` a teacher, and `classify` with a student."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from reinforce.config import parse
from reinforce.errors import ConfigError, SampleError
from reinforce.lines import say
from reinforce.terminal import DeviceOption, JsonOption, SetOption, errors_as_sentences, home, show, typed
from train.options import EvalOption, eval_sets, show_report


def adapt(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA", help="labelled images: a folder in CLIP_benchmark's layout, with a split `train`"
        ),
    ],
    teacher: Annotated[
        str | None, typer.Option(help="an open_clip model, or local-dir:FOLDER; without it, the recipe's")
    ] = None,
    pretrained: Annotated[str | None, typer.Option(help="the teacher's weights: a tag of open_clip, or a file")] = None,
    out: Annotated[Path, typer.Option(callback=home, help="the file to write")] = Path("runs/prompts.safetensors"),
    recipe: Annotated[
        str, typer.Option(help="name of a recipe with an ADAPTATION, or a path: mine.py, mine.json")
    ] = "comkd",
    eval_: EvalOption = [],
    set_: SetOption = [],
    json_: JsonOption = False,
) -> None:
    """Adapt a CLIP teacher to labelled images by prompts: a file that a recipe names as the teacher's `prompts`."""
    with errors_as_sentences():
        from train.comkd.adapt import AdaptConfig, load_adaptation
        from train.comkd.adapt import adapt as adapt_teacher

        if pretrained and not teacher:
            raise ConfigError(f"--pretrained {pretrained} needs --teacher: whose weights are they?")
        config = load_adaptation(recipe, set_)
        asked: dict[str, Any] = {"data": data}
        asked |= {"teacher": {"model": teacher, "pretrained": pretrained}} if teacher else {}
        asked |= {"eval_sets": eval_sets(eval_)} if eval_ else {}
        config = parse(AdaptConfig, config.model_dump() | asked, "the request")
        show_report(
            adapt_teacher(config, out),
            json_,
            f"{typed('clip-reinforce')} run .. with a recipe whose teacher has prompts={out} "
            "and whose class_sets name the classes",
        )


def classify(
    student: Annotated[Path, typer.Argument(metavar="STUDENT", help="folder of a student trained with comkd")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="image files")],
    device: DeviceOption = "auto",
    json_: JsonOption = False,
) -> None:
    """Give the three most probable classes of each image, among the classes that the student was trained on.

    The numbers are probabilities from 0 to 1. Over all classes they add up to 1.

    Images that cannot be read are named on stderr, the others are classified, and the exit code is 1.

    JSON has the probabilities under `classified` and the reasons under `failed`, both by file.
    """
    with errors_as_sentences():
        from reinforce.data.images import decode
        from reinforce.models.device import pick_device
        from train.comkd.classifier import load

        place = pick_device(device)
        classifier = load(student).to(place)
        classified, failed = dict[str, dict[str, float]](), dict[str, str]()
        for path in images:
            try:
                picture = decode(path.read_bytes())
            except (OSError, SampleError) as error:
                failed[str(path)] = getattr(error, "strerror", None) or str(error)
                say(f"error: {path}: {failed[str(path)]}; give image files", file=sys.stderr)
                continue
            probabilities = classifier.classify([picture])[0]
            best = probabilities.argsort(descending=True)[:3].tolist()
            classified[str(path)] = {classifier.names[i]: round(probabilities[i].item(), 4) for i in best}
        show({"classified": classified, "failed": failed} if json_ else classified, json_)
    raise typer.Exit(1 if failed else 0)


COMMANDS = (adapt, classify)
