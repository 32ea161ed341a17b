"""Adapters and LoRA: sizes to the digit, values and gradients against independent oracles."""

import pytest
import torch
import torch.nn as nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

from adapters import (
    AcousticAdapter,
    LoRALinear,
    QFormerAttention,
    QFormerLayer,
    SemanticAdapter,
    add_lora,
    merge_lora,
)
from model import DIFFA2, PRESETS
from runtime.tutorials import count


def test_parameter_counts_to_the_digit():
    """Table B.3 recomputed, and the first generation on whisper-small (the sizes of DIFFA's own weights)."""
    with torch.device("meta"):
        two, one = DIFFA2(PRESETS["diffa2"], lora=True), DIFFA2(PRESETS["diffa1"], lora=True)
    lora = sum(p.numel() for n, p in two.named_parameters() if "lora_" in n)
    positions = two.encoder.positional_embedding.numel()  # a buffer here, a parameter in transformers
    assert count(two.encoder) + positions == 636_968_960
    assert count(two.semantic) == 36_392_448
    assert count(two.acoustic) == 47_892_992
    assert count(two.backbone) - lora == 8_015_581_184
    assert lora == 14_680_064
    assert two.soft_prompts.numel() == 81_920
    assert count(two.semantic) + count(two.acoustic) + lora == 98_965_504
    assert count(one.encoder) + one.encoder.positional_embedding.numel() == 88_154_112
    assert (count(one.semantic), count(one.acoustic)) == (14_369_280, 22_251_776)
    assert not any("lora_" in n for n, _ in one.named_parameters())


