"""The backbone, the encoder and the splice against transformers and against themselves alone."""

import dataclasses
import json

import pytest
import torch
from conftest import SMALL, lively, whisper_encoder
from transformers import LlamaConfig, LlamaForCausalLM

from model import (
    DIFFA2,
    PRESETS,
    Cache,
    Config,
    Encoder,
    LLaDA,
    RMSNorm,
    attend,
    rope_table,
    rotate,
    splice_order,
)
from runtime.errors import UserError
from runtime.fresh import build

LLAMA = {  # our name of a part of a block -> transformers'
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
}


def llama_like(backbone, attention="eager"):
    """transformers' Llama with our backbone's weights."""
    c = backbone.c
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab,
            hidden_size=c.width,
            intermediate_size=c.ffn,
            num_hidden_layers=c.layers,
            num_attention_heads=c.heads,
            rms_norm_eps=c.norm_eps,
            max_position_embeddings=c.context,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
            tie_word_embeddings=False,
            attn_implementation=attention,
        )
    )
    renamed = {}
    for key in backbone.state_dict():
        if key.startswith("blocks."):
            _, n, part, leaf = key.split(".")
            renamed[key] = f"model.layers.{n}.{LLAMA[part]}.{leaf}"
        else:
            renamed[key] = {
                "wte.weight": "model.embed_tokens.weight",
                "ln_f.weight": "model.norm.weight",
                "ff_out.weight": "lm_head.weight",
            }[key]
    llama.load_state_dict({renamed[k]: v for k, v in backbone.state_dict().items()})
    return llama, renamed


