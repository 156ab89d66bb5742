"""Writes what teachers know beside the data: tar shards in, a Zarr store out.

    report = reinforce.write("shards/{00000..00127}.tar", "store.zarr", "mine.py")
    store = reinforce.open_store("store.zarr")
    store["00000017"].view("base", row=3, index=0).embeddings["openai"]

Importing this package loads no torch, no Ray, no Zarr: each is loaded by the first call that needs it.
"""

from collections.abc import Iterable
from os import PathLike, fspath
from typing import TYPE_CHECKING, Literal

from reinforce.config import Captioner, ClassSet, Recipe, RunOptions, Teacher, ViewSet, parse
from reinforce.errors import (
    ConfigError,
    Corrupt,
    Diverged,
    ManifestMismatch,
    MissingExtra,
    NotCommitted,
    ReinforceError,
    ReplayError,
    SampleError,
    ShardError,
    StoreError,
)

if TYPE_CHECKING:
    from reinforce.run.reports import RunReport
    from reinforce.store.reader import StoreReader

__all__ = [
    "Captioner",
    "ClassSet",
    "ConfigError",
    "Corrupt",
    "Diverged",
    "ManifestMismatch",
    "MissingExtra",
    "NotCommitted",
    "Recipe",
    "ReinforceError",
    "ReplayError",
    "SampleError",
    "ShardError",
    "StoreError",
    "Teacher",
    "ViewSet",
    "open_store",
    "write",
]

_DEFAULTS = RunOptions()


def write(
    shards: str | PathLike[str] | Iterable[str | PathLike[str]],
    store: str | PathLike[str],
    recipe: Recipe | str | PathLike[str],
    *,
    workers: int | str = _DEFAULTS.workers,
    device: Literal["auto", "cpu", "cuda"] = _DEFAULTS.device,
    max_invalid: float = _DEFAULTS.max_invalid,
    attempts: int = _DEFAULTS.attempts,
    decode_threads: int | None = _DEFAULTS.decode_threads,
) -> "RunReport":
    """Write what the teachers of a recipe know about the shards into a store; what is there already is kept.

    shards: tars: braces, '*', several joined by '::' or in a list, paths or fsspec URLs. store: a local path or an
    fsspec URL.
    recipe: a Recipe, the name of one of this project, or a path to a .py or .json file.
    workers: a number, 'MIN:MAX' or 'auto' of Ray workers; 0 works in this process, without Ray.
    max_invalid: share of bad samples at which a shard is refused. attempts: tries per shard.

    Raises ConfigError, MissingExtra and ManifestMismatch before any work. A shard that fails does not raise: it is in
    `failed` of the report, nothing of it is written, and the next call tries it again.
    """
    from reinforce.data.shards import joined
    from reinforce.recipes import load_recipe
    from reinforce.run.driver import run

    options = {
        "workers": str(workers),
        "device": device,
        "max_invalid": max_invalid,
        "attempts": attempts,
        "decode_threads": decode_threads,
    }
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(fspath(recipe))
    return run(joined(shards), fspath(store), loaded, parse(RunOptions, options, "reinforce.write"))


def open_store(url: str | PathLike[str]) -> "StoreReader":
    """A store at a local path or an fsspec URL, to look at and never to change.

    Raises StoreError where there is none, or where another version of this project wrote it.
    """
    from reinforce.store.reader import StoreReader

    return StoreReader(fspath(url))
