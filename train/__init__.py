"""Trains students on a store: `train.fit` with our own loop, `train.ReinforcedDataset` with yours.

Importing this package loads no torch: it is loaded by the first name that needs it.
"""

from collections.abc import Iterable
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.data.dataset import OpenClipData, ReinforcedDataset

__all__ = ["OpenClipData", "ReinforcedDataset", "fit"]


def fit(
    *,
    shards: str | PathLike[str] | Iterable[str | PathLike[str]] | None = None,
    store: str | PathLike[str] | None = None,
    out: str | PathLike[str],
    recipe: str | PathLike[str] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train a student into the folder `out`, as `clip-train fit` does; called again, it goes on where it stopped.

    shards: tars: braces, '*', several joined by '::' or in a list, paths or fsspec URLs. store: what teachers know of
    these tars; without one it is plain CLIP training, which needs `distill=0`. None of both: those of the recipe.
    recipe: the name or path of a file with a TRAINING; None takes the defaults.
    settings: any of train.config.TrainConfig, over those of the recipe: `student="vit_tiny", lr=1e-3, epochs=5, ..`;
    `data=[{"shards": .., "store": .., "weight": 2}, ..]` takes the place of `shards` and `store`.

    Returns the report that is written to `out`/report.json; the student is in `out`/student, an open_clip folder.
    Raises ConfigError and StoreError before any work, Diverged where the loss is NaN or infinite.
    """
    from pathlib import Path

    from reinforce.config import parse
    from reinforce.data.shards import joined
    from train.config import TrainConfig, load_training, taking_the_place

    base = load_training(None if recipe is None else fspath(recipe))
    where = taking_the_place(
        None if shards is None else joined(shards), None if store is None else fspath(store), settings.get("data")
    )
    config = parse(TrainConfig, base.model_dump() | settings | where, "train.fit")
    from train.trainer import fit as fit_student

    return fit_student(config, Path(out))


def __getattr__(name: str) -> Any:
    if name in __all__:
        from train.data import dataset

        return getattr(dataset, name)
    if name == "trained":
        import train.trained as trained  # `from train import` would ask here again

        return trained
    raise AttributeError(f"module 'train' has no attribute '{name}'")
