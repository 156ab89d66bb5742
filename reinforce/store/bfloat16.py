"""Teaches zarr-python the data type `bfloat16` of the Zarr extension registry, as TensorStore and zarrs write it.

Importing this module is all that a program needs to open a store with plain zarr. There is an entry point
`zarr.data_type` as well, but zarr 3.1.6 only collects those: nothing in it ever loads them.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import ml_dtypes
import numpy as np
from zarr.dtype import DataTypeValidationError, data_type_registry

from reinforce import process

try:
    from zarr.core.dtype.npy.float import BaseFloat
except ImportError as error:
    raise process.changed("zarr", "core.dtype.npy.float.BaseFloat", "it cannot be taught bfloat16") from error

_NATIVE = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True, kw_only=True)
class BFloat16(BaseFloat[Any, Any]):
    """16-bit brain floating point, little-endian."""

    dtype_cls = type(_NATIVE)
    _zarr_v3_name: ClassVar[str] = "bfloat16"
    _zarr_v2_names: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_native_dtype(cls, dtype: Any) -> Self:
        if dtype == _NATIVE:
            return cls()
        raise DataTypeValidationError(f"Invalid data type: {dtype}. Expected bfloat16")

    def to_native_dtype(self) -> Any:
        return _NATIVE  # ml_dtypes has no byte-swapped variant

    @property
    def item_size(self) -> int:
        return 2


data_type_registry.register("bfloat16", BFloat16)
