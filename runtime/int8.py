"""int8: half the memory of bf16, and less time on a CPU (`--int8`, for asking only)."""

import contextlib
import ctypes

import torch
import torch.nn as nn
import torch.nn.functional as F

from adapters import LoRALinear, replace_modules


class Int8Linear(nn.Module):
    """A Linear whose matrix is held in int8, with a scale for each output channel o.

        W[o] ~ scale[o] q[o],   scale[o] = max |W[o]| / 127,   q[o] = round(W[o] / scale[o])

    On an x86 CPU the input is rounded as well, each row by a scale of its own, so that a row's result does
    not depend on its neighbours; the product is then one of integers, exact but for the two roundings
    (oneDNN's kernel; timings in docs/RESULTS.md).  With |W - scale q| <= scale / 2 and |x - s u| <= s / 2,
    y[o] is off by at most s/2 |W[o]|_1 + scale[o]/2 |x|_1 + n s scale[o] / 4 for n inputs.  On other devices
    (not tried on any) each call turns the matrix back into the input's type: memory falls, time does not.
    """

    def __init__(self, linear, device):
        """linear: weight (out, in), bias (out,) or None.  device: where the result is to be."""
        super().__init__()
        q, scale = [], []
        for rows in linear.weight.detach().split(4096):  # the vocabulary's matrix in fp32 would be 2 GB
            numbers, size = round_rows(rows.float(), 127)
            q.append(numbers.to(torch.int8))
            scale.append(size[:, 0])
        q, scale = torch.cat(q), torch.cat(scale)
        self.levels = 0  # 0: the input stays as it is
        if device.type == "cpu" and "AVX" in torch.backends.cpu.get_cpu_capability():
            q = torch.ops.onednn.qlinear_prepack(q, None)  # in the order in which the kernel reads it
            self.levels = input_levels()
        self.register_buffer("weight", q.to(device))
        self.register_buffer("scale", scale.to(device))
        self.register_buffer("zero", torch.zeros(len(scale), dtype=torch.int, device=device))
        self.bias = linear.bias

    def forward(self, x):
        """(..., in) -> (..., out), in the type of x."""
        if self.levels:
            q, scale = round_rows(x.float(), self.levels)
            # the kernel wants bytes without a sign, and is told what stands for zero
            q = (q + (self.levels + 1)).to(torch.uint8)
            inputs = (q, 1.0, self.levels + 1, self.weight, self.scale, self.zero, None)
            y = torch.ops.onednn.qlinear_pointwise(*inputs, 1.0, 0, torch.float32, "none", [], "") * scale
        else:
            y = F.linear(x, self.weight.to(x.dtype)) * self.scale
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def round_rows(x, levels):
    """x (..., n) -> whole numbers from -levels to levels (..., n) and a scale for each row (..., 1)."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / levels
    return (x / scale).round_(), scale


def input_levels():
    """127, or 63 on a processor without VNNI: its instruction adds two products in 16 bits."""
    found = torch.cpu.get_capabilities()
    return 127 if found.get("avx512_vnni") or found.get("avx_vnni") else 63


def quantise(model, device):
    """Turns all matrices of encoder and backbone but the embeddings into int8, LoRA merged.  In place.

    One matrix after the other, and each is let go before the next is read: of weights that lie mapped on
    the disk no second copy exists at any time.  The rest of the model stays as and where it is.
    """

    def rounded(_, linear):
        new = Int8Linear(linear.merged() if isinstance(linear, LoRALinear) else linear, device)
        del linear.weight
        return_memory()
        return new

    for part in (model.encoder, model.backbone):
        replace_modules(part, nn.Linear, rounded)
    return model


def return_memory():
    """Gives the system back what was freed: glibc keeps large pieces for later, a tenth of the size of an
    8-billion model by the time that it is read.  Does nothing beside another C library.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
