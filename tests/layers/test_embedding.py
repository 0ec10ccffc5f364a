"""Rows out, logits out, both from one packed copy; ids are checked."""

from __future__ import annotations

import numpy as np
import pytest

from pace_nb.errors import InvalidRequestError, ModelFormatError
from pace_nb.layers.embedding import Embedding


def test_lookup_is_exact_and_the_head_is_tied(load, rng, dtype, stored):
    w, w64 = stored(rng.standard_normal((50, 24)))
    embedding = Embedding(50, 24)
    source = load(embedding, dtype, {"weight": w})
    ids = np.array([0, 49, 7, 7], np.int32)
    np.testing.assert_array_equal(embedding(ids), w64[ids].astype(np.float32))
    x, x64 = stored(rng.standard_normal((3, 24)))
    np.testing.assert_allclose(embedding.project(x), x64 @ w64.T, atol=1e-5, rtol=1e-5)
    assert source.released == ["layer.weight"]


def test_a_row_that_is_not_finite_is_refused(load, rng, dtype):
    w = rng.standard_normal((200, 24)).astype(np.float32)
    w[131, 7] = np.nan
    with pytest.raises(ModelFormatError, match=r"tensor layer\.weight holds nan at \[131, 7\]"):
        load(Embedding(200, 24), dtype, {"weight": w})


@pytest.mark.parametrize("bad", [-1, 50, 2**31 - 1])
def test_an_id_outside_the_vocabulary_is_named(load, rng, bad):
    embedding = Embedding(50, 8)
    load(embedding, "float32", {"weight": rng.standard_normal((50, 8)).astype(np.float32)})
    with pytest.raises(InvalidRequestError, match=f"token id {bad} is outside .* 0 to 49"):
        embedding(np.array([3, bad, 4], np.int32))
