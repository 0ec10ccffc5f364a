"""What a kernel loads, stores and computes, counted by running it as plain Python.

A compiled kernel cannot be watched. But every lane operation has a NumPy body, so the same source
runs interpreted: here each compiled function is replaced by the Python function it was made from,
each operation with two bodies by one that counts and then runs its NumPy body, and each array
argument by a view that counts the elements read and written one by one.

Counted are instructions as the source says them. Moves between registers are free (`splat`,
`bits`), so are prefetches, and so is arithmetic on indices. Interpreted runs are some 10,000 times
slower: count a small shape, the formulas say the rest.
Knows lanes. Knows no kernel. Source: the tracing arrays of GPU-Puzzles.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from types import CellType, FunctionType, ModuleType
from typing import Any

import numpy as np

from nblib.show import Table
from pace_nb.kernels.llvm_body import W

Array = np.ndarray[Any, Any]


@dataclass
class Counts:
    """Instructions, and bytes. A vector instruction counts once, as a scalar one does."""

    loads: int = 0
    stores: int = 0
    fmas: int = 0  # 16 lanes: 32 FLOPs
    dots: int = 0  # 16 BF16 pairs: 64 FLOPs
    adds_muls: int = 0  # 16 lanes, + - * /: 16 FLOPs
    others: int = 0  # 16 lanes: max, select, round, reduce, ..
    scalar_flops: int = 0  # + - * / of single elements that were read from an array
    bytes_loaded: int = 0
    bytes_stored: int = 0
    _touched: dict[int, tuple[Array, Array]] = field(default_factory=dict, repr=False)

    @property
    def flops(self) -> int:
        """Floating-point operations: a multiply-add is two."""
        return 2 * W * self.fmas + 4 * W * self.dots + W * self.adds_muls + self.scalar_flops

    @property
    def bytes_touched(self) -> int:
        """Bytes that were read or written at least once: what caches of any size cannot avoid."""
        return sum(int(mask.sum()) for _, mask in self._touched.values())

    def __repr__(self) -> str:
        named = [f"{f.name}={getattr(self, f.name):,}" for f in fields(self) if f.repr]
        return f"Counts({', '.join(named)}, bytes_touched={self.bytes_touched:,})"

    def _touch(self, x: Array, first: int, num_bytes: int) -> None:
        """Bytes `first` .. of the memory that x is a view of, counted from x's beginning."""
        root = x
        while isinstance(root.base, np.ndarray):
            root = root.base
        start = root.__array_interface__["data"][0]
        mask = self._touched.setdefault(id(root), (root, np.zeros(root.nbytes, bool)))[1]
        at = x.__array_interface__["data"][0] - start + first
        mask[at : at + num_bytes] = True

    def _load(self, x: Array, i: int, n: int, instructions: int = 1) -> None:
        self.loads += instructions
        self.bytes_loaded += n * x.itemsize
        self._touch(x, int(i) * x.itemsize, int(n) * x.itemsize)

    def _store(self, x: Array, i: int, n: int, instructions: int = 1) -> None:
        self.stores += instructions
        self.bytes_stored += n * x.itemsize
        self._touch(x, int(i) * x.itemsize, int(n) * x.itemsize)


# ---- vectors and single elements that count their arithmetic -------------------------------------
_UFUNCS = {np.add, np.subtract, np.multiply, np.divide}


class _Lanes(np.ndarray):
    """A vector in a register: an operator on it is an instruction."""

    counts: Counts | None = None

    def __array_finalize__(self, obj: Any) -> None:
        self.counts = getattr(obj, "counts", None)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        plain = [np.asarray(v) if isinstance(v, np.ndarray) else v for v in inputs]
        result = getattr(ufunc, method)(*plain, **kwargs)
        if self.counts is None:
            return result
        if ufunc in _UFUNCS:
            self.counts.adds_muls += 1
        else:
            self.counts.others += 1
        return _as_lanes(result, self.counts)


