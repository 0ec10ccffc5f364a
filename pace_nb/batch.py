"""`Batch`: the flat, ragged arrays of one engine step.

Knows which tokens of which request run in this step, and where in their sequences they stand. Does
not know phases (a decode is a request with one query token, a prefill chunk is a request with
many), padding, storage or models.

    T = query tokens in the flat batch, B = requests, R = rows whose logits are wanted

    | field        | shape, dtype | meaning                                                        |
    |--------------|--------------|----------------------------------------------------------------|
    | request_ids  | B strings    | whose tokens they are; a cache finds its storage by it         |
    | token_ids    | int32[T]     | the query tokens, request after request                        |
    | positions    | int32[T]     | position of each token in its own sequence, from 0             |
    | cu_seqlens_q | int32[B+1]   | b has token_ids[cu_seqlens_q[b]:cu_seqlens_q[b+1]], never none |
    | context_lens | int32[B]     | keys that b has once this step's keys are written              |
    | seq_lens     | int32[B]     | tokens of b known by now, prompt and generated, run or not     |
    | logits_rows  | int32[R]     | indices into T, ascending: the rows whose logits are wanted    |

The last query token of a request is its last key:
positions[cu_seqlens_q[b+1] - 1] == context_lens[b] - 1. A prompt that runs in chunks has seq_lens
above context_lens until its last chunk: rotary frequencies that depend on a sequence's length
(longrope, dynamic) must not depend on where a prompt was cut.
Source: the varlen form of FlashAttention and vLLM v1, as nano-vllm uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pace_nb.errors import ShapeError

Int32Array = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Batch:
    """One step's tokens (fields: see the module docstring). Make one with `Batch.from_spans`."""

    request_ids: tuple[str, ...]
    token_ids: Int32Array
    positions: Int32Array
    cu_seqlens_q: Int32Array
    context_lens: Int32Array
    seq_lens: Int32Array
    logits_rows: Int32Array

    @property
    def num_requests(self) -> int:
        """B."""
        return len(self.request_ids)

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.token_ids)

    @classmethod
    def of_last_tokens(
        cls, request_ids: Sequence[str], token_ids: Sequence[int], positions: Sequence[int]
    ) -> Batch:
        """A batch in which each request has one token, the last of its sequence, whose logits are
        asked for: what decoding is. As `from_spans` would make it, with less to do.

        Raises ShapeError when the lengths differ or a request is named twice.
        """
        size = len(request_ids)
        if not len(set(request_ids)) == size == len(token_ids) == len(positions):
            raise ShapeError(
                f"a batch names each request once, with a token and a position, got "
                f"{list(request_ids)}, {len(token_ids)} tokens and {len(positions)} positions"
            )
        # Three times the same call: between two steps each part of NumPy has left the caches, and a
        # `+` or `arange` would cost more than the array that it makes.
        starts = np.array(range(size + 1), np.int32)
        context_lens = np.array([position + 1 for position in positions], np.int32)
        return cls(
            request_ids=tuple(request_ids),
            token_ids=np.array(token_ids, np.int32),
            positions=np.array(positions, np.int32),
            cu_seqlens_q=starts,
            context_lens=context_lens,
            seq_lens=context_lens,
            logits_rows=starts[:size],
        )

    @classmethod
    def from_spans(
        cls,
        spans: Sequence[tuple[str, int, Sequence[int], int]],
        seq_lens: Sequence[int] | None = None,
    ) -> Batch:
        """Build a batch from one (request_id, start, token_ids, num_logits) per request.

        `token_ids` stand at positions start, start + 1, ... of their sequence and must not be
        empty. The logits of the last `num_logits` of them are asked for (0 for a prefill chunk that
        does not reach the end). `seq_lens`, one per span, says how long each sequence is known to
        be; without it, each ends with its span.

        Raises ShapeError naming the request when a span is empty, starts below 0, asks for more
        logits than it has tokens or ends after its sequence; or when two spans name one request.
        """
        if len({span[0] for span in spans}) != len(spans):
            raise ShapeError(f"a batch names each request once, got {[span[0] for span in spans]}")
        token_ids: list[int] = []
        positions: list[int] = []
        cu_seqlens_q = [0]
        context_lens: list[int] = []
        logits_rows: list[int] = []
        for request_id, start, span_token_ids, num_logits in spans:
            length = len(span_token_ids)
            if length == 0 or start < 0 or not 0 <= num_logits <= length:
                raise ShapeError(
                    f"request {request_id}: a span needs tokens, start >= 0 and at most one row of "
                    f"logits per token; got {length} tokens, start {start}, {num_logits} rows"
                )
            token_ids.extend(span_token_ids)
            positions.extend(range(start, start + length))
            end = len(token_ids)
            cu_seqlens_q.append(end)
            context_lens.append(start + length)
            logits_rows.extend(range(end - num_logits, end))
        seq_lens = context_lens if seq_lens is None else seq_lens
        if len(seq_lens) != len(spans):
            raise ShapeError(f"a batch of {len(spans)} requests got {len(seq_lens)} seq_lens")
        for span, context_len, seq_len in zip(spans, context_lens, seq_lens, strict=True):
            if seq_len < context_len:
                raise ShapeError(
                    f"request {span[0]}: a span ends at {context_len} in a sequence of {seq_len}"
                )
        return cls(
            request_ids=tuple(span[0] for span in spans),
            token_ids=np.array(token_ids, dtype=np.int32),
            positions=np.array(positions, dtype=np.int32),
            cu_seqlens_q=np.array(cu_seqlens_q, dtype=np.int32),
            context_lens=np.array(context_lens, dtype=np.int32),
            seq_lens=np.array(seq_lens, dtype=np.int32),
            logits_rows=np.array(logits_rows, dtype=np.int32),
        )
