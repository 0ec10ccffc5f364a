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

    def release(self, name, first=0, end=None):
        self.released.append(name if end is None else (name, first, end))


def random(dtype, shape=(5, 7), scale=1.0):
    x = (np.random.default_rng(3).standard_normal(shape) * scale).astype(np.float32)
    return x.astype(dtype)


def whole(x, dtype):
    """All rows of a tensor in storage dtype."""
    return np.concatenate(list(Weights(Source(w=x), dtype).rows("w", x.shape)))


def test_bf16_is_kept_as_it_is():
    bits = random(ml_dtypes.bfloat16).view(np.uint16)
    (block,) = Weights(Source(w=bits), "bfloat16").rows("w", (5, 7))
    assert np.shares_memory(block, bits) and block.shape == bits.shape
    exact = whole(bits, "float32")
    np.testing.assert_array_equal(exact, bits.view(ml_dtypes.bfloat16).astype(np.float32))


def test_f32_is_kept_or_rounded_to_nearest_even():
    x = random(np.float32)
    (block,) = Weights(Source(w=x), "float32").rows("w", (5, 7))
    assert np.shares_memory(block, x) and block.shape == x.shape
    stored = whole(x, "bfloat16")
    np.testing.assert_array_equal(stored, x.astype(ml_dtypes.bfloat16).view(np.uint16))


def test_f16_goes_through_f32_and_keeps_its_subnormals():
    x = random(np.float16, scale=1e-6)
    assert np.any((x != 0) & (np.abs(x) < np.finfo(np.float16).tiny))
    single = whole(x, "float32")
    np.testing.assert_array_equal(single, x.astype(np.float32))
    stored = whole(x, "bfloat16")
    np.testing.assert_array_equal(
        stored, x.astype(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)
    )
    assert np.all((stored != 0) == (x != 0))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("given", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_blocks_of_rows_join_to_the_whole(monkeypatch, given, dtype):
    """Rows longer than a block, and a last block that is short; pages go behind the reader."""
    x = random(given, (11, 7))
    x = x.view(np.uint16) if given == ml_dtypes.bfloat16 else x
    expected = whole(x, dtype)
    for block, part in ((3, 3), (14, 7), (50, 14), (50, 100)):
        monkeypatch.setattr(weights_module, "_ROWS", block)
        monkeypatch.setattr(weights_module, "_BLOCK", part)
        source, blocks, step = Source(w=x), [], max(1, block // 7)
        for rows in Weights(source, dtype).rows("w", (11, 7)):
            first = len(blocks) * step
            assert source.released == [("w", i, i + step) for i in range(0, first, step)]
            blocks.append(rows.copy())
        np.testing.assert_array_equal(np.concatenate(blocks), expected)
        assert source.released[-1][2] == 11


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named(value, dtype):
    x = random(np.float32)
    x[4, 3] = value
    weights = Weights(Source(w=x, b=x[4]), dtype)
    expected = rf"tensor w holds {value} at \[4, 3\], expected finite numbers"
    with pytest.raises(ModelFormatError, match=expected):
        raise weights.not_finite("w", (5, 7))
    with pytest.raises(ModelFormatError, match=rf"tensor b holds {value} at \[3\], expected"):
        weights.vector("b", (7,))


def test_what_the_dtype_cannot_hold_is_not_called_damaged():
    x = np.full((2, 2), 3.4e38, np.float32)
    error = Weights(Source(w=x), "bfloat16").not_finite("w", (2, 2))
    assert str(error) == ("tensor w holds numbers beyond the range of bfloat16, use dtype float32")


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
