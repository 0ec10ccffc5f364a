"""What notebooks import: counts against formulas, checks that refuse, timings that add up."""

from __future__ import annotations

import importlib
import io
import math

import nblib
import numpy as np
import pytest
from nblib import checking, counting, drawing, measure
from numba import prange
from PIL import Image

from pace_nb.kernels import jit, lanes, norm
from pace_nb.kernels.bf16 import from_f32
from pace_nb.kernels.gemm import NR, gemm, gemm_ref, pack_weight
from pace_nb.kernels.lanes import fma, load, reduce_add, splat, store

compiled = pytest.mark.skipif(jit.INTERPRETED, reason="there is nothing compiled to interpret")


# ---- counting ------------------------------------------------------------------------------------
def naive(a, b, c):
    for m in range(a.shape[0]):
        for n in range(b.shape[0]):
            acc = np.float32(0.0)
            for k in range(a.shape[1]):
                acc += a[m, k] * b[n, k]
            c[m, n] = acc


@jit.device_fn
def axpy_row(s, x, y, at):
    store(y, at, fma(splat(s), load(x, at), load(y, at)))


@jit.kernel
def axpy_kernel(s, x, y, n):
    for t in prange(n // 16):
        axpy_row(s, x, y, t * 16)


@jit.device_fn
def by_module(x, out):
    out[0] = lanes.reduce_max(lanes.load(x, 0) * lanes.load(x, 16) - lanes.splat(1.0))


def test_scalar_loops_count_elements_and_flops():
    a, b = np.ones((3, 4), np.float32), np.full((5, 4), 2, np.float32)
    c = np.zeros((3, 5), np.float32)
    found = nblib.count(naive, a, b, c)
    assert (c == 8).all()
    assert (found.loads, found.stores) == (2 * 3 * 5 * 4, 3 * 5)
    assert found.flops == found.scalar_flops == 2 * 3 * 5 * 4
    assert found.bytes_loaded == 4 * found.loads
    assert found.bytes_touched == 4 * (12 + 20 + 15)


@compiled
def test_a_kernel_of_lanes_counts_through_its_device_functions():
    x, y = np.arange(64, dtype=np.float32), np.ones(64, np.float32)
    found = nblib.count(axpy_kernel, 2.0, x, y, 64)
    assert (y == 2 * np.arange(64) + 1).all()
    assert (found.loads, found.stores, found.fmas) == (8, 4, 4)
    assert (found.bytes_loaded, found.bytes_stored) == (512, 256)
    assert found.bytes_touched == 512
    assert found.flops == 2 * 64


@compiled
def test_names_reached_through_the_module_count_as_well():
    x, out = np.arange(32, dtype=np.float32), np.zeros(1, np.float32)
    found = nblib.count(by_module, x, out)
    assert out[0] == 15 * 31 - 1
    assert (found.loads, found.adds_muls, found.others, found.stores) == (2, 2, 1, 1)


@compiled
@pytest.mark.parametrize(("m", "n", "k"), [(1, 64, 2), (6, 70, 10), (12, 128, 33)])
def test_the_packages_gemm_does_what_its_docstring_says(m, n, k):
    rng = np.random.default_rng(0)
    x, w = (from_f32(rng.standard_normal(s, np.float32)) for s in ((m, k), (n, k)))
    packed = pack_weight(w)
    found = nblib.count(gemm, x, packed)
    panels, steps = -(-n // NR), -(-k // 2)
    assert found.dots == panels * NR // 16 * steps * m
    assert found.fmas == 0
    tiles = -(-m // 6)  # each reads its panel once
    row = 4 if jit.WIDE else 8 if m > 1 else 8 // 4  # float32; one row is read for 4 panels
    loaded = panels * steps * (tiles * NR * 4 + m * row)
    assert found.bytes_loaded == loaded
    assert found.bytes_stored == 4 * m * n


@compiled
def test_an_interpreted_run_gives_the_compiled_result():
    x = np.random.default_rng(1).standard_normal((3, 50)).astype(np.float32)
    weight, out = np.ones(50, np.float32), np.empty((3, 50), np.float32)
    found = nblib.count(norm.rms_norm, x, weight, 1e-6, out=out)
    np.testing.assert_allclose(out, norm.rms_norm(x, weight, 1e-6), rtol=1e-6)
    assert found.bytes_stored == out.nbytes
    assert found.bytes_loaded == 2 * x.nbytes + 3 * weight.nbytes


@compiled
def test_counting_leaves_the_kernel_as_it_was():
    x, y = np.ones(32, np.float32), np.ones(32, np.float32)
    nblib.count(axpy_kernel, 1.0, x, y, 32)
    axpy_kernel(1.0, x, y, 32)
    assert (y == 3).all()
    assert type(x) is np.ndarray
    assert lanes.load is load and reduce_add is lanes.reduce_add


def test_every_operation_of_the_lanes_is_known():
    """A rule for a name that is gone, or a memory operation without a rule, would count wrong."""
    operations = {
        name
        for module in map(importlib.import_module, counting._VOCABULARY)
        for name, value in vars(module).items()
        if callable(value)
        and getattr(value, "__module__", "") == module.__name__
        and not name.startswith("_")
        and not isinstance(value, type)
    }
    known = set(counting._RULES) | counting._FREE
    assert known <= operations
    memory = {n for n in operations if n.startswith(("load", "store", "copy")) or "_load" in n}
    assert memory <= set(counting._RULES)


def test_counts_stand_beside_the_formula_or_are_refused():
    counts = nblib.Counts(loads=1536, fmas=2)
    table = nblib.show_counts({"rung": counts}, {"rung": {"loads": 1536}})
    assert "1,536 =" in repr(table)
    with pytest.raises(ValueError, match=r"loads counted 1,536, the formula says 7"):
        nblib.show_counts({"rung": counts}, {"rung": {"loads": 7}})
    with pytest.raises(ValueError, match="no column"):
        nblib.show_counts({"rung": counts}, {"rung": {"dots": 0}})


# ---- checks and exercises ------------------------------------------------------------------------
def test_a_check_prints_its_largest_error(capsys):
    nblib.check([1.0, 2.5, np.nan, np.inf], [1.0, 2.0, np.nan, np.inf], [0, 1, 0, 0], "rung")
    assert capsys.readouterr().out == "ok  rung: max error 5.0e-01, bound 1.0e+00\n"
    nblib.check(np.empty(0), np.empty(0), name="none")
    assert capsys.readouterr().out == "ok  none: empty\n"
    nblib.check(3, 3)
    assert "max error 0.0e+00" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("got", "want", "said"),
    [
        ([1.0, 2.0], [1.0, 3.0], r"1 of 2 wrong, first at \[1\]: 2, expected 3 within 0.5"),
        ([1.0, np.nan], [1.0, 3.0], "nan, expected 3"),
        ([1.0, 2.0], [1.0, np.nan], "2, expected nan"),
        ([1.0, np.inf], [1.0, -np.inf], "inf, expected -inf"),
        ([1.0], [1.0, 2.0], r"shape \(1,\), expected \(2,\)"),
    ],
)
def test_a_check_says_what_is_off(got, want, said):
    with pytest.raises(nblib.CheckFailed, match=said):
        nblib.check(got, want, 0.5)


def examine(answer):
    for n in (1, 16, 33):
        nblib.expect(answer(n), -(-n // 16), f"vectors of {n}")


def stub(n): ...


def test_an_exercise_says_whether_it_is_right(capsys, monkeypatch):
    monkeypatch.delenv("PACE_NB_SOLUTIONS", raising=False)
    assert nblib.exercise(examine)(stub) is stub
    nblib.exercise(examine)(lambda n: n // 16)
    nblib.exercise(examine)(lambda n: 1 / 0)
    nblib.exercise(examine)(lambda n: (n + 15) // 16)
    assert capsys.readouterr().out.splitlines() == [
        "not yet  stub: vectors of 1: nothing was returned yet",
        "not yet  <lambda>: vectors of 1: 0, expected 1",
        "not yet  <lambda>: division by zero",
        "right    <lambda>",
    ]


@pytest.mark.parametrize(
    ("solutions", "answer", "said"),
    [
        ("def stub(n): return -(-n // 16)\ndef stub_wrong(n): return n // 16", stub, None),
        ("def stub(n): return n // 16 + 1", stub, "refuses the solution: vectors of 16: 2, ex"),
        ("def stub(n): return -(-n // 16)\ndef stub_wrong_2(n): return (n+15)//16", stub, "acce"),
        ("def other(n): return 1", stub, "has no function of this name"),
        (None, stub, "there is no such file"),
        ("def stub(n): return -(-n // 16)", lambda n: -(-n // 16), "accepts the unsolved stub"),
    ],
)
def test_a_check_that_tells_nothing_apart_is_found(
    solutions, answer, said, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "solutions.py"
    if solutions:
        path.write_text(solutions)
    monkeypatch.setenv("PACE_NB_SOLUTIONS", str(path))
    if said is None:
        nblib.exercise(examine)(answer)
        assert capsys.readouterr().out.startswith("not yet  stub")
    else:
        with pytest.raises(nblib.CheckFailed, match=said):
            nblib.exercise(examine)(answer)
    checking._solutions.cache_clear()


def test_expect_shortens_what_is_long():
    with pytest.raises(nblib.CheckFailed) as failed:
        nblib.expect(np.arange(100), np.arange(101), "offsets")
    assert len(str(failed.value)) < 160
    nblib.expect(np.arange(3), [0, 1, 2], "offsets")


# ---- timing --------------------------------------------------------------------------------------
def slow_clock(monkeypatch, cost):
    """perf_counter that a run named in `cost` moves by so many seconds."""
    now = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def run(name):
        def body():
            now[0] += cost[name]

        return body

    return run


def test_rates_and_shares_come_from_the_same_rounds(monkeypatch):
    monkeypatch.delenv("PACE_NB_FAST", raising=False)
    run = slow_clock(monkeypatch, {"slow": 0.4, "quick": 0.1, "limit": 0.05})
    limit = nblib.Limit("peak", "FLOP", [measure.Probe(run("limit"), 1e9)])
    found = nblib.timeit(
        {"slow": run("slow"), "quick": run("quick")}, flops=1e9, moved={"quick": 5e8}, limit=limit
    )
    quick = found["quick"]
    assert len(found) == 2 and [row.name for row in found] == ["slow", "quick"]
    assert quick.best == pytest.approx(0.1) and quick.median == pytest.approx(0.1)
    assert quick.speedup == pytest.approx(4)
    assert quick.gflops == pytest.approx(10)
    assert quick.gbps == pytest.approx(5)
    assert quick.intensity == pytest.approx(2)
    assert quick.share == pytest.approx(0.5)
    assert found.limit_rate == pytest.approx(2e10)
    assert math.isnan(found["slow"].gbps)
    text = repr(found)
    assert "3 interleaved rounds" in text and "50 %" in text and "4 x" in text
    assert "the limit is the peak: 20 GFLOP/s" in text
    assert "<td" in found._repr_html_()
    with pytest.raises(KeyError, match="expected one of"):
        found["other"]


def test_what_is_short_is_repeated_within_a_round(monkeypatch):
    monkeypatch.delenv("PACE_NB_FAST", raising=False)
    run = slow_clock(monkeypatch, {"short": 1e-6})
    found = nblib.timeit({"short": run("short")})
    assert found["short"].median == pytest.approx(1e-6)
    assert "31 interleaved rounds" in repr(found)


def test_fast_calls_each_thing_once(monkeypatch):
    monkeypatch.setenv("PACE_NB_FAST", "1")
    calls = []
    limit = nblib.Limit("rate", "B", [measure.Probe(lambda: calls.append("limit"), 1.0)])
    found = nblib.timeit(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, moved=1.0, limit=limit
    )
    assert calls == ["a", "b", "limit"]
    assert found["a"].share > 0


def test_threads_are_set_and_put_back(monkeypatch):
    monkeypatch.setenv("PACE_NB_FAST", "1")
    before, seen = jit.num_threads(), []
    found = nblib.timeit({"a": lambda: seen.append(jit.num_threads())}, threads=1)
    assert seen == [1] and jit.num_threads() == before
    assert "1 thread," in repr(found)
    with pytest.raises(ValueError, match="runs is empty"):
        nblib.timeit({})


@pytest.mark.parametrize(("gain", "warned"), [(1.1, True), (1.49, True), (1.51, False)])
def test_threads_that_compute_hardly_more_than_one_are_told_of(monkeypatch, capsys, gain, warned):
    used = [2]

    class Threads:
        def __init__(self, n):
            self.n = n

        def __enter__(self):
            used.append(self.n or 2)
            return used[-1]

        def __exit__(self, *exception):
            used.pop()

    monkeypatch.delenv("PACE_NB_FAST", raising=False)
    monkeypatch.setattr(measure, "_threads", Threads)
    monkeypatch.setattr(measure, "STREAMED", 1 << 16)
    monkeypatch.setattr(measure, "flop_peak", lambda *_: 1e9 * (gain if used[-1] > 1 else 1.0))
    assert nblib.limits().f32 == gain * 1e9
    said = capsys.readouterr().out
    assert said.count("\n") == warned
    assert (f"2 threads compute {gain:.2f} times what one does" in said) == warned
    nblib.limits(threads=1)
    monkeypatch.setenv("PACE_NB_FAST", "1")
    nblib.limits()
    assert capsys.readouterr().out == ""


def test_the_limits_of_the_machine_and_the_best_time(monkeypatch, capsys):
    monkeypatch.setenv("PACE_NB_FAST", "1")
    roof = nblib.limits()
    assert min(roof.bf16, roof.f32, roof.read, roof.copy) > 0
    assert "GB/s" in repr(roof)
    assert nblib.flop_limit(np.float32).probes[0].amount > 0
    assert nblib.read_limit(np.ones(1 << 12, np.float32)).unit == "B"
    assert nblib.copy_limit(1 << 16).probes[0].amount == pytest.approx(1 << 16, rel=0.01)
    best = nblib.best_time(2e9, 1e8, 1e9, 1e9)
    assert (best.seconds, best.bound) == (2.0, "FLOPs")
    assert nblib.best_time(1e8, 3e9, 1e9, 1e9).bound == "bytes"
    nblib.environment(["seed      7"])
    printed = capsys.readouterr().out
    assert "Numba" in printed and jit.isa_path() in printed and "seed      7" in printed


def test_seconds_are_written_in_a_fitting_unit():
    written = [nblib.seconds_text(s) for s in (2.5, 0.0123, 3.4e-5, 250e-6, 4e-7)]
    assert written == ["2.50 s", "12.3 ms", "34.0 us", "250 us", "0.40 us"]


# ---- what is shown -------------------------------------------------------------------------------
def test_a_takeaway_has_a_number():
    shown = nblib.takeaway("A tile makes it 7 times & more")
    assert "7 times &amp; more" in shown._repr_html_()
    assert repr(shown) == "Takeaway: A tile makes it 7 times & more"
    with pytest.raises(ValueError, match="no number"):
        nblib.takeaway("It is much faster")


def test_a_table_is_aligned_and_escaped():
    shown = nblib.table(["what", "n"], [["a<b", 1], ["c", 100]], "note")
    assert repr(shown).splitlines() == ["what    n", "----  ---", "a<b     1", "c     100", "note"]
    assert "a&lt;b" in shown._repr_html_()
    with pytest.raises(ValueError, match="columns"):
        nblib.table(["what"], [["a", 1]])


def pixels(picture):
    return np.asarray(Image.open(io.BytesIO(picture.png)).convert("RGB"))


PICTURES = {
    "blocks": lambda: nblib.blocks(
        np.arange(12).reshape(2, 6),
        np.arange(12).reshape(2, 6) % 3,
        title="offsets",
        legend=["a", "b", "c"],
        rows=["n=0", "n=1"],
        columns=[f"k={k}" for k in range(6)],
        marked=np.eye(2, 6),
    ),
    "tiles": lambda: nblib.tiles(np.arange(24).reshape(4, 6) // 6, names={1: "one"}, title="tiles"),
    "timeline": lambda: nblib.timeline(
        {"thread 0": [(0, 2, "a", 0), (2, 3, "b", 1)], "thread 1": [(1, 3, "c", 2)]}, title="who"
    ),
    "roofline": lambda: nblib.roofline(
        {"naive": (1.0, 2.0), "tile": (50.0, 80.0)}, (1e11, 1e10), title="roof"
    ),
    "bars": lambda: nblib.bars({"a": 1.0, "b": 3.0}, unit="GB/s", limit=4.0, title="rates"),
    "curves": lambda: nblib.curves(
        {"a": ([1, 2, 4], [1, 2, 3]), "b": ([1, 2, 4], [3, 2, 1])},
        xlabel="M", ylabel="ms", title="times", logx=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_small_opaque_and_says_what_it_shows(name):
    shown = PICTURES[name]()
    data, facts = shown._repr_mimebundle_()
    assert len(shown.png) <= 60_000
    assert facts["image/png"]["alt"] == shown.alt != ""
    assert shown.alt in data["text/plain"]
    image = Image.open(io.BytesIO(shown.png))
    assert "transparency" not in image.info
    colours = pixels(shown)
    assert (colours[0, 0] > 240).all()  # a light margin
    assert colours.min() < 60  # and ink


def test_cells_get_the_look_of_their_group():
    same = pixels(nblib.blocks([["", ""]], [[0, 0]], title="x"))
    different = pixels(nblib.blocks([["", ""]], [[0, 3]], title="x"))
    fill = [int(drawing.GROUPS[3][0][i : i + 2], 16) for i in (1, 3, 5)]
    assert not (np.abs(same.astype(int) - fill).sum(-1) < 12).any()
    assert (np.abs(different.astype(int) - fill).sum(-1) < 12).mean() > 0.02
    with pytest.raises(ValueError, match="groups"):
        nblib.blocks([["a"]], [[1, 2]])


def test_rectangles_cover_each_element_once():
    rng = np.random.default_rng(0)
    owner = np.kron(rng.integers(0, 4, (5, 7)), np.ones((3, 2), int))
    painted = np.full(owner.shape, -9)
    for value, r, c, h, w in drawing._rectangles(owner):
        assert (painted[r : r + h, c : c + w] == -9).all()
        painted[r : r + h, c : c + w] = value
    assert (painted == owner).all()


def test_groups_differ_in_grey():
    """Neighbours in the list of looks, and those with the same hatch, differ in brightness."""
    light = [drawing._brightness(fill) for fill, _ in drawing.GROUPS]
    for i in range(len(light) - 1):
        assert abs(light[i] - light[i + 1]) > 0.2
    for i, (_, a) in enumerate(drawing.GROUPS):
        for j in range(i):
            assert drawing.GROUPS[j][1] != a or abs(light[i] - light[j]) > 0.2


def test_the_reference_is_what_notebooks_start_from():
    x, w = np.ones((2, 3), np.float32), np.ones((4, 3), np.float32)
    nblib.check(gemm(x, pack_weight(w)), gemm_ref(x, w), 1e-6, "gemm")
