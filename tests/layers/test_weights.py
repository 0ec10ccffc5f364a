"""Conversion of checkpoint tensors to storage dtype."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from pace_nb.errors import ModelFormatError
from pace_nb.layers import weights as weights_module
from pace_nb.layers.weights import FLOATS, Weights


class Source:
    """A checkpoint in memory that records what was released."""

    def __init__(self, **tensors):
        self._tensors = tensors
        self.released = []

    def names(self):
        return self._tensors.keys()

    def shape(self, name):
        return self._tensors[name].shape

    def tensor(self, name, shape, dtypes=FLOATS):
        assert self._tensors[name].shape == shape
        assert (self._tensors[name].dtype == np.uint8) == (dtypes == ("U8",))
        return self._tensors[name]

    def release(self, name):
        self.released.append(name)


def random(dtype, shape=(5, 7), scale=1.0):
    x = (np.random.default_rng(3).standard_normal(shape) * scale).astype(np.float32)
    return x.astype(dtype)


def test_bf16_is_kept_as_it_is():
    bits = random(ml_dtypes.bfloat16).view(np.uint16)
    assert Weights(Source(w=bits), "bfloat16").matrix("w", (5, 7)) is bits
    exact = Weights(Source(w=bits), "float32").matrix("w", (5, 7))
    np.testing.assert_array_equal(exact, bits.view(ml_dtypes.bfloat16).astype(np.float32))


def test_f32_is_kept_or_rounded_to_nearest_even():
    x = random(np.float32)
    assert Weights(Source(w=x), "float32").matrix("w", (5, 7)) is x
    stored = Weights(Source(w=x), "bfloat16").matrix("w", (5, 7))
    np.testing.assert_array_equal(stored, x.astype(ml_dtypes.bfloat16).view(np.uint16))


def test_f16_goes_through_f32_and_keeps_its_subnormals():
    x = random(np.float16, scale=1e-6)
    assert np.any((x != 0) & (np.abs(x) < np.finfo(np.float16).tiny))
    single = Weights(Source(w=x), "float32").matrix("w", (5, 7))
    np.testing.assert_array_equal(single, x.astype(np.float32))
    stored = Weights(Source(w=x), "bfloat16").matrix("w", (5, 7))
    np.testing.assert_array_equal(
        stored, x.astype(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)
    )
    assert np.all((stored != 0) == (x != 0))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_blocks_of_rows_join_to_the_whole(monkeypatch, dtype):
    """Rows longer than a block, and a last block that is short."""
    x = random(np.float16, (11, 7))
    whole = Weights(Source(w=x), dtype).matrix("w", (11, 7))
    for block in (3, 14, 50):
        monkeypatch.setattr(weights_module, "_BLOCK", block)
        np.testing.assert_array_equal(Weights(Source(w=x), dtype).matrix("w", (11, 7)), whole)


def test_a_vector_is_an_own_f32_copy_and_its_pages_go():
    bits = random(ml_dtypes.bfloat16, (6,)).view(np.uint16)
    x = random(np.float32, (6,))
    source = Source(b=bits, x=x)
    weights = Weights(source, "bfloat16")
    vector = weights.vector("b", (6,))
    np.testing.assert_array_equal(vector, bits.view(ml_dtypes.bfloat16).astype(np.float32))
    own = weights.vector("x", (6,))
    assert not np.shares_memory(own, x) and own.dtype == np.float32
    assert source.released == ["b", "x"]


def test_check_names_the_tensor_and_both_shapes():
    weights = Weights(Source(w=np.zeros((4, 2), np.float32)), "bfloat16")
    weights.check("w", (4, 2))
    with pytest.raises(ModelFormatError, match=r"tensor w has shape \[4, 2\].* says \[2, 4\]"):
        weights.check("w", (2, 4))
    with pytest.raises(ModelFormatError, match=r"tensor v is missing .* \[2, 4\]"):
        weights.check("v", (2, 4))


def test_codes_of_a_quantized_tensor_are_asked_for_as_bytes():
    """Whatever the storage dtype: what they mean is known to who asks."""
    blocks = np.arange(6, dtype=np.uint8).reshape(2, 3)
    for dtype in ("bfloat16", "float32"):
        assert Weights(Source(w=blocks), dtype).codes("w", (2, 3)) is blocks
