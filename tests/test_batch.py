"""`Batch.from_spans` lays requests out one after another, whatever their lengths."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pace_nb.batch import Batch
from pace_nb.errors import ShapeError


def test_decode_and_prefill_in_one_batch():
    batch = Batch.from_spans(
        [("decoding", 7, [50], 1), ("chunk", 0, [1, 2, 3], 0), ("end", 16, [8, 9], 2)]
    )

    assert batch.request_ids == ("decoding", "chunk", "end")
    assert batch.token_ids.tolist() == [50, 1, 2, 3, 8, 9]
    assert batch.positions.tolist() == [7, 0, 1, 2, 16, 17]
    assert batch.cu_seqlens_q.tolist() == [0, 1, 4, 6]
    assert batch.context_lens.tolist() == [8, 3, 18]
    assert batch.seq_lens.tolist() == [8, 3, 18]
    assert batch.logits_rows.tolist() == [0, 4, 5]
    assert (batch.num_requests, batch.num_tokens) == (3, 6)


def test_a_chunk_knows_how_long_its_sequence_is():
    batch = Batch.from_spans([("chunk", 4, [1, 2], 0), ("decoding", 7, [50], 1)], [30, 8])

    assert batch.context_lens.tolist() == [6, 8]
    assert batch.seq_lens.tolist() == [30, 8] and batch.seq_lens.dtype == np.int32


@given(
    st.lists(st.tuples(st.integers(0, 40), st.lists(st.integers(0, 99), min_size=1)), max_size=5)
)
def test_every_span_can_be_read_back(spans):
    batch = Batch.from_spans(
        [(str(b), start, ids, len(ids) // 2) for b, (start, ids) in enumerate(spans)]
    )

    arrays = [getattr(batch, field.name) for field in dataclasses.fields(batch)[1:]]
    assert len(arrays) == 6
    for array in arrays:
        assert array.dtype == np.int32 and array.flags.c_contiguous
    rows = iter(batch.logits_rows.tolist())
    for b, (start, ids) in enumerate(spans):
        begin, end = batch.cu_seqlens_q[b], batch.cu_seqlens_q[b + 1]
        assert batch.token_ids[begin:end].tolist() == ids
        assert batch.positions[begin:end].tolist() == list(range(start, start + len(ids)))
        assert batch.positions[end - 1] == batch.context_lens[b] - 1
        assert [next(rows) for _ in range(len(ids) // 2)] == list(range(end - len(ids) // 2, end))
    assert next(rows, None) is None


@pytest.mark.parametrize(
    "spans, message",
    [
        ([("a", 0, [], 0)], "request a: .* got 0 tokens"),
        ([("a", -1, [1], 0)], "start -1"),
        ([("a", 0, [1], 2)], "got 1 tokens, start 0, 2 rows"),
        ([("a", 0, [1], -1)], "-1 rows"),
        ([("a", 0, [1], 1), ("a", 1, [1], 1)], "names each request once"),
    ],
)
def test_spans_that_make_no_batch(spans, message):
    with pytest.raises(ShapeError, match=message):
        Batch.from_spans(spans)


def test_a_span_cannot_end_after_its_sequence():
    with pytest.raises(ShapeError, match="request b: a span ends at 9 in a sequence of 8"):
        Batch.from_spans([("a", 0, [1], 1), ("b", 7, [1, 2], 1)], [1, 8])
    with pytest.raises(ShapeError, match="a batch of 1 requests got 2 seq_lens"):
        Batch.from_spans([("a", 0, [1], 1)], [1, 8])


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 40)), max_size=5))
def test_last_tokens_are_the_batch_of_their_spans(tokens):
    ids = [str(b) for b in range(len(tokens))]
    batch = Batch.of_last_tokens(ids, [t for t, _ in tokens], [p for _, p in tokens])
    spans = [(name, position, [t], 1) for name, (t, position) in zip(ids, tokens, strict=True)]
    for field in dataclasses.fields(batch):
        found, expected = (getattr(b, field.name) for b in (batch, Batch.from_spans(spans)))
        assert np.array_equal(found, expected)
        assert field.name == "request_ids" or found.dtype == np.int32


def test_last_tokens_name_each_request_once_with_a_token_and_a_position():
    for arguments in ((["a", "a"], [1, 2], [0, 0]), (["a"], [1, 2], [0]), (["a"], [1], [])):
        with pytest.raises(ShapeError, match="a batch names each request once, with a token"):
            Batch.of_last_tokens(*arguments)
