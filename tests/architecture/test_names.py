"""Each module says what it is, is named for one thing, and a model stays one readable file."""

from __future__ import annotations

import ast

VAGUE = {"util", "utils", "helper", "helpers", "manager", "common", "misc", "base_utils", "tools"}
MODEL_LINES = 300
WHOLE = ("ForCausalLM", "ForConditionalGeneration")  # Hugging Face's names for a whole model


def test_every_module_opens_with_a_docstring(modules):
    short = [str(m.path) for m in modules if len((ast.get_docstring(m.tree) or "").split()) < 4]
    assert not short, "\n".join(short)


def test_no_vague_names(modules):
    wrong = [m.name for m in modules if set(m.name.split(".")[-1].split("_")) & VAGUE]
    classes = [
        f"{m.path}:{node.lineno}: class {node.name}"
        for m in modules
        for node in ast.walk(m.tree)
        if isinstance(node, ast.ClassDef) and node.name.endswith(("Manager", "Helper", "Utils"))
    ]
    assert not wrong + classes, "\n".join(wrong + classes)


def test_a_model_is_one_readable_file(modules):
    """Config, Attention, MLP, DecoderLayer, ForCausalLM, in at most 300 lines."""
    models = [m for m in modules if m.area == "models" and causal_lm(m.tree)]
    assert models, "no module in pace_nb/models defines a whole model"
    for module in models:
        lines = len(module.path.read_text().splitlines())
        assert lines <= MODEL_LINES, f"{module.path}: {lines} lines, at most {MODEL_LINES}"
        classes = [node.name for node in module.tree.body if isinstance(node, ast.ClassDef)]
        assert classes[0].endswith("Config"), f"{module.path}: begins with {classes[0]}"
        assert classes[-1].endswith(WHOLE), f"{module.path}: ends with {classes[-1]}"


def causal_lm(tree):
    return any(isinstance(n, ast.ClassDef) and n.name.endswith(WHOLE) for n in tree.body)
