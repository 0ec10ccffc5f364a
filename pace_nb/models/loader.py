"""`Checkpoint`: the files of a model directory, opened, checked and mapped; tensors by name.

Knows which files make up a checkpoint and that they must agree. Does not know the format of one
(`safetensors_file.py`), what the configuration means (`config_json.py`), or layers. Only these are
opened: config.json, generation_config.json, and model.safetensors or else
model.safetensors.index.json with the shards that it names. Pickled weights are refused by name,
unopened: to load one is to run it.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from pace_nb.errors import ModelFormatError, UnsupportedModelError
from pace_nb.models.model_files import read_json, shown
from pace_nb.models.safetensors_file import SafetensorsFile

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 100_000_000  # 90000 tensors take 8 MB
SHARD_NAME = re.compile(r"[A-Za-z0-9._-]+\.safetensors")  # nothing that leads elsewhere
REFUSED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".gguf", ".h5", ".msgpack", ".onnx")
WEIGHT_DTYPES = ("BF16", "F16", "F32")


class Checkpoint:
    """Tensors by name, and the configuration beside them; made by `Checkpoint.open`.

    directory: where it lies. config: parsed config.json. generation_config: parsed
    generation_config.json, empty where there is none. files: paths of the weight files.
    nbytes: bytes of all tensors. A context manager, from which errors about the model come out with
    the directory in front: who reads fields and tensors knows only their names. The mappings live
    as long as any view of them.
    """

    def __init__(
        self,
        directory: Path,
        config: dict[str, Any],
        generation_config: dict[str, Any],
        files: list[SafetensorsFile],
    ) -> None:
        self.directory = directory
        self.config = config
        self.generation_config = generation_config
        self.files = tuple(file.path for file in files)
        self.nbytes = sum(file.nbytes for file in files)
        self._opened = files
        self._file_of = {name: file for file in files for name in file.tensors}
        self._read: set[str] = set()

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> Checkpoint:
        """Open and check every file. Maps the weights, reads none of them.

        ModelFormatError, one line naming file, tensor or field, when anything is missing, lies or
        contradicts something else.
        """
        directory = Path(directory)
        try:
            names = set(os.listdir(directory))
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            reason = getattr(error, "strerror", None) or str(error)
            raise ModelFormatError(
                f"{directory}: not a readable model directory: {reason}"
            ) from error
        if not names & {SINGLE, INDEX}:
            raise _no_weights(directory, names)
        config = read_json(directory, "config.json")
        generation_config: dict[str, Any] = {}
        if "generation_config.json" in names:
            generation_config = read_json(directory, "generation_config.json")
        if SINGLE in names:
            files = [SafetensorsFile(directory, SINGLE)]
        else:
            files = _open_shards(directory)
        return cls(directory, config, generation_config, files)

    def names(self) -> Collection[str]:
        """Every tensor name."""
        return self._file_of.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor. ModelFormatError where there is none of this name."""
        return self._find(name).tensors[name].shape

    def dtype(self, name: str) -> str:
        """The file's name of the dtype: "BF16", "F16", "F32", "U8", ..."""
        return self._find(name).tensors[name].dtype

    def tensor(
        self, name: str, shape: tuple[int, ...], dtypes: Collection[str] = WEIGHT_DTYPES
    ) -> NDArray[Any]:
        """A read-only view of the file: uint16 (BF16 bits), float16 or float32, of this very shape.

        dtypes: what the caller can use; ("U8",) gives uint8, for packed formats. ModelFormatError
        naming tensor, file, found and expected where shape or dtype differ, UnsupportedModelError
        for a dtype that this engine does not read at all.
        """
        file = self._find(name)
        entry = file.tensors[name]
        if entry.shape != tuple(shape):
            raise ModelFormatError(
                f"{file.path}: tensor {shown(name)} has shape {list(entry.shape)},"
                f" expected {list(shape)}"
            )
        view = file.view(name)
        if entry.dtype not in dtypes:
            raise ModelFormatError(
                f"{file.path}: tensor {shown(name)} is {entry.dtype},"
                f" expected {' or '.join(dtypes)}"
            )
        self._read.add(name)
        return view

    def release(self, name: str, first: int = 0, end: int | None = None) -> None:
        """Rows first .. end - 1 (None: to the last) have been copied or packed: their pages may go.
        They come back when looked at."""
        self._find(name).release(name, first, end)

    def unused(self) -> list[str]:
        """Names, sorted, of the tensors that `tensor` was never asked for."""
        return sorted(self._file_of.keys() - self._read)

    def close(self) -> None:
        """Unmap the files; a view that is still alive keeps its own."""
        for file in self._opened:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
        about_it = isinstance(error, ModelFormatError | UnsupportedModelError)
        if about_it and str(self.directory) not in str(error):
            raise type(error)(f"{self.directory}: {error}") from error  # type: ignore[misc]

    def _find(self, name: str) -> SafetensorsFile:
        try:
            return self._file_of[name]
        except KeyError:
            raise ModelFormatError(
                f"{self.directory}: tensor {shown(name)} is missing from the checkpoint"
            ) from None


def _no_weights(directory: Path, names: set[str]) -> ModelFormatError:
    """The error for a directory that has no safetensors; names what it has instead."""
    refused = sorted(name for name in names if name.lower().endswith(REFUSED))
    if refused:
        return ModelFormatError(
            f"{directory / refused[0]}: only safetensors weights are read; this file was not opened"
            f" (pickled weights can run code); expected {SINGLE} or {INDEX}"
        )
    others = [name for name in sorted(names) if name.endswith(".safetensors")]
    found = f" (found {', '.join(others[:3])})" if others else ""
    return ModelFormatError(f"{directory}: has neither {SINGLE} nor {INDEX}{found}")


def _open_shards(directory: Path) -> list[SafetensorsFile]:
    """The files that the index names. Index and files must agree on where each tensor is."""
    index_path = directory / INDEX
    weight_map = read_json(directory, INDEX, max_bytes=MAX_INDEX_BYTES).get("weight_map")
    if type(weight_map) is not dict or not weight_map:
        raise ModelFormatError(
            f"{index_path}: weight_map is {shown(weight_map)}, expected an object"
            " of tensor names and file names"
        )
    for tensor, shard in weight_map.items():
        if type(shard) is not str or not SHARD_NAME.fullmatch(shard):
            raise ModelFormatError(
                f"{index_path}: tensor {shown(tensor)} is in {shown(shard)}, expected the name of"
                " a .safetensors file in the same directory"
            )
    files: dict[str, SafetensorsFile] = {}
    with contextlib.ExitStack() as on_failure:
        by_identity: dict[tuple[int, int], SafetensorsFile] = {}
        for shard in sorted(set(weight_map.values())):
            file = files[shard] = SafetensorsFile(directory, shard)
            on_failure.callback(file.close)
            other = by_identity.setdefault(file.identity, file)
            if other is not file:
                raise ModelFormatError(f"{file.path}: is the same file as {other.path.name}")
            for tensor in file.tensors:
                if weight_map.get(tensor) != shard:
                    raise ModelFormatError(
                        f"{file.path}: holds tensor {shown(tensor)}, which {INDEX} says is in"
                        f" {shown(weight_map.get(tensor))}"
                    )
        for tensor, shard in weight_map.items():
            if tensor not in files[shard].tensors:
                raise ModelFormatError(
                    f"{directory / shard}: has no tensor {shown(tensor)}, which {INDEX} says is"
                    " in it"
                )
        on_failure.pop_all()
    return list(files.values())