def _as_lanes(value: Any, counts: Counts) -> Any:
    if not (isinstance(value, np.ndarray) and value.shape == (W,)):
        return value
    vector = value.view(_Lanes)
    vector.counts = counts
    return vector


def _counted_scalar(base: type[Any]) -> type[Any]:
    """A float32 or float64 whose + - * / are counted, as are those of its results."""

    def operation(name: str) -> Callable[[Any, Any], Any]:
        plain = getattr(base, name)

        def counted(self: Any, other: Any) -> Any:
            value = plain(self, other)
            if value is NotImplemented:
                return value
            self.counts.scalar_flops += 1
            return _as_scalar(value, self.counts)

        return counted

    names = [f"__{r}{n}__" for n in ("add", "sub", "mul", "truediv") for r in ("", "r")]
    return type(f"counted_{base.__name__}", (base,), {n: operation(n) for n in names})


_SCALARS = {base: _counted_scalar(base) for base in (np.float32, np.float64)}


def _as_scalar(value: Any, counts: Counts) -> Any:
    kind = _SCALARS.get(type(value))
    if kind is None:
        return value
    scalar = kind(value)
    scalar.counts = counts
    return scalar


class _Memory(np.ndarray):
    """An argument: elements read and written one by one are counted."""

    counts: Counts | None = None

    def __array_finalize__(self, obj: Any) -> None:
        self.counts = getattr(obj, "counts", None)

    def _place(self, index: Any) -> int:
        index = index if isinstance(index, tuple) else (index,)
        steps = zip(index, self.shape, self.strides, strict=True)
        return sum((operator.index(i) % n) * stride for i, n, stride in steps)

    def __getitem__(self, index: Any) -> Any:
        value = super().__getitem__(index)
        if self.counts is None or not isinstance(value, np.generic):
            return value
        self.counts.loads += 1
        self.counts.bytes_loaded += self.itemsize
        self.counts._touch(self, self._place(index), self.itemsize)
        return _as_scalar(value, self.counts)

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(index, value)
        single = index if isinstance(index, tuple) else (index,)
        if self.counts is None or len(single) != self.ndim:
            return
        if all(isinstance(i, (int, np.integer)) for i in single):
            self.counts.stores += 1
            self.counts.bytes_stored += self.itemsize
            self.counts._touch(self, self._place(index), self.itemsize)


# ---- what each operation counts as ---------------------------------------------------------------
def _words(x: Array) -> int:
    return 4 // x.itemsize


def _tile_load(c: Counts, mr: int, nv: int, x: Array, x0: int, ld: int, n: int = -1) -> None:
    for i in range(mr):
        c._load(x, x0 + i * ld, nv * W if n < 0 else n, nv)


