"""Compute kernels: arrays in, arrays out.

Knows numpy, numba and llvmlite; knows no config, request or model. This package can be lifted out
and used alone. `README.md` beside this file lists every kernel with its formula, the bytes it moves
and its error bound; `jit.py` is the one place that decides how code is compiled.
"""

from pace_nb.kernels import jit as jit  # first: it sets the thread count before numba is imported
