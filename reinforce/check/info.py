"""What a store holds, in numbers."""

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from reinforce.config import Recipe
from reinforce.data.status import Status
from reinforce.errors import NotCommitted, StoreError
from reinforce.store import refused as notes_of
from reinforce.store.columns import CLASSES, KEY, STATUS, Column
from reinforce.store.manifest import Manifest
from reinforce.store.store import Store

log = logging.getLogger(__name__)


def groups(store: Store, manifest: Manifest) -> Iterator[tuple[str, list[Column]]]:
    """Every group with the columns that it must have: the class texts', then each shard's."""
    if classes := manifest.class_columns():
        yield CLASSES, classes
    for shard in store.shards():
        yield shard, manifest.columns()


def stored_recipe(url: str) -> Recipe | None:
    """The recipe of a store, or None where there is no store yet. Raises StoreError."""
    manifest = Store(url).manifest()
    return manifest.parsed_recipe() if manifest else None


def none_whole(store: Store, columns: list[Column]) -> StoreError:
    """What is wrong where no shard has all the columns that it must have."""
    shard = next(iter(store.shards()), None)
    if shard is None:
        return StoreError(f"{store.url} has no shard yet; finish its run first")
    first, *more = store.missing(shard, columns)
    return StoreError(
        f"no shard of {store.url} is whole yet: {shard} lacks {first}"
        + (f" and {len(more)} more columns" if more else "")
        + "; finish its run first, or, where captions were imported, `clip-reinforce extend` it"
    )


def info(url: str) -> dict[str, Any]:
    """Counts, sets, bytes, missing columns, and those whose damage was in the way (`verify` looks for all). Embeddings
    are counted raw (2 bytes per number) and as stored; `total` is of all objects."""
    store = Store(url)
    if store.manifest() is None and (notes := refused(url)):
        told = [f"  {shard}: {note['why']}" for shard, note in notes.items()]
        raise StoreError(f"no store at {url}: nothing was written of the shards that a run was given", *told)
    manifest = store.promised()
    recipe = manifest.parsed_recipe()
    quarantined: Counter[str] = Counter()
    samples = valid = raw = stored = 0
    missing, damaged = [], []
    for group, wanted in groups(store, manifest):
        absent = store.missing(group, wanted)
        missing += [f"{group}/{column}" for column in absent]
        present = [column for column in wanted if column not in absent]
        try:
            statuses = store.read(group, STATUS) if STATUS in present else None
        except StoreError as error:  # costs its own shard's counts and nothing else
            statuses = None
            damaged.append(str(error))
        if statuses is not None:
            samples += len(statuses)
            valid += int((statuses == Status.GOOD).sum())
            quarantined.update(Status(int(status)).reason for status in statuses if status != Status.GOOD)
        for column in present:
            if column.teacher:
                try:
                    raw += 2 * int(np.prod(store.open_array(group, column).shape))
                    stored += store.stored_bytes(group, column)
                except StoreError as error:
                    damaged.append(str(error))
    return {
        "format_version": manifest.format_version,
        "recipe": recipe.name,
        "recipe_fingerprint": manifest.fingerprint,
        "weights": recipe.weights,
        "shards": len(store.shards()),
        "samples": samples,
        "valid": valid,
        "quarantined": dict(sorted(quarantined.items())),
        "view_sets": {n: {"views": v.num_views, "teachers": [*recipe.teachers]} for n, v in recipe.view_sets.items()},
        "text_sets": {
            name: {"captions": num, "teachers": recipe.text_teachers} for name, num in recipe.text_sets.items()
        },
        "class_sets": {
            name: {"classes": len(c.classnames), "templates": len(c.templates), "teachers": recipe.text_teachers}
            for name, c in recipe.class_sets.items()
        },
        "embeddings": recipe.embeddings,
        **({"embedding_loss": manifest.embedding_loss} if manifest.embedding_loss else {}),
        "bytes": {"total": store.objects.total_bytes(""), "embeddings_raw": raw, "embeddings_stored": stored},
        "refused_shards": notes_of.refused(store.objects),
        "missing_columns": missing,
        "damaged_columns": damaged,
    }


def refused(url: str) -> dict[str, dict[str, Any]]:
    """Of every shard that a run refused, what was wrong: counts by reason, and the first sample of each."""
    objects = Store(url).objects
    return {shard: notes_of.refusal(objects, shard) for shard in notes_of.refused(objects)}


def quarantine(url: str) -> Iterator[dict[str, str]]:
    """Shard, key and reason of every sample that is not used."""
    store = Store(url)
    store.promised()
    for shard in store.shards():
        try:
            keys, statuses = store.read(shard, KEY), store.read(shard, STATUS)
        except NotCommitted:
            continue
        except StoreError as error:
            log.warning("the quarantine of %s is left out: %s", shard, error)
            continue
        if len(keys) != len(statuses):
            log.warning(
                "the quarantine of %s is left out: it has %d keys and %d statuses; verify the store",
                shard,
                len(keys),
                len(statuses),
            )
            continue
        for key, status in zip(keys, statuses, strict=True):
            if status != Status.GOOD:
                yield {"shard": shard, "key": str(key), "reason": Status(int(status)).reason}
