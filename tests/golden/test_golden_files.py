"""The goldens themselves: complete, consistent, small, and able to show a mistake."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pace_nb.kernels.bf16 import to_f32
from pace_nb.models.loader import Checkpoint

DIRECTORIES = sorted(path.parent for path in Path(__file__).parent.glob("*/golden.json"))
LENGTHS = (5, 37, 130)


@pytest.fixture(params=DIRECTORIES, ids=lambda path: path.name)
def directory(request):
    return request.param


def test_there_are_some():
    assert {"llama_mha_untied", "llama_gqa_tied_llama3rope"} <= {d.name for d in DIRECTORIES}


def test_size(directory):
    assert sum(file.stat().st_size for file in directory.iterdir()) <= 200_000


def test_the_checkpoint_is_sound(directory):
    with Checkpoint.open(directory) as checkpoint:
        assert checkpoint.config["vocab_size"] == 99
        for name in checkpoint.names():
            packed = name.endswith(("_blocks", "_scales"))  # MXFP4
            assert checkpoint.dtype(name) == ("U8" if packed else "BF16")
            if not packed:
                bits = checkpoint.tensor(name, checkpoint.shape(name))
                assert np.isfinite(to_f32(bits)).all(), name


@pytest.mark.parametrize("length", LENGTHS)
def test_arrays_agree_with_each_other(directory, length):
    with np.load(directory / "golden.npz", allow_pickle=False) as arrays:
        ids, logits, tokens, margins, greedy_logits = (
            arrays[f"{kind}_{length}"]
            for kind in ("ids", "logits", "greedy", "greedy_margin", "greedy_logits")
        )
    assert ids.shape == (length,) and ids.min() >= 3 and ids.max() < 99
    assert logits.shape == (length, 99) and logits.dtype == np.float32
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(greedy_logits[0], logits[-1], atol=1e-4)
    np.testing.assert_array_equal(greedy_logits.argmax(axis=1), tokens)
    best = np.sort(greedy_logits, axis=1)
    np.testing.assert_array_equal(best[:, -1] - best[:, -2], margins)
    assert margins.min() > 2 * 2e-3  # float32 has to reproduce every token
    assert len(set(tokens.tolist())) >= 8


def test_a_mistake_would_show(directory):
    """Each setting read wrongly moves the logits further than BF16 is allowed to; where BF16 may
    take other experts, only float32 is judged."""
    facts = json.loads((directory / "golden.json").read_text())
    config = json.loads((directory / "config.json").read_text())
    experts = "num_local_experts" in config
    allowed = 100 * 2e-3 if experts else 1.5 * facts["prompts"]["130"]["bf16_maxdiff"]
    assert facts["sensitivity_130"]
    assert min(facts["sensitivity_130"].values()) > allowed
    assert all(facts["prompts"][str(length)]["cached_equals_full"] for length in LENGTHS)
