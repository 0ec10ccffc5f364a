"""The lines of a report say what the results hold."""

from __future__ import annotations

import json

from pace_nb.verify import PLANTS, verify
from pace_nb.verify.report import lines, share, summary, to_json


def report(*arguments, **options):
    results = list(verify(*arguments, **options))
    return results, "\n".join(lines(results))


def test_a_sound_kernel():
    results, text = report("norm", grid="2x17")
    assert "BROKEN" not in text and "caught by" not in text
    assert "T=2 E=17, one NaN" in text and "ULP of bfloat16 against float64" in text
    assert "(E/128 + 7) 2^-24 |y|" in text and "pace_nb/kernels/norm.py" in text
    assert "4 calls of 1 kernels: every bound holds" in summary(results)


def test_a_faulty_one():
    results, text = report("gemm", grid="3x5x17", fault="lost-tail", dtype="float32")
    assert "BROKEN" in text and PLANTS["gemm", "lost-tail"].test in text
    assert "m: 0-2 of 3 (all)" in text and "15 of 15 elements are off; worst at m=" in text
    assert "the bound is broken in" in summary(results)


def test_sizes_that_do_not_show_the_fault():
    _, text = report("gemm", grid="3x5x32", fault="lost-tail", dtype="float32")
    assert "none of these sizes shows the fault" in text


def test_lost_nans_are_counted():
    _, text = report("exp", grid="20", fault="nnan")
    assert "NaN          1" in text


def test_share():
    assert share(0.25) == "25% of the bound" and share(12.0) == "12 times the bound"


def test_json():
    results, _ = report("gemm", grid="3x5x17", fault="lost-tail", dtype="float32")
    found = json.loads(json.dumps(to_json(results, "1.2"), allow_nan=False))
    assert found["pace_nb"] == "1.2" and found["fault"] == "lost-tail" and found["holds"] is False
    assert found["caught_by"] == {"gemm": PLANTS["gemm", "lost-tail"].test}
    assert len(found["results"]) == 2 and found["results"][0]["sizes"] == {"M": 3, "N": 5, "K": 17}
    assert list(found["results"][0]["ulp"]["histogram"]) == found["bins"]
