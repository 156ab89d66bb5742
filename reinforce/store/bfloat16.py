"""Teaches zarr-python the data type `bfloat16` of the Zarr extension registry, as TensorStore and zarrs write it.

Found by zarr through the entry point `zarr.data_type`: any program with this package installed can open a store.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import ml_dtypes
import numpy as np
from zarr.core.dtype.npy.float import BaseFloat
from zarr.dtype import DataTypeValidationError

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
