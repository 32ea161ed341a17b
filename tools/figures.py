"""Figures: drawn without a display, saved under a temporary name."""

import math
import os

from model import UserError


def new_figure(width, height):
    """An empty figure, inches; matplotlib takes a second to import, and nothing else needs it."""
    from matplotlib.figure import Figure

    return Figure((width, height), layout="constrained")


def scale_calls(axis, most):
    """A logarithmic axis of network calls, marked 1, 2, 4, ... up to `most`."""
    ticks = [2**k for k in range(int(math.log2(most)) + 1)]
    axis.set_xscale("log")
    axis.set_xticks(ticks, ticks)
    axis.minorticks_off()


def save_figure(fig, path, dpi):
    """A figure as a PNG, under a temporary name and renamed."""
    try:
        fig.savefig(path + ".tmp", format="png", dpi=dpi)
        os.replace(path + ".tmp", path)
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror})") from None
    print(f"{path}: written")
