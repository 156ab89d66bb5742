"""One column as two objects: its chunks in one, Zarr's metadata with a record of them in the other.

All chunks of a column lie in one object (Zarr's `sharding_indexed`), so a column comes from one writer, and a store has
few objects. A reader takes the chunks that it needs by their places. Each ends in its CRC-32C, which the metadata
repeats: so a chunk that belongs somewhere else is found out although it is whole.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import google_crc32c
import numpy as np
import zarr
from zarr.abc.store import ByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.abc.store import Store as ZarrStore
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.storage import MemoryStore, WrapperStore

import reinforce.store.bfloat16  # noqa: F401 - teaches zarr the data type
from reinforce import process
from reinforce.config import Packing
from reinforce.errors import Corrupt, MissingExtra
from reinforce.store.metadata import METADATA
from reinforce.store.packing import packed

CHUNK_ROWS = 16384  # rows of one view in one chunk: 12.5 k rows of 768 bfloat16, a DataCompDR shard, are 19 MB
BITS_OF_NAN = 0x7FC0  # of a bfloat16
_CRC = 4  # bytes
_NOWHERE = 2**64 - 1  # the offset of a chunk that lies wholly outside the array

process.blosc_in_one_thread()
process.zarr_without_warnings()


class Items(Protocol):
    """Equal arrays, one after the other: a numpy array is one of these, and so is what makes each when it is asked."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[np.ndarray]: ...


@dataclass(frozen=True)
class Encoded:
    """A column as it will lie. Put together, `parts` are the object with its chunks; they are none where the array is
    empty. `record` is what the metadata repeat of that object."""

    metadata: dict[str, Any]
    parts: list[bytes]
    record: dict[str, Any]


def encode(items: np.ndarray | Items, row_axis: int, packing: Packing = "bf16") -> Encoded:
    """A Zarr v3 array: always the same for the same array. A chunk holds one view (or caption) of up to CHUNK_ROWS
    rows. `packing`: of embeddings.

    Where `row_axis` is 1, `items` are views (or captions), and one is held at a time: so a column takes the memory that
    it takes encoded. `zarr` itself would hold it whole, its chunks, and two copies of the object.
    """
    parts: list[bytes] = []
    for number, item in enumerate(items if row_axis else [np.asarray(items)]):
        item = packed(item[None] if row_axis else item, packing)
        if number == 0:
            shape = (len(items), *item.shape[1:]) if row_axis else item.shape
            metadata = json.loads(_created(shape, item.dtype, row_axis, packing, True)[1][METADATA].to_bytes())
            array, objects = _created(item.shape, item.dtype, row_axis, packing, False)
        if item.size:
            array[...] = item
            parts += [objects[name].to_bytes() for name in _names(item.shape, row_axis)]
    if parts:
        parts.append(_index([len(part) for part in parts]))
    return Encoded(metadata, parts, _record_of(parts))


def _created(
    shape: tuple[int, ...], dtype: np.dtype[Any], row_axis: int, packing: Packing, sharded: bool
) -> tuple[Any, Any]:
    """An array in memory, and its objects by name. `sharded`: with all chunks in one object, as in a store."""
    is_text, in_pcodec = dtype.kind in "UTO", packing == "bf16-pco"
    compressor = ZstdCodec(level=3) if is_text else BloscCodec(cname="zstd", clevel=5, shuffle="bitshuffle")
    memory, chunk = MemoryStore(), _chunk_shape(shape, row_axis)
    made = zarr.create_array(
        memory,
        shape=shape,
        dtype="string" if is_text else dtype,
        chunks=chunk,
        shards=tuple(n * side for n, side in zip(_num_chunks(shape, chunk), chunk, strict=True)) if sharded else None,
        fill_value="" if is_text else BITS_OF_NAN if in_pcodec else _loud(dtype),
        filters=None,
        serializer=pcodec() if in_pcodec else "auto",
        compressors=[Crc32cCodec()] if in_pcodec else [compressor, Crc32cCodec()],
        chunk_key_encoding={"name": "default", "separator": "."},
        config={"write_empty_chunks": True},
    )
    return made, memory._store_dict


def pcodec() -> Any:
    """Its codec. Raises MissingExtra where the package is not installed, which Zarr would find out only when it encodes
    or decodes."""
    try:
        import pcodec  # noqa: F401
        from zarr.codecs.numcodecs import PCodec
    except ImportError as error:
        raise MissingExtra("bf16-pco needs pcodec: pip install 'clip-reinforce[pco]'") from error
    return PCodec(level=8)


