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

A matrix is read in blocks of rows: while one is packed, nothing else of it needs to be in memory,
neither as the checkpoint has it nor converted. A NaN or infinity is refused where it is read: it
would come out as a request that fails for no reason the user could see.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pace_nb.errors import ModelFormatError
from pace_nb.kernels import bf16

StorageDtype = Literal["bfloat16", "float32"]
Float32Array = NDArray[np.float32]
FLOATS = ("BF16", "F16", "F32")
_BLOCK = 1 << 20  # elements that are converted at a time: 4 MB of float32
_ROWS = 1 << 24  # elements of a block of rows: 32 MB of BF16, a hundred panels per thread


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

    def release(self, name: str, first: int = 0, end: int | None = None) -> None:
        """Rows first .. end - 1 (None: to the last) were read for the last time: their pages may
        go."""


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

    def rows(self, name: str, shape: tuple[int, ...]) -> Iterator[NDArray[Any]]:
        """The tensor in storage dtype, in blocks along its first axis, in order.

        A block is a view of the checkpoint where nothing is converted. Once the next one is asked
        for, its pages go. Whoever packs the blocks looks for what is not finite (`not_finite`).
        """
        raw = self._source.tensor(name, shape)
        step = max(1, _ROWS // max(1, raw[0].size)) if len(raw) else 1
        for first in range(0, len(raw), step):
            yield self._stored(raw[first : first + step])
            self._source.release(name, first, min(first + step, len(raw)))

    def _stored(self, raw: NDArray[Any]) -> NDArray[Any]:
        """A block in storage dtype; a part at a time, so that the float32 in between is small."""
        if raw.dtype == self.storage_dtype:
            return raw
        stored = np.empty(raw.shape, self.storage_dtype)
        step = max(1, _BLOCK // max(1, raw[0].size))
        for first in range(0, len(raw), step):
            part = _to_f32(raw[first : first + step])
            stored[first : first + step] = part if self.dtype == "float32" else bf16.from_f32(part)
        return stored

    def vector(self, name: str, shape: tuple[int, ...]) -> Float32Array:
        """The tensor as an own float32 copy; its pages are released. Refused if not finite."""
        values = np.array(_to_f32(self._source.tensor(name, shape)), np.float32)
        if not np.isfinite(values).all():
            raise self.not_finite(name, shape)
        self._source.release(name)
        return values

    def not_finite(self, name: str, shape: tuple[int, ...]) -> ModelFormatError:
        """The error for a tensor that holds a NaN or infinity: where the first one is."""
        raw = self._source.tensor(name, shape)
        for i, row in enumerate(raw):
            wrong = ~np.isfinite(_to_f32(row))
            if wrong.any():
                index = [i, *(int(x) for x in np.argwhere(wrong)[0])]
                return ModelFormatError(
                    f"tensor {name} holds {_to_f32(raw[tuple(index)])} at {index}, expected finite"
                    " numbers: the checkpoint is damaged"
                )
        return ModelFormatError(
            f"tensor {name} holds numbers beyond the range of {self.dtype}, use dtype float32"
        )

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
