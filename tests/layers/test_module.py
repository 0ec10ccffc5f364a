"""The walk: public attributes are parts, a leading underscore is not, lists are numbered."""

from __future__ import annotations

from typing import ClassVar

from pace_nb.layers.module import Module, sibling


class Leaf(Module):
    def __init__(self, shape):
        self._shape = shape
        self.loaded_as = ""

    def tensors(self, name):
        yield f"{name}.weight", self._shape

    def load(self, weights, name=""):
        self.loaded_as = name


class Block(Module):
    def __init__(self):
        self.q_proj = Leaf((2, 3))
        self._secret = Leaf((9, 9))
        self.size = 7


class Root(Module):
    weight_names: ClassVar = {"layers": "model.layers"}

    def __init__(self, depth):
        self.norm = Leaf((5,))
        self.layers = [Block() for _ in range(depth)]
        self.head = None


class Recorder:
    def __init__(self):
        self.checked = []

    def check(self, name, shape):
        self.checked.append((name, shape))


def test_names_and_shapes():
    assert list(Root(2).tensors("")) == [
        ("norm.weight", (5,)),
        ("model.layers.0.q_proj.weight", (2, 3)),
        ("model.layers.1.q_proj.weight", (2, 3)),
    ]
    assert next(iter(Block().tensors("a.b"))) == ("a.b.q_proj.weight", (2, 3))


def test_load_reaches_every_leaf_and_no_private_one():
    root = Root(3)
    root.load(None)
    assert root.norm.loaded_as == "norm"
    assert [b.q_proj.loaded_as for b in root.layers] == [
        f"model.layers.{i}.q_proj" for i in range(3)
    ]
    assert root.layers[0]._secret.loaded_as == ""


def test_check_asks_for_every_tensor():
    recorder = Recorder()
    Root(1).check(recorder)
    assert recorder.checked == [("norm.weight", (5,)), ("model.layers.0.q_proj.weight", (2, 3))]


def test_sibling():
    assert sibling("model.layers.0.self_attn.qkv_proj", "q_proj") == (
        "model.layers.0.self_attn.q_proj"
    )
    assert sibling("qkv_proj", "q_proj") == "q_proj"