def _num_chunks(shape: tuple[int, ...], chunk: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(max(1, -(-length // side)) for length, side in zip(shape, chunk, strict=True))


def _names(shape: tuple[int, ...], row_axis: int) -> list[str]:
    """Of the objects of an array that is not sharded."""
    places = np.ndindex(_num_chunks(shape, _chunk_shape(shape, row_axis)))
    return [".".join(["c", *map(str, place)]) for place in places]


def _index(lengths: list[int]) -> bytes:
    """What ends the object: offset and length of each chunk, and the CRC-32C of them all."""
    ends = np.cumsum(lengths)
    places = np.stack([ends - lengths, lengths], 1).astype("<u8").tobytes()
    return places + int(google_crc32c.value(places)).to_bytes(_CRC, "little")


def _record_of(parts: list[bytes]) -> dict[str, Any]:
    digest, chunks, offset = hashlib.sha256(), [], 0
    for part in parts:
        digest.update(part)
        chunks.append([offset, len(part), _crc(part)])
        offset += len(part)
    return {"chunks": chunks[:-1], "index_crc32c": chunks[-1][2], "sha256": digest.hexdigest()} if parts else {}


def object_name(metadata: dict[str, Any]) -> str | None:
    """What the object with the chunks is called; None where the array is empty."""
    return ".".join(["c", *["0"] * len(metadata["shape"])]) if 0 not in metadata["shape"] else None


def record(data: bytes, metadata: dict[str, Any]) -> dict[str, Any]:
    """What the metadata repeats of the object `data`: [offset, length, CRC-32C] of each chunk, the CRC-32C of the index
    that names their places, and the SHA-256 of the whole.

    Raises Corrupt where `data` is no such object, or a chunk of it is damaged.
    """
    outer = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    inner = metadata["codecs"][0]["configuration"]["chunk_shape"]
    num = int(np.prod([length // side for length, side in zip(outer, inner, strict=True)]))
    start = len(data) - (16 * num + _CRC)
    if start < 0 or not _is_whole(data[start:]):
        raise Corrupt("the index of its chunks is damaged")
    chunks = []
    for offset, length in np.frombuffer(data, "<u8", 2 * num, start).reshape(num, 2).tolist():
        if offset != _NOWHERE:
            chunk = data[offset : offset + length]
            if offset + length > start or not _is_whole(chunk):
                raise Corrupt("a chunk of it is damaged")
            chunks.append([offset, length, _crc(chunk)])
    return {"chunks": chunks, "index_crc32c": _crc(data), "sha256": hashlib.sha256(data).hexdigest()}


def check_shape(metadata: dict[str, Any]) -> None:
    """Raises ValueError where an array is not as large as the chunks that were written: Zarr would make room for what
    its metadata say. Format 1 has no record of them."""
    if "chunks" in metadata["attributes"]:
        shape, inner = metadata["shape"], metadata["codecs"][0]["configuration"]["chunk_shape"]
        nums = _num_chunks(shape, inner)
        outer = [num * side for num, side in zip(nums, inner, strict=True)]
        if outer != metadata["chunk_grid"]["configuration"]["chunk_shape"] or math.prod(nums) != len(
            metadata["attributes"]["chunks"]
        ):
            raise ValueError(f"its shape is {shape}, and that of the chunks that were written another")


class Recorded(WrapperStore[ZarrStore]):
    """A zarr store of one column, `path`, whose metadata has been read: bytes that are not those of its record are an
    error, and so is a missing or empty object, which Zarr takes for fill values."""

    def __init__(self, store: ZarrStore, path: str, metadata: bytes, attributes: dict[str, Any]) -> None:
        super().__init__(store)
        self._path, self._metadata, self._record = f"{path}/{METADATA}", metadata, attributes

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        prototype = prototype or default_buffer_prototype()
        if key == self._path:
            return prototype.buffer.from_bytes(self._metadata)
        value = await self._store.get(key, prototype, byte_range)
        if key.endswith(".json"):
            return value
        if value is None or len(value) == 0:
            raise Corrupt(f"chunk {key} is {'missing' if value is None else 'empty'}; verify the store")
        if "chunks" in self._record and not self._is_recorded(value.to_bytes(), byte_range):
            raise Corrupt(f"{key}: these are not the bytes that were committed; verify the store")
        return value

    def _is_recorded(self, data: bytes, byte_range: ByteRequest | None) -> bool:
        chunks = self._record["chunks"]
        if isinstance(byte_range, RangeByteRequest):
            return any(offset == byte_range.start and crc == _crc(data) for offset, _, crc in chunks)
        return (
            self._record["index_crc32c"] == _crc(data)
            and (
                isinstance(byte_range, SuffixByteRequest)  # the index alone
                or all(crc == _crc(data[: offset + length]) for offset, length, crc in chunks)
            )
        )


def _is_whole(data: bytes) -> bool:
    return len(data) > _CRC and google_crc32c.value(data[:-_CRC]) == _crc(data)


def _crc(data: bytes) -> int:
    """The CRC-32C in which they end."""
    return int.from_bytes(data[-_CRC:], "little")


def _chunk_shape(shape: tuple[int, ...], row_axis: int) -> tuple[int, ...]:
    chunk = [min(length, CHUNK_ROWS) if axis == row_axis else length for axis, length in enumerate(shape)]
    if row_axis == 1:
        chunk[0] = 1
    return tuple(max(1, length) for length in chunk)


def _loud(dtype: np.dtype[Any]) -> Any:
    """What a plain Zarr reader sees in place of a lost chunk: NaN, where the data type has one."""
    return dtype.type(0) if dtype.kind in "iu" else dtype.type("nan")
