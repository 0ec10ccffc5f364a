"""How kernels are compiled, cached, threaded and switched off. The only place with njit flags.

Knows: numba's flags, the CPU's features, the threading layer, the thread count that affinity and
cgroup allow, the on-disk cache of machine code, and whether an operation runs compiled or as its
`*_ref` (`using`). Does not know: any kernel.

Import this module before numba: numba reads its thread count once, when it is first imported.

Decisions, each with its reason:
- No fastmath. Lanes say `fma` where they want one, so every result is the one the source spells
  out, the same in every kernel that shares a device function; `nnan`/`ninf` would also fold `isnan`
  away (docs/adr/0011).
- `error_model="numpy"`: a division never raises, so no kernel has an exception path.
- `nogil`: the kernel thread must not stop Python threads.
- `_nrt=False`: arrays belong to the caller, and kernels make none. With Numba's reference counts,
  atomic and shared by the threads, a device function that branches counts every array it is given,
  each time it runs: a quarter of the time to rotate heads, 3 % of a decode step of a 1B model.
- Cache: numba's own index has cross-process races (numba#4807: two signatures may share a data
  file), its files are unauthenticated pickles and its freshness test sees only the defining file.
  So: one file per signature, a SHA-256 at its end, in a private 0700 directory whose name hashes
  all kernel sources, versions and CPU features.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import math
import os
import shutil
import stat
import sys
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal, cast

from tqdm import tqdm


# ---- threads: what affinity and cgroup allow -----------------------------------------------------
def _cgroup_cpu_quota() -> float:
    """CPUs that the cgroup's quota is worth (v2 `cpu.max`, v1 `cpu.cfs_*`), or infinity."""
    for path, split in (
        ("/sys/fs/cgroup/cpu.max", True),
        ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", False),
    ):
        try:
            text = Path(path).read_text()
            if split:
                quota, period = text.split()[:2]
            else:
                quota, period = (
                    text.strip(),
                    Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us").read_text(),
                )
            if quota not in ("max", "-1"):
                return float(quota) / float(period)
        except (OSError, ValueError):
            continue
    return math.inf


def allowed_threads() -> int:
    """Threads worth starting: the affinity mask, cut by the cgroup quota, at least 1."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cpus, math.ceil(min(_cgroup_cpu_quota(), cpus))))


def _libgomp_present() -> bool:
    """The numba wheel links libgomp but does not bundle it (numba's `omppool` needs it)."""
    try:
        ctypes.CDLL("libgomp.so.1")
        return True
    except OSError:
        return False


if "numba" not in sys.modules:
    # libgomp reads this when it is loaded. A thread that is done waits for the others by spinning,
    # some 10 us with this count, and then sleeps. Its default, milliseconds, keeps a core from the
    # very thread it waits for wherever something else runs: a decode step of a 1B model beside one
    # busy process took 158 ms, with 1000 it takes 73, and alone 56 where it took 55 (docs/LOG.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault(
        "NUMBA_NUM_THREADS", os.environ.get("PACE_NB_NUM_THREADS") or str(allowed_threads())
    )
    # `workqueue`, numba's own pool, works everywhere but is not safe to enter from two threads.
    os.environ.setdefault("NUMBA_THREADING_LAYER", "omp" if _libgomp_present() else "workqueue")

import llvmlite  # noqa: E402
import numba  # noqa: E402
import numpy as np  # noqa: E402
from numba.core.caching import FunctionCache, IndexDataCacheFile, NullCache  # noqa: E402

numba_config: Any = numba.config  # numba's settings are set at run time, unknown to mypy
INTERPRETED: bool = bool(
    numba_config.DISABLE_JIT
)  # NUMBA_DISABLE_JIT=1: kernels run as plain Python


@functools.cache
def _pool() -> tuple[Callable[[], int], Callable[[int], None]]:
    """What reads and what sets Numba's number of threads, without the locks and checks that its
    public functions make at each call: 2.6 us of every small kernel."""
    numba.get_num_threads()  # starts the threads, after which the two are there
    from numba.np.ufunc import parallel

    return (
        getattr(parallel, "_get_num_threads", numba.get_num_threads),
        getattr(parallel, "_set_num_threads", numba.set_num_threads),
    )


def num_threads() -> int:
    """Threads that the next parallel region uses."""
    return 1 if INTERPRETED else int(_pool()[0]())


