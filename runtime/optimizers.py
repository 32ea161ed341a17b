"""Optimizers: AdamW, and Muon for the matrices of a small model's blocks."""

import re

import torch


def make_optimizers(trained, settings):
    """AdamW for `trained` (name -> parameter); with settings.muon Muon for the matrices of the blocks.

    Muon is for matrices that map hidden states to hidden states.  All else stays with AdamW, as its authors
    advise: a row of an embedding, say, is a word's alone, and most words are in no batch.
    """
    in_blocks = re.compile(r"(backbone\.blocks|acoustic\.layers)\.\d+\..*weight$")
    by_muon = sorted(n for n, p in trained.items() if settings.muon and p.dim() == 2 and in_blocks.match(n))
    others = [p for n, p in trained.items() if n not in by_muon]
    # decay keeps matrices from growing for ever; a norm's gain it would only pull to 0, where nothing passes
    groups = [
        {"params": [p for p in others if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in others if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, settings.beta2), fused=True)]
    if by_muon:
        optimizers.append(Muon([trained[n] for n in by_muon], settings.lr, settings.weight_decay))
    return optimizers


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) for matrices: the momentum's nearest matrix with equal singular values.

    A gradient's few large singular values drown the many small ones; here each direction gets a step of the
    same size.  Updates are scaled to the size of AdamW's, so one learning rate serves both.  torch.optim.Muon
    does the same in bf16, which takes a CPU without bf16 arithmetic thirty times as long; this is in fp32.
    """

    def __init__(self, parameters, lr, weight_decay, momentum=0.95):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(momentum, group["momentum"]))  # Nesterov's look ahead
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(update, alpha=group["lr"] * 0.2 * max(p.shape) ** 0.5)  # as long as AdamW's


def orthogonalize(matrix, steps=5):
    """U V^T of the singular value decomposition U S V^T, to within a few tenths, by Newton-Schulz.

    With X = U S V^T, X X^T X is U S^3 V^T: products of X with itself change the singular values and nothing
    else.  So each round applies the odd polynomial a s + b s^3 + c s^5 to every singular value s at once,
    without ever computing one.  Muon's a, b, c blow small values up quickest: from 0.002 on they end between
    0.7 and 1.2.
    """
    x = matrix / (matrix.norm() + 1e-7)  # all singular values at most 1
    is_tall = x.size(0) > x.size(1)
    x = x.T if is_tall else x  # the smaller of the two Gram matrices
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315) @ x
    return x.T if is_tall else x
