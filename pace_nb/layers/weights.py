"""`Weights`: the tensors of a checkpoint, by name, in the dtype the engine stores.

Knows the three dtypes a checkpoint may hold and the two the engine stores. Does not know files,
layers or packing.

    | checkpoint | storage "bfloat16" (uint16)                      | storage "float32" |
    |------------|--------------------------------------------------|-------------------|
    | BF16       | as it is, no copy                                | exact             |
    | F32        | rounded to nearest even                          | as it is, no copy |
    | F16        | to float32 (exact), then rounded to nearest even | exact             |

F16 to BF16 drops 3 of 11 significant bits; the range only grows, so nothing overflows and F16
subnormals survive. Vectors (norm weights, biases, sinks) are float32 whatever the storage dtype:
they are few, and rounding them saves nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pace_nb.errors import ModelFormatError
from pace_nb.kernels import bf16

StorageDtype = Literal["bfloat16", "float32"]
Float32Array = NDArray[np.float32]
FLOATS = ("BF16", "F16", "F32")
_BLOCK = 1 << 20  # elements that are converted at a time: 4 MB of float32


class TensorSource(Protocol):
    """Where tensors come from: `models/loader.py:Checkpoint`, or a dictionary in a test."""

    def names(self) -> Collection[str]:
        """Every tensor name."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it."""

    def tensor(
        self, name: str, shape: tuple[int, ...], dtypes: Collection[str] = FLOATS
    ) -> NDArray[Any]:
        """A view: uint16 for BF16, float16, float32, uint8 for "U8". ModelFormatError unless it has
        this shape and one of these dtypes."""

    def release(self, name: str) -> None:
        """The tensor was read for the last time: its pages may go."""


class Weights:
    """Named tensors in storage dtype. `dtype` is "bfloat16" or "float32"."""

    def __init__(self, source: TensorSource, dtype: StorageDtype) -> None:
        self.dtype: StorageDtype = dtype
        self._source = source

    @property
    def storage_dtype(self) -> np.dtype[Any]:
        """uint16 (BF16 bits) or float32."""
        return storage_dtype(self.dtype)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """ModelFormatError unless the tensor exists in this very shape. Allocates nothing."""
        if name not in self._source.names():
            raise ModelFormatError(
                f"tensor {name} is missing from the checkpoint, expected shape {list(shape)}"
            )
        found = tuple(self._source.shape(name))
        if found != shape:
            raise ModelFormatError(
                f"tensor {name} has shape {list(found)}, config.json says {list(shape)}"
            )

    def matrix(self, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """The tensor in storage dtype; a view of the checkpoint where nothing is converted."""
        raw = self._source.tensor(name, shape)
        if raw.dtype == self.storage_dtype:
            return raw
        stored = np.empty(shape, self.storage_dtype)
        # In blocks of rows, so that the float32 in between never takes more than a few MB.
        rows = max(1, _BLOCK // max(1, raw[0].size)) if len(raw) else 1
        for start in range(0, len(raw), rows):
            block = _to_f32(raw[start : start + rows])
            stored[start : start + rows] = (
                block if self.dtype == "float32" else bf16.from_f32(block)
            )
        return stored

    def vector(self, name: str, shape: tuple[int, ...]) -> Float32Array:
        """The tensor as an own float32 copy; its pages are released."""
        values = np.array(_to_f32(self._source.tensor(name, shape)), np.float32)
        self._source.release(name)
        return values

    def codes(self, name: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """A view of a quantized tensor's bytes, as the checkpoint holds them."""
        return self._source.tensor(name, shape, ("U8",))

    def release(self, name: str) -> None:
        """The tensor has been packed: its pages may go."""
        self._source.release(name)


def storage_dtype(dtype: StorageDtype) -> np.dtype[Any]:
    """NumPy dtype that holds "bfloat16" (uint16) or "float32"."""
    return np.dtype(np.uint16 if dtype == "bfloat16" else np.float32)


def _to_f32(raw: NDArray[Any]) -> Float32Array:
    """BF16 bits, float16 or float32 to float32; all exact."""
    if raw.dtype == np.uint16:
        return bf16.to_f32(raw)
    return raw.astype(np.float32, copy=False)
