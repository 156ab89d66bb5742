"""A store: one Zarr group per shard, columns that are there whole or not at all, and never change.

A column exists exactly when its `zarr.json` exists, and that is the last object written. There is no other record of
progress. No object is ever written over another (objects.py), so what is committed stays: of two writers the first one
wins, and the other's column is the first one's.

A column knows whose it is. Its attributes name shard and column, `promise`, the hash of all settings and models that
decide it, `data`, the identity of the tar's samples, and a record of its chunks (arrays.py); a checksum guards them
all. Every read compares them. Format 1 had none of that, and is read without.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np
import zarr
from zarr.abc.store import Store as ZarrStore
from zarr.storage import FsspecStore, LocalStore

from reinforce.config import Packing
from reinforce.data.augment import OLD_PIXEL_HASH, PIXEL_HASH
from reinforce.data.status import Status
from reinforce.errors import Corrupt, NotCommitted
from reinforce.store import arrays
from reinforce.store.arrays import Encoded, Items, Recorded
from reinforce.store.columns import DIGEST, IDENTITY, PLACE, STATUS, Column
from reinforce.store.manifest import Manifest
from reinforce.store.metadata import GROUP, METADATA, group_objects, is_sealed, sealed
from reinforce.store.objects import Objects
from reinforce.store.packing import unpacked
from reinforce.store.promises import Promises, shards_of

C = TypeVar("C", Column, str)

_MOST_BYTES = 1 << 35  # of a column: a hundred thousand rows with 100 views of 1,536 numbers have less
# What Zarr and its codecs raise on metadata that are not an array's, and on altered bytes; found by fuzzing.
_FAULTS = (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, RuntimeError, OSError)


class Store:
    """A store at a local path or an fsspec URL. A column is named by a `Column`, or by its path in the group."""

    def __init__(self, url: str) -> None:
        """Raises ConfigError for an empty address."""
        self.url = url
        self.objects = Objects(url)
        self._promises = Promises(url, self.objects)

    # -- manifest, as promises.py has it -------------------------------------------------------------------------

    def manifest(self) -> Manifest | None:
        """What the store promises, or None where there is no store yet. Raises StoreError."""
        return self._promises.newest()

    def promised(self) -> Manifest:
        """The manifest of a store that must exist. Raises StoreError."""
        return self._promises.there()

    @property
    def manifests(self) -> list[str]:
        """The names of the objects that the manifest was read from."""
        return self._promises.names

    def promise(self, manifest: Manifest, extend: bool = False) -> None:
        """Write the manifest of a new store, or raise ManifestMismatch if the store promises something else. `extend`:
        where it promises less, let it promise this as well."""
        self._promises.promise(manifest, extend)

    # -- columns -------------------------------------------------------------------------------------------------

    def shards(self) -> list[str]:
        """Names of the shards' groups, sorted."""
        return shards_of(self.objects)

    def has(self, shard: str, column: Column | str) -> bool:
        return self.objects.exists(f"{shard}/{column}/{METADATA}")

    def missing(self, shard: str, columns: Iterable[C]) -> list[C]:
        """Those of `columns` that are not committed."""
        paths = {f"{column}/{METADATA}": column for column in columns}
        there = self.objects.there(shard, paths)
        return [column for path, column in paths.items() if path not in there]

    def commit(self, shard: str, column: Column | str, items: np.ndarray | Items, data: str = "", **more: Any) -> bool:
        """Write one column of a shard, or of the group CLASSES. `items`: the array, or what makes its views or captions
        one by one. `data`: the identity of the tar's samples; `more`: attributes besides those that every column has.

        Gives False where another writer was first and what is stored now has other bytes; they stay as they are.
        """
        column = Column.at(str(column))
        folder = f"{shard}/{column}"
        packing = self._packing(column)
        encoded = arrays.encode(items, column.row_axis, packing)
        name = arrays.object_name(encoded.metadata)
        self._create_groups(folder)
        for stray in set(self.chunk_objects(shard, column)) - {name}:
            self.objects.remove(f"{folder}/{stray}")  # of format 1, which had an object for each chunk
        ours = True
        rows = encoded.metadata["shape"][column.row_axis]
        attributes = self._binding(shard, column) | {"data": data, "rows": rows} | more
        if packing != "bf16":
            attributes["packing"] = packing
        if name:
            record = self._create_whole(f"{folder}/{name}", encoded)
            ours = record == encoded.record
            attributes |= {"num_chunks": 1, **record}
            self.objects.sync(folder)
        written = sealed(encoded.metadata | {"attributes": attributes})
        if not self.objects.create(f"{folder}/{METADATA}", written):
            ours = ours and self.objects.get(f"{folder}/{METADATA}") == written
        self.objects.sync(folder)
        return ours

    def read(self, shard: str, column: Column | str, index: int | None = None, data: str | None = None) -> np.ndarray:
        """A column, or item `index` of its outermost axis, which touches that item's chunks only. `data`: the identity
        that it must have; None: any.

        Raises NotCommitted if it is not there, Corrupt if an object of it is missing, empty, altered, or of another
        column, shard or store, or if it is not of `data`.
        """
        array = self.open_array(shard, column)
        if data is not None and array.attrs.get("data") != data:
            raise Corrupt(
                f"{self.url}: {shard}/{column} belongs to other images than the keys and digests of its shard; verify "
                "the store"
            )
        try:
            if (packing := array.attrs.get("packing", "bf16")) == "bf16-pco":
                arrays.pcodec()
            return unpacked(np.asarray(array[...] if index is None else array[index]), packing)
        except Corrupt as error:
            told = str(error).removeprefix(f"{shard}/{column}/")
            raise Corrupt(f"{self.url}: {shard}/{column}: {told}") from None
        except _FAULTS as error:
            raise Corrupt(f"{self.url}: {shard}/{column} cannot be decoded: {error}; verify the store") from error

    def identity(self, shard: str) -> str | None:
        """Of the data that a shard's columns belong to, by its keys and digests; None in format 1, which has neither
        digests nor columns that know. Raises NotCommitted, Corrupt."""
        if self.promised().format_version == 1:
            return None
        keys, digests = (self.read(shard, column) for column in IDENTITY)
        return identity(keys.tolist(), digests)

    def attributes(self, shard: str, column: Column | str) -> dict[str, Any]:
        """What a committed column says of itself: `rows`, `data`, `sha256`, .. Raises NotCommitted, Corrupt."""
        attributes: dict[str, Any] = self._metadata(shard, column)[1]["attributes"]
        return attributes

    def open_array(self, shard: str, column: Column | str) -> Any:
        """The zarr.Array of a column, read-only, for which bytes that were not committed are an error."""
        written, metadata = self._metadata(shard, column)
        path = f"{shard}/{column}"
        try:
            arrays.check_shape(metadata)
            recorded = Recorded(self._zarr(), path, written, metadata["attributes"])
            array = zarr.open_array(recorded, path=path, mode="r", zarr_format=3)
            if array.nbytes > _MOST_BYTES:
                raise ValueError(f"it says that it has {array.nbytes} bytes")
            return array
        except _FAULTS as error:
            raise Corrupt(f"{self.url}: {path}/{METADATA} is no array's: {error}; verify the store") from error

    def check(self, shard: str, column: Column | str) -> None:
        """Raises Corrupt if the objects of a committed column are not those that were written."""
        attributes = self.attributes(shard, column)
        names = self.chunk_objects(shard, column)
        num = attributes.get("num_chunks", 0)
        if len(names) != num:
            raise Corrupt(f"{shard}/{column}: {len(names)} chunk objects, committed were {num}")
        digest = hashlib.sha256()
        for name in names:
            digest.update(self.objects.get(f"{shard}/{column}/{name}"))
        if names and digest.hexdigest() != attributes.get("sha256"):
            raise Corrupt(f"{shard}/{column}: the bytes of its chunks are not those that were committed")

    def chunk_objects(self, shard: str, column: Column | str) -> list[str]:
        """Names of the objects with the chunks of a column, committed or not."""
        return [name for name in self.objects.files(f"{shard}/{column}") if name != METADATA]

    def stored_bytes(self, shard: str, column: Column | str) -> int:
        """Size of a column's chunks as stored."""
        return sum(self.objects.size(f"{shard}/{column}/{name}") for name in self.chunk_objects(shard, column))

    def remove(self, shard: str, column: Column | str) -> None:
        """Take a column out: its metadata first, so that at no moment there is half of it."""
        self.objects.remove(f"{shard}/{column}/{METADATA}")
        for name in self.chunk_objects(shard, column):
            self.objects.remove(f"{shard}/{column}/{name}")

    # -- objects -------------------------------------------------------------------------------------------------

    def _binding(self, shard: str, column: Column) -> dict[str, Any]:
        """What a column of this store says of whose it is."""
        return {"shard": shard, "column": str(column), "promise": self._promises.of(column)}

    def _packing(self, column: Column) -> Packing:
        manifest = self._promises.read()
        return manifest.parsed_recipe().embeddings if manifest and column.teacher else "bf16"

    def _metadata(self, shard: str, column: Column | str) -> tuple[bytes, dict[str, Any]]:
        """The `zarr.json` of a column as it is written, and read; that it is this column's has been checked."""
        path = f"{shard}/{column}"
        try:
            written = self.objects.get(f"{path}/{METADATA}")
        except FileNotFoundError:
            raise NotCommitted(
                f"{self.url} has no column {column} for shard {shard}; run `clip-reinforce run` over that shard again, "
                "`extend` for what was added later, or learn without it (settings teachers, view_set, text_sets)"
            ) from None
        try:
            metadata = json.loads(written)
            attributes = metadata["attributes"]
            sound = metadata["node_type"] == "array" and isinstance(attributes, dict)
        except (ValueError, KeyError, TypeError) as error:
            raise Corrupt(f"{self.url}: {path}/{METADATA} is damaged: {error}; verify the store") from None
        manifest = self._promises.read()
        if manifest and manifest.format_version == 1 and "checksum" not in attributes:
            return written, metadata  # it says less of itself
        if not sound or not is_sealed(written, attributes):
            raise Corrupt(f"{self.url}: {path}/{METADATA} is not as it was written; verify the store")
        for what, expected in self._binding(shard, Column.at(str(column))).items():
            if attributes.get(what) != expected:
                raise Corrupt(
                    f"{self.url}: {path} is another's: its {what} is {attributes.get(what)}, and should be {expected}; "
                    "verify the store"
                )
        return written, metadata

    def _create_whole(self, path: str, encoded: Encoded) -> dict[str, Any]:
        """Put the object with a column's chunks; gives the record of what lies there then, ours or of a writer before
        us."""
        while not self.objects.create(path, *encoded.parts):
            try:
                return arrays.record(self.objects.get(path), encoded.metadata)
            except FileNotFoundError:
                pass  # removed meanwhile: put it again
            except Corrupt:
                self.objects.remove(path)
        return encoded.record

    def _zarr(self) -> ZarrStore:
        if self.objects.local:
            return LocalStore(self.objects.root, read_only=True)
        return FsspecStore.from_url(self.url, read_only=True, storage_options={"use_listings_cache": False})

    def _create_groups(self, folder: str) -> None:
        for path in group_objects(folder):
            if not self.objects.exists(path):
                self.objects.create(path, GROUP)


def identity(keys: Iterable[str], digests: np.ndarray) -> str:
    """Of the data that a shard's columns belong to: a hash of its N keys and of the N digests of its images."""
    digest = hashlib.sha256("\0".join(keys).encode())
    digest.update(digests.astype("<u8").tobytes())
    return digest.hexdigest()[:32]


def pixel_hash_of(attributes: dict[str, Any]) -> str:
    """How the pixels of a column were hashed (data/augment.py)."""
    return str(attributes.get("hash", OLD_PIXEL_HASH))


def said_of(column: Column, items: np.ndarray | Items, stamp: dict[str, int | str]) -> dict[str, Any]:
    """What a column of a shard says besides what all do, so that many shards are looked at by one object of each: of
    which tar they are; how many of its samples are good; and how pixels were hashed."""
    if column in (DIGEST, PLACE):
        return {"tar": stamp}
    if column.part == "pixels":
        return {"hash": PIXEL_HASH}
    return {"num_good": int((np.asarray(items) == Status.GOOD).sum())} if column == STATUS else {}
