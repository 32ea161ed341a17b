"""The house: what a learner reads from top to bottom, each file importing only what stands above it."""

import ast
import functools
import glob
import io
import os
import tokenize

import pytest

import runtime
from runtime.files import ROOT

# the reading order of README; what the paper does not speak of lies in runtime/
ORDER = ["diffusion", "adapters", "model", "weights", "data", "decode", "vrpo", "train"]


def modules(folder):
    """Names of a folder's modules, as they are imported."""
    prefix = f"{folder}." if folder else ""
    return {
        prefix + f.removesuffix(".py") for f in os.listdir(os.path.join(ROOT, folder)) if f.endswith(".py")
    }


OURS = modules("") | modules("runtime") | modules("tools")


@functools.cache
def imports(name):
    """Our modules that a module imports, wherever in it."""
    with open(os.path.join(ROOT, name.replace(".", "/") + ".py"), encoding="utf-8") as f:
        tree = ast.parse(f.read())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & OURS


def reached(name):
    """All that a module imports, and what that imports in turn."""
    found, new = set(), {name}
    while new:
        found |= new
        new = set().union(*map(imports, new)) - found
    return found - {name}


@pytest.mark.parametrize("name", ORDER)
def test_a_file_needs_only_files_above_it(name):
    """Also by way of runtime/: the root's files can be read in their order, and none in a circle."""
    assert reached(name) & set(ORDER) <= set(ORDER[: ORDER.index(name)])


def test_the_programs_need_no_tools():
    for name in modules("") | modules("runtime"):
        assert not any(module.startswith("tools") for module in reached(name)), name


def test_runtime_has_an_index():
    index = {line.split()[0] for line in runtime.__doc__.splitlines()[2:]}
    assert {f"runtime.{name}" for name in index | {"__init__"}} == modules("runtime")


def test_no_imports_go_in_a_circle():
    for name in OURS:
        assert not any(name in reached(other) for other in imports(name)), name


def test_the_root_holds_the_files_of_the_readme():
    assert modules("") == set(ORDER)
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as f:
        rows = [line.split("`")[1] for line in f if line.startswith("| `")]
    assert [row.removesuffix(".py") for row in rows if row.endswith(".py")] == ORDER


def test_the_network_knows_nothing_of_files_and_programs():
    assert not {"weights", "data", "decode", "train"} & reached("model")
    assert "decode" not in reached("train")


def explaining_lines(source):
    """Numbers of the lines that hold a comment or belong to a docstring."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            lines.add(token.start[0])
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            lines |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def measures(path):
    """Lines, explaining lines in 100 (of those that are not empty), and the longest line of a Python file."""
    with open(path, encoding="utf-8") as f:
        source = f.read()
    lines = source.splitlines()
    filled = sum(bool(line.strip()) for line in lines)
    explaining = sum(bool(lines[n - 1].strip()) for n in explaining_lines(source))
    return len(lines), 100 * explaining / max(1, filled), max(map(len, lines), default=0)


def test_the_measures_are_kept():
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as f:
        assert len(f.readlines()) <= 200
    root = {path: measures(path) for path in glob.glob(os.path.join(ROOT, "*.py"))}
    assert sum(n for n, *_ in root.values()) <= 2600
    for path, (_, explaining, _) in root.items():
        assert explaining >= 30, path
    for path in glob.glob(os.path.join(ROOT, "tools", "*.py")):
        assert measures(path)[0] <= 700, f"{path}: split it by concept"
