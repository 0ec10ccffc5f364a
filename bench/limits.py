"""Rows that hold a run against a limit of the machine: the package's, under the benches' name."""

from __future__ import annotations

from pace_nb.benchmarks.limits import Run, against_copy, against_peak, against_read, row

__all__ = ["Run", "against_copy", "against_peak", "against_read", "row"]
