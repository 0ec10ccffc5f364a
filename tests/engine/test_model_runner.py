"""What is scheduled becomes one flat batch, and the rows asked for become logits."""

from __future__ import annotations

import numpy as np
import pytest

from pace_nb.config import CacheConfig, EngineConfig
from pace_nb.engine.model_runner import ModelRunner
from pace_nb.errors import ConfigError, OutOfMemoryError
from pace_nb.kernels import jit
from pace_nb.kv_cache import create_cache


class Watched:
    """A model that notes in which mode it was called."""

    vocab_size = 3

    def __init__(self, stored):
        self.stored = stored
        self.modes = []
        self.batches = []

    def __call__(self, batch, kv):
        self.modes.append(jit.use_reference())
        self.batches.append(batch)
        assert kv.layer(0).k is not None and len(kv.views[0].block_table) == batch.num_requests
        return np.stack([batch.token_ids, batch.positions], axis=1).astype(np.float32)

    def logits(self, hidden, rows):
        self.modes.append(jit.use_reference())
        return np.repeat(hidden[rows].sum(axis=1, keepdims=True), 3, axis=1)


@pytest.fixture
def make(scripted):
    def build(**options):
        stored = scripted.setup().model.kv_cache_config("float32")
        cache = create_cache(stored, CacheConfig("contiguous", 64, 64))
        model = Watched(stored)
        return ModelRunner(model, cache, EngineConfig(**options)), model

    return build


def test_requests_become_spans(make, scripted):
    runner, model = make()
    a = scripted.request("a", [10, 11, 12, 13], prompt_logprobs=0)
    b = scripted.request("b", [20, 21])
    b.token_ids.append(22)
    b.num_computed_tokens = 2
    for request in (a, b):
        runner.cache.allocate(request.request_id, request.num_tokens)

    logits = runner.run([(a, 3), (b, 1)])
    (batch,) = model.batches
    assert batch.request_ids == ("a", "b")
    assert batch.token_ids.tolist() == [10, 11, 12, 22]
    assert batch.positions.tolist() == [0, 1, 2, 2]
    assert batch.context_lens.tolist() == [3, 3]
    assert batch.seq_lens.tolist() == [4, 3]
    assert batch.logits_rows.tolist() == [0, 1, 2, 3]
    assert len(logits) == 4
    assert logits.rows(np.array([0, 3])).tolist() == [[10] * 3, [24] * 3]
    assert logits.rows(np.array([], dtype=np.int64)).shape == (0, 3)


@pytest.mark.parametrize("kernels, reference", [("numba", False), ("reference", True)])
def test_the_config_says_which_kernels_run(make, scripted, kernels, reference):
    runner, model = make(kernels=kernels)
    request = scripted.request("a", [1])
    runner.cache.allocate("a", 1)
    runner.run([(request, 1)]).rows(np.array([0]))
    runner.forward([1, 2])
    assert model.modes == [reference] * 4
    assert not jit.use_reference()


def test_forward_goes_in_chunks_and_gives_its_room_back(make):
    runner, model = make(max_num_seqs=4, max_num_batched_tokens=4)
    logits = runner.forward([5, 6, 7, 8, 9, 1])
    assert logits[:, 0].tolist() == [5, 7, 9, 11, 13, 6]
    assert [batch.num_tokens for batch in model.batches] == [4, 2]
    assert [batch.seq_lens.tolist() for batch in model.batches] == [[6], [6]]
    assert runner.cache.num_free_tokens == 64

    def fail(batch, kv):
        raise ValueError("no")

    runner._model = fail
    fail.vocab_size = 3
    with pytest.raises(ValueError, match="no"):
        runner.forward([1])
    assert runner.cache.num_free_tokens == 64


def test_forward_without_room(make):
    runner, _ = make()
    runner.cache.allocate("a", 40)
    with pytest.raises(OutOfMemoryError, match="for 17 tokens, free are 16 of 64"):
        runner.forward([1] * 17)


def test_forward_without_memory_for_the_logits(make):
    runner, model = make()
    model.vocab_size = 2**50
    with pytest.raises(OutOfMemoryError, match=f"no memory for logits of 2 tokens x {2**50}"):
        runner.forward([1, 2])
    assert runner.cache.num_free_tokens == 64


def test_threads_are_set_once(make, monkeypatch):
    asked = []
    monkeypatch.setattr(jit, "set_num_threads", asked.append)
    make()
    make(num_threads=3)
    assert asked == [3]


def test_a_thread_count_that_is_not_allowed_is_a_config_error(make):
    with pytest.raises(ConfigError, match="num_threads=999: expected 1 to"):
        make(num_threads=999)
