"""BF16 as uint16, the upper half of a float32: conversions for tests, references and loading.

    to_f32(u)   = float with bits u << 16                       exact
    from_f32(x) = round to nearest, ties to even                relative error <= 2**-8
NaN stays NaN with its sign (quiet bit set); infinities and values above the largest BF16 go to
infinity; denormals are rounded like any number. NumPy has no BF16 type, hence uint16 storage
(docs/adr/0002). Kernels convert in registers (`lanes.load`, `lanes.store`) with the same bits.
Source: bfloat16 as in IEEE-754 binary32's top half.
Notebook: 02 bf16. Ledger: lanes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]


def to_f32(u: Array) -> NDArray[np.float32]:
    """uint16 (BF16 bits) of any shape to float32, exactly."""
    if u.dtype != np.uint16:
        raise TypeError(f"to_f32: expected uint16 (BF16 bits), found {u.dtype}")
    return (u.astype(np.uint32) << np.uint32(16)).view(np.float32)


def from_f32(x: Array) -> NDArray[np.uint16]:
    """float32 of any shape to BF16 bits (uint16), nearest, ties to even; NaN stays NaN."""
    if x.dtype != np.float32:
        raise TypeError(f"from_f32: expected float32, found {x.dtype}")
    u = np.ascontiguousarray(x).view(np.uint32)
    rounded = (u + (np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    quiet = (u >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(x), quiet, rounded).astype(np.uint16).reshape(x.shape)


def as_f32(x: Array) -> NDArray[np.float32]:
    """Storage (uint16 as BF16, or float32) to float32; float32 is given back itself."""
    return to_f32(x) if x.dtype == np.uint16 else x.astype(np.float32, copy=False)


def as_stored(x: NDArray[np.float32], dtype: np.dtype[Any]) -> Array:
    """float32 to storage: itself, or BF16 bits where `dtype` is uint16."""
    return from_f32(x) if dtype == np.uint16 else x


def widen(x: Array) -> NDArray[np.float64]:
    """Storage (uint16 as BF16, or float32) to float64, exactly: what each `*_ref` computes with."""
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
        return (to_f32(x) if x.dtype == np.uint16 else x).astype(np.float64)


def narrow(x: NDArray[np.float64], dtype: np.dtype[np.generic] | type[np.generic]) -> Array:
    """float64 to storage: float32, or from there to BF16 bits where `dtype` is uint16."""
    with np.errstate(over="ignore", invalid="ignore"):
        single = x.astype(np.float32)
    return from_f32(single) if np.dtype(dtype) == np.uint16 else single
