"""A store becomes one whose embeddings are stored otherwise, beside it. No model is asked and no tar is read."""

from dataclasses import dataclass, field
from typing import Any

from reinforce.check import dial
from reinforce.check.info import groups
from reinforce.config import Packing
from reinforce.errors import ConfigError, StoreError
from reinforce.progress import Progress
from reinforce.store.columns import Column
from reinforce.store.store import Store

# Attributes that the new column has of its own; the others tell of the data, and are handed on.
_OWN = {"shard", "column", "promise", "rows", "packing", "num_chunks", "chunks", "index_crc32c", "sha256", "checksum"}


@dataclass
class RepackReport:
    """`bytes_before` and `bytes_after` count the columns that were written now. `failed` says of each group that is not
    wholly in the new store why. `embedding_loss`: what is lost (store/packing.py), by teacher."""

    store: str
    groups: int
    done: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    embedding_loss: dict[str, dict[str, float]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)


def repack(url: str, new: str, embeddings: Packing) -> RepackReport:
    """Write a store at `new` that holds the same in another way; one that was begun is gone on with. The old one is
    only read, and what is missing there is missing here.

    Raises ConfigError where there is nothing to do or it cannot be done, StoreError where one of the two cannot be
    used.
    """
    old, made = Store(url), Store(new)
    manifest = old.promised()
    before = manifest.parsed_recipe().embeddings
    if made.objects.within(old.objects) or old.objects.within(made.objects):
        raise ConfigError(f"{new} and {url} lie in each other; a store has a folder to itself: give another --to")
    if manifest.format_version == 1:
        raise ConfigError(f"{url} is of format 1; make one of format 2 of it first, with `clip-reinforce upgrade`")
    if before == embeddings:
        raise ConfigError(f"{url} holds {embeddings} already; there is nothing to repack")
    if before == "int8":
        raise ConfigError(f"{url} holds int8, and what that has lost is in no store; run its recipe again")
    lost = dial.losses(old, manifest, embeddings) if embeddings == "int8" else {}
    made.promise(manifest.repacked(embeddings, lost))
    found = list(groups(old, manifest))
    report = RepackReport(new, len(found), embedding_loss=made.promised().embedding_loss)
    with Progress(len(found), "group") as progress:
        for group, columns in found:
            try:
                for column in made.missing(group, columns):
                    if old.has(group, column):
                        _copy(old, made, group, column, report)
                report.done += 1
            except StoreError as error:
                report.failed.append(str(error))
            progress.add(f"{len(report.failed)} failed")
    made.objects.sweep()
    return report


def _copy(old: Store, made: Store, group: str, column: Column, report: RepackReport) -> None:
    old.check(group, column)
    about: dict[str, Any] = {k: v for k, v in old.attributes(group, column).items() if k not in _OWN}
    made.commit(group, column, old.read(group, column), about.pop("data", ""), **about)
    report.bytes_before += old.stored_bytes(group, column)
    report.bytes_after += made.stored_bytes(group, column)
