"""Frequencies of every rope_type against transformers, and what the tables must keep."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pace_nb.errors import ModelFormatError, UnsupportedModelError
from pace_nb.layers.rope import (
    RopeParameters,
    RotaryEmbedding,
    attention_factor,
    inverse_frequencies,
)

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONGROPE = {
    "rope_type": "longrope",
    "rotary_dim": 16,
    "original_max_position_embeddings": 64,
    "short_factor": (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7),
    "long_factor": (1.0, 1.5, 2.0, 4.0, 8.0, 16.0, 32.0, 47.77),
}
YARN = {
    "rope_type": "yarn",
    "max_position_embeddings": 4096,
    "factor": 4.0,
    "original_max_position_embeddings": 1024,
}

# What ROPE_INIT_FUNCTIONS of transformers 5.19 return (float32, seven digits): name, parameters,
# sequence length, {index: inv_freq}, attention factor.
FACTS = [
    ("default", {}, 0, {0: 1.0, 1: 0.5623413, 15: 0.0001778279}, 1.0),
    ("linear", {"rope_type": "linear", "factor": 4.0}, 0, {0: 0.25, 15: 4.445699e-05}, 1.0),
    ("dynamic short", {"rope_type": "dynamic", "factor": 4.0}, 2048, {15: 0.0001778279}, 1.0),
    (
        "dynamic long",
        {"rope_type": "dynamic", "factor": 4.0},
        5000,
        {0: 1.0, 1: 0.4950466, 8: 0.00360719, 15: 2.628404e-05},
        1.0,
    ),
    (
        "llama3",  # 14 turns fast enough, 15 to 17 are blended, 18 is slow
        dict(rotary_dim=64, **LLAMA3),
        0,
        {
            13: 0.004839421,
            14: 0.003211446,
            15: 0.001371894,
            16: 0.000524846,
            17: 0.0001785078,
            18: 7.784655e-05,
            31: 3.767323e-07,
        },
        1.0,
    ),
    (
        "llama3 of Llama 4: low == high",
        dict(LLAMA3, factor=16.0, high_freq_factor=1.0, original_max_position_embeddings=64),
        0,
        {2: 0.1939228, 3: 0.005337319, 15: 2.838544e-07},
        1.0,
    ),
    (
        "yarn",
        YARN,
        0,
        {2: 0.3162278, 3: 0.1587749, 6: 0.01807016, 8: 0.003571428, 9: 0.001405853},
        1.138629436111989,
    ),
    (
        "yarn, truncate false",
        {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "max_position_embeddings": 1024,
            "factor": 32.0,
            "original_max_position_embeddings": 32,
            "truncate": False,
        },
        0,
        {0: 1.0, 1: 0.2643136, 2: 0.02556476, 3: 0.003344513, 15: 4.387979e-07},
        1.3465735902799727,
    ),
    (
        "yarn with mscale",
        dict(
            YARN,
            factor=40.0,
            original_max_position_embeddings=4096,
            mscale=0.707,
            mscale_all_dim=1.0,
        ),
        0,
        {5: 0.05623413, 6: 0.02721818, 11: 0.0002921459, 12: 2.5e-05},
        0.9210423553163399,
    ),
    ("yarn with attention_factor", dict(YARN, attention_factor=1.25), 0, {3: 0.1587749}, 1.25),
    (
        "longrope at the original length",
        LONGROPE,
        64,
        {1: 0.2874798, 4: 0.007142857, 7: 0.0001860163},
        1.3540064007726602,
    ),
    (
        "longrope one beyond it",
        LONGROPE,
        65,
        {1: 0.2108185, 4: 0.00125, 7: 6.619799e-06},
        1.3540064007726602,
    ),
]


def parameters(**changes) -> RopeParameters:
    return RopeParameters(**{"rotary_dim": 32, "max_position_embeddings": 2048} | changes)


def rotate(rotary, positions, length=None):
    positions = np.array(positions, np.int32)
    lengths = np.full(len(positions), positions.max() + 1 if length is None else length, np.int32)
    cos, sin, rows, _ = rotary(positions, lengths)
    return cos[rows], sin[rows]


@pytest.mark.parametrize(
    ("changes", "length", "expected", "factor"), [f[1:] for f in FACTS], ids=[f[0] for f in FACTS]
)
def test_frequencies_are_those_of_transformers(changes, length, expected, factor):
    p = parameters(**changes)
    found = inverse_frequencies(p, length)
    assert found.dtype == np.float64 and len(found) == p.rotary_dim // 2
    for index, value in expected.items():
        assert found[index] == pytest.approx(value, rel=2e-6), index
    assert attention_factor(p) == pytest.approx(factor, rel=1e-12)


def test_table_rows_are_cos_and_sin_of_position_times_frequency():
    p = parameters(**YARN)
    cos, sin = rotate(RotaryEmbedding(p), [0, 1, 7, 2000])
    angle = np.array([0, 1, 7, 2000])[:, None] * inverse_frequencies(p)
    np.testing.assert_array_equal(cos, (np.cos(angle) * 1.138629436111989).astype(np.float32))
    np.testing.assert_array_equal(sin, (np.sin(angle) * 1.138629436111989).astype(np.float32))


def test_growing_keeps_every_bit_and_grows_only_when_needed():
    rotary, fresh = RotaryEmbedding(parameters()), RotaryEmbedding(parameters())
    before = rotate(rotary, range(10))
    first = rotary(np.array([3], np.int32), np.array([4], np.int32))
    again = rotary(np.array([200], np.int32), np.array([201], np.int32))
    assert first.cos is again.cos and len(first.cos) == 256
    grown = rotary(np.array([70_000], np.int32), np.array([70_001], np.int32))
    assert len(grown.cos) == 131072
    after = rotate(rotary, range(10))
    whole = rotate(fresh, [*range(10), 70_000])
    for old, new, at_once in zip(before, after, whole, strict=True):
        np.testing.assert_array_equal(old, new)
        np.testing.assert_array_equal(old, at_once[:10])


def test_which_types_depend_on_the_length_of_the_sequence():
    """A cache must not share such keys between sequences."""
    assert parameters(**LONGROPE).by_length
    assert parameters(rope_type="dynamic", factor=2.0).by_length
    assert not any(p.by_length for p in (parameters(), parameters(**YARN)))


def test_the_length_where_all_positions_rotate_otherwise():
    """Beyond it, not at it. dynamic changes only where no sequence gets."""
    rope = parameters(**LONGROPE)
    length = rope.switch_length
    short, still, long = (inverse_frequencies(rope, n) for n in (1, length, length + 1))
    np.testing.assert_array_equal(still, short)
    assert not np.allclose(long, short)
    assert parameters(rope_type="dynamic", factor=2.0).switch_length is None
    assert parameters().switch_length is None and parameters(**YARN).switch_length is None


@pytest.mark.parametrize("changes", [LONGROPE, {"rope_type": "dynamic", "factor": 4.0}])
def test_a_sequence_does_not_depend_on_its_neighbours_length(changes):
    """Three sequences of a batch, one of them long: each gets what it gets alone."""
    rotary = RotaryEmbedding(parameters(max_position_embeddings=64, **changes))
    positions = np.array([0, 1, 2, 63, 64, 4999], np.int32)
    lengths = np.array([64, 64, 64, 65, 65, 5000], np.int32)
    cos, sin, rows, _ = rotary(positions, lengths)
    for i, (position, length) in enumerate(zip(positions, lengths, strict=True)):
        alone_cos, alone_sin = rotate(rotary, [position], length)
        np.testing.assert_array_equal(cos[rows[i]], alone_cos[0])
        np.testing.assert_array_equal(sin[rows[i]], alone_sin[0])
    short, long = rotate(rotary, [40], 64)[0], rotate(rotary, [40], 65)[0]
    assert np.abs(short - long).max() > 1e-3  # the two lengths do differ


def test_float64_angles_stay_exact_at_long_positions():
    """In float32 the product 100003 * inv_freq[1] alone would be off by up to 4e-3 radians."""
    cos, _ = rotate(RotaryEmbedding(parameters(rotary_dim=4, rope_theta=3.0)), [100_003])
    assert cos[0, 1] == np.float32(math.cos(100_003 / math.sqrt(3.0)))


def test_unknown_type_names_the_supported():
    with pytest.raises(UnsupportedModelError, match=r"'mrope' is not supported.*llama3.*yarn"):
        parameters(rope_type="mrope")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotary_dim": 0}, "rotary dimension is 0"),
        ({"rotary_dim": 15}, "rotary dimension is 15, expected an even number"),
        ({"rope_theta": -1.0}, "rope rope_theta is -1.0"),
        ({"rope_theta": math.nan}, "rope rope_theta is nan"),
        ({"rope_type": "linear"}, "rope factor is missing"),
        ({"rope_type": "linear", "factor": 0.0}, "rope factor is 0.0"),
        ({"rope_type": "linear", "factor": math.inf}, "rope factor is inf"),
        ({"rope_type": "dynamic", "factor": 2.0, "rotary_dim": 2}, "needs at least 4"),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0},
            "high_freq_factor is missing",
        ),
        (dict(YARN, rope_theta=1.0), "needs another base"),
        (dict(LONGROPE, short_factor=(1.0,)), "short_factor has 1 numbers, expected 8"),
        (dict(LONGROPE, long_factor=(1.0,) * 7 + (-1.0,)), "long_factor must hold positive"),
        (dict(LONGROPE, original_max_position_embeddings=1), "needs at least 2"),
    ],
)
def test_impossible_values_name_the_field(changes, message):
    with pytest.raises(ModelFormatError, match=message) as caught:
        parameters(**changes)
    assert "\n" not in str(caught.value)
