"""The correctness lab: a compiled kernel against its float64 reference, with or without a fault.

    for result in verify("gemm", dtype="bfloat16", grid="quick", fault="lost-tail"):
        result.holds, result.worst_share, result.where()

    subject.py  which kernels, on what inputs, and the bound that each docstring declares
    fault.py    mistakes put around a kernel from outside, and the test that catches each
    result.py   errors in ULP, their histogram, and where in the tensor they sit
    check.py    `verify`: choose, run, compare
    report.py   the same as lines of text
    plots.py    the same as a picture (needs matplotlib)

Knows the kernels and nothing above them. No kernel knows of it.
"""

from __future__ import annotations

from pace_nb.verify.check import verify
from pace_nb.verify.fault import FAULTS, PLANTS
from pace_nb.verify.result import Result, merged
from pace_nb.verify.subject import SUBJECTS

__all__ = ["FAULTS", "PLANTS", "SUBJECTS", "Result", "merged", "verify"]
