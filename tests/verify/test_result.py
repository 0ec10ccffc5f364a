"""ULP, bins, and where a broken bound is."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pace_nb.verify.result import EDGES, LABELS, Result, merged, ranges, ulp_of

NAN = float("nan")


def result(got, exact, bound=1.0, unit="float32", tiles=None):
    got, exact = np.array(got, float), np.array(exact, float)
    tiles = tiles or {"n": 4} if got.ndim == 1 else tiles or {"m": 2, "n": 4}
    return Result("gemm", unit, unit, "none", {"N": got.size}, False, tiles, got, exact,
                  np.broadcast_to(np.asarray(bound, float), got.shape))  # fmt: skip


@pytest.mark.parametrize("value", [1.0, 1.5, 2.0, 3e-39, 1e-45, 3.4e38, 0.0])
def test_a_ulp_is_the_distance_to_the_neighbour(value):
    assert ulp_of(np.array([value]), "float32")[0] == np.spacing(np.float32(value))
    assert ulp_of(np.array([-value]), "float32")[0] == np.spacing(np.float32(value))


def test_a_ulp_of_bf16():
    np.testing.assert_array_equal(
        ulp_of(np.array([1.0, 1.99, 2.0, 0.75]), "bfloat16"), [2**-7, 2**-7, 2**-6, 2**-8]
    )


def test_errors_are_counted_in_ulp_and_fall_into_bins():
    ulp = 2.0**-23
    r = result([1, 1 + 0.4 * ulp, 1 + ulp, 1 + 1.5 * ulp, 1 + 300 * ulp, 9], [1] * 6)
    np.testing.assert_allclose(r.ulp, [0, 0.4, 1, 1.5, 300, 8 / ulp])
    counts = dict(zip(LABELS, r.histogram, strict=True))
    assert {k: n for k, n in counts.items() if n} == {
        "exact": 1, "<= 1/2": 1, "<= 1": 1, "<= 2": 1, "<= 1024": 1, "> 2^18": 1
    }  # fmt: skip
    assert merged([r, r]) == [2 * n for n in r.histogram]
    assert len(EDGES) + 1 == len(LABELS)


def test_a_nan_on_one_side_breaks_the_bound_and_on_both_sides_is_right():
    r = result([1, NAN, NAN, 1], [1, NAN, 1, NAN], bound=[1, NAN, 9, NAN])
    np.testing.assert_array_equal(r.wrong_nan, [False, False, True, True])
    np.testing.assert_array_equal(r.broken, [False, False, True, True])
    assert sum(r.histogram) == 2 and r.max_ulp == np.inf and not r.holds
    assert result([NAN], [NAN], NAN).holds


def test_an_infinity_is_right_where_it_should_be():
    assert result([np.inf], [np.inf], NAN).holds
    assert not result([np.inf], [1.0]).holds
    assert not result([1.0], [np.inf], np.inf).holds or np.inf in result([1.0], [np.inf]).share


def test_where_a_bound_is_broken():
    got, exact = np.zeros((5, 10)), np.zeros((5, 10))
    got[1:3, 8:] = 3.0
    r = result(got, exact)
    assert not r.holds and r.worst == (1, 8) and r.worst_share == 3.0
    assert r.where() == [
        "m: 1-2 of 5",
        "n: 8-9 of 10 (only what is left over after whole tiles of 4)",
        "tiles of 2 x 4: 2 of 9",
    ]
    np.testing.assert_array_equal(r.by_tile(), [[0, 0, 3], [0, 0, 3], [0, 0, 0]])
    np.testing.assert_array_equal(r.by_axis("m"), [0, 3, 3, 0, 0])
    got[:] = 2.0
    assert result(got, exact).where()[0] == "m: 0-4 of 5 (all)"
    assert result(exact, exact).where() == []


def test_ranges():
    assert ranges(np.array([3, 4, 5, 9])) == "3-5, 9"
    assert ranges(np.arange(0, 20, 2)) == "0, 2, 4, 6, 8, 10 and 4 more"


def test_json_has_no_infinity():
    r = result([1.0, 2.0, NAN], [1.0, 2.5, 1.0])
    found = json.loads(json.dumps(r.to_json(), allow_nan=False))
    assert found["ulp"]["max"] is None and found["ulp"]["wrong_nan"] == 1
    assert found["bound"] == {"holds": False, "broken": 1, "worst_share": None}
    assert found["worst"]["index"] == {"n": 2} and found["worst"]["got"] is None
    assert sum(found["ulp"]["histogram"].values()) == 2
