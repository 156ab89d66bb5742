"""Why shards were refused, a note for each beside the groups: nothing else is written of them, and `info` has to say
where they are."""

import json
import os
from contextlib import suppress
from typing import Any

from reinforce.store.objects import Objects

FOLDER = "__refused__"  # no shard can be called so


def refuse(objects: Objects, shard: str, told: dict[str, Any]) -> None:
    """Note what is wrong, in place of an older note."""
    with suppress(OSError):  # the run says it, too, and what else is wrong is told by whatever writes next
        accept(objects, shard)
        objects.create(f"{FOLDER}/{shard}.json", json.dumps(told, indent=1).encode())


def accept(objects: Objects, shard: str) -> None:
    """Take back the note of a shard that is in the store now."""
    objects.remove(f"{FOLDER}/{shard}.json")
    if objects.local:
        with suppress(OSError):  # there is none, or there are other notes
            os.rmdir(f"{objects.root}/{FOLDER}")


def refused(objects: Objects) -> list[str]:
    """The names of the shards that have a note."""
    return [name.removesuffix(".json") for name in objects.files(FOLDER)]


def refusal(objects: Objects, shard: str) -> dict[str, Any]:
    """The note: `why` in a sentence, and the counts of a ShardReport."""
    note: dict[str, Any] = json.loads(objects.get(f"{FOLDER}/{shard}.json"))
    return note
