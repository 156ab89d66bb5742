"""Columns of a store as plain arrays or tables, for pandas, datasets, FAISS and all that read no Zarr or no bfloat16.

Rows are the good samples of a shard, in its order; `key` says which they are. Embeddings become float32, exactly.

    npy       OUT/<shard>/<column>.npy, '/' in a column's name as '.': (N, ..), or (A, N, ..) for A views or captions
    parquet   OUT/<shard>.parquet: `key`, and a field for each view or caption, as `view/base/vit/0`
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from reinforce.data.status import Status
from reinforce.errors import ConfigError, MissingExtra, NotCommitted, StoreError
from reinforce.exchange.place import check_empty
from reinforce.progress import Progress
from reinforce.store.columns import KEY, Column
from reinforce.store.reader import StoreReader

Form = Literal["npy", "parquet"]


@dataclass
class ColumnsReport:
    """`failed` says of each shard that was not written why."""

    out: str
    shards: int
    done: int = 0
    rows: int = 0
    files: int = 0
    failed: list[str] = field(default_factory=list)


def export_columns(url: str, wanted: list[str], out: Path, form: Form) -> ColumnsReport:
    """Write `wanted`, columns by their paths or `*` for all, of every shard.

    Raises ConfigError for a column that the store cannot have or where something is in `out`, StoreError where there is
    no store, MissingExtra.
    """
    check_empty(out)
    store = StoreReader(url)
    known = {str(column): column for column in store.manifest.columns()}
    asked = list(known) if wanted == ["*"] else wanted
    if strange := [name for name in asked if name not in known]:
        raise ConfigError(f"{url} has no column '{strange[0]}'; it has: {', '.join(known)}")
    columns = [KEY, *(known[name] for name in asked if known[name] != KEY)]
    write = _write_npy if form == "npy" else _parquet()
    report = ColumnsReport(str(out), len(store))
    with Progress(len(store), "shard") as progress:
        for shard in store:
            try:
                reader = store[shard]
                good = np.flatnonzero(reader.status == Status.GOOD)
                arrays = {column: _plain(reader.array(str(column)).take(good, column.row_axis)) for column in columns}
                report.files += write(out, shard, arrays)
                report.rows += len(good)
                report.done += 1
            except NotCommitted as error:
                report.failed.append(f"{shard}: {error}")
            except StoreError as error:
                report.failed.append(str(error))
            except OSError as error:
                raise ConfigError(f"{out} cannot be written: {error}") from error
            progress.add(f"{len(report.failed)} failed")
    return report


def _plain(array: np.ndarray) -> np.ndarray:
    """The same in a type that all know."""
    if array.dtype == ml_dtypes.bfloat16:
        return array.astype(np.float32)
    return np.array(array.tolist(), dtype=str).reshape(array.shape) if array.dtype.kind in "OT" else array


def _write_npy(out: Path, shard: str, arrays: dict[Column, np.ndarray]) -> int:
    folder = out / shard
    folder.mkdir(parents=True, exist_ok=True)
    for column, array in arrays.items():
        with (folder / f"{str(column).replace('/', '.')}.npy").open("wb") as file:
            np.lib.format.write_array(file, array, allow_pickle=False)
    return len(arrays)


def _parquet() -> Any:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise MissingExtra("writing parquet needs pyarrow: pip install 'clip-reinforce[parquet]'") from None

    def write(out: Path, shard: str, arrays: dict[Column, np.ndarray]) -> int:
        out.mkdir(parents=True, exist_ok=True)
        fields = {
            name: pyarrow.array(rows.tolist())
            if rows.dtype.kind == "U"
            else pyarrow.FixedSizeListArray.from_arrays(rows.reshape(-1), rows.shape[1])
            if rows.ndim == 2
            else pyarrow.array(rows)
            for name, rows in _fields(arrays)
        }
        parquet.write_table(pyarrow.table(fields), out / f"{shard}.parquet")
        return 1

    return write


def _fields(arrays: dict[Column, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    for column, array in arrays.items():
        if column.row_axis == 0:
            yield str(column), array
        else:
            yield from ((f"{column}/{index}", item) for index, item in enumerate(array))
