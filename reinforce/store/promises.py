"""The manifests of a store: the first, and a larger one beside it for each time that the store has grown.

None of them is ever changed. The newest says what the store promises, and is read once.
"""

import json

from reinforce.errors import StoreError
from reinforce.store.columns import Column
from reinforce.store.manifest import Manifest
from reinforce.store.metadata import METADATA, group_json, is_sealed, sealed
from reinforce.store.objects import Objects


class Promises:
    """Of the store at `url`."""

    def __init__(self, url: str, objects: Objects) -> None:
        self._url, self._objects = url, objects
        self._manifest: Manifest | None = None
        self._num_extensions = 0
        self._of_columns: dict[Column, str] = {}  # of a column they never change, whatever a store grows by

    def newest(self) -> Manifest | None:
        """The store's manifest, or None where there is no store yet. Raises StoreError if it is not one of ours, or is
        not as it was written, or has been lost."""
        manifest = self.read()
        # A manifest comes before any shard. So where there are shards, it may have come since it was looked for.
        if manifest is None and (shards := shards_of(self._objects)) and not (manifest := self.read()):
            raise StoreError(
                f"{self._url} holds '{shards[0]}' and no {METADATA}: its manifest is lost, or it is no store; restore "
                "that file, or give another STORE"
            )
        return manifest

    def there(self) -> Manifest:
        """The manifest of a store that must exist. Raises StoreError."""
        manifest = self.newest()
        if manifest is None:
            raise StoreError(f"no store at {self._url}; make one with: clip-reinforce run SHARDS --store {self._url}")
        return manifest

    def read(self) -> Manifest | None:
        """The newest, whatever else lies in the store. One that came after it was read first is not looked for."""
        if self._manifest is None:
            manifest, number = self._at(METADATA), 0
            while manifest and (larger := self._at(_extension(number + 1))):
                manifest.extended(larger, self._url)
                manifest, number = larger, number + 1
            self._manifest, self._num_extensions = manifest, number
        return self._manifest

    @property
    def names(self) -> list[str]:
        """Of the objects that the manifest was read from: the first, and one for each time it has grown."""
        self.there()
        return [METADATA, *(_extension(number + 1) for number in range(self._num_extensions))]

    def of(self, column: Column) -> str:
        """What all columns of that name are held to; empty where there is no manifest yet."""
        if column not in self._of_columns and (manifest := self.read()):
            self._of_columns[column] = manifest.promise(column)
        return self._of_columns.get(column, "")

    def promise(self, manifest: Manifest, extend: bool) -> None:
        """Write the manifest of a new store, or raise ManifestMismatch if the store promises something else. `extend`:
        where it promises less, let it promise this as well."""
        if self.newest() is None:
            self._objects.create(METADATA, _written(manifest))
        while extend:
            stored = self.there()
            manifest = stored.extended(manifest, self._url)
            if manifest.fingerprint == stored.fingerprint:
                break
            self._objects.create(_extension(self._num_extensions + 1), _written(manifest))
            self._manifest = None  # ours, or that of another run, which ours must contain then
        self.there().check(manifest, self._url)
        self._objects.sync("")  # whoever wrote it: what comes now must not survive a power cut that takes the manifest

    def _at(self, path: str) -> Manifest | None:
        try:
            written = self._objects.get(path)
            root = json.loads(written)
            attributes = root.get("attributes", {})
            tree = attributes.get("reinforce")
        except FileNotFoundError:
            return None
        except (ValueError, AttributeError) as error:
            raise StoreError(f"{self._url}/{path} is damaged: {error}; restore it, or give another STORE") from error
        if tree is None:
            raise StoreError(f"{self._url} is a Zarr store, but not one of this project; give another STORE")
        manifest = Manifest.from_json(tree, self._url)
        if manifest.format_version > 1 and not is_sealed(written, attributes):
            raise StoreError(f"{self._url}/{path} is not as it was written; restore it, or give another STORE")
        return manifest


def shards_of(objects: Objects) -> list[str]:
    """Names of the shards' groups, sorted."""
    return [name for name in objects.folders() if not name.startswith((".", "__"))]


def _written(manifest: Manifest) -> bytes:
    return sealed(json.loads(group_json({"reinforce": manifest.to_json()})))


def _extension(number: int) -> str:
    """Where the manifest of a store lies that has grown so many times."""
    return f"manifest.{number:04d}.json"