def set_num_threads(n: int) -> None:
    """Use `n` threads from now on; at most what numba was started with (see `allowed_threads`)."""
    most = int(numba_config.NUMBA_NUM_THREADS)
    if not 1 <= n <= most:
        raise ValueError(
            f"num_threads={n}: expected 1 to {most} (affinity, cgroup or NUMBA_NUM_THREADS)"
        )
    if not INTERPRETED:
        numba.set_num_threads(n)


# Bytes below which other threads are not worth waking: a thread moves 1 MiB within its caches in
# about 10 us; a parallel region costs 2 to 5 us, and milliseconds where the cores are busy.
SMALL = 1 << 20


class threads_for:
    """`with threads_for(work):` kernels called inside use one thread if `work` bytes are few.

    Results do not depend on the number of threads, so this changes nothing but time.
    """

    __slots__ = ("_before",)

    def __init__(self, work: int) -> None:
        self._before = num_threads() if work < SMALL else 1  # 1: nothing to change, or to restore

    def __enter__(self) -> None:
        if self._before > 1:
            _pool()[1](1)

    def __exit__(self, *exception: object) -> None:
        if self._before > 1:
            _pool()[1](self._before)


def threading_layer() -> str:
    """`omp`, `tbb` or `workqueue`: what runs `prange` (chosen when this module is imported)."""
    return "none (interpreted)" if INTERPRETED else str(numba_config.THREADING_LAYER)


# ---- the CPU -------------------------------------------------------------------------------------
def cpu_features() -> frozenset[str]:
    """LLVM's names of the features compiled for; empty for `NUMBA_CPU_NAME=generic`."""
    if INTERPRETED:
        return frozenset()
    from numba.core.registry import cpu_target

    listed = str(cpu_target.target_context.codegen()._tm_features)
    return frozenset(f[1:] for f in listed.split(",") if f.startswith("+"))


def isa_path() -> str:
    """Which bodies the lanes get, and why, in one line (for `pace-nb doctor`)."""
    if INTERPRETED:
        return "interpreted NumPy bodies (NUMBA_DISABLE_JIT=1)"
    features = cpu_features()
    if {"avx512f", "avx512bf16"} <= features:
        return "512-bit vectors, BF16 dot products with vdpbf16ps (avx512bf16 present)"
    width = "512-bit" if "avx512f" in features else "256-bit" if "avx" in features else "128-bit"
    fused = "fused multiply-add" if "fma" in features else "multiply, then add (no fma)"
    return f"{width} vectors, BF16 by shift + f32 {fused} (no avx512bf16)"


# Are there 32 registers of 512 bits? Elsewhere there are 16, narrower ones, and tiles are smaller.
# Interpreted kernels have the tiles of the larger machine.
WIDE: bool = INTERPRETED or "avx512f" in cpu_features()


# ---- compiled or reference -----------------------------------------------------------------------
Mode = Literal["numba", "reference"]
_mode: ContextVar[Mode] = ContextVar("pace_nb_kernels", default="numba")


class using:
    """`with using(mode):` kernels run compiled ("numba") or as their `*_ref` ("reference")."""

    __slots__ = ("_before", "_mode")

    def __init__(self, mode: Mode) -> None:
        if mode not in ("numba", "reference"):
            raise ValueError(f'kernels={mode!r}: expected "numba" or "reference"')
        self._mode = mode

    def __enter__(self) -> None:
        self._before = _mode.set(self._mode)

    def __exit__(self, *exception: object) -> None:
        _mode.reset(self._before)


def use_reference() -> bool:
    """True where the caller asked for `*_ref` (every public wrapper asks this once)."""
    return _mode.get() == "reference"


# ---- the cache of machine code -------------------------------------------------------------------
def _cache_key() -> str:
    """Hash of everything that machine code depends on.

    `kernels/` imports nothing else of the package (tested), so its sources are all that count.
    """
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    for fact in (
        numba.__version__,
        llvmlite.__version__,
        np.__version__,
        sys.version,
        numba_config.CPU_NAME,
        numba_config.OPT,
        numba_config.BOUNDSCHECK,
        sorted(cpu_features()),
    ):
        digest.update(repr(fact).encode() + b"\0")
    return digest.hexdigest()[:32]


