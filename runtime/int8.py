"""int8 weights: half the memory of bf16, and less time on a CPU (`--int8`, for inference only)."""

import contextlib
import ctypes

import torch
import torch.nn as nn
import torch.nn.functional as F

from adapters import LoRALinear, replace_modules


class Int8Linear(nn.Module):
    """A Linear whose matrix is held in int8 (symmetric), with a scale for each output channel o.

        W[o] ~ scale[o] q[o],   scale[o] = max |W[o]| / 127,   q[o] = round(W[o] / scale[o])

    On an x86 CPU the input is rounded as well, x ~ s u with a scale s for each row, so that a row's result
    does not depend on its neighbours; the product of the integers u and q is exact (oneDNN's kernel; timings
    in docs/RESULTS.md).  From |W - scale q| <= scale / 2 and |x - s u| <= s / 2 follows that y[o] is off by
    at most s/2 |W[o]|_1 + scale[o]/2 |x|_1 + n s scale[o] / 4, with n inputs.  On other devices (not tried
    on any) each call converts q to the input's type: memory falls, time does not.
    """

    def __init__(self, linear, device):
        """linear: weight (out, in), bias (out,) or None.  device: where this layer is to be."""
        super().__init__()
        q, scale = [], []
        for rows in linear.weight.detach().split(4096):  # the vocabulary's matrix in fp32 would be 2 GB
            rounded, row_scale = round_rows(rows.float(), 127)
            q.append(rounded.to(torch.int8))
            scale.append(row_scale[:, 0])
        q, scale = torch.cat(q), torch.cat(scale)
        self.levels = 0  # the input is rounded to -levels..levels; 0: it is not rounded
        if device.type == "cpu" and "AVX" in torch.backends.cpu.get_cpu_capability():
            q = torch.ops.onednn.qlinear_prepack(q, None)  # in the kernel's own memory layout
            self.levels = input_levels()
        self.register_buffer("weight", q.to(device))
        self.register_buffer("scale", scale.to(device))
        # zero points of W: the number that stands for zero, 0 in each channel
        self.register_buffer("zero", torch.zeros(len(scale), dtype=torch.int, device=device))
        self.bias = linear.bias

    def forward(self, x):
        """(..., in) -> (..., out), in the type of x."""
        if self.levels:
            q, scale = round_rows(x.float(), self.levels)
            # the kernel takes unsigned bytes: all are moved up, and levels + 1 becomes the zero point
            q = (q + (self.levels + 1)).to(torch.uint8)
            # x, W: each with scale and zero point; bias.  x has one scale for each row, applied afterwards
            inputs = (q, 1.0, self.levels + 1, self.weight, self.scale, self.zero, None)
            # the output's scale, zero point and type; no operation is fused with the product
            y = torch.ops.onednn.qlinear_pointwise(*inputs, 1.0, 0, torch.float32, "none", [], "") * scale
        else:
            y = F.linear(x, self.weight.to(x.dtype)) * self.scale
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def round_rows(x, levels):
    """x (..., n) -> integers in -levels..levels, kept as floats, (..., n) and each row's scale (..., 1)."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / levels
    return (x / scale).round_(), scale


def input_levels():
    """127, or 63 on a processor without VNNI, which adds up two products in 16 bits and may overflow."""
    found = torch.cpu.get_capabilities()
    return 127 if found.get("avx512_vnni") or found.get("avx_vnni") else 63


def quantise(model, device):
    """Turns all Linears of encoder and backbone into Int8Linears, LoRA merged.  In place.

    One after the other, and each is freed before the next is read: of memory-mapped weights no copy in
    full precision ever exists as a whole.  Embeddings, convolutions, norms and adapters stay as they are.
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
    """Returns freed memory to the system.

    glibc keeps some of it for later: by the time an 8-billion-parameter model is read, a tenth of its size.
    With another C library this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
