"""jit.py: the cache of machine code, threads, modes; mostly in processes with their own cache."""

from __future__ import annotations

import hashlib
import math
import os
import pickle  # noqa: TID251  (to plant a file as an attacker would)
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba import prange

from pace_nb.kernels import jit
from pace_nb.kernels.lanes import load, store

compiled_only = pytest.mark.skipif(jit.INTERPRETED, reason="about compiling")
SOURCES = Path(jit.__file__).parent

# A kernels folder with one kernel, whose constant and whose callee live in another file.
CALLEE = """
from pace_nb.kernels import jit
from pace_nb.kernels.lanes import splat
FACTOR = 2.0

@jit.device_fn
def scaled(v):
    return v * splat(FACTOR)
"""
TINY = """
from numba import prange
from pace_nb.kernels import jit
from pace_nb.kernels.callee import scaled
from pace_nb.kernels.lanes import load, store

@jit.kernel
def _tiny_kernel(y, x, n):
    for i in prange(n):
        store(y, 16 * i, scaled(load(x, 16 * i)))
"""
RUN = """
import numpy as np
from pace_nb.kernels import jit
from pace_nb.kernels.tiny import _tiny_kernel
x, y = np.arange(64, dtype=np.float32), np.empty(64, np.float32)
with jit.compile_progress(disable=False):
    _tiny_kernel(y, x, 4)
print(y[3] / x[3], jit.num_compiled(), jit.cache_dir())
"""


def environment(**changes: str) -> dict[str, str]:
    ours = ("PACE_NB_", "NUMBA_NUM_THREADS", "NUMBA_THREADING_LAYER", "GOMP_SPINCOUNT")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    return kept | changes


