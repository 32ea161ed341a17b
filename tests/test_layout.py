"""The house: files in reading order, each importing only what stands above it."""

import ast
import os

ORDER = ["diffusion", "adapters", "model", "data", "decode", "vrpo", "train", "prepare", "evaluate", "bench"]
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def our_imports(name):
    tree = ast.parse(open(os.path.join(ROOT, name + ".py"), encoding="utf-8").read())
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
        yield from (n for n in names if n in ORDER)


def test_imports_point_upwards():
    present = [n for n in ORDER if os.path.exists(os.path.join(ROOT, n + ".py"))]
    assert len(present) >= 8
    for name in present:
        for imported in our_imports(name):
            assert ORDER.index(imported) < ORDER.index(name), f"{name}.py imports {imported}.py, which stands below it"
    assert not {"data", "decode", "train"} & set(our_imports("model"))
    assert "decode" not in set(our_imports("train"))


def test_no_other_modules():
    files = {f[:-3] for f in os.listdir(ROOT) if f.endswith(".py")}
    assert files <= set(ORDER)
