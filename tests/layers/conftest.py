"""Checkpoints in memory for layers."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import pytest

from pace_nb.layers.weights import Weights


class MemorySource:
    """Named arrays (float32, or BF16 bits as uint16) with the protocol of a checkpoint."""

    def __init__(self, tensors: Mapping[str, np.ndarray]):
        self.tensors = dict(tensors)
        self.released: list[str] = []

    def names(self):
        return self.tensors.keys()

    def shape(self, name):
        return self.tensors[name].shape

    def tensor(self, name, shape, dtypes=("BF16", "F16", "F32")):
        assert self.tensors[name].shape == tuple(shape), name
        assert (self.tensors[name].dtype == np.uint8) == (tuple(dtypes) == ("U8",)), name
        return self.tensors[name]

    def release(self, name, first=0, end=None):
        self.released.append(name)


@pytest.fixture
def load():
    """load(layer, dtype, tensors): give the layer, whose name is "layer", its tensors."""

    def load(layer, dtype, tensors, name="layer", prefix="layer."):
        source = MemorySource({f"{prefix}{part}": array for part, array in tensors.items()})
        weights = Weights(source, dtype)
        layer.check(weights, name)
        layer.load(weights, name)
        return source

    return load


@pytest.fixture
def rng():
    return np.random.default_rng(11)


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request):
    return request.param


@pytest.fixture
def stored(dtype):
    """stored(x) = (x as the engine stores it, the float64 values that this stands for)."""

    def stored(x):
        if dtype == "float32":
            x = np.asarray(x, np.float32)
            return x, x.astype(np.float64)
        x = np.asarray(x, np.float32).astype(ml_dtypes.bfloat16)
        return x.view(np.uint16), x.astype(np.float64)

    return stored


@pytest.fixture
def value():
    """value(x): float64 of an array in storage dtype."""

    def value(x):
        if x.dtype == np.uint16:
            x = x.view(ml_dtypes.bfloat16)
        return x.astype(np.float64)

    return value