def _private_directory(path: Path) -> Path:
    """Create `path` as 0700, or refuse it: a cached kernel is code, nobody else may write there."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    facts = path.lstat()
    if not stat.S_ISDIR(facts.st_mode):
        raise OSError(f"{path} is not a directory")
    if facts.st_uid != os.geteuid():
        raise OSError(f"{path} belongs to user {facts.st_uid}, not to {os.geteuid()}")
    if facts.st_mode & 0o022:
        raise OSError(f"{path} is writable by others")
    probe = path / f".probe-{os.getpid()}"
    probe.touch()
    probe.unlink()
    return path


KEPT_KEYS = 4  # older cache directories kept: a few checkouts or environments side by side


def _open_cache() -> tuple[Path | None, str]:
    """(directory or None, what to tell the user)."""
    if INTERPRETED:
        return None, "off (interpreted)"
    try:
        root = os.environ.get("PACE_NB_CACHE_DIR")
        base = (
            Path(root)
            if root
            else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pace_nb"
        )
        base = _private_directory(base.absolute())
        path = _private_directory(base / f"jit-{_cache_key()}")
        os.utime(path)
        older = sorted(base.glob("jit-*"), key=lambda p: p.stat().st_mtime, reverse=True)[
            1 + KEPT_KEYS :
        ]
        for stale in older:
            shutil.rmtree(stale, ignore_errors=True)
        return path, f"on disk in {path}"
    except (OSError, RuntimeError) as problem:  # RuntimeError: no home directory
        warnings.warn(
            f"compiled kernels are kept in memory only: {problem}", RuntimeWarning, stacklevel=2
        )
        return None, f"in memory only: {problem}"


_cache_dir, _cache_note = _open_cache()


def cache_dir() -> Path | None:
    """Directory of compiled kernels, or None when they are kept in memory only."""
    return _cache_dir


def is_cached(kernel: str) -> bool:
    """Is machine code of `kernel` ("module._name") kept on disk, or not kept on disk at all?"""
    return _cache_dir is None or any(_cache_dir.glob(f"*/{kernel}-*.nbc"))


def cache_state() -> str:
    """One line for `pace-nb doctor`: where compiled kernels are kept, and how many."""
    files = len(list(_cache_dir.rglob("*.nbc"))) if _cache_dir else 0
    return f"{_cache_note}" + (f", {files} compiled" if _cache_dir else "")


# Bytes of SHA-256 at the end of a cache file; unpickling ignores what follows the pickle's STOP.
DIGEST = 32


class _OneFilePerSignature(IndexDataCacheFile):
    """Numba's data files without its index: named by a hash of the key, never mixed up."""

    def _file_name(self, key: object) -> str:
        stem = Path(self._data_name_pattern).name.split("-")[0]
        return f"{stem}-{hashlib.sha256(repr(key).encode()).hexdigest()[:40]}.nbc"

    def save(self, key: object, data: object) -> None:
        self._save_data(self._file_name(key), data)

    def load(self, key: object) -> Any:
        name = self._file_name(key)
        path = Path(self._data_path(name))
        if not path.exists():
            return None
        content = path.read_bytes()
        if hashlib.sha256(content[:-DIGEST]).digest() != content[-DIGEST:]:
            raise OSError(f"{path} is damaged")
        return self._load_data(name)

    def _dump(self, obj: object) -> bytes:
        payload: bytes = super()._dump(obj)
        return payload + hashlib.sha256(payload).digest()


class _KernelCache(FunctionCache):
    """A cache whose errors never reach the caller: a bad file wipes it, a full disk only warns."""

    def __init__(self, py_func: Callable[..., Any]) -> None:
        super().__init__(py_func)
        self._kernel = py_func.__name__
        self._cache_file = _OneFilePerSignature(
            cache_path=self._cache_path, filename_base=self._impl.filename_base, source_stamp=None
        )

    def load_overload(self, sig: object, target_context: Any) -> Any:
        try:
            found = super().load_overload(sig, target_context)
        except Exception as problem:  # whatever a damaged pickle raises
            warnings.warn(f"compiled-kernel cache wiped: {problem}", RuntimeWarning, stacklevel=2)
            shutil.rmtree(self._cache_path, ignore_errors=True)
            found = None
        if found is None:
            _announce_compile(self._kernel)
        return found

    def save_overload(self, sig: object, data: Any) -> None:
        global _save_warned
        try:
            super().save_overload(sig, data)
        except OSError as problem:
            if not _save_warned:
                warnings.warn(f"compiled kernel not saved: {problem}", RuntimeWarning, stacklevel=2)
            _save_warned = True


