"""Imports go down only (docs/architecture.md): a layer knows what is below it and nothing else."""

from __future__ import annotations

import ast
import sys

import pytest

# A name may import what stands in lines below its own, and its own package.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"server", "benchmarks"},
    {"openai_api"},
    {"llm", "async_llm"},
    {"text_model"},
    {"prompts", "compile_ahead"},
    {"engine"},
    {"tokenizer"},
    {"chat_template", "detokenizer", "disguise"},
    {"chat_template_worker"},  # the process that renders templates, with limits
    {"models"},
    {"layers"},
    {"kv_cache", "verify"},
    {"kernels"},
]
LEAVES = {"batch", "config", "sampling_params", "structured_outputs", "outputs", "errors", "env"}
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
KERNEL_LIBRARIES = {"numpy", "numba", "llvmlite"}


def edges(modules):
    """(importing module, imported dotted name, line) for imports within pace_nb."""
    for module in modules:
        for name, line in module.imports():
            if name.split(".")[0] == "pace_nb":
                yield module, name, line


def area_of(name):
    return ([*name.split("."), ""])[1]


def test_every_top_level_name_has_a_place(modules):
    placed = set(RANK) | LEAVES | {"", "demo"}
    assert {m.area for m in modules} <= placed, "give the new name a line in LAYERS or LEAVES"


def test_imports_go_down(modules):
    wrong = []
    for module, name, line in edges(modules):
        source, target = module.area, area_of(name)
        if source == target or source == "":  # pace_nb/__init__.py: see test_import_time.py
            continue
        if target in LEAVES:
            allowed = source != "kernels"
        elif target in RANK:
            allowed = source in RANK and RANK[source] < RANK[target]
        else:  # pace_nb itself, for its version
            allowed = target in {"", "__version__"} and source in {"cli", "server"}
        if not allowed:
            wrong.append(f"{module.path}:{line}: {source} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_kernels_stand_alone(modules):
    """kernels/ can be lifted out: NumPy, Numba, llvmlite and the standard library (tqdm in jit)."""
    wrong = []
    for module in modules:
        if module.area != "kernels":
            continue
        for name, line in module.imports():
            top = name.split(".")[0]
            own = name.startswith("pace_nb.kernels")
            bar = top == "tqdm" and module.name == "pace_nb.kernels.jit"
            if not (own or bar or top in KERNEL_LIBRARIES or top in sys.stdlib_module_names):
                wrong.append(f"{module.path}:{line}: {name}")
    assert not wrong, "\n".join(wrong)


def test_models_do_not_import_each_other(modules):
    """Two models may repeat a hundred lines. What a third needs unchanged moves to layers/."""
    models = {m.name for m in modules if m.area == "models" and defines_a_model(m)}
    assert models, "no module in pace_nb/models defines a whole model"
    wrong = [
        f"{module.path}:{line}: {name}"
        for module, name, line in edges(modules)
        if module.name in models
        and any(name == model or name.startswith(f"{model}.") for model in models)
    ]
    assert not wrong, "\n".join(wrong)


def defines_a_model(module):
    classes = [node.name for node in module.tree.body if isinstance(node, ast.ClassDef)]
    return any(name.endswith(("ForCausalLM", "ForConditionalGeneration")) for name in classes)


@pytest.mark.parametrize("name", ["pace_nb.engine.scheduler", "pace_nb.engine.request"])
def test_scheduling_knows_no_arrays(modules, name):
    (module,) = [m for m in modules if m.name == name]
    assert not [n for n, _ in module.imports() if n.split(".")[0] in {"numpy", "numba"}]


def test_numba_is_imported_by_kernels_only(modules):
    """Elsewhere it would be loaded before kernels/jit.py has set its threads and its layer."""
    wrong = [
        f"{module.path}:{line}: {name}"
        for module in modules
        for name, line in module.imports()
        if name.split(".")[0] in {"numba", "llvmlite"} and module.area != "kernels"
    ]
    assert not wrong, "\n".join(wrong)


def test_no_cycles_between_modules(modules):
    names = {m.name for m in modules}
    graph: dict[str, set[str]] = {name: set() for name in names}
    for module, name, _ in edges(modules):
        target = name if name in names else name.rpartition(".")[0]
        if target in names - {module.name, "pace_nb"}:
            graph[module.name].add(target)
    done: set[str] = set()

    def walk(name, path):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for target in sorted(graph[name]):
                walk(target, [*path, name])
            done.add(name)

    for name in sorted(names):
        walk(name, [])
