"""What the package never does: a list short enough to read, each with where it is allowed."""

from __future__ import annotations

import ast

BANNED_MODULES = {"torch", "transformers", "pickle", "cPickle", "dill", "marshal", "shelve"}
BANNED_CALLS = {"eval", "exec", "compile", "__import__", "breakpoint"}
NUMBA_COMPILERS = {"njit", "jit", "vectorize", "guvectorize", "stencil", "cfunc", "jitclass"}
NUMBA_FLAGS = {"fastmath", "nogil", "error_model", "forceinline", "parallel"}


def report(wrong):
    assert not wrong, "\n".join(wrong)


def calls(tree):
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def test_no_banned_import(modules):
    report(
        [
            f"{module.path}:{line}: import {name}"
            for module in modules
            for name, line in module.imports()
            if name.split(".")[0] in BANNED_MODULES
        ]
    )


def test_no_torch_in_tests(repository):
    """A golden is made by a script; a test reads it (docs/adr/0001)."""
    wrong = []
    for path in sorted((repository / "tests").rglob("*.py")):
        if path.name.startswith("make_"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            if {name.split(".")[0] for name in names} & {"torch", "transformers"}:
                wrong.append(f"{path}:{node.lineno}")
    report(wrong)


def test_no_eval_exec_or_unpickling(modules):
    wrong = []
    for module in modules:
        for call in calls(module.tree):
            if isinstance(call.func, ast.Name) and call.func.id in BANNED_CALLS:
                wrong.append(f"{module.path}:{call.lineno}: {call.func.id}()")
            if any(keyword.arg == "allow_pickle" for keyword in call.keywords):
                wrong.append(f"{module.path}:{call.lineno}: allow_pickle")
            if any(keyword.arg in {"shell", "trust_remote_code"} for keyword in call.keywords):
                wrong.append(f"{module.path}:{call.lineno}: shell or trust_remote_code")
    report(wrong)


def test_no_assert(modules):
    """`python -O` removes asserts, so none of them may be a check."""
    report(
        [
            f"{module.path}:{node.lineno}"
            for module in modules
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Assert)
        ]
    )


def test_print_is_for_the_command_line(modules):
    report(
        [
            f"{module.path}:{call.lineno}"
            for module in modules
            if module.area != "cli"
            for call in calls(module.tree)
            if isinstance(call.func, ast.Name) and call.func.id == "print"
        ]
    )


def test_njit_flags_are_in_one_file(modules):
    wrong = []
    for module in modules:
        if module.name == "pace_nb.kernels.jit":
            continue
        for name, line in module.imports():
            if name.split(".")[0] == "numba" and name.split(".")[-1] in NUMBA_COMPILERS:
                wrong.append(f"{module.path}:{line}: import {name}")
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and node.attr in NUMBA_COMPILERS:
                if isinstance(node.value, ast.Name) and node.value.id in {"numba", "nb"}:
                    wrong.append(f"{module.path}:{node.lineno}: {node.value.id}.{node.attr}")
            elif isinstance(node, ast.keyword) and node.arg in NUMBA_FLAGS:
                wrong.append(f"{module.path}:{node.value.lineno}: {node.arg}=")
    report(wrong)


def test_environment_is_read_in_two_files(modules):
    """env.py documents every variable of the package; kernels/jit.py can be lifted out."""
    wrong = []
    for module in modules:
        if module.name in {"pace_nb.env", "pace_nb.kernels.jit"}:
            continue
        for node in ast.walk(module.tree):
            named = isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv"}
            if named and isinstance(node.value, ast.Name) and node.value.id == "os":
                wrong.append(f"{module.path}:{node.lineno}: os.{node.attr}")
        for name, line in module.imports():
            if name in {"os.environ", "os.getenv"}:
                wrong.append(f"{module.path}:{line}: {name}")
    report(wrong)


def test_exceptions_are_defined_in_one_file(modules):
    """A private one, which never leaves its module, may stand where it is used."""
    wrong = []
    for module in modules:
        if module.name == "pace_nb.errors":
            continue
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                bases = {ast.unparse(base).split(".")[-1] for base in node.bases}
                if any(base.endswith(("Error", "Exception", "Warning")) for base in bases):
                    wrong.append(f"{module.path}:{node.lineno}: class {node.name}")
    report(wrong)