def start(tree: Path, cache: Path | None, code: str = RUN, **changes: str) -> Any:
    where = {} if cache is None else {"PACE_NB_CACHE_DIR": str(cache)}
    return subprocess.Popen(
        [sys.executable, "-W", "always", "-c", code],
        cwd=tree,  # comes first in sys.path
        env=environment(**where, **changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: Any) -> tuple[list[str], str]:
    """(words printed, stderr) of a process that must succeed."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.split(), err


def run(tree: Path, cache: Path | None, code: str = RUN, **changes: str) -> tuple[list[str], str]:
    return finish(start(tree, cache, code, **changes))


def copy_tree(to: Path) -> Path:
    """A package of jit.py, what it needs and the kernel above."""
    kernels = to / "pace_nb" / "kernels"
    kernels.mkdir(parents=True)
    for name in ("jit", "lanes", "llvm_body", "bf16"):
        shutil.copy(SOURCES / f"{name}.py", kernels)
    (to / "pace_nb" / "__init__.py").touch()
    (kernels / "__init__.py").touch()
    (kernels / "callee.py").write_text(CALLEE)
    (kernels / "tiny.py").write_text(TINY)
    return to


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def warm(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(a cache with one compiled kernel, what its process wrote to stderr)."""
    cache = tmp_path_factory.mktemp("cache") / "pace_nb"
    (factor, compiled, directory), err = run(tree, cache)
    assert (factor, compiled) == ("2.0", "1")
    assert Path(directory).parent == cache
    return cache, err


def cached_files(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.nbc"))


# ---- the cache -----------------------------------------------------------------------------------
@compiled_only
def test_the_cache_is_private_and_used(tree: Path, warm: tuple[Path, str]) -> None:
    cache, err = warm
    for directory in (cache, *cache.glob("jit-*")):
        assert directory.stat().st_mode & 0o777 == 0o700
    assert len(cached_files(cache)) == 1
    assert not list(cache.rglob("*.nbi"))  # numba's index, with its races, is not used
    assert "tiny" in err and "compiling kernels" in err
    (factor, compiled, _), err = run(tree, cache)
    assert (factor, compiled) == ("2.0", "0")
    assert err == ""  # no bar when nothing is compiled


PLANTED = "planted.txt"


class _Planted:
    """What unpickles into a shell command."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {PLANTED}",)


DAMAGE = {
    "truncated": lambda content: content[: len(content) // 2],
    "one bit": lambda content: content[:500] + bytes([content[500] ^ 1]) + content[501:],
    "planted": lambda content: pickle.dumps(_Planted()),
    "not a pickle": lambda content: b"x" * 99 + hashlib.sha256(b"x" * 99).digest(),
}


@compiled_only
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_compiled_again(
    damage: str, tree: Path, warm: tuple[Path, str], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(warm[0], cache)
    (file,) = cached_files(cache)
    good = file.read_bytes()
    file.write_bytes(DAMAGE[damage](good))
    (factor, compiled, _), err = run(tree, cache)
    assert (factor, compiled) == ("2.0", "1")
    assert err.count("RuntimeWarning: compiled-kernel cache wiped") == 1
    assert not (tree / PLANTED).exists()  # the working directory of the process
    (file,) = cached_files(cache)
    content = file.read_bytes()
    assert hashlib.sha256(content[:-32]).digest() == content[-32:]


@compiled_only
def test_an_edit_in_another_file_is_compiled(
    tree: Path, warm: tuple[Path, str], tmp_path: Path
) -> None:
    """Numba's own test of freshness sees neither constants nor callees in other files."""
    edited = copy_tree(tmp_path / "tree")
    (edited / "pace_nb" / "kernels" / "callee.py").write_text(CALLEE.replace("2.0", "3.0"))
    cache = tmp_path / "cache"
    shutil.copytree(warm[0], cache)
    (factor, compiled, directory), _ = run(edited, cache)
    assert (factor, compiled) == ("3.0", "1")
    assert len(list(cache.glob("jit-*"))) == 2 and Path(directory).parent == cache


@compiled_only
def test_kernels_of_other_folders_are_not_cached(tree: Path, tmp_path: Path) -> None:
    """A constant in a notebook's or a test's kernel is not in the key: never a stale result."""
    code = """
import numpy as np
from numba import prange
from pace_nb.kernels import jit
from mine import _mine_kernel
y = np.empty(16, np.float32)
_mine_kernel(y, 1)
print(y[0], jit.num_compiled())
"""
    source = """
from numba import prange
from pace_nb.kernels import jit
from pace_nb.kernels.lanes import splat, store

@jit.kernel
def _mine_kernel(y, n):
    for i in prange(n):
        store(y, 16 * i, splat({}))
"""
    for value in ("1.5", "2.5"):
        (tree / "mine.py").write_text(source.format(value))
        out, _ = run(tree, tmp_path / "cache", code, PYTHONDONTWRITEBYTECODE="1")
        assert out == [value, "1"]


@compiled_only
def test_four_processes_on_an_empty_cache(tree: Path, tmp_path: Path) -> None:
    processes = [start(tree, tmp_path / "cache") for _ in range(4)]
    for process in processes:
        (factor, *_), err = finish(process)
        assert factor == "2.0"
        assert "Warning" not in err
    assert len(cached_files(tmp_path / "cache")) == 1
    assert not list((tmp_path / "cache").rglob("*.tmp.*"))


TWICE = RUN.replace("with jit", "{}\nwith jit").replace(
    "print(", "_tiny_kernel(x.astype(np.uint16), x, 4)\nprint("
)


@compiled_only
def test_without_a_directory_kernels_stay_in_memory_with_one_warning(
    tree: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()  # root may write anywhere, but not below a file
    (factor, compiled, directory), err = run(tree, tmp_path / "file" / "cache", TWICE.format(""))
    assert (factor, compiled, directory) == ("2.0", "2", "None")
    assert err.count("Warning") == 1
    assert "RuntimeWarning: compiled kernels are kept in memory only" in err
    assert "tiny" in err  # the bar


@compiled_only
def test_a_disk_that_fills_warns_once(tree: Path, tmp_path: Path) -> None:
    fill = "import shutil; shutil.rmtree(jit.cache_dir()); jit.cache_dir().touch()"
    (factor, compiled, _), err = run(tree, tmp_path / "cache", TWICE.format(fill))
    assert (factor, compiled) == ("2.0", "2")
    assert err.count("Warning") == 1
    assert "RuntimeWarning: compiled kernel not saved" in err


def _symlink(base: Path) -> None:
    (base.parent / "elsewhere").mkdir(mode=0o700)
    base.symlink_to(base.parent / "elsewhere")


def _open_to_all(base: Path) -> None:
    base.mkdir()
    base.chmod(0o777)


REFUSED = {"not a directory": _symlink, "writable by others": _open_to_all}


@compiled_only
@pytest.mark.parametrize("reason", REFUSED)
@pytest.mark.parametrize("inner", [False, True])
def test_a_directory_that_others_could_write_is_refused(
    reason: str, inner: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base, and the directory of the key inside it."""
    base = tmp_path / "cache"
    monkeypatch.setenv("PACE_NB_CACHE_DIR", str(base))
    where = base
    if inner:
        where = jit._open_cache()[0] or base
        where.rmdir()
    REFUSED[reason](where)
    with pytest.warns(RuntimeWarning, match=f"kept in memory only: .*{where.name} is {reason}"):
        path, note = jit._open_cache()
    assert path is None and "in memory only" in note


@compiled_only
def test_a_directory_of_another_user_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PACE_NB_CACHE_DIR", str(tmp_path / "cache"))
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    with pytest.warns(RuntimeWarning, match=f"belongs to user {mine}, not to {mine + 1}"):
        assert jit._open_cache()[0] is None


@compiled_only
def test_no_home_directory_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PACE_NB_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.warns(RuntimeWarning, match="kept in memory only: Could not determine home"):
        assert jit._open_cache()[0] is None


@compiled_only
def test_old_keys_are_removed_and_recent_ones_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PACE_NB_CACHE_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    older = [tmp_path / f"jit-{n:032d}" for n in range(jit.KEPT_KEYS + 3)]
    for age, path in enumerate(older):
        path.mkdir()
        (path / "a.nbc").touch()
        os.utime(path, (time.time() - 1000 - age,) * 2)
    path, note = jit._open_cache()
    assert path is not None and str(path) in note
    assert set(tmp_path.iterdir()) == {path, *older[: jit.KEPT_KEYS]}


@compiled_only
def test_the_cache_says_what_it_holds() -> None:
    state, directory = jit.cache_state(), jit.cache_dir()
    if directory is None:
        assert "in memory only" in state
    else:
        assert str(directory) in state and state.endswith("compiled")


# ---- threads -------------------------------------------------------------------------------------
THREADS = "from pace_nb.kernels import jit; print(jit.allowed_threads(), jit.num_threads())"


@compiled_only
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_the_thread_count_follows_affinity(tree: Path, tmp_path: Path) -> None:
    one = sorted(os.sched_getaffinity(0))[-1]
    pin = f"import os; os.sched_setaffinity(0, {{{one}}})\n"
    assert run(tree, tmp_path / "cache", pin + THREADS)[0] == ["1", "1"]


@compiled_only
def test_the_thread_count_follows_the_variable(tree: Path, tmp_path: Path) -> None:
    out, _ = run(tree, tmp_path / "cache", THREADS, PACE_NB_NUM_THREADS="1")
    assert out == [str(jit.allowed_threads()), "1"]


@compiled_only
def test_threads_sleep_soon_unless_the_user_says_otherwise(tree: Path, tmp_path: Path) -> None:
    code = "import os; from pace_nb.kernels import jit; print(os.environ['GOMP_SPINCOUNT'])"
    assert run(tree, tmp_path / "cache", code)[0] == ["1000"]
    assert run(tree, tmp_path / "cache", code, GOMP_SPINCOUNT="5")[0] == ["5"]


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"/sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"/sys/fs/cgroup/cpu.max": "max 100000\n"}, math.inf),
        (
            {
                "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
                "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            0.5,
        ),
        ({"/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n"}, math.inf),
        ({"/sys/fs/cgroup/cpu.max": "nonsense"}, math.inf),
        ({}, math.inf),
    ],
)
def test_the_thread_count_follows_the_cgroup(
    files: dict[str, str], quota: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_text(path: Path) -> str:
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert jit._cgroup_cpu_quota() == quota
    assert jit.allowed_threads() == (8 if quota == math.inf else math.ceil(quota))


def test_num_threads_outside_the_range_is_refused() -> None:
    before = jit.num_threads()
    for n in (0, -1, 10_000):
        with pytest.raises(ValueError, match=f"num_threads={n}: expected 1 to "):
            jit.set_num_threads(n)
    jit.set_num_threads(1)
    assert jit.num_threads() == 1
    jit.set_num_threads(before)
    assert jit.num_threads() == before


@compiled_only
def test_the_workqueue_layer_works(tree: Path, tmp_path: Path) -> None:
    code = RUN + "print(jit.threading_layer())\n"
    out, _ = run(tree, tmp_path / "cache", code, NUMBA_THREADING_LAYER="workqueue")
    assert out[0] == "2.0" and out[-1] == "workqueue"


# ---- modes, flags, machine -----------------------------------------------------------------------
def test_using_nests_and_is_undone() -> None:
    assert not jit.use_reference()
    with jit.using("reference"):
        assert jit.use_reference()
        with jit.using("numba"):
            assert not jit.use_reference()
        assert jit.use_reference()
        with pytest.raises(KeyError), jit.using("numba"):
            raise KeyError
        assert jit.use_reference()
        seen: list[bool] = []
        thread = threading.Thread(target=lambda: seen.append(jit.use_reference()))
        thread.start()
        thread.join()
        assert seen == [False]  # another thread has its own mode
    assert not jit.use_reference()
    mode: Any = "fast"
    with pytest.raises(ValueError, match="kernels='fast': expected"), jit.using(mode):
        pass


@jit.kernel
def _divide_kernel(y, x, n):
    for i in prange(n):
        y[i] = x[i] / x[i + n]
        if np.isnan(y[i]):
            y[i] = 77.0


def test_division_by_zero_and_nan_are_data() -> None:
    """No exception path, and `isnan` is not folded away as fastmath would."""
    x = np.float32([1.0, -1.0, 0.0, np.nan, 0.0, 0.0, 0.0, 1.0])
    y = np.empty(4, np.float32)
    _divide_kernel(y, x, 4)
    np.testing.assert_array_equal(y, [np.inf, -np.inf, 77.0, 77.0])


@compiled_only
def test_assembly_is_that_of_the_kernel() -> None:
    @jit.kernel
    def _copy_kernel(y, x, n):
        for i in prange(n):
            v = load(x, 16 * i)
            store(y, 16 * i, v * v)

    x = np.ones(16, np.float32)
    _copy_kernel(np.empty_like(x), x, 1)
    text = jit.assembly(_copy_kernel)
    vectors = "%zmm" if "avx512f" in jit.cpu_features() else "%xmm|%ymm|v0"
    assert any(v in text for v in vectors.split("|"))


@compiled_only
def test_kernels_count_no_references() -> None:
    @jit.device_fn
    def _row(y, x, at, n):
        if n < 16:  # a branch: Numba leaves the counting around it in
            y[at] = x[at]
        else:
            store(y, at, load(x, at))

    @jit.kernel
    def _rows_kernel(y, x, n):
        for i in prange(n):
            _row(y, x, 16 * i, 16 * (i + 1))

    x, y = np.ones(32, np.float32), np.zeros(32, np.float32)
    _rows_kernel(y, x, 2)
    np.testing.assert_array_equal(y, x)
    assert "NRT_" not in jit.assembly(_rows_kernel)


def test_the_machine_is_described_in_one_line() -> None:
    line, features = jit.isa_path(), jit.cpu_features()
    assert "\n" not in line
    if jit.INTERPRETED:
        assert features == frozenset() and "interpreted" in line
        assert jit.cache_dir() is None and jit.cache_state() == "off (interpreted)"
        assert jit.threading_layer() == "none (interpreted)" and jit.num_threads() == 1
    else:
        assert ("512-bit" in line) == ("avx512f" in features)
        assert ("vdpbf16ps (" in line or "with vdpbf16ps" in line) == ("avx512bf16" in features)
        assert jit.threading_layer() in ("omp", "tbb", "workqueue", "default")


@pytest.mark.skipif(jit.num_threads() < 2, reason="one thread allowed")
def test_few_bytes_are_left_to_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "SMALL", 1000)
    threads = jit.num_threads()
    with jit.threads_for(1000):
        assert jit.num_threads() == threads
    with pytest.raises(KeyError), jit.threads_for(999):
        assert jit.num_threads() == 1
        with jit.threads_for(5):
            assert jit.num_threads() == 1
        assert jit.num_threads() == 1
        raise KeyError
    assert jit.num_threads() == threads
