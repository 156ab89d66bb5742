"""The commands `pack`, `import` and `export`."""

import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from reinforce.config import check_name
from reinforce.errors import ConfigError
from reinforce.recipes import load_recipe
from reinforce.terminal import JsonOption, SetOption, StoreOption, errors_as_sentences, home, show, typed

importing = typer.Typer(no_args_is_help=True, help="Make a store of what others wrote.")
exporting = typer.Typer(no_args_is_help=True, help="Write a store in a form that others read.")


def pack(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER|TABLE",
            callback=home,
            help="a folder of pictures with their captions in .txt beside them; or a .csv, .tsv or .parquet with a "
            "column of paths and one of captions",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", callback=home, help="the folder that is written")],
    samples_per_shard: Annotated[int, typer.Option(min=1, help="pictures in a tar")] = 10_000,
    image_column: Annotated[str | None, typer.Option(help="of a table: where the paths are")] = None,
    caption_column: Annotated[str | None, typer.Option(help="of a table: where the captions are")] = None,
    json_: JsonOption = False,
) -> None:
    """Make shards of a folder of pictures, or of a table of paths and captions. The same input gives the same bytes."""
    from reinforce.exchange.packed import pack as make

    with errors_as_sentences():
        report = make(source, out, samples_per_shard, image_column, caption_column)
        following = f"{typed('clip-reinforce')} run '{out}/*.tar' --store STORE --recipe RECIPE"
        show(asdict(report), json_, following)
    raise typer.Exit(1 if report.noted.keys() & {"missing_file", "no_path", "wrong_fields"} else 0)


@importing.command("datacompdr")
def import_datacompdr(
    records: Annotated[str, typer.Argument(metavar="TARS", help="tars with paug.json, syn.json and npz or pth.gz")],
    store: StoreOption,
    images: Annotated[
        str | None, typer.Option(help="tars with the images, named as those of the records; by default the same tars")
    ] = None,
    recipe: Annotated[str, typer.Option(help="a recipe that names the teachers and the captioner")] = "datacompdr_12m",
    set_: SetOption = [],
    width: Annotated[
        list[str],
        typer.Option(
            metavar="TEACHER=NUMBER", help="of its part of an embedding, in the recipe's order; else its model's"
        ),
    ] = [],
    max_invalid: Annotated[
        float, typer.Option(help="a shard with a larger share of samples without image or record is refused")
    ] = 0.1,
    json_: JsonOption = False,
) -> None:
    """Make a store of DataCompDR's tars and of the images that they are of, from which `clip-train fit` learns."""
    with errors_as_sentences():
        from reinforce.exchange.imported import import_datacompdr as run

        made_by = load_recipe(recipe, set_)
        report = run(records, images or records, store, made_by, _widths(width), max_invalid)
        # The records do not say whose they are.
        assumed = {name: f"{of.model},{of.pretrained or ''}".strip(",") for name, of in made_by.teachers.items()}
        show(asdict(report) | {"assumed_teachers": assumed}, json_)
        raise typer.Exit(1 if report.failed else 0)


@importing.command("clip-retrieval")
def import_clip_retrieval(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", callback=home, help="a local folder with img_emb, text_emb and metadata")
    ],
    images: Annotated[str, typer.Option(help="the tars that were embedded")],
    store: StoreOption,
    clip_model: Annotated[
        str, typer.Option(help="as clip-retrieval was told: ViT-B/32, open_clip:ViT-B-32/laion2b_s34b_b79k, ..")
    ],
    teacher: Annotated[str, typer.Option(help="what the model is called in the store")] = "clip",
    logit_scale: Annotated[float, typer.Option(help="what the model multiplies its cosines by")] = 100.0,
    max_invalid: Annotated[
        float, typer.Option(help="a shard with a larger share of samples without image or embedding is refused")
    ] = 0.1,
    json_: JsonOption = False,
) -> None:
    """Make a store of what clip-retrieval embedded, and of those tars: one view of each image, its middle."""
    with errors_as_sentences():
        check_name("--teacher", teacher)
        from reinforce.exchange.clip_retrieval import import_clip_retrieval as run

        report = run(folder, images, store, clip_model, teacher, logit_scale, max_invalid)
        show(asdict(report), json_)
        raise typer.Exit(1 if report.failed else 0)


