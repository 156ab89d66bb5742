"""What each way to store embeddings costs and loses, on a store's own rows."""

from typing import get_args

import numpy as np

from reinforce.check.info import none_whole
from reinforce.config import Packing
from reinforce.data.status import Status
from reinforce.errors import StoreError
from reinforce.store import arrays
from reinforce.store.columns import STATUS, Column
from reinforce.store.manifest import Manifest
from reinforce.store.packing import MEASURED, loss
from reinforce.store.store import Store


def dial(url: str) -> dict[str, dict[str, dict[str, float]]]:
    """For each teacher and each setting of `embeddings`: `of_raw`, bytes as stored over those of bfloat16; and, where
    it has captions, what is lost (store/packing.py). Of view 0 and caption 0 of up to MEASURED samples of one shard.

    Raises StoreError where no shard is whole, or the store has lost already what is compared with.
    """
    store = Store(url)
    manifest = store.promised()
    recipe = manifest.parsed_recipe()
    if recipe.embeddings == "int8":
        raise StoreError(f"{url} holds int8: what bfloat16 would say is not known any more")
    return {
        teacher: {packing: _row(*found, packing) for packing in get_args(Packing)}
        for teacher, found in samples(store, manifest).items()
    }


def losses(store: Store, manifest: Manifest, packing: Packing) -> dict[str, dict[str, float]]:
    """For each teacher what a setting would lose; of a store without captions nothing is known."""
    found = samples(store, manifest)
    return {name: loss(images, texts, scale, packing) for name, (images, texts, scale) in found.items() if len(texts)}


def samples(store: Store, manifest: Manifest) -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
    """For each teacher view 0 and caption 0 of the same good samples of the first shard that is whole, and its
    `logit_scale`. Raises StoreError where none is."""
    recipe, columns = manifest.parsed_recipe(), manifest.columns()
    whole = (shard for shard in store.shards() if not store.missing(shard, columns))
    if (shard := next(whole, None)) is None:
        raise none_whole(store, columns)
    good = np.flatnonzero(store.read(shard, STATUS) == Status.GOOD)[:MEASURED]
    views, texts = next(iter(recipe.view_sets)), next(iter(recipe.text_sets), None)

    def first(column: Column) -> np.ndarray:
        return store.read(shard, column, 0)[good]

    return {
        teacher: (
            first(Column("view", views, teacher)),
            first(Column("text", texts, teacher)) if texts else np.empty((0, 0)),
            manifest.models["teachers"][teacher]["logit_scale"],
        )
        for teacher in recipe.text_teachers
    }


def _row(images: np.ndarray, texts: np.ndarray, scale: float, packing: Packing) -> dict[str, float]:
    stored = sum(map(len, arrays.encode(images[None], 1, packing).parts))
    return {"of_raw": stored / max(1, images.nbytes)} | (loss(images, texts, scale, packing) if len(texts) else {})
