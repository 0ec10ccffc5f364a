"""The form of a kernel file (docs/how-to/add-kernel.md), as far as a machine can judge it."""

from __future__ import annotations

import ast

import pytest

MEASURES = {"limits"}  # its kernels compute nothing: they are there to be timed
SECTIONS = ["Moves", "Does", "Error", "Cautions", "Source", "Notebook", "Ledger"]


def functions(module):
    return {node.name: node for node in module.tree.body if isinstance(node, ast.FunctionDef)}


def decorators(node):
    return {ast.unparse(d).split("(")[0].split(".")[-1] for d in node.decorator_list}


def names_used(node):
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def wrappers(module):
    """Public functions that call a compiled kernel, directly or through private functions."""
    own = functions(module)
    calls = {name: names_used(node) & set(own) - {name} for name, node in own.items()}
    reach = {name for name, node in own.items() if "kernel" in decorators(node)}
    while more := {
        name
        for name in set(own) - reach
        if any(callee.startswith("_") for callee in calls[name] & reach)
    }:
        reach |= more
    return sorted(name for name in reach if not name.startswith("_"))


@pytest.fixture(scope="module")
def kernel_modules(modules):
    """Modules of kernels/ that define at least one @kernel."""
    found = [
        module
        for module in modules
        if module.area == "kernels"
        and any("kernel" in decorators(node) for node in functions(module).values())
    ]
    assert "pace_nb.kernels.norm" in {m.name for m in found}
    return found


def stem(module):
    return module.name.rsplit(".", 1)[1]


def report(wrong):
    assert not wrong, "\n".join(wrong)


def test_a_kernel_is_private_and_says_so(kernel_modules):
    report(
        [
            f"{module.path}:{node.lineno}: {name}"
            for module in kernel_modules
            for name, node in functions(module).items()
            if "kernel" in decorators(node)
            and not (name.startswith("_") and name.endswith("_kernel"))
        ]
    )


def test_a_reference_beside_each_kernel(kernel_modules):
    wrong = []
    for module in kernel_modules:
        if stem(module) in MEASURES:
            continue
        own = functions(module)
        public = wrappers(module)
        if not public:
            wrong.append(f"{module.path}: no public function calls its kernels")
        for name in public:
            reference = own.get(f"{name}_ref")
            if reference is None:
                wrong.append(f"{module.path}: {name} has no {name}_ref")
            elif reference.lineno > own[name].lineno:
                wrong.append(f"{module.path}: {name}_ref stands after {name}")
            elif decorators(reference):
                wrong.append(f"{module.path}: {name}_ref is decorated; it is plain NumPy")
    report(wrong)


def test_the_docstring_has_its_sections(kernel_modules):
    report(
        [
            f"{module.path}: the docstring has no {section!r}"
            for module in kernel_modules
            for section in SECTIONS
            if f"{section}:" not in (ast.get_docstring(module.tree) or "").replace("*", "")
        ]
    )


def test_every_public_function_has_a_docstring(modules):
    report(
        [
            f"{module.path}:{node.lineno}: {name}"
            for module in modules
            if module.area == "kernels"
            for name, node in functions(module).items()
            if not name.startswith("_") and not ast.get_docstring(node)
        ]
    )


def test_a_ledger_row_for_each_kernel(kernel_modules, repository):
    ledger = (repository / "docs" / "ledger.md").read_text()
    rows = [line for line in ledger.splitlines() if line.startswith("| ")]
    header, _, *rest = [line.count("|") for line in ledger.splitlines() if line.startswith("|")]
    assert all(count == header for count in rest), "a row has a different number of columns"
    names = [stem(m) for m in kernel_modules if stem(m) not in MEASURES]
    report([f"docs/ledger.md has no row for {n}" for n in names if not any(n in r for r in rows)])


def test_a_bench_for_each_kernel(kernel_modules, repository):
    names = [stem(m) for m in kernel_modules if stem(m) not in MEASURES]
    benches = repository / "bench" / "kernels"
    report([f"no {p}" for n in names if not (p := benches / f"bench_{n}.py").is_file()])


def test_kernels_neither_raise_nor_ask_for_memory_by_keyword(kernel_modules):
    """A compiled kernel has no exception path: nothing checks a status inside `prange`."""
    report(
        [
            f"{module.path}:{inner.lineno}: raise in {name}"
            for module in kernel_modules
            for name, node in functions(module).items()
            if decorators(node) & {"kernel", "device_fn"}
            for inner in ast.walk(node)
            if isinstance(inner, ast.Raise | ast.Try)
        ]
    )
