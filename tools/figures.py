"""Pictures by command: the logged curves of training runs.

    python -m tools.figures out/tiny/stage1 out/tiny/stage2     # curves.png: loss and held-out loss
"""

import argparse
import json
import os
import sys

from model import Parser, UserError
from weights import write_file


def new_figure(width, height):
    """An empty figure, inches; matplotlib takes a second to import, and nothing else needs it."""
    from matplotlib.figure import Figure

    return Figure((width, height), layout="constrained")


def save_figure(fig, path, dpi):
    """A figure as a PNG."""
    write_file(path, lambda temporary: fig.savefig(temporary, format="png", dpi=dpi))
    print(f"{path}: written")


def smooth(values, decay):
    """A running mean that forgets: decay 0 leaves the values as they are."""
    curve = []
    for value in values:
        curve.append(decay * curve[-1] + (1 - decay) * value if curve else value)
    return curve


def curves(folders, path="curves.png"):
    """Draws the logged loss, smoothed, and the held-out loss of one or several runs."""
    runs = {}
    for folder in folders:
        log = os.path.join(folder, "log.jsonl")
        if not os.path.exists(log):
            raise UserError(f"{folder}: no log.jsonl; train.py writes one there")
        with open(log, encoding="utf-8") as f:
            runs[folder] = [json.loads(line) for line in f]
    fig = new_figure(11, 4)
    axes = fig.subplots(1, 2)
    kinds = (("loss", "training loss, smoothed", 0.95), ("held_out", "held-out loss, mean over fixed t", 0.0))
    for axis, (key, title, decay) in zip(axes, kinds, strict=True):
        for folder, entries in runs.items():
            points = [(e["step"], e[key]) for e in entries if e.get(key) is not None]
            if points:
                steps, values = zip(*points, strict=True)
                axis.plot(steps, smooth(values, decay), label=folder)
        axis.set(title=title, xlabel="step")
        if axis.lines:
            axis.legend(fontsize=7)
    save_figure(fig, path, 120)


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="figures", description=__doc__, formatter_class=raw)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="of a run, with its log.jsonl")
    parser.add_argument("--out", default="curves.png")
    try:
        args = parser.parse_args(argv)
        curves(args.folders, args.out)
    except UserError as e:
        print(f"figures: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
