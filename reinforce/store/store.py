"""The only file that knows Zarr: one group per shard, columns that are there whole or not at all.

A column exists exactly when its `zarr.json` exists, and that is the last object written: the array is made in memory,
its chunks are put first (synced to disk on a local store) and its metadata last, each object in one atomic step. There
is no other record of progress.

Zarr reads a chunk that is not there as fill values, without a word. So all chunks are written, empty ones too, and
here a missing or empty chunk is an error.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any, TypeVar

import fsspec
import numpy as np
import zarr
from fsspec.implementations.local import LocalFileSystem
from zarr.abc.store import Store as ZarrStore
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec
from zarr.core.buffer import Buffer
from zarr.storage import FsspecStore, LocalStore, MemoryStore, WrapperStore

import reinforce.store.bfloat16  # noqa: F401 - teaches zarr the data type
from reinforce import process
from reinforce.errors import ConfigError, Corrupt, NotCommitted, StoreError
from reinforce.store.columns import CLASSES, Column
from reinforce.store.manifest import Manifest

CHUNK_ROWS = 16384  # rows of one view in one object: 12.5 k rows of 768 bfloat16, a DataCompDR shard, are 19 MB
_PARTIAL = ".partial"  # where objects of a local store wait until they are whole

C = TypeVar("C", Column, str)

process.blosc_in_one_thread()


class Store:
    """A store at a local path or an fsspec URL. A column is named by a `Column`, or by its path in the group."""

    def __init__(self, url: str) -> None:
        """Raises ConfigError for an empty address."""
        if not url.strip():
            raise ConfigError("the address of the store is empty; name a local path or an fsspec URL")
        self.url = url
        # Listings are never cached: another process may have written since.
        self._fs, self._root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        self._local = isinstance(self._fs, LocalFileSystem)

    # -- manifest ------------------------------------------------------------------------------------------------

    def manifest(self) -> Manifest | None:
        """The store's manifest, or None where there is no store yet. Raises StoreError if it is not one of ours."""
        try:
            root = json.loads(self._fs.cat_file(f"{self._root}/zarr.json"))
            tree = root.get("attributes", {}).get("reinforce")
        except FileNotFoundError:
            return None
        except NotADirectoryError:
            raise StoreError(f"{self.url} is a file, and a store is a folder; give another STORE") from None
        except (ValueError, AttributeError) as error:
            raise StoreError(f"{self.url}/zarr.json is damaged: {error}; restore it, or give another STORE") from error
        if tree is None:
            raise StoreError(f"{self.url} is a Zarr store, but not one of this project; give another STORE")
        return Manifest.from_json(tree, self.url)

    def promised(self) -> Manifest:
        """The manifest of a store that must exist. Raises StoreError."""
        manifest = self.manifest()
        if manifest is None:
            raise StoreError(f"no store at {self.url}; make one with: clip-reinforce run SHARDS --store {self.url}")
        return manifest

    def promise(self, manifest: Manifest) -> None:
        """Write the manifest of a new store, or raise ManifestMismatch if the store promises something else."""
        if self.manifest() is None:
            self._put("zarr.json", _group_json({"reinforce": manifest.to_json()}), create=True)
        stored = self.manifest()
        if stored is None:
            raise StoreError(f"{self.url}: the manifest was written and cannot be read back")
        stored.check(manifest, self.url)

    # -- columns -------------------------------------------------------------------------------------------------

    def shards(self) -> list[str]:
        """Names of the shards' groups that hold anything, sorted."""
        names = (path.rstrip("/").rsplit("/", 1)[-1] for path in self._ls(self._root))
        return sorted(name for name in names if name not in ("zarr.json", _PARTIAL, CLASSES))

    def has(self, shard: str, column: Column | str) -> bool:
        return bool(self._fs.exists(f"{self._root}/{shard}/{column}/zarr.json"))

    def missing(self, shard: str, columns: Iterable[C]) -> list[C]:
        """Those of `columns` that are not committed."""
        return [column for column in columns if not self.has(shard, column)]

    def commit(self, shard: str, column: Column | str, array: np.ndarray) -> None:
        """Write one column of a shard, or of the group CLASSES. To commit it twice, even at the same time, is harmless.

        A chunk holds one view (or caption) of up to CHUNK_ROWS rows; `Column` says what has which axes.
        """
        objects = _encode(array, Column.at(str(column)).row_axis)
        metadata = objects.pop("zarr.json")
        self._put_groups(shard, column)
        prefix = f"{shard}/{column}"
        for stray in set(self.objects(shard, column)) - set(objects):
            self._fs.rm_file(f"{self._root}/{prefix}/{stray}")
        for name, data in objects.items():
            self._put(f"{prefix}/{name}", data)
        if objects:
            self._sync_folder(prefix)
        self._put(f"{prefix}/zarr.json", metadata)
        self._sync_folder(prefix)

    def read(self, shard: str, column: Column | str, index: int | None = None) -> np.ndarray:
        """A column, or item `index` of its outermost axis, which touches that item's chunks only.

        Raises NotCommitted if it is not there, Corrupt if an object of it is missing, empty or altered.
        """
        array = self.open_array(shard, column)
        try:
            return np.asarray(array[...] if index is None else array[index])
        except Corrupt:
            raise
        except (ValueError, RuntimeError, OSError) as error:  # what codecs raise on altered bytes
            raise Corrupt(f"{self.url}: {shard}/{column} cannot be decoded: {error}; verify the store") from error

    def open_array(self, shard: str, column: Column | str) -> Any:
        """The zarr.Array of a column, read-only, for which a missing chunk is an error."""
        try:
            return zarr.open_array(self._zarr(), path=f"{shard}/{column}", mode="r", zarr_format=3)
        except FileNotFoundError:
            raise NotCommitted(
                f"{self.url} has no column {column} for shard {shard}; reinforce that shard first"
            ) from None

    def objects(self, shard: str, column: Column | str) -> list[str]:
        """Names of the chunk objects of a column, committed or not."""
        names = (path.rsplit("/", 1)[-1] for path in self._ls(f"{self._root}/{shard}/{column}"))
        return sorted(name for name in names if name != "zarr.json")

    def check(self, shard: str, column: Column | str) -> None:
        """Raises Corrupt if the objects of a committed column are not those that were written."""
        attributes = dict(self.open_array(shard, column).attrs)
        names = self.objects(shard, column)
        if len(names) != attributes["num_chunks"]:
            raise Corrupt(f"{shard}/{column}: {len(names)} chunks, committed were {attributes['num_chunks']}")
        digest = hashlib.sha256()
        for name in names:
            digest.update(self._fs.cat_file(f"{self._root}/{shard}/{column}/{name}"))
        if digest.hexdigest() != attributes["sha256"]:
            raise Corrupt(f"{shard}/{column}: the bytes of its chunks are not those that were committed")

    def stored_bytes(self, shard: str, column: Column | str) -> int:
        """Size of a column's chunks as stored."""
        return sum(self._fs.size(f"{self._root}/{shard}/{column}/{name}") for name in self.objects(shard, column))

    def sweep(self, shards: set[str]) -> None:
        """Remove what writers of these shards that were killed in mid-write have left. Call when no writer is alive."""
        if not self._local:
            return  # an object store shows an object when it is whole, or not at all
        folder = f"{self._root}/{_PARTIAL}"
        for path in self._ls(folder):
            if path.rsplit("/", 1)[-1].partition("~")[0] in shards | {"", CLASSES}:
                self._fs.rm_file(path)
        if self._fs.isdir(folder) and not self._ls(folder):
            self._fs.rmdir(folder)

    # -- objects -------------------------------------------------------------------------------------------------

    def _zarr(self) -> ZarrStore:
        if self._local:
            return _Strict(LocalStore(self._root, read_only=True))
        return _Strict(FsspecStore.from_url(self.url, read_only=True, storage_options={"use_listings_cache": False}))

    def _put_groups(self, shard: str, column: Column | str) -> None:
        """Group metadata from the shard down to the column's parent, so that the tree can be walked in plain Zarr."""
        steps = f"{shard}/{column}".split("/")
        for depth in range(1, len(steps)):
            path = "/".join(steps[:depth]) + "/zarr.json"
            if not self._fs.exists(f"{self._root}/{path}"):
                self._put(path, _group_json({}))

    def _put(self, path: str, data: bytes, create: bool = False) -> None:
        """Put one object, whole or not at all. `create`: leave one that is there already as it is."""
        target = f"{self._root}/{path}"
        if not self._local:
            if not (create and self._fs.exists(target)):
                self._fs.pipe_file(target, data)
            return
        shard = path.rpartition("/")[0].partition("/")[0]
        partial = f"{self._root}/{_PARTIAL}/{shard}~{uuid.uuid4().hex}"
        os.makedirs(os.path.dirname(partial), exist_ok=True)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            if create:
                os.link(partial, target)
                os.unlink(partial)
            else:
                os.replace(partial, target)
        except FileExistsError:
            os.unlink(partial)

    def _sync_folder(self, path: str) -> None:
        """Make the names in a local folder, and the folders above it, survive a power cut."""
        for folder in [path, *map(str, PurePosixPath(path).parents)] if self._local else []:
            descriptor = os.open(f"{self._root}/{folder}", os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _ls(self, path: str) -> list[str]:
        try:
            return list(self._fs.ls(path, detail=False))
        except FileNotFoundError:
            return []


class _Strict(WrapperStore[ZarrStore]):
    """A zarr store in which a chunk that is missing or empty is an error and not fill values."""

    async def get(self, key: str, *args: Any, **kwargs: Any) -> Buffer | None:
        value = await self._store.get(key, *args, **kwargs)
        if not key.endswith(".json") and (value is None or len(value) == 0):
            raise Corrupt(f"chunk {key} is {'missing' if value is None else 'empty'}; verify the store")
        return value


def _chunk_shape(shape: tuple[int, ...], row_axis: int) -> tuple[int, ...]:
    chunk = [min(length, CHUNK_ROWS) if axis == row_axis else length for axis, length in enumerate(shape)]
    if row_axis == 1:
        chunk[0] = 1
    return tuple(max(1, length) for length in chunk)


def _encode(array: np.ndarray, row_axis: int) -> dict[str, bytes]:
    """The objects of a Zarr v3 array: chunks `c.0.0.0` and `zarr.json`, always the same for the same array."""
    is_text = array.dtype.kind in "UTO"
    compressor = ZstdCodec(level=3) if is_text else BloscCodec(cname="zstd", clevel=5, shuffle="bitshuffle")
    memory = MemoryStore()
    made = zarr.create_array(
        memory,
        shape=array.shape,
        dtype="string" if is_text else array.dtype,
        chunks=_chunk_shape(array.shape, row_axis),
        fill_value="" if is_text else _loud(array.dtype),
        filters=None,
        compressors=[compressor, Crc32cCodec()],
        chunk_key_encoding={"name": "default", "separator": "."},
        config={"write_empty_chunks": True},
    )
    if array.size:
        made[...] = array
    contents = memory._store_dict
    names = sorted(name for name in contents if name != "zarr.json")
    digest = hashlib.sha256(b"".join(contents[name].to_bytes() for name in names)).hexdigest()
    made.update_attributes({"rows": array.shape[row_axis], "num_chunks": len(names), "sha256": digest})
    return {name: contents[name].to_bytes() for name in [*names, "zarr.json"]}


def _loud(dtype: np.dtype[Any]) -> Any:
    """What a plain Zarr reader sees in place of a lost chunk: NaN, where the data type has one."""
    return dtype.type(0) if dtype.kind in "iu" else dtype.type("nan")


def _group_json(attributes: dict[str, Any]) -> bytes:
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}, indent=2).encode()