@pytest.mark.parametrize("causal", [False, True])
def test_backbone_is_llama_values_and_gradients(causal):
    """LLaDA: a mask of zeros takes Llama's causality away.  The autoregressive baseline keeps it."""
    c = dataclasses.replace(SMALL, causal=causal, rope_theta=500000.0)
    model = lively(build(c, seed=0), scale=4)
    llama, renamed = llama_like(model.backbone)
    ids = torch.randint(0, c.vocab, (3, 17), generator=torch.Generator().manual_seed(0))
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    ours = model(ids, everywhere, everywhere).view(3, 17, -1)
    theirs = llama(ids, attention_mask=None if causal else torch.zeros(3, 1, 17, 17)).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    target = torch.randint(0, c.vocab, (3 * 17,), generator=torch.Generator().manual_seed(1))
    torch.nn.functional.cross_entropy(ours.flatten(0, 1), target).backward()
    torch.nn.functional.cross_entropy(theirs.flatten(0, 1), target).backward()
    reference = dict(llama.named_parameters())
    for name, p in model.backbone.named_parameters():
        torch.testing.assert_close(p.grad, reference[renamed[name]].grad, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    "mask",
    [None, torch.arange(7)[None, None, None] < 5, torch.ones(7, 7).tril()[None, None] > 0],
    ids=["all", "padding", "causal"],
)
def test_attention_spelled_out_is_torchs(mask):
    """Values and gradients."""
    start = [
        torch.randn(2, 3, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        for i in range(4)
    ]
    found = []
    for attention in (attend, torch.nn.functional.scaled_dot_product_attention):
        q, k, v = (x.clone().requires_grad_() for x in start[:3])
        y = attention(q, k, v, mask)
        (y * start[3]).sum().backward()
        found.append([y, q.grad, k.grad, v.grad])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_fresh_layers_add_about_what_was_there():
    """Embeddings of rms 1 enter, and all layers together less than double their variance.

    So a token still knows what it is.
    """
    model, seen = build(PRESETS["tiny"], seed=0), []
    model.backbone.ln_f.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    ids = torch.randint(10, 600, (4, 50), generator=torch.Generator().manual_seed(0))
    x = model.backbone.wte(ids)
    model.backbone(x, None)
    assert x.pow(2).mean().sqrt().item() == pytest.approx(1, abs=0.05)
    assert 1 < (seen[0].pow(2).mean() / x.pow(2).mean()).item() < 2
    assert torch.nn.functional.cosine_similarity(seen[0], x, -1).mean() > 0.7


def test_rope_and_rmsnorm_compute_in_fp32():
    """In bf16 both stay within one rounding of the fp32 result; computed in bf16 they would not."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 64, 16, generator=g).to(torch.bfloat16)
    rope = rope_table(torch.arange(3000, 3064)[None], 16, 500000.0)
    assert rope[0].dtype == torch.float32
    exact = rotate(x.double(), tuple(t.double() for t in rope))
    assert torch.equal(rotate(x, rope), rotate(x.float(), rope).to(torch.bfloat16))
    assert (rotate(x, rope).double() - exact).abs().max() <= exact.abs().max() * 2**-8
    norm = RMSNorm(16, 1e-5).to(torch.bfloat16)
    with torch.no_grad():
        norm.weight.normal_(generator=g)
    y = x.float()
    expected = norm.weight * (y / (y.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()).to(torch.bfloat16)
    assert torch.equal(norm(x), expected)


def random_row(c, n_text, n_audio, g):
    """ids (n_text,), audio (n_audio, D)."""
    return torch.randint(6, c.vocab, (n_text,), generator=g), torch.randn(n_audio, c.width, generator=g)


def test_splice_order_against_lists():
    for n_text, n_audio, at in ((7, 3, (0, 4, 7)), (5, 1, (5, 2, 1)), (4, 6, (3, 0, 4))):
        order = splice_order(n_text, n_audio, torch.tensor(at))
        for row, a in zip(order.tolist(), at, strict=True):
            text, audio = list(range(n_text)), list(range(n_text, n_text + n_audio))
            assert row == text[:a] + audio + text[a:]


def test_a_row_does_not_see_its_neighbours(small):
    """Three prompt lengths x three clip lengths in one batch, padded left, right and in the audio."""
    c, g = small.config, torch.Generator().manual_seed(0)
    rows = [random_row(c, t, a, g) for t in (9, 14, 20) for a in (2, 5, 11)]
    at = [3, 5, 0, 4, 7, 2, 9, 1, 6]
    T, A = 24, 11
    ids, valid = torch.zeros(9, T, dtype=torch.long), torch.zeros(9, T, dtype=torch.bool)
    audio, is_audio = torch.randn(9, A, c.width, generator=g), torch.zeros(9, A, dtype=torch.bool)
    audio_at = []
    for i, (text, sound) in enumerate(rows):
        left = (0, 1, T - len(text))[i % 3]  # padded right, both, left
        ids[i] = torch.randint(6, c.vocab, (T,), generator=g)  # rubbish where it is not valid
        ids[i, left : left + len(text)], valid[i, left : left + len(text)] = text, True
        audio[i, : len(sound)], is_audio[i, : len(sound)] = sound, True
        audio_at.append(left + at[i])
    together = small(ids, valid, valid, audio, is_audio, torch.tensor(audio_at))
    begin = 0
    for i, (text, sound) in enumerate(rows):
        everywhere = torch.ones(1, len(text), dtype=torch.bool)
        alone = small(
            text[None],
            everywhere,
            everywhere,
            sound[None],
            torch.ones(1, len(sound), dtype=torch.bool),
            torch.tensor([at[i]]),
        )
        torch.testing.assert_close(together[begin : begin + len(text)], alone, atol=2e-4, rtol=1e-4)
        begin += len(text)


def test_splice_is_the_embedding_sequence(small):
    """Splicing the embeddings of tokens gives what those tokens in the text give."""
    c, g = small.config, torch.Generator().manual_seed(0)
    ids, _ = random_row(c, 20, 1, g)
    everywhere = torch.ones(1, 20, dtype=torch.bool)
    whole = small(ids[None], everywhere, everywhere)
    kept = torch.cat([ids[:6], ids[11:]])[None]
    part = torch.ones(1, 15, dtype=torch.bool)
    spliced = small(
        kept,
        part,
        part,
        small.backbone.wte(ids[6:11])[None],
        torch.ones(1, 5, dtype=torch.bool),
        torch.tensor([6]),
    )
    torch.testing.assert_close(spliced, torch.cat([whole[:6], whole[11:]]), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_cached_pass_over_unchanged_tokens(causal, config):
    """Recomputing part of a row on cached keys and values gives what the whole pass gave."""
    model = lively(build(dataclasses.replace(config, causal=causal), seed=0))
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(6, config.vocab, (2, 22), generator=g)
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, :4] = False  # left padding
    audio, is_audio = torch.randn(2, 7, config.width, generator=g), torch.ones(2, 7, dtype=torch.bool)
    is_audio[0, 5:] = False
    cache, at = Cache(), torch.tensor([3, 6])
    with torch.no_grad():
        whole = model(ids, valid, valid, audio, is_audio, at, cache=cache)
        where = valid.clone()
        where[:, :14] = False
        expected = model(ids, valid, where, audio, is_audio, at)
        for stop in (18, 22):  # a block in the middle (dual), the rest of the row (prefix)
            part = slice(14, stop)
            again = model(ids[:, part], valid[:, part], where[:, part], cache=cache, start=14 + 7)
            rows = expected.view(2, 8, -1)[:, : stop - 14].flatten(0, 1)
            torch.testing.assert_close(again, rows, atol=2e-4, rtol=1e-4)
        # a changed token at the end of the row: the prefix pass with fresh columns sees it
        changed = ids.clone()
        changed[:, 20] = 7
        fresh = model(changed[:, 14:], valid[:, 14:], where[:, 14:], cache=cache, start=21)
    assert len(whole) == 22 + 18 and not torch.allclose(fresh, expected, atol=1e-2)


def test_encoder_taps_are_transformers_hidden_states():
    c = dataclasses.replace(SMALL, taps=(0, 1, 2, 3))
    torch.manual_seed(0)
    ours = Encoder(c).eval()
    theirs = whisper_encoder(c.audio_width, c.audio_layers, c.audio_heads, c.n_mels, c.n_frames)
    names = {
        "attn.query": "self_attn.q_proj",
        "attn.key": "self_attn.k_proj",
        "attn.value": "self_attn.v_proj",
        "attn.out": "self_attn.out_proj",
        "attn_ln": "self_attn_layer_norm",
        "mlp.0": "fc1",
        "mlp.2": "fc2",
        "mlp_ln": "final_layer_norm",
    }
    weights = {"embed_positions.weight": ours.positional_embedding}
    for key, value in ours.state_dict().items():
        if key.startswith("blocks."):
            _, n, rest = key.split(".", 2)
            module, leaf = rest.rsplit(".", 1)
            key = f"layers.{n}.{names[module]}.{leaf}"
        weights[key.replace("ln_post", "layer_norm")] = value
    theirs.load_state_dict(weights)
    mel = torch.randn(2, c.n_mels, 2 * c.n_frames)
    with torch.no_grad():
        taps, final = ours(mel, c.taps)
        reference = theirs(mel, output_hidden_states=True)
    assert taps.shape == (2, 4, c.n_frames, c.audio_width)
    for k in (0, 1, 2):
        torch.testing.assert_close(taps[:, k], reference.hidden_states[k], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(final, reference.last_hidden_state, atol=1e-5, rtol=1e-4)
    # the last tap is the last block's output, before the final norm
    torch.testing.assert_close(ours.ln_post(taps[:, 3]), final)
    # a shorter window is what an encoder built for it would make of it; a longer one has no positions
    shorter = Encoder(dataclasses.replace(c, n_frames=c.n_frames // 2)).eval()
    shorter.load_state_dict(ours.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(ours(mel[:, :, : c.n_frames])[1], shorter(mel[:, :, : c.n_frames])[1])
    with pytest.raises(ValueError, match="200"):
        ours(torch.cat([mel, mel], 2))


def test_presets_have_the_published_taps_and_ids():
    two, one = PRESETS["diffa2"], PRESETS["diffa1"]
    assert two.taps == tuple(range(3, 32, 4)) and one.taps == (2, 5, 8, 11)
    assert (two.bos_id, two.eos_id, two.mask_id) == (126080, 126081, 126336)
    assert (two.start_header_id, two.end_header_id, two.eot_id) == (126346, 126347, 126348)
    with torch.device("meta"):
        backbone = LLaDA(two).state_dict()
    assert len(backbone) == 291 and sum(v.numel() * 2 for v in backbone.values()) == 16_031_162_368
    assert backbone["blocks.31.ff_out.weight"].shape == (4096, 12288)
    with pytest.raises(ValueError):
        Config(taps=(3, 33))


def test_adapt_orders_prompts_and_clips(small):
    mel = torch.randn(2, 80, 200)
    taps, final = small.encode(mel, torch.full((len(mel),), 100))
    assert not taps.requires_grad and not final.requires_grad
    n_frames = torch.tensor([100, 41])
    audio, is_audio = small.adapt(taps, final, n_frames, stage=1)
    assert audio.shape == (2, 4 + 25, 32) and is_audio.sum(1).tolist() == [29, 14]
    torch.testing.assert_close(audio[1, :4], small.soft_prompts)
    two, is_audio = small.adapt(taps, final, n_frames, stage=2)
    assert two.shape == (2, 5 + 25, 32) and is_audio.sum(1).tolist() == [30, 15]
    torch.testing.assert_close(two[:, 5:], audio[:, 4:])
    torch.testing.assert_close(two[:, :5], small.acoustic(taps))


def test_tokenizer_without_mask_is_refused(tokenizer):
    from tokenizers import Tokenizer

    text = json.loads(tokenizer.to_str())
    text["added_tokens"] = [t for t in text["added_tokens"] if t["content"] != "<|mdm_mask|>"]
    del text["model"]["vocab"]["<|mdm_mask|>"]
    with pytest.raises(UserError, match="mdm_mask"):
        Config().with_tokenizer(Tokenizer.from_str(json.dumps(text)))


def test_logits_are_computed_only_where_asked(small):
    """The head sees exactly the rows that `where` names, in the order of noisy[where]."""
    ids = torch.randint(6, small.config.vocab, (2, 10), generator=torch.Generator().manual_seed(0))
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    where = torch.rand(2, 10, generator=torch.Generator().manual_seed(1)) < 0.4
    seen = []
    handle = small.backbone.ff_out.register_forward_hook(lambda m, i, o: seen.append(len(i[0])))
    some, whole = small(ids, everywhere, where), small(ids, everywhere, everywhere)
    handle.remove()
    assert seen == [int(where.sum()), 20]
    torch.testing.assert_close(some, whole.view(2, 10, -1)[where])


def test_meta_model_is_the_preset():
    with torch.device("meta"):
        tiny = DIFFA2(PRESETS["tiny"], lora=True)
    trained = sum(p.numel() for n, p in tiny.named_parameters() if not n.startswith("encoder."))
    assert 2 * trained < 30_000_000  # bytes in bf16, beside Whisper's encoder


def test_short_windows_do_not_depend_on_the_batch(config):
    """With pad_to a clip is encoded in its own window, and heard alike in company.

    The window ends in a fifth of a step of silence at least; the Q-Former sees its own window's frames,
    normalised where norm_taps is set.
    """
    c = dataclasses.replace(config, pad_to=25, norm_taps=True)
    model = build(c, seed=0).eval()
    n_frames = torch.tensor([3, 19, 20, 71, 100])
    assert model.windows(n_frames).tolist() == [25, 25, 50, 100, 100]
    assert build(config, seed=0).windows(n_frames).tolist() == [100] * 5
    mel = torch.randn(5, 80, 200, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        taps, final = model.encode(mel, n_frames)
        audio, is_audio = model.adapt(taps, final, n_frames, 2)
        for row, n in enumerate(n_frames.tolist()):
            window = int(model.windows(torch.tensor([n])))
            plain_taps, plain_final = model.encoder(mel[row : row + 1, :, : 2 * window], c.taps)
            assert (
                torch.allclose(final[row, :window], plain_final[0], atol=1e-5)
                and not final[row, window:].any()
            )
            normed = torch.nn.functional.layer_norm(plain_taps, plain_taps.shape[-1:])
            assert torch.allclose(audio[row, : c.n_queries], model.acoustic(normed)[0], atol=1e-5)
            alone, _ = model.adapt(
                *model.encode(mel[row : row + 1], n_frames[row : row + 1]), n_frames[row : row + 1], 2
            )
            assert torch.allclose(alone[0], audio[row][is_audio[row]], atol=1e-5)
