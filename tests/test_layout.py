"""The house: the root's files in reading order, each importing only what stands above it."""

import ast
import os

import pytest

ORDER = ["runtime", "diffusion", "adapters", "model", "weights", "data", "decode", "vrpo", "train"]
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def our_imports(path):
    """Names of our modules that a file imports, wherever in it: of the root, or tools.NAME."""
    with open(os.path.join(ROOT, path), encoding="utf-8") as f:
        tree = ast.parse(f.read())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
            names |= {f"tools.{alias.name}" for alias in node.names if node.module == "tools"}
    return {name for name in names if name in ORDER or name.split(".")[0] == "tools"}


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_only_files_above_it(name):
    for imported in our_imports(f"{name}.py"):
        assert not imported.startswith("tools"), f"{name}.py imports {imported}: the root stands alone"
        assert ORDER.index(imported) < ORDER.index(name), (
            f"{name}.py imports {imported}.py, which stands below it"
        )


def test_the_network_knows_nothing_of_files_and_programs():
    assert not {"weights", "data", "decode", "train"} & our_imports("model.py")
    assert "decode" not in our_imports("train.py")


def test_the_root_holds_nothing_else():
    assert {f.removesuffix(".py") for f in os.listdir(ROOT) if f.endswith(".py")} == set(ORDER)


def test_tools_are_no_longer_than_can_be_read():
    folder = os.path.join(ROOT, "tools")
    for name in os.listdir(folder):
        if name.endswith(".py"):
            with open(os.path.join(folder, name), encoding="utf-8") as f:
                assert len(f.readlines()) <= 700, f"tools/{name} has more than 700 lines: split it by concept"