def _tile_store(c: Counts, acc: Array, x: Array, x0: int, ld: int, n: int = -1) -> None:
    for i in range(acc.shape[0]):
        c._store(x, x0 + i * ld, acc.shape[1] if n < 0 else n, acc.shape[1] // W)


def _products(c: Counts, acc: Array, pairs: bool) -> None:
    if pairs:
        c.dots += acc.size // W
    else:
        c.fmas += acc.size // W


def _tile_dot_apart(
    c: Counts,
    acc: Array,
    a: Array,
    a0: int,
    lda: int,
    b: Array,
    b0: Any,
    offset: int,
    step: int = 1,
) -> None:
    s = _words(b)
    for i in range(acc.shape[0]):
        row = a0 + i * lda
        if step == 1:  # a pair is one load
            c._load(a, row, s)
        else:
            for at in range(row, row + s * step, step):
                c._load(a, at, 1)
    for start in b0[: acc.shape[1] // W]:
        c._load(b, start + offset, s * W)
    _products(c, acc, s == 2)


def _tile_dot(
    c: Counts, acc: Array, a: Array, a0: int, lda: int, b: Array, b0: int, ldb: int, step: int = 1
) -> None:
    starts = [b0 + j * ldb for j in range(acc.shape[1] // W)]
    _tile_dot_apart(c, acc, a, a0, lda, b, starts, 0, step)


def _tile_dot_pairs(c: Counts, acc: Array, a: Array, a0: int, lda: int, *b: Array) -> None:
    for i in range(acc.shape[0]):
        c._load(a, a0 + i * lda, 2)
    _products(c, acc, True)


def _tile_scale_rows(c: Counts, acc: Array, s: Array, s0: int) -> None:
    c._load(s, s0, acc.shape[0], acc.shape[0])
    c.adds_muls += acc.size // W


def _one(name: str) -> Callable[..., None]:
    def add(c: Counts, *args: Any) -> None:
        setattr(c, name, getattr(c, name) + 1)

    return add


def _copy_word(c: Counts, to: Array, i: int, x: Array, j: int) -> None:
    c._load(x, j, _words(to))
    c._store(to, i, _words(to))


_RULES: dict[str, Callable[..., None]] = {
    "load": lambda c, x, i: c._load(x, i, W),
    "load_tail": lambda c, x, i, n: c._load(x, i, n),
    "load_pairs": lambda c, x, i: c._load(x, i, 2 * W),
    "splat_pair": lambda c, x, i: c._load(x, i, 2),
    "first_of_words": lambda c, x, i: c._load(x, i, W * _words(x)),
    "second_of_words": lambda c, x, i: c._load(x, i, W * _words(x)),
    "mxfp4_exponents": lambda c, x, i: c._load(x, i, W),
    # a line is loaded once for its four quarters
    "mxfp4_pairs": lambda c, x, i, quarter, e: None if quarter else c._load(x, i, 4 * W),
    "store": lambda c, x, i, v: c._store(x, i, W),
    "store_operand": lambda c, x, i, v: c._store(x, i, W),
    "store_tail": lambda c, x, i, v, n: c._store(x, i, n),
    "store_words": lambda c, x, i, a, b: c._store(x, i, W * _words(x)),
    "store_weights": lambda c, x, i, v: c._store(x, i, W),
    "copy_word": _copy_word,
    "fma": _one("fmas"),
    "dot_pairs": _one("dots"),
    "tile_load": _tile_load,
    "tile_load_tail": _tile_load,
    "tile_store": _tile_store,
    "tile_store_tail": _tile_store,
    "tile_dot": _tile_dot,
    "tile_dot_apart": _tile_dot_apart,
    "tile_dot_pairs": _tile_dot_pairs,
    "tile_scale_rows": _tile_scale_rows,
}
_FREE = {
    "splat", "iota", "bits", "from_bits", "per_word", "tile_zeros", "prefetch", "prefetch_once",
    "no_weights",
}  # fmt: skip
_LANES = ("lanes", "words", "tiles", "mxfp4_lanes", "integer_lanes")
_VOCABULARY = {f"pace_nb.kernels.{name}" for name in _LANES}
_AS_IT_IS = {"pace_nb.kernels.jit", "pace_nb.kernels.arrays"}


class _Interpreter:
    """Rebuilds functions so that they run as Python and count."""

    def __init__(self, counts: Counts, home: str) -> None:
        self.counts, self.home = counts, home
        self._globals: dict[int, dict[str, Any]] = {}
        self._functions: dict[int, Any] = {}
        self._keep: list[Any] = []  # what ids were taken of

    def convert(self, value: Any) -> Any:
        """The counting twin of a function, a module or a tuple of them; others as they are."""
        if hasattr(value, "py_func"):
            return self._rebuilt(value.py_func)
        if isinstance(value, ModuleType) and value.__name__.startswith("pace_nb.kernels."):
            return value if value.__name__ in _AS_IT_IS else _Module(self, value)
        if type(value) is tuple:
            return tuple(self.convert(v) for v in value)
        if not isinstance(value, FunctionType):
            return value
        module = value.__module__ or ""
        if module in _VOCABULARY and not value.__name__.startswith("_"):
            return self._operation(value)
        ours = module.startswith("pace_nb.kernels.") and module not in _AS_IT_IS | _VOCABULARY
        return self._rebuilt(value) if ours or module == self.home else value

    def _operation(self, function: Any) -> Any:
        name, counts = function.__name__, self.counts
        rule = _RULES.get(name) or (None if name in _FREE else _one("others"))

        def counted(*args: Any) -> Any:
            plain = [np.asarray(a) if isinstance(a, np.ndarray) else a for a in args]
            if rule is not None:
                rule(counts, *plain)
            return _as_lanes(function(*plain), counts)

        return counted

    def _rebuilt(self, function: Any) -> Any:
        if id(function) in self._functions:
            return self._functions[id(function)]
        self._keep.append(function)
        cells = tuple(CellType() for _ in function.__closure__ or ())
        twin = FunctionType(
            function.__code__, self._namespace(function), function.__name__,
            function.__defaults__, cells,
        )  # fmt: skip
        twin.__kwdefaults__ = function.__kwdefaults__
        self._functions[id(function)] = twin
        for cell, original in zip(cells, function.__closure__ or (), strict=True):
            cell.cell_contents = self.convert(original.cell_contents)
        return twin

    def _namespace(self, function: Any) -> dict[str, Any]:
        original = function.__globals__
        if id(original) not in self._globals:
            names = self._globals[id(original)] = dict(original)
            for name, value in original.items():
                names[name] = self.convert(value)
        return self._globals[id(original)]

    def argument(self, value: Any) -> Any:
        if type(value) is not np.ndarray:
            return value
        memory = value.view(_Memory)
        memory.counts = self.counts
        return memory


class _Module:
    """A module of kernels whose functions count: `lanes.load` where a kernel says so."""

    def __init__(self, interpreter: _Interpreter, module: ModuleType) -> None:
        self._interpreter, self._module = interpreter, module

    def __getattr__(self, name: str) -> Any:
        return self._interpreter.convert(getattr(self._module, name))


def count(function: Any, *args: Any, **kwargs: Any) -> Counts:
    """Run `function` (a kernel, a device function, or a function that calls some) interpreted.

    Arrays are written as a compiled run writes them. Use small shapes.
    """
    counts = Counts()
    plain = getattr(function, "py_func", function)
    interpreter = _Interpreter(counts, plain.__module__)
    with np.errstate(all="ignore"):  # NaN and infinity are data here too
        interpreter.convert(function)(
            *(interpreter.argument(a) for a in args),
            **{name: interpreter.argument(a) for name, a in kwargs.items()},
        )
    return counts


_COLUMNS = {
    "loads": "loads", "stores": "stores", "fmas": "FMAs", "dots": "dot products",
    "adds_muls": "+ - * /", "others": "other", "scalar_flops": "scalar FLOPs",
    "bytes_loaded": "bytes loaded", "bytes_stored": "bytes stored",
    "bytes_touched": "bytes touched", "flops": "FLOPs",
}  # fmt: skip


def show_counts(
    counted: Mapping[str, Counts], formulas: Mapping[str, Mapping[str, float]] | None = None
) -> Table:
    """A table of counts; where `formulas[name][field]` is given it is held against the count.

    "1,536 =" is a count that the formula gives too; ValueError, with both, where it does not.
    """
    columns = [c for c in _COLUMNS if any(getattr(n, c) for n in counted.values())]
    rows = []
    for name, counts in counted.items():
        row = [name]
        said = dict((formulas or {}).get(name, {}))
        for column in columns:
            value = getattr(counts, column)
            formula = said.pop(column, None)
            if formula is not None and formula != value:
                raise ValueError(
                    f"{name}: {column} counted {value:,}, the formula says {formula:,}"
                )
            row.append(f"{value:,}" + (" =" if formula is not None else ""))
        if said:
            raise ValueError(f"{name}: no column {sorted(said)}, expected some of {columns}")
        rows.append(row)
    caption = "= marks what the formula gives too" if formulas else ""
    return Table(["", *(_COLUMNS[c] for c in columns)], rows, caption)


if W != 16:
    raise ImportError("nblib.counting: its FLOPs are for vectors of 16 lanes")
