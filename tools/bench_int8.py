"""One matrix of LLaDA-8B's size in int8 and in bf16: time, error and bytes.

Every product reads another one of a few matrices, because the network, too, finds none of them in a cache.
"""

import functools
import itertools
import statistics

import torch
import torch.nn as nn

from runtime.int8 import Int8Linear
from tools.measure import machine, seconds_of, spread

MATRICES, ROWS = 8, (1, 16, 128, 480)  # 16: an answer beside a cache; 480: a whole row with its audio


def milliseconds(layers, x, repeats):
    """What a product of x takes, after one of each layer; the layers take turns."""
    for layer in layers:
        layer(x)
    turns = itertools.islice(itertools.cycle(layers), repeats)
    return [1000 * seconds_of(functools.partial(layer, x), x.device) for layer in turns]


@torch.no_grad()
def int8_bench(device, size, repeats):
    device = torch.device(device or "cpu")
    print(
        f"{machine(device.type)}, torch {torch.__version__}; a matrix of {size} x {size}, {repeats} repeats"
    )
    torch.manual_seed(0)
    options = {"bias": False, "device": device, "dtype": torch.bfloat16}
    half = [nn.Linear(size, size, **options) for _ in range(MATRICES)]
    rounded = [Int8Linear(linear, device) for linear in half]
    print(f"{'rows':>6}{'bf16, ms':>28}{'int8, ms':>28}{'x bf16':>8}{'error, bf16':>13}{'error, int8':>13}")
    for n in ROWS:
        x = torch.randn(n, size, device=device, dtype=torch.bfloat16)
        wanted = x.double() @ half[0].weight.double().T
        times, errors = [], []
        for layers in (half, rounded):
            errors.append(((layers[0](x).double() - wanted).norm() / wanted.norm()).item())
            times.append(milliseconds(layers, x, repeats))
        ratio = statistics.median(times[0]) / statistics.median(times[1])
        cells = "".join(f"{spread(values):>28}" for values in times)
        print(f"{n:6}{cells}{ratio:8.1f}" + "".join(f"{error:13.2%}" for error in errors), flush=True)
