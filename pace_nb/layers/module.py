"""`Module`: a layer whose weights are found by walking its attributes.

Knows that a public attribute holding a Module, or a list of Modules, is a part whose tensors are
named `<name>.<attribute>` (list items `<name>.<attribute>.<index>`), as in a Hugging Face
checkpoint. A leading `_` marks what is not a weight. Does not know dtypes, files or any particular
layer.

A module is built as a shell: its constructor allocates nothing that grows with a size. `check` then
compares every tensor's shape with the checkpoint, and only after that does `load` allocate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from pace_nb.layers.weights import Weights

Shape = tuple[int, ...]


class Module:
    """A tree of layers. Leaves (Linear, RMSNorm, ...) override `tensors` and `load`."""

    # Attributes whose tensors are not named `<name>.<attribute>`: attribute -> full name in the
    # checkpoint.
    weight_names: ClassVar[Mapping[str, str]] = {}

    def parts(self, name: str) -> Iterator[tuple[str, Module]]:
        """(checkpoint name, module) of every direct part, in order of construction."""
        for attribute, value in vars(self).items():
            if attribute.startswith("_"):
                continue
            full_name = self.weight_names.get(attribute) or join(name, attribute)
            if isinstance(value, Module):
                yield full_name, value
            elif isinstance(value, list):
                for index, item in enumerate(value):
                    if isinstance(item, Module):
                        yield join(full_name, str(index)), item

    def tensors(self, name: str) -> Iterator[tuple[str, Shape]]:
        """(tensor name, shape) of everything `load` will read."""
        for part_name, part in self.parts(name):
            yield from part.tensors(part_name)

    def check(self, weights: Weights, name: str = "") -> None:
        """ModelFormatError, naming the tensor, unless every tensor is there in its exact shape."""
        for tensor_name, shape in self.tensors(name):
            weights.check(tensor_name, shape)

    def load(self, weights: Weights, name: str = "") -> None:
        """Read, convert and pack every weight; `name` is this module's name in the checkpoint."""
        for part_name, part in self.parts(name):
            part.load(weights, part_name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Each layer has its own signature."""
        raise NotImplementedError(f"{type(self).__name__} cannot be called")


def join(name: str, part: str) -> str:
    """`name.part`, or `part` at the root."""
    return f"{name}.{part}" if name else part


def sibling(name: str, other: str) -> str:
    """`name` with its last component replaced: sibling("a.qkv_proj", "q_proj") is "a.q_proj"."""
    parent, _, _ = name.rpartition(".")
    return join(parent, other)
