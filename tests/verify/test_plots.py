"""The picture shows what the results hold."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from pace_nb.errors import ConfigError
from pace_nb.verify import merged, plots, verify


def test_histogram_and_map_hold_the_values():
    results = list(verify("gemm", dtype="float32", grid="3x70x17", fault="lost-tail"))
    left, right = Figure().subplots(1, 2)
    plots.histogram_on(left, results)
    counts = merged(results)
    heights = [bar.get_height() for bar in left.patches]
    np.testing.assert_allclose(heights, 100 * np.array(counts) / sum(counts))
    plots.map_on(right, results[0])
    shown = right.images[0].get_array()
    np.testing.assert_allclose(shown, plots.shade(results[0].share))
    assert shown.min() > 0.4  # all of it is beyond the bound


def test_large_maps_show_the_worst_of_each_block():
    (result,) = list(verify("exp", grid="5000"))[:1]
    axes = Figure().subplots()
    plots.map_on(axes, result)
    shown = axes.images[0].get_array()
    assert shown.shape[1] <= plots.MOST
    assert shown.max() == pytest.approx(float(plots.shade(np.array(result.worst_share))))


def test_shades_tell_within_from_beyond():
    shares = np.array([0.0, 1e-3, 0.1, 1.0, 1.01, 1e3, 1e6, np.inf])
    shades = plots.shade(shares)
    np.testing.assert_allclose(shades, [0, 0, 0.15, 0.3, 0.4504, 0.725, 1, 1], atol=1e-3)


def test_draw_writes_a_picture(tmp_path):
    results = list(verify("norm", grid="2x17"))
    plots.draw(results, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"--plot .*: "):
        plots.draw(results, tmp_path / "a.xyz")


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'pace-nb\[bench\]'"):
        plots.draw([], tmp_path / "a.png")
