"""What Zarr keeps of a group or an array in its `zarr.json`, with a checksum that tells if it is as it was written."""

import hashlib
import json
from typing import Any

METADATA = "zarr.json"


def group_json(attributes: dict[str, Any]) -> bytes:
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}, indent=2).encode()


GROUP = group_json({})


def group_objects(folder: str) -> list[str]:
    """Zarr's metadata of the groups from the shard down to a column's parent: with them the tree can be walked. Each
    holds GROUP."""
    steps = folder.split("/")
    return ["/".join([*steps[:depth], METADATA]) for depth in range(1, len(steps))]


def sealed(metadata: dict[str, Any]) -> bytes:
    """A `zarr.json` whose attributes have a `checksum` of all its bytes but those of the checksum itself."""
    attributes = metadata["attributes"] | {"checksum": ""}
    text = json.dumps(metadata | {"attributes": attributes}, indent=2).encode()
    return text.replace(_seal(""), _seal(hashlib.sha256(text).hexdigest()[:32]), 1)


def is_sealed(written: bytes, attributes: dict[str, Any]) -> bool:
    found = str(attributes.get("checksum"))
    return hashlib.sha256(written.replace(_seal(found), _seal(""), 1)).hexdigest()[:32] == found


def _seal(checksum: str) -> bytes:
    # No other key can look like this: within a JSON string its quotes would be escaped.
    return f'"checksum": "{checksum}"'.encode()
