"""What a store holds, in numbers."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from reinforce.errors import StoreError
from reinforce.manifest import Manifest, columns
from reinforce.shards import Status
from reinforce.store import Store


def promised(store: Store) -> Manifest:
    """The manifest of a store that has to exist. Raises StoreError."""
    manifest = store.manifest()
    if manifest is None:
        raise StoreError(f"no store at {store.url}; make one with: python -m reinforce run SHARDS --store {store.url}")
    return manifest


def info(url: str) -> dict[str, Any]:
    """Counts, sets, bytes and missing columns. Embeddings are counted raw (2 bytes a number) and as stored."""
    store = Store(url)
    manifest = promised(store)
    recipe = manifest.parsed_recipe()
    quarantined: Counter[str] = Counter()
    samples = valid = total = raw = stored = 0
    missing = []
    shards = store.shards()
    for shard in shards:
        absent = set(store.missing(shard, columns(recipe)))
        missing += [f"{shard}/{column}" for column in columns(recipe) if column in absent]
        if "status" not in absent:
            statuses = store.read(shard, "status")
            samples += len(statuses)
            valid += int((statuses == Status.GOOD).sum())
            quarantined.update(Status(int(status)).reason for status in statuses if status != Status.GOOD)
        for column in columns(recipe):
            if column not in absent:
                size = store.stored_bytes(shard, column)
                total += size
                if column.rsplit("/", 1)[-1] in recipe.teachers:
                    stored += size
                    raw += 2 * int(np.prod(store.open_array(shard, column).shape))
    return {
        "format_version": manifest.format_version,
        "recipe": recipe.name,
        "recipe_fingerprint": manifest.fingerprint,
        "weights": recipe.weights,
        "shards": len(shards),
        "samples": samples,
        "valid": valid,
        "quarantined": dict(sorted(quarantined.items())),
        "view_sets": {n: {"views": v.num_views, "teachers": [*recipe.teachers]} for n, v in recipe.view_sets.items()},
        "text_sets": {
            name: {"captions": num, "teachers": [*recipe.teachers]}
            for name, num in [
                ("original", recipe.num_original_captions),
                *((name, captioner.num_captions) for name, captioner in recipe.captioners.items()),
            ]
        },
        "bytes": {"total": total, "embeddings_raw": raw, "embeddings_stored": stored},
        "missing_columns": missing,
    }


def quarantine(url: str) -> Iterator[dict[str, str]]:
    """Shard, key and reason of every sample that is not used."""
    store = Store(url)
    promised(store)
    for shard in store.shards():
        if store.has(shard, "key") and store.has(shard, "status"):
            for key, status in zip(store.read(shard, "key"), store.read(shard, "status"), strict=True):
                if status != Status.GOOD:
                    yield {"shard": shard, "key": str(key), "reason": Status(int(status)).reason}
