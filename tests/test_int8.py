"""Matrices in int8: how far a product, a model's logits and its answers may be off."""

import os

import pytest
import torch
import torch.nn as nn
from test_released import CLIPS, released  # noqa: F401 - a fixture

from adapters import LoRALinear, merge_lora
from decode import ask
from runtime import int8
from runtime.errors import UserError
from runtime.int8 import Int8Linear, quantise, round_rows
from weights import assemble, load, save

CPU = torch.device("cpu")
DEMO = os.path.join(os.path.dirname(__file__), "..", "assets", "demo")


def linear_of(n_in, n_out, bias=False, seed=0):
    torch.manual_seed(seed)
    linear = nn.Linear(n_in, n_out, bias=bias)
    with torch.no_grad():
        linear.weight.mul_(torch.rand(n_out, 1) * 10)  # channels of different sizes
    return linear


@pytest.mark.parametrize("levels", sorted({int8.input_levels(), 63}))
def test_a_product_is_within_its_bound(levels, monkeypatch):
    """The bound of Int8Linear's docstring, element by element, and the same integers as in float64.

    In the levels that this processor takes, and in those of one without VNNI.
    """
    monkeypatch.setattr(int8, "input_levels", lambda: levels)
    linear = linear_of(96, 5000)  # more rows than are rounded at once
    x = torch.randn(2, 7, 96) * torch.logspace(-3, 3, 7)[:, None]  # rows of very different sizes
    x[0, 3] = 0
    with torch.no_grad():
        found = Int8Linear(linear, CPU)(x).double()
        W, x = linear.weight.double(), x.double()
        scale = W.abs().amax(1) / 127  # (out,)
        s = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / levels  # (2, 7, 1)
        bound = s / 2 * W.abs().sum(1) + scale / 2 * x.abs().sum(-1, keepdim=True) + 96 * s * scale / 4
        assert ((found - x @ W.T).abs() <= bound * 1.0001).all()
        q, u = (W / scale[:, None]).round(), (x / s).round()
        same = (found - (u @ q.T) * s * scale).abs() <= 1e-5 * bound
        assert same.float().mean() > 0.999  # a number half-way between two may be rounded either way
        error = (found - x @ W.T).norm(dim=-1) / (x @ W.T).norm(dim=-1).clamp(min=1e-12)
        assert error.max() < (0.015 if levels == 127 else 0.03)


def test_a_row_does_not_depend_on_its_neighbours():
    layer = Int8Linear(linear_of(64, 40, bias=True), CPU)
    x = torch.randn(9, 64)
    together = layer(torch.cat([x, 1000 * x]))
    for i in range(9):
        assert torch.equal(layer(x[i : i + 1])[0], together[i])


def test_bias_and_types():
    linear = linear_of(64, 40, bias=True)
    x = torch.randn(3, 64)
    wanted = linear(x)
    for dtype in (torch.float32, torch.bfloat16):
        found = Int8Linear(linear, CPU)(x.to(dtype))
        assert found.dtype == dtype
        assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_where_there_is_no_kernel(monkeypatch):
    """Other devices turn the matrix back: the rounding of the weights is all that is lost."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "NEON")
    linear = linear_of(64, 40, bias=True)
    layer, x = Int8Linear(linear, CPU), torch.randn(3, 64)
    assert layer.weight.dtype == torch.int8 and layer.weight.layout == torch.strided
    q, scale = round_rows(linear.weight, 127)
    torch.testing.assert_close(layer(x), x @ (q * scale).T + linear.bias, atol=1e-5, rtol=1e-5)


def test_round_rows():
    q, scale = round_rows(torch.tensor([[0.0, 0.0], [1.0, -2.0], [254.0, 1.0]]), 127)
    assert q.tolist() == [[0, 0], [64, -127], [127, 0]]
    assert scale[1:].flatten().tolist() == pytest.approx([2 / 127, 2.0])


def test_the_released_model_in_int8(released, tokenizer):  # noqa: F811
    """LoRA is merged before the rounding, every matrix is rounded, and the logits are near."""
    c, _, folder, ear = released(8, 4)
    files = (c, f"{folder}/llada", ear, f"{folder}/pytorch_model.bin", CPU, torch.bfloat16, 4)
    exact, rounded = assemble(*files)[0], quantise(assemble(*files)[0], CPU)
    unmerged = assemble(*files)[0]
    for module in unmerged.modules():
        if isinstance(module, LoRALinear):
            module.lora_B.data.zero_()
    for part in (rounded.encoder, rounded.backbone):
        assert not any(isinstance(m, nn.Linear) for m in part.modules())
    assert rounded.backbone.wte.weight.dtype == torch.bfloat16
    ids = torch.arange(40)[None] % 300
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    merge_lora(exact)
    with torch.no_grad():
        wanted, found, without = (m(ids, everywhere, everywhere).float() for m in (exact, rounded, unmerged))
    error = (found - wanted).norm() / wanted.norm()
    assert error < 0.1 < (without - wanted).norm() / wanted.norm(), error
    ask(rounded, tokenizer, CLIPS[:2], "Hm?", answer_length=4, block=4, cache="dual")
    with pytest.raises(UserError, match="in int8 is not written"):
        save(rounded, tokenizer, folder)


def test_the_small_model_in_int8():
    """Logits within 5 % of their size; the answers about the demo clips are the same."""
    exact, tokenizer = load("tiny", "cpu")
    rounded, _ = load("tiny", "cpu", int8=True)
    merge_lora(exact)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(6, tokenizer.get_vocab_size(), (4, 40), generator=generator)
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        wanted, found = exact(ids, everywhere, everywhere), rounded(ids, everywhere, everywhere)
    assert (found - wanted).norm() < 0.05 * wanted.norm()
    clips = {"clock": "What do you hear?", "seven": "Which digit is spoken?", "digits": "What is said?"}
    paths = [os.path.join(DEMO, f"{name}.wav") for name in clips]
    texts = [[a.text for a in ask(m, tokenizer, paths, list(clips.values()))] for m in (exact, rounded)]
    assert texts[0] == texts[1]
