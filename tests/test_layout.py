"""The house: files in reading order, each importing only what stands above it."""

import ast
import os

import pytest

# what no paper speaks of lies in runtime/; a learner reads the root alone
ORDER = [
    "runtime.errors",
    "runtime.command_line",
    "runtime.files",
    "runtime.names",
    "runtime.ctranslate2",
    "runtime.hub",
    "runtime.recordings",
    "runtime.manifests",
    "runtime.checkpoints",
    "runtime.log",
    "runtime.processes",
    "runtime.optimizers",
    "runtime.variations",
    "diffusion",
    "adapters",
    "runtime.int8",
    "model",
    "runtime.fresh",
    "runtime.ctc",
    "weights",
    "data",
    "runtime.loading",
    "runtime.held_out",
    "runtime.terminal",
    "runtime.pieces",
    "decode",
    "vrpo",
    "runtime.start",
    "runtime.plan",
    "train",
    "runtime.tutorials",
]
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def our_imports(path):
    """Names of our modules that a file imports, wherever in it: NAME, runtime.NAME or tools.NAME."""
    with open(os.path.join(ROOT, path), encoding="utf-8") as f:
        tree = ast.parse(f.read())
    last = tree.body[-1]
    if isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'":
        # run alone, a file shows what it is about: the tutorials may use all that there is
        tree.body.pop()
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module in ("runtime", "tools"):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {name for name in names if name in ORDER or name.split(".")[0] in ("runtime", "tools")}


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_only_files_above_it(name):
    for imported in our_imports(name.replace(".", "/") + ".py"):
        assert not imported.startswith("tools"), f"{name} imports {imported}: the programs stand alone"
        assert ORDER.index(imported) < ORDER.index(name), f"{name} imports {imported}, which stands below it"


def test_the_network_knows_nothing_of_files_and_programs():
    assert not {"weights", "data", "decode", "train"} & our_imports("model.py")
    assert "decode" not in our_imports("train.py")


def modules(folder):
    return {f.removesuffix(".py") for f in os.listdir(os.path.join(ROOT, folder)) if f.endswith(".py")}


def test_root_and_runtime_hold_nothing_else():
    assert modules("") == {name for name in ORDER if "." not in name}
    assert {f"runtime.{name}" for name in modules("runtime") - {"__init__"}} == set(ORDER) - modules("")


def test_tools_are_no_longer_than_can_be_read():
    folder = os.path.join(ROOT, "tools")
    for name in os.listdir(folder):
        if name.endswith(".py"):
            with open(os.path.join(folder, name), encoding="utf-8") as f:
                assert len(f.readlines()) <= 700, f"tools/{name} has more than 700 lines: split it by concept"
