"""`SafetensorsFile`: one safetensors file, checked whole before a byte of it is used, then mapped.

Knows the format and every way to lie in it. Does not know models, shards or which tensors are
wanted. Layout of the file:

    8 bytes        N, length of the header, little-endian
    N bytes        JSON {name: {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}}
                   and perhaps "__metadata__": {string: string}
    the rest       the data; offsets count from its first byte

Nothing is believed: sizes are compared in Python's unbounded integers, the tensors must cover the
data without overlap, hole or remainder, and each must be as long as its dtype and shape say. What
passes here also passes the reference reader (tests/models/test_safetensors_file.py compares them).
Source: github.com/huggingface/safetensors, README and safetensors/src/tensor.rs (0.8).

Caution: the data is read through the mapping. A file that another process truncates is noticed at
the next `view`, but if that happens while a view is being read, the kernel ends this process with
SIGBUS; nothing in user space can prevent it. A file that is replaced (renamed over) is harmless.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pace_nb.errors import ModelFormatError, UnsupportedModelError
from pace_nb.models.model_files import open_file, parse_json, shown

MAX_HEADER_BYTES = 100_000_000  # the reference reader's limit
MAX_DIMENSIONS = 32  # NumPy 1.x's limit
LENGTH_BYTES = 8

# Bits per element of every dtype of the format, so that any sound file can be opened ...
BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
# ... and the few that can be looked at. BF16 is its bits (docs/adr/0002).
ARRAY_DTYPES = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "U8": "u1"}


class TensorEntry(NamedTuple):
    """What the header says about a tensor."""

    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    stop: int


class SafetensorsFile:
    """`tensors`: name -> TensorEntry, in the order of the data. `path`, `nbytes` (of the data)."""

    def __init__(self, directory: Path, name: str) -> None:
        """Open, check and map `directory/name`. ModelFormatError naming file, tensor and reason."""
        self.path = directory / name
        descriptor = open_file(directory, name)
        try:
            status = os.fstat(descriptor)
            self.identity = (status.st_dev, status.st_ino)
            self._size = status.st_size
            header = _read_header(descriptor, self._size, str(self.path))
            self.tensors = parse_header(header, self._size, str(self.path))
            self._map = mmap.mmap(descriptor, self._size, access=mmap.ACCESS_READ)
        except (OSError, ValueError, OverflowError) as error:
            # ValueError: the file became shorter between fstat and mmap. (A PaceError is neither.)
            reason = getattr(error, "strerror", None) or str(error)
            raise ModelFormatError(f"{self.path}: cannot be mapped: {reason}") from error
        finally:
            os.close(descriptor)
        self.nbytes = self._size - LENGTH_BYTES - len(header)

    def view(self, name: str) -> NDArray[Any]:
        """The tensor, read-only and without a copy: uint16 for BF16, float16, float32 or uint8.

        A tensor that the file does not align to its element size is copied, so that a kernel never
        sees a misaligned pointer. UnsupportedModelError for the format's other dtypes,
        ModelFormatError when the file has become shorter.
        """
        entry = self.tensors[name]
        if entry.dtype not in ARRAY_DTYPES:
            raise UnsupportedModelError(
                f"{self.path}: tensor {shown(name)} is {entry.dtype},"
                f" expected one of {', '.join(ARRAY_DTYPES)}"
            )
        if self._map.size() < self._size:
            raise ModelFormatError(
                f"{self.path}: was truncated from {self._size} to {self._map.size()} bytes"
                " after it had been opened"
            )
        dtype = np.dtype(ARRAY_DTYPES[entry.dtype])
        count = (entry.stop - entry.start) // dtype.itemsize
        flat = np.frombuffer(self._map, dtype, count, entry.start)
        if not flat.flags.aligned:
            flat = flat.copy()
            flat.flags.writeable = False
        return flat.reshape(entry.shape)

    def release(self, name: str, first: int = 0, end: int | None = None) -> None:
        """Let the pages of the tensor's rows first .. end - 1 (None: to the last) go from memory. A
        later look reads them from the file again."""
        entry = self.tensors[name]
        num_rows = entry.shape[0] if entry.shape else 1
        row = (entry.stop - entry.start) // max(1, num_rows)
        begin, stop = (
            entry.start + first * row,
            entry.start + row * (num_rows if end is None else end),
        )
        begin -= begin % mmap.PAGESIZE  # whole pages; neighbours lose nothing
        if stop > begin and row and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, begin, stop - begin)

    def close(self) -> None:
        """Unmap the file, or, while views of it are alive, leave that to the last of them."""
        try:
            self._map.close()
        except BufferError:  # a view is alive; it holds the mapping
            pass


def parse_header(header: bytes, file_size: int, where: str) -> dict[str, TensorEntry]:
    """The tensors in the order of their data; ModelFormatError, beginning with `where`.

    header: the JSON, without the length before it. file_size: bytes of the whole file. Pure, so
    that it can be fuzzed; allocates nothing but the result.
    """
    if not header.startswith(b"{"):
        raise ModelFormatError(
            f"{where}: the header begins with {shown(header[:8])}, expected '{{'"
        )
    tensors: dict[str, TensorEntry] = {}
    data_start = LENGTH_BYTES + len(header)
    for name, fields in parse_json(header, f"{where}: header").items():
        if name == "__metadata__":
            _check_metadata(fields, where)
        elif not _is_unicode(name):
            raise ModelFormatError(f"{where}: tensor {shown(name)} is not named in Unicode")
        else:
            tensors[name] = _entry(fields, data_start, f"{where}: tensor {shown(name)}")
    ordered = sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop))
    position = data_start
    for name, entry in ordered:
        if entry.start != position:
            what = "overlaps the one before it" if entry.start < position else "leaves a hole"
            raise ModelFormatError(
                f"{where}: tensor {shown(name)} {what}: data_offsets begin at"
                f" {entry.start - data_start}, expected {position - data_start}"
            )
        position = entry.stop
    if position != file_size:
        raise ModelFormatError(
            f"{where}: the file has {file_size} bytes, its header describes {position}"
            f" ({'truncated?' if file_size < position else 'bytes that belong to no tensor'})"
        )
    return dict(ordered)


def _read_header(descriptor: int, file_size: int, where: str) -> bytes:
    """The header's JSON, after its length has been compared with the file's."""
    begin = os.pread(descriptor, 64, 0)
    if begin.startswith(b"version https://git-lfs"):
        raise ModelFormatError(f"{where}: a Git LFS pointer, not the weights; run 'git lfs pull'")
    if len(begin) < LENGTH_BYTES:
        raise ModelFormatError(
            f"{where}: {file_size} bytes, expected a safetensors file (truncated?)"
        )
    length = int.from_bytes(begin[:LENGTH_BYTES], "little")
    most = min(MAX_HEADER_BYTES, file_size - LENGTH_BYTES)
    if length > most:
        raise ModelFormatError(
            f"{where}: header length {length}, expected at most {most}"
            " (truncated, or not a safetensors file)"
        )
    header = os.pread(descriptor, length, LENGTH_BYTES)
    if len(header) != length:
        raise ModelFormatError(f"{where}: became shorter while its header was read")
    return header


def _check_metadata(fields: object, where: str) -> None:
    if type(fields) is not dict or not all(type(value) is str for value in fields.values()):
        raise ModelFormatError(f"{where}: __metadata__ is not an object of strings")


def _entry(fields: object, data_start: int, where: str) -> TensorEntry:
    """One tensor's entry, each field checked by itself and then against the others."""
    if type(fields) is not dict or fields.keys() != {"dtype", "shape", "data_offsets"}:
        keys = sorted(fields) if type(fields) is dict else fields
        raise ModelFormatError(
            f"{where}: has {shown(keys)}, expected dtype, shape and data_offsets"
        )
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if type(dtype) is not str or dtype not in BITS:
        raise ModelFormatError(f"{where}: dtype {shown(dtype)}, expected one of {', '.join(BITS)}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise ModelFormatError(
            f"{where}: shape {shown(shape)}, expected at most {MAX_DIMENSIONS} integers from 0"
        )
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ModelFormatError(
            f"{where}: data_offsets {shown(offsets)}, expected two integers, 0 <= begin <= end"
        )
    bits = BITS[dtype]
    extent = 1  # as if no dimension were 0: NumPy refuses an empty array whose others are too large
    for size in shape:
        extent *= max(size, 1)
    if extent * bits >= 2**63:
        raise ModelFormatError(f"{where}: shape {shown(shape)} is larger than any memory")
    count = 0 if 0 in shape else extent
    if (offsets[1] - offsets[0]) * 8 != count * bits:
        raise ModelFormatError(
            f"{where}: data_offsets {offsets} span {offsets[1] - offsets[0]} bytes,"
            f" expected {count * bits / 8:g} for {dtype} {shape}"
        )
    return TensorEntry(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _is_unicode(name: str) -> bool:
    """False for a lone surrogate, which JSON can spell and UTF-8 cannot."""
    return name.isascii() or not any("\ud800" <= character <= "\udfff" for character in name)


def _are_sizes(values: object) -> bool:
    """True for a list of integers (no booleans) from 0, small enough for any machine."""
    return type(values) is list and all(type(v) is int and 0 <= v < 2**63 for v in values)