@exporting.command("datacompdr")
def export_datacompdr(
    store: Annotated[str, typer.Argument(metavar="STORE", help="the store: a local path or an fsspec URL")],
    shards: Annotated[str, typer.Option(help="the tars that the store was made from")],
    out: Annotated[Path, typer.Option(callback=home, help="the folder that is written")],
    embeddings: Annotated[str, typer.Option(help="fp32, in npz, or bf16, in pth.gz")] = "fp32",
    view_set: Annotated[str, typer.Option(help="which views are written")] = "base",
    json_: JsonOption = False,
) -> None:
    """Write tars as those of DataCompDR, images and captions among them: the published trainer reads them."""
    with errors_as_sentences():
        from reinforce.exchange.exported import export_datacompdr as run

        if embeddings not in ("fp32", "bf16"):
            raise ConfigError(f"--embeddings {embeddings}: choose fp32 or bf16")
        report = run(store, shards, out, embeddings, view_set)  # type: ignore[arg-type]
        show(asdict(report), json_)
        raise typer.Exit(1 if report.failed else 0)


@importing.command("captions")
def import_captions(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", callback=home, help=".jsonl, .jsonl.gz or .parquet: key, and captions")
    ],
    store: StoreOption,
    name: Annotated[str, typer.Option(help="what the text set is called")],
    num_captions: Annotated[
        int | None, typer.Option(min=1, help="for each image; by default as many as the one with most of them has")
    ] = None,
    source: Annotated[str, typer.Option(help="who wrote them, for the manifest")] = "",
    json_: JsonOption = False,
) -> None:
    """Add captions that were written elsewhere. `clip-reinforce extend` then has the teachers embed them."""
    with errors_as_sentences():
        check_name("--name", name)
        from reinforce.exchange.captions import import_captions as run

        following = f"{typed('clip-reinforce')} extend SHARDS --store {store}"
        show(asdict(run(file, store, name, num_captions, source)), json_, following)


@exporting.command("keys")
def export_keys(
    store: Annotated[str, typer.Argument(metavar="STORE", help="the store: a local path or an fsspec URL")],
    shards: Annotated[str, typer.Option(help="the tars that the store was made from")],
    out: Annotated[Path | None, typer.Option(help="the file that is written; by default stdout")] = None,
) -> None:
    """Write a JSON line for each image, for who captions elsewhere: shard, key, caption, where its bytes lie."""
    with errors_as_sentences():
        from reinforce.exchange.captions import export_keys as run

        out = out and home(out).resolve()
        # On a terminal no caption may steer it.
        lines = (json.dumps(told, ensure_ascii=out is None) for told in run(store, shards))
        if out is None or (out.exists() and not out.is_file()):  # a device or a pipe is written to, and not replaced
            with out.open("w", encoding="utf-8") if out else nullcontext(sys.stdout) as file:
                file.writelines(f"{line}\n" for line in lines)
            return
        partial = out.with_name(f"{out.name}.partial")
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in lines)
            os.replace(partial, out)  # whole or not at all
        finally:
            partial.unlink(missing_ok=True)


@exporting.command("columns")
def export_columns(
    store: Annotated[str, typer.Argument(metavar="STORE", help="the store: a local path or an fsspec URL")],
    columns: Annotated[list[str], typer.Argument(metavar="COLUMN..", help="as view/base/vit, or '*' for all")],
    out: Annotated[Path, typer.Option(callback=home, help="the folder that is written")],
    form: Annotated[Literal["npy", "parquet"], typer.Option("--format", help="arrays, or tables")] = "npy",
    json_: JsonOption = False,
) -> None:
    """Write columns as numpy arrays or parquet tables: good samples only, embeddings as float32."""
    with errors_as_sentences():
        from reinforce.exchange.columns import export_columns as run

        report = run(store, columns, out, form)
        show(asdict(report), json_)
        raise typer.Exit(1 if report.failed else 0)


def files_of(option: str, given: Sequence[str]) -> dict[str, Path]:
    """Files by name, from texts NAME=FILE. Raises ConfigError."""
    files: dict[str, Path] = {}
    for item in given:
        name, equals, file = item.partition("=")
        if not (name and equals and file):
            raise ConfigError(f"{option} {item}: write NAME=FILE, such as vlm=captions.jsonl")
        check_name(option, name)
        if name in files:
            raise ConfigError(f"{option}: '{name}' is given twice; take another name for one of the files")
        files[name] = home(Path(file))
    return files


def _widths(given: list[str]) -> dict[str, int]:
    widths = {}
    for item in given:
        name, equals, number = item.partition("=")
        if not equals or not number.isdecimal():
            raise ConfigError(f"--width {item}: write TEACHER=NUMBER, such as openai=768")
        widths[name] = int(number)
    return widths