_save_warned = False


class _MemoryOnly(NullCache):
    """No cache; says what is compiled, as `_KernelCache` does."""

    def __init__(self, py_func: Callable[..., Any]) -> None:
        self._kernel = py_func.__name__

    def load_overload(self, sig: object, target_context: Any) -> None:
        _announce_compile(self._kernel)


def _hashed(func: Callable[..., Any]) -> bool:
    """Is the function's source part of the cache key?

    Numba looks at its bytecode only: a constant or a callee that was edited in another folder (a
    notebook, a test) would bring back old machine code.
    """
    return Path(func.__code__.co_filename).resolve().parent == Path(__file__).resolve().parent


# ---- the bar that names kernels while they compile -----------------------------------------------
_bar: tqdm[Any] | None = None
_bar_wanted = False
_num_compiled = 0


def num_compiled() -> int:
    """Kernels compiled by this process so far (not those loaded from the cache)."""
    return _num_compiled


@contextlib.contextmanager
def compile_progress(disable: bool | None = None) -> Iterator[None]:
    """Inside the block a bar on stderr names each kernel while it compiles.

    Nothing shows when all are cached. `disable=None` means: only on a terminal, as tqdm does.
    """
    global _bar, _bar_wanted
    _bar_wanted = disable is False or (disable is None and sys.stderr.isatty())
    try:
        yield
    finally:
        if _bar is not None:
            _bar.close()
        _bar, _bar_wanted = None, False


def _announce_compile(name: str) -> None:
    global _bar, _num_compiled
    _num_compiled += 1
    if _bar_wanted:
        if _bar is None:
            _bar = tqdm(desc="compiling kernels", unit=" kernels", file=sys.stderr)
        _bar.set_postfix_str(name.strip("_").removesuffix("_kernel"))
        _bar.update(1)


# ---- decorators ----------------------------------------------------------------------------------
# Reasons: the module docstring.
_FLAGS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "_nrt": False}


_kernels: list[tuple[dict[str, Any], str]] = []


def kernels() -> list[tuple[dict[str, Any], str]]:
    """(namespace, name) of every kernel that has been imported: where its callers look it up."""
    return _kernels


def kernel(func: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled entry point with one `prange` loop, called by a wrapper that checks all.

    It makes no arrays, nor reduces over `prange`, for which Numba would: all it needs is given.
    Kernels of this folder are cached on disk; those written elsewhere are compiled in each process.
    """
    if _hashed(func):
        _kernels.append((func.__globals__, func.__name__))
    if INTERPRETED:
        return np.errstate(all="ignore")(func)  # NaN and infinity are data here too
    compiled: Any = numba.njit(**_FLAGS, parallel=True)(func)
    if _cache_dir is not None and _hashed(func):
        with _numba_cache_in(_cache_dir):
            compiled._cache = _KernelCache(func)
    else:
        compiled._cache = _MemoryOnly(func)
    return cast(Callable[..., Any], compiled)


def device_fn(func: Callable[..., Any]) -> Callable[..., Any]:
    """A function of kernels, always inlined: register tiles must not cross a call."""
    inlined: Any = numba.njit(**_FLAGS, forceinline=True)(func)
    return cast(Callable[..., Any], inlined)


@contextlib.contextmanager
def _numba_cache_in(path: Path) -> Iterator[None]:
    """Numba reads its cache directory's name while a cache is made: set it just for that."""
    before = numba_config.CACHE_DIR
    numba_config.CACHE_DIR = str(path)
    try:
        yield
    finally:
        numba_config.CACHE_DIR = before


def assembly(kernel: Any) -> str:
    """Machine code of `kernel` for every signature it has run with, compiled afresh (cached kernels
    do not keep their text). For tests and notebooks; takes as long as compiling does."""
    fresh: Any = numba.njit(**_FLAGS, parallel=True)(kernel.py_func)
    for signature in kernel.signatures:
        fresh.compile(signature)
    return "\n".join(fresh.inspect_asm().values())