def reference_semantic(adapter, frames):
    """The semantic adapter (paper 3.1) on one clip, plainly: frames (n, d), n a multiple of 4."""
    x = nn.functional.pad(frames.T, (1, 1))
    x = nn.functional.conv1d(x[None], adapter.conv1.weight, adapter.conv1.bias)[0]
    x = nn.functional.pad(0.5 * x * (1 + torch.erf(x / 2**0.5)), (1, 1))
    w, b = adapter.conv2.weight, adapter.conv2.bias
    tokens = [(w * x[None, :, 4 * j : 4 * j + 3]).sum((1, 2)) + b for j in range(len(frames) // 4)]
    x = torch.stack(tokens) @ adapter.fc1.weight.T + adapter.fc1.bias
    x = x.clamp(min=0) @ adapter.fc2.weight.T + adapter.fc2.bias
    return nn.functional.layer_norm(
        x.clamp(min=0), x.shape[-1:], adapter.norm.weight, adapter.norm.bias, 1e-5
    )


def test_semantic_adapter_each_clip_as_if_alone():
    torch.manual_seed(0)
    adapter, frames = SemanticAdapter(8, 12), torch.randn(4, 40, 8)
    n_frames = torch.tensor([40, 23, 4, 31])
    tokens, is_audio = adapter(frames, n_frames)
    assert tokens.shape == (4, 10, 12)
    assert is_audio.sum(1).tolist() == [10, 5, 1, 7]
    for row, n in enumerate(n_frames.tolist()):
        kept = n // 4
        torch.testing.assert_close(
            tokens[row, :kept], reference_semantic(adapter, frames[row, : 4 * kept]), atol=1e-6, rtol=1e-5
        )


def test_a_very_short_clip_has_one_token():
    tokens, is_audio = SemanticAdapter(8, 12)(torch.randn(2, 40, 8), torch.tensor([1, 3]))
    assert tokens.shape == (2, 1, 12) and is_audio.all()


def bert_config(d, heads, ffn):
    """A Q-Former's layer in transformers' terms."""
    return BertConfig(
        hidden_size=d,
        num_attention_heads=heads,
        intermediate_size=ffn,
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        is_decoder=True,
        add_cross_attention=True,
        attn_implementation="eager",
    )


def bert_layer(ours, d, heads, ffn):
    """transformers' layer with the same weights; eager and dropout 0, else it would mask causally or drop."""
    bert = BertLayer(bert_config(d, heads, ffn))
    names = {"fc1": "intermediate.dense", "fc2": "output.dense", "norm": "output.LayerNorm"}
    for mine, theirs in (("self_attention", "attention"), ("cross_attention", "crossattention")):
        names |= {f"{mine}.{n}": f"{theirs}.self.{n}" for n in ("query", "key", "value")}
        names |= {f"{mine}.out": f"{theirs}.output.dense", f"{mine}.norm": f"{theirs}.output.LayerNorm"}
    renamed = {
        names[k.rpartition(".")[0]] + "." + k.rpartition(".")[2]: v for k, v in ours.state_dict().items()
    }
    bert.load_state_dict(renamed)
    return bert, names


def test_qformer_layer_is_bert_values_and_gradients():
    torch.manual_seed(0)
    d, heads, ffn = 24, 4, 40
    ours = QFormerLayer(d, heads, ffn, dropout=0.1).eval()
    bert, names = bert_layer(ours, d, heads, ffn)
    x, frames = torch.randn(3, 7, d, requires_grad=True), torch.randn(3, 50, d, requires_grad=True)
    x2, frames2 = x.detach().clone().requires_grad_(), frames.detach().clone().requires_grad_()
    target = torch.randn(3, 7, d)
    a = ours(x, frames)
    b = bert.eval()(x2, encoder_hidden_states=frames2)
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    (a * target).sum().backward()
    (b * target).sum().backward()
    torch.testing.assert_close(x.grad, x2.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(frames.grad, frames2.grad, atol=1e-5, rtol=1e-4)
    theirs = dict(bert.named_parameters())
    for name, p in ours.named_parameters():
        module, _, leaf = name.rpartition(".")
        torch.testing.assert_close(
            p.grad, theirs[f"{names[module]}.{leaf}"].grad, atol=1e-5, rtol=1e-4, msg=name
        )


def test_dropout_of_the_qformers_attention_weights():
    """As BERT has it, in training only.  With values of 1 the output counts the frames that stay."""
    torch.manual_seed(0)
    attention, n = QFormerAttention(4, 1, dropout=0.25), 20
    with torch.no_grad():
        for linear in (attention.query, attention.key, attention.value):
            linear.weight.zero_()  # all frames are looked at alike
            linear.bias.fill_(1.0)
        attention.out.weight.copy_(torch.eye(4))
        attention.out.bias.zero_()
    sums = []
    attention.out.register_forward_hook(lambda module, inputs, y: sums.append(y[:, 0, 0]))
    x, frames = torch.zeros(4000, 1, 4), torch.zeros(4000, n, 4)
    attention.eval()(x, frames)
    assert torch.allclose(sums[0], torch.ones(4000))
    attention.train()(x, frames)
    kept = sums[1] * 0.75 * n  # of n frames: what stays is scaled by 1 / 0.75
    assert torch.allclose(kept, kept.round(), atol=1e-4)
    assert abs(kept.mean() - 15) < 4 * (n * 0.25 * 0.75 / 4000) ** 0.5
    assert kept.var().item() == pytest.approx(n * 0.25 * 0.75, rel=0.15)


def test_acoustic_adapter_shares_the_qformer_and_mixes_per_query():
    """Against the plain formula: each tap alone through shared layers, a softmax over taps per query."""
    torch.manual_seed(0)
    d, D, taps, Q = 12, 10, 3, 5
    adapter = AcousticAdapter(d, D, taps, n_heads=2, d_ffn=20, n_queries=Q).eval()
    with torch.no_grad():
        adapter.tap_logits.normal_()
    x = torch.randn(2, taps, 30, d)
    per_tap = []
    for k in range(taps):
        y = adapter.queries[k].expand(2, -1, -1)
        for layer in adapter.layers:
            y = layer(y, x[:, k])
        per_tap.append(y)
    mix = adapter.tap_logits.exp() / adapter.tap_logits.exp().sum(1, keepdim=True)
    y = sum(mix[:, k, None] * per_tap[k] for k in range(taps))
    expected = (
        nn.functional.layer_norm(y, (d,), adapter.norm.weight, adapter.norm.bias) @ adapter.proj.weight.T
        + adapter.proj.bias
    )
    torch.testing.assert_close(adapter(x), expected, atol=1e-5, rtol=1e-4)
    assert AcousticAdapter(d, D, taps, 2).tap_logits.abs().sum() == 0  # an even mix to begin with


def lora_stack():
    torch.manual_seed(0)
    net = nn.ModuleDict({n: nn.Linear(6, 6, bias=False) for n in ("q_proj", "attn_out", "up_proj")})
    return net


def test_lora_starts_as_nothing_and_only_where_asked():
    net, x = lora_stack(), torch.randn(4, 6)
    before = {n: m(x) for n, m in net.items()}
    names = set(dict(net.named_parameters()))
    add_lora(net, r=2, alpha=4)
    assert isinstance(net["q_proj"], LoRALinear) and isinstance(net["up_proj"], LoRALinear)
    assert type(net["attn_out"]) is nn.Linear
    assert names <= set(dict(net.named_parameters()))  # checkpoints of the plain layers still fit
    for n, m in net.items():
        assert torch.equal(m.eval()(x), before[n])
    lora = net["q_proj"]
    assert [n for n, p in lora.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    # A is drawn as the Linear itself was: evenly from -1 / sqrt(6) to 1 / sqrt(6)
    wide = LoRALinear(nn.Linear(6, 6), 1000, 1000, 0.0).lora_A
    assert 0.99 < wide.abs().max() * 6**0.5 <= 1 and abs(wide.var().item() * 18 - 1) < 0.05


def test_lora_against_the_merged_matrix_values_and_gradients():
    net, x = lora_stack(), torch.randn(4, 6)
    layer = add_lora(net, r=2, alpha=4, dropout=0.5)["q_proj"].eval()
    with torch.no_grad():
        layer.lora_B.normal_()
    W, A, B = (p.detach().clone().requires_grad_() for p in (layer.weight, layer.lora_A, layer.lora_B))
    y, expected = layer(x), x @ (W + 4 / 2 * B @ A).T
    torch.testing.assert_close(y, expected)
    y.pow(2).sum().backward()
    expected.pow(2).sum().backward()
    torch.testing.assert_close(layer.lora_A.grad, A.grad)
    torch.testing.assert_close(layer.lora_B.grad, B.grad)
    merge_lora(net)
    assert type(net["q_proj"]) is nn.Linear and "lora" not in "".join(dict(net.named_parameters()))
    torch.testing.assert_close(net["q_proj"](x), expected)
    biased = LoRALinear(nn.Linear(6, 6), 2, 4, 0.0)  # LLaDA has no biases, another backbone may
    torch.testing.assert_close(biased.merged()(x), biased(x))
    assert not torch.equal(biased.merged()(x), x @ biased.weight.T)


def test_lora_dropout_is_on_in_training_only():
    layer = add_lora(lora_stack(), r=2, alpha=4, dropout=0.5)["q_proj"]
    with torch.no_grad():
        layer.lora_B.normal_()
    x = torch.randn(64, 6)
    assert not torch.equal(layer.train()(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_lora_trains_in_fp32_beside_bf16_weights():
    net = lora_stack().to(torch.bfloat16)
    layer = add_lora(net)["q_proj"].eval()
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    assert layer(torch.randn(3, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert merge_lora(net)["q_proj"].weight.dtype == torch.bfloat16
    with pytest.raises(RuntimeError):
        layer(torch.randn(3, 5, dtype=torch.bfloat16))


def test_the_semantic_adapter_multiplies_rows_that_lie_together():
    """torch multiplies a strided input in another way with gradients than without; VRPO compares the two."""
    adapter, strides = SemanticAdapter(64, 96), []
    adapter.fc1.register_forward_pre_hook(lambda module, inputs: strides.append(inputs[0].is_contiguous()))
    adapter(torch.randn(3, 40, 64), torch.tensor([40, 20, 31]))
    assert strides == [True]
