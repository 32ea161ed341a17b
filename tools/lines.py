"""How long the files are and how much of them explains: the measures this project holds itself to.

Printed by `python -m tools.lines`.
"""

import ast
import glob
import io
import os
import sys
import tokenize

from runtime.errors import exit_status
from runtime.files import ROOT


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


def main():
    total = {}
    print(f"{'file':32}{'lines':>8}{'explaining in 100':>20}{'longest line':>14}")
    for folder in ("", "runtime", "tools", "tests"):
        for path in sorted(glob.glob(os.path.join(ROOT, folder, "*.py"))):
            n, share, longest = measures(path)
            total[folder] = total.get(folder, 0) + n
            print(f"{os.path.relpath(path, ROOT):32}{n:>8}{share:>20.0f}{longest:>14}")
        print(f"{'in ' + (folder or 'the root'):32}{total[folder]:>8}\n")
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as f:
        print(f"{'README.md':32}{len(f.readlines()):>8}")


if __name__ == "__main__":
    sys.exit(exit_status("tools.lines", main))
