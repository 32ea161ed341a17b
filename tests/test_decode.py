"""Samplers against slow references, Eq. 8 against brute force, rows against themselves alone, bad input."""

import copy
import dataclasses
import io
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
import torch

from data import load_audio, window_samples
from decode import (
    Options,
    ask,
    choose,
    close_after_end,
    count_by_factor,
    count_by_schedule,
    count_by_threshold,
    generate,
    generate_ar,
    main,
    most_confident,
    parse,
)
from model import Cache, rope_table
from runtime.errors import UserError
from runtime.fresh import build
from runtime.recordings import split_clip
from runtime.terminal import Stream
from tools.bench_decode import naive_generate
from weights import load

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# ---------------------------------------------------------------------------------- a slow reference


def reference(predict, c, answer_length, block, steps=None, factor=1.0, threshold=None):
    """The paper's 3.6 and B.4 for one prompt, in lists: predict all, keep the surest, stop at the end mark.

    predict: answer (list) -> logits (answer_length, vocab)."""
    answer, calls = [c.mask_id] * answer_length, 0
    for first in range(0, answer_length, block):
        inside = range(first, first + block)
        per_block = steps and steps // (answer_length // block)
        step = 0
        while any(answer[i] == c.mask_id for i in inside):
            with torch.no_grad():
                logits = predict(answer).clone()
            calls += 1
            logits[:, c.mask_id] = -math.inf
            p, token = logits.softmax(-1).max(-1)
            candidates = sorted(
                (i for i in inside if answer[i] == c.mask_id), key=lambda i: (-p[i].item(), i)
            )
            if steps:
                keep = block // per_block + (1 if step < block % per_block else 0)
            elif threshold is not None:
                keep = max(1, sum(p[i].item() > threshold for i in candidates))
            else:
                keep = max(
                    [
                        n
                        for n in range(1, len(candidates) + 1)
                        if (n + 1) * (1 - p[candidates[n - 1]].item()) < factor
                    ],
                    default=1,
                )
            for i in candidates[:keep]:
                answer[i] = token[i].item()
            for i, t in enumerate(answer):
                if t == c.mask_id:
                    break
                if t == c.eos_id:
                    answer[i:] = [c.eos_id] * (answer_length - i)
                    break
            step += 1
    return answer, calls


def alone(model, prompt, audio, audio_at):
    """`predict` for one row of a scene."""

    def predict(answer):
        ids = torch.tensor([prompt + answer])
        everywhere = torch.ones_like(ids, dtype=torch.bool)
        sound = torch.ones(1, audio.size(1), dtype=torch.bool)
        return model(ids, everywhere, everywhere, audio, sound, torch.tensor([audio_at]))[len(prompt) :]

    return predict


def scene(model, n_prompts=(9, 14, 20), n_audio=(2, 5, 11), seed=0):
    """Prompts of three lengths x clips of three lengths, as one padded batch and as rows."""
    g, c = torch.Generator().manual_seed(seed), model.config
    rows = []
    for p in n_prompts:
        for a in n_audio:
            prompt = torch.randint(6, c.vocab, (p,), generator=g).tolist()
            rows.append((prompt, torch.randn(1, a, c.width, generator=g), p // 2))
    A = max(n_audio)
    audio = torch.randn(len(rows), A, c.width, generator=g)
    is_audio = torch.zeros(len(rows), A, dtype=torch.bool)
    for i, (_, sound, _) in enumerate(rows):
        audio[i, : sound.size(1)], is_audio[i, : sound.size(1)] = sound[0], True
    return rows, ([r[0] for r in rows], audio, is_audio, [r[2] for r in rows])


# 128/128/128, 16/16/16, 128/32/128, 256/32/256 over 8
TABLE_B4 = [(16, 16, 16), (2, 2, 2), (16, 4, 16), (32, 4, 32)]
FEWER = [(16, 16, 5), (16, 4, 8), (32, 8, 12), (12, 12, 1), (12, 4, 3)]


@pytest.mark.parametrize("answer_length, block, steps", TABLE_B4 + FEWER)
def test_fixed_step_remasking_is_the_reference(small, answer_length, block, steps):
    rows, batch = scene(small, (9, 14), (2, 5))
    answers, calls = generate(small, *batch, answer_length=answer_length, block=block, steps=steps)
    for i, row in enumerate(rows):
        assert (answers[i].tolist(), calls[i].item()) == reference(
            alone(small, *row), small.config, answer_length, block, steps=steps
        )
    assert (answers != small.config.mask_id).all() and calls.max() <= steps


@pytest.mark.parametrize("answer_length, block", [(16, 16), (2, 2), (16, 4), (32, 4)])
@pytest.mark.parametrize(
    "rule", [{"factor": 0.3}, {"factor": 1.0}, {"factor": 3.0}, {"threshold": 0.2}, {"threshold": 1.0}]
)
def test_parallel_decoding_is_the_reference(small, answer_length, block, rule):
    rows, batch = scene(small, (9, 14), (2, 5))
    answers, calls = generate(small, *batch, answer_length=answer_length, block=block, **rule)
    for i, row in enumerate(rows):
        assert (answers[i].tolist(), calls[i].item()) == reference(
            alone(small, *row), small.config, answer_length, block, **rule
        )


def test_the_small_model_is_sure_now_and_then(small):
    """The tests above mean something only if factor decoding keeps now several tokens, now one."""
    _, batch = scene(small)
    _, calls = generate(small, *batch, answer_length=16, block=16, factor=1.0)
    assert calls.min() < 16 and calls.max() > 1 and len(set(calls.tolist())) > 1


def test_end_mark_stops_and_closes(small):
    """Heads that love the end mark more or less: rows stop early where the reference does."""
    model, c = small, small.config
    rows, batch = scene(model, (9, 14), (2, 5))
    stopped = 0
    for seed in range(6):
        with torch.no_grad():
            direction = torch.randn(c.width, generator=torch.Generator().manual_seed(seed))
            model.backbone.ff_out.weight[c.eos_id] = direction * 3
        answers, calls = generate(model, *batch, answer_length=16, block=4, factor=1.0)
        for i, row in enumerate(rows):
            expected, n = reference(alone(model, *row), c, 16, 4)
            assert (answers[i].tolist(), calls[i].item()) == (expected, n)
            stopped += calls[i].item() < 4
    assert stopped > 0  # some rows ended before their later blocks: four blocks need four calls at least


def test_mask_is_never_emitted(small):
    """Even by a head that prefers it to everything."""
    with torch.no_grad():
        small.backbone.ff_out.weight[small.config.mask_id] *= 50
    _, batch = scene(small)
    for options in ({"steps": 8}, {"factor": 1.0}, {"threshold": 0.0}, {"factor": 1.0, "temperature": 2.0}):
        answers, _ = generate(small, *batch, answer_length=8, block=4, **options)
        assert (answers != small.config.mask_id).all()


@pytest.mark.parametrize(
    "options",
    [{"steps": 8}, {"factor": 1.0}, {"factor": 1.0, "cache": "prefix"}, {"steps": 16, "cache": "dual"}],
)
def test_a_row_gets_what_it_gets_alone(small, options):
    """Three prompt lengths x three clip lengths."""
    rows, batch = scene(small)
    answers, calls = generate(small, *batch, answer_length=16, block=8, **options)
    for i, (prompt, audio, at) in enumerate(rows):
        sound = torch.ones(1, audio.size(1), dtype=torch.bool)
        by_itself, n = generate(small, [prompt], audio, sound, [at], answer_length=16, block=8, **options)
        assert torch.equal(answers[i], by_itself[0]) and calls[i] == n[0]


@pytest.mark.parametrize("answer_length, block, steps", TABLE_B4 + FEWER)
def test_the_naive_sampler_gives_the_same_tokens(small, answer_length, block, steps):
    """What tools/bench_decode.py times against: full rows, all positions, float64, without end marks."""
    with torch.no_grad():
        small.backbone.ff_out.weight[small.config.eos_id] = 0
    rows, batch = scene(small)
    answers, _ = generate(small, *batch, answer_length=answer_length, block=block, steps=steps)
    for i, (prompt, audio, at) in enumerate(rows):
        assert small.config.eos_id not in answers[i]
        naive = naive_generate(small, prompt, audio, None, at, answer_length, block, steps)
        assert naive.tolist() == answers[i].tolist()


@pytest.mark.parametrize(
    "options", [{}, {"cache": "prefix"}, {"cache": "dual"}, {"cache": "dual", "refresh": 2}]
)
def test_finished_rows_leave_the_batch(small, options, monkeypatch):
    """The network sees a row as often as that row needs, and no oftener."""
    _, batch = scene(small)
    seen, forward = [], small.forward
    monkeypatch.setattr(
        small, "forward", lambda ids, *rest, **more: seen.append(len(ids)) or forward(ids, *rest, **more)
    )
    _, calls = generate(small, *batch, answer_length=16, block=8, factor=1.0, **options)
    assert sum(seen) == calls.sum() and min(seen) < len(calls)


def test_one_row_meets_no_mask(small, monkeypatch):
    rows, _ = scene(small)
    prompt, audio, at = rows[0]
    seen, attention = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *a, attn_mask=None, **k: seen.append(attn_mask) or attention(*a, attn_mask=attn_mask, **k),
    )
    for cache in ("none", "prefix"):
        generate(
            small,
            [prompt],
            audio,
            torch.ones(1, audio.size(1), dtype=torch.bool),
            [at],
            answer_length=8,
            block=4,
            cache=cache,
        )
    assert seen and all(mask is None for mask in seen)


def test_options_whole_or_by_name(small):
    """An Options, single fields of one, or both; what is none of them, or does not fit, is refused."""
    _, batch = scene(small)
    whole = generate(small, *batch, Options(answer_length=16, block=8, steps=4))
    by_name = generate(small, *batch, answer_length=16, block=8, steps=4)
    mixed = generate(small, *batch, Options(answer_length=16, block=16, steps=4), block=8)
    for answers, calls in (by_name, mixed):
        assert torch.equal(answers, whole[0]) and torch.equal(calls, whole[1])
    with pytest.raises(TypeError, match="hurry"):
        generate(small, *batch, hurry=True)
    for wrong in ({"cache": "magic"}, {"refresh": 0}, {"steps": 7, "block": 8}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            generate(small, *batch, **wrong)


@pytest.mark.parametrize("end", ["turn", "end mark"])
def test_the_autoregressive_baseline_against_a_plain_loop(small, config, end):
    """Three prompt lengths x three clip lengths, cached and in a batch; the loop runs whole rows."""
    model = small
    c = model.config = model.backbone.c = dataclasses.replace(config, causal=True)
    rows, batch = scene(model)
    answers, calls = generate_ar(model, *batch, answer_length=10)
    with torch.no_grad():  # what would have been the third token of the first answer ends it
        head = model.backbone.ff_out.weight
        head[c.eot_id if end == "turn" else c.eos_id] = 1.01 * head[answers[0, 2]]
    answers, calls = generate_ar(model, *batch, answer_length=10)
    assert calls.min() <= 3
    for i, (prompt, audio, at) in enumerate(rows):
        answer = []
        while len(answer) < 10 and not {c.eot_id, c.eos_id} & set(answer):
            ids = torch.tensor([prompt + answer])
            everywhere = torch.ones_like(ids, dtype=torch.bool)
            with torch.no_grad():
                logits = model(
                    ids,
                    everywhere,
                    everywhere,
                    audio,
                    torch.ones(1, audio.size(1), dtype=torch.bool),
                    torch.tensor([at]),
                )[-1]
            logits[c.mask_id] = -math.inf
            answer.append(logits.argmax().item())
        assert answers[i].tolist() == answer + [c.eos_id] * (10 - len(answer)) and calls[i] == len(answer)
    with pytest.raises(UserError, match="both ways"):
        generate_ar(build(config, seed=1), *batch)


def test_a_cache_keeps_rows(small):
    rows, batch = scene(small)
    cache = Cache()
    x, valid = torch.randn(4, 6, small.config.width), torch.ones(4, 6, dtype=torch.bool)
    valid[2, 0] = False
    small.backbone(x, valid, cache)
    cache.keep(torch.tensor([1, 2]))
    again = small.backbone(x[1:3, 4:], None, cache, 4)
    assert torch.allclose(again, small.backbone(x, valid)[1:3, 4:], atol=1e-5)


def test_seeds(small):
    """Sampling depends on a row's own generator, not on its place in the batch; a seed matters."""
    rows, batch = scene(small)
    options = {"answer_length": 16, "block": 8, "temperature": 1.5}

    def seeded(seeds):
        return [torch.Generator().manual_seed(s) for s in seeds]

    answers, _ = generate(small, *batch, generator=seeded(range(9)), **options)
    again, _ = generate(small, *batch, generator=seeded(range(9)), **options)
    assert torch.equal(answers, again)
    for i, (prompt, audio, at) in enumerate(rows):
        sound = torch.ones(1, audio.size(1), dtype=torch.bool)
        by_itself, _ = generate(small, [prompt], audio, sound, [at], generator=seeded([i]), **options)
        assert torch.equal(answers[i], by_itself[0])
    assert not torch.equal(answers, generate(small, *batch, generator=seeded(range(9, 18)), **options)[0])


def test_text_alone(small):
    prompts = [[7, 8, 9], [10, 11, 12, 13, 14]]
    answers, _ = generate(small, prompts, answer_length=8, block=4, steps=8)
    by_itself, _ = generate(small, prompts[:1], answer_length=8, block=4, steps=8)
    assert torch.equal(answers[0], by_itself[0])


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_cache_refreshed_at_each_call_is_no_cache(small, cache):
    _, batch = scene(small)
    options = {"answer_length": 16, "block": 4, "steps": 16}
    plain, _ = generate(small, *batch, **options)
    fresh, _ = generate(small, *batch, cache=cache, refresh=1, **options)
    assert torch.equal(plain, fresh)
    # a block's first call is exact; with one call a block nothing is approximate
    one = {"answer_length": 16, "block": 4, "steps": 4}
    assert torch.equal(generate(small, *batch, **one)[0], generate(small, *batch, cache=cache, **one)[0])


def spelled_out(model, x, live, frozen):
    """The backbone on the columns `live` of one row, spelled out: no cache, no mask, one head at a time.

    x (T, width): embeddings of the whole row.  frozen: per layer keys and values (H, T, d) that stand in for
    those of all other columns; None where there are no others.  Returns hidden states after ln_f
    (len(live), width), and keys and values of every layer.
    """
    c, backbone = model.config, model.backbone
    d = c.width // c.heads
    cos, sin = rope_table(torch.arange(len(x))[None], d, c.rope_theta)
    cos, sin = cos.reshape(len(x), d)[live], sin.reshape(len(x), d)[live]
    h, kept = x[live], []

    def turned(z):
        return z * cos + torch.cat([-z[:, d // 2 :], z[:, : d // 2]], -1) * sin

    for layer, block in enumerate(backbone.blocks):
        y = block.attn_norm(h)
        heads, keys, values = [], [], []
        for i in range(c.heads):
            rows = slice(i * d, (i + 1) * d)
            q, k, v = (y @ p.weight[rows].T for p in (block.q_proj, block.k_proj, block.v_proj))
            all_k, all_v = (
                (torch.zeros(len(x), d), torch.zeros(len(x), d))
                if frozen is None
                else (z[i].clone() for z in frozen[layer])
            )
            all_k[live], all_v[live] = turned(k), v
            heads.append((turned(q) @ all_k.T / d**0.5).softmax(-1) @ all_v)
            keys.append(all_k)
            values.append(all_v)
        kept.append((torch.stack(keys), torch.stack(values)))
        h = h + block.attn_out(torch.cat(heads, -1))
        y = block.ff_norm(h)
        h = h + block.ff_out(torch.nn.functional.silu(block.ff_proj(y)) * block.up_proj(y))
    return backbone.ln_f(h), kept


def with_stale_entries(model, prompt, audio, audio_at, block, cache, refresh):
    """`predict` of one row whose columns outside the block are as they were at the last refresh.

    The frozen columns' keys and values are computed anew at every call, from the answer of that time.
    """
    state = {"first": None, "step": 0, "then": None}

    def embedded(answer):
        x = model.backbone.wte(torch.tensor(prompt + answer))
        return torch.cat([x[:audio_at], audio[0], x[audio_at:]])

    def predict(answer):
        first = answer.index(model.config.mask_id) // block * block
        if first != state["first"]:
            state.update(first=first, step=0)
        if state["step"] % (refresh or 1000) == 0:
            state["then"] = list(answer)
        state["step"] += 1
        before = len(prompt) + audio.size(1)
        everything = list(range(before + len(answer)))
        _, frozen = spelled_out(model, embedded(state["then"]), everything, None)
        last = first + block if cache == "dual" else len(answer)
        live = [before + i for i in range(first, last)]
        h, _ = spelled_out(model, embedded(answer), live, frozen)
        logits = torch.zeros(len(answer), model.config.vocab)
        logits[first:last] = model.backbone.ff_out(h)
        return logits

    return predict


def recording(predict, mask_id, kept):
    """`predict` that adds to `kept` every answer that it is given and the confidences that it finds."""

    def recorded(so_far):
        logits = predict(so_far)
        p = logits.index_fill(1, torch.tensor([mask_id]), -math.inf).softmax(-1).amax(-1)
        kept.append((list(so_far), p))
        return logits

    return recorded


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("refresh", [None, 2])
@pytest.mark.parametrize("rule", [{"steps": 16}, {"factor": 0.5}])
def test_stale_entries_are_those_of_the_last_refresh(small, cache, refresh, rule):
    """Tokens, calls and confidences against keys and values that are recomputed as they were."""
    rows, _ = scene(small)
    with torch.no_grad():
        small.backbone.ff_out.weight[small.config.eos_id] = 0  # no end mark: every block is filled to its end
    differs = False
    for prompt, audio, at in rows[::2]:
        sound, seen = torch.ones(1, audio.size(1), dtype=torch.bool), []
        options = {"answer_length": 16, "block": 8, **rule}

        def keep(response, sure, n, seen=seen):
            seen.append(sure.clone())

        stale = {"cache": cache, "refresh": refresh, "on_step": keep}
        answer, calls = generate(small, [prompt], audio, sound, [at], **stale, **options)
        predict, expected = with_stale_entries(small, prompt, audio, at, 8, cache, refresh), []
        recorded = recording(predict, small.config.mask_id, expected)
        assert (answer[0].tolist(), calls[0].item()) == reference(recorded, small.config, 16, 8, **rule)
        final = answer[0].tolist()
        for call, (so_far, p) in enumerate(expected):
            after = expected[call + 1][0] if call + 1 < len(expected) else final
            new = [i for i in range(16) if so_far[i] != after[i]]
            assert new and torch.allclose(seen[call][0][new], p[new], atol=1e-4)
        differs |= final != generate(small, [prompt], audio, sound, [at], **options)[0][0].tolist()
    assert differs  # entries that nobody misses would prove nothing


# ---------------------------------------------------------------------------------- the rules


def brute_force(confidences, factor):
    """Eq. 8 tried for every n."""
    return max(
        [n for n in range(1, len(confidences) + 1) if (n + 1) * (1 - confidences[n - 1]) < factor], default=1
    )


def test_factor_rule_against_brute_force():
    g = torch.Generator().manual_seed(0)
    for n in range(1, 12):
        for factor in (0.1, 0.5, 1.0, 2.0, 20.0):
            c = (
                torch.rand(300, n, generator=g, dtype=torch.float64)
                ** torch.tensor([0.02, 0.2, 1.0])[torch.randint(3, (300, 1), generator=g)]
            )
            c = (c * 20).round() / 20  # ties and ones
            c = c.sort(1, descending=True).values
            assert count_by_factor(c, factor).tolist() == [brute_force(row, factor) for row in c.tolist()]


def test_factor_rule_at_its_edges():
    def count(factor, *c):
        return count_by_factor(torch.tensor([c], dtype=torch.float64), factor).item()

    assert count(1.0, 0.9, 0.9, 0.5) == 2  # only the last candidate fails: it stays masked
    assert count(1.0, 0.1, 0.1) == 1  # none passes: one is kept all the same
    assert count(0.001, 1.0, 1.0, 1.0) == 3
    assert count(0.5, 0.75, 0.75) == 1  # 2 x 0.25 < 0.5 is false: strictly less
    assert count(100.0, 0.9, float("-inf")) == 1  # what is not masked is no candidate


def test_threshold_rule():
    c = torch.tensor([[0.9, 0.8, 0.3], [0.5, 0.4, float("-inf")]])
    assert count_by_threshold(c, 0.8).tolist() == [1, 1]
    assert count_by_threshold(c, 0.35).tolist() == [2, 2]


def test_ties_go_to_the_lower_position():
    c = torch.tensor([[0.5, 0.7, 0.7, 0.7, float("-inf")]])

    def keep(**rule):
        return most_confident(c, Options(5, 5, **rule), 0)[0].nonzero().flatten().tolist()

    # 5, 3, 2, 1 steps: 1, 2, 3, 5 tokens in the first call; four are above 0.4
    assert [keep(steps=n) for n in (5, 3, 2)] == [[1], [1, 2], [1, 2, 3]]
    assert keep(threshold=0.4) == [0, 1, 2, 3] and keep(steps=1) == [0, 1, 2, 3]


def test_schedule_is_even_with_the_remainder_first():
    for masks, steps, wanted in ((16, 5, [4, 3, 3, 3, 3]), (4, 4, [1] * 4), (7, 2, [4, 3])):
        assert [count_by_schedule(masks, steps, step) for step in range(steps)] == wanted


def test_close_after_end():
    M, E = 9, 1
    response = torch.tensor([[5, E, 6, M], [M, E, 6, 7], [E, M, M, M], [5, 6, E, 7]])
    close_after_end(response, M, E)
    assert response.tolist() == [[5, E, E, E], [M, E, 6, 7], [E, E, E, E], [5, 6, E, E]]


def test_a_stub_without_parameters_is_decoded(config):
    """The decoders ask a model for its config and for logits, no more: here always those of token 9."""

    class Stub(torch.nn.Module):
        def forward(self, ids, valid, where, **rest):
            return 50.0 * torch.eye(config.vocab)[[9] * len(where[0])]

    stub = Stub()
    stub.config = config
    answers, calls = generate(stub, [[7, 8]], answer_length=4, block=4)
    assert answers.tolist() == [[9] * 4] and calls.tolist() == [1]
    stub.config = dataclasses.replace(config, causal=True)
    answers, calls = generate_ar(stub, [[7, 8]], answer_length=4)
    assert answers.tolist() == [[9] * 4] and calls.tolist() == [4]


def test_with_a_factor_steps_are_ignored(small):
    """Appendix B.4.  A threshold goes before both, as on the command line one of the three is given."""
    _, batch = scene(small, (9,), (5,))

    def found(**options):
        answers, calls = generate(small, *batch, answer_length=16, block=16, **options)
        return answers.tolist(), calls.tolist()

    assert found(steps=16, factor=2.0) == found(factor=2.0) != found(steps=16)
    assert found(factor=1.0) == found()


def test_choose_leaves_the_logits_as_they_were():
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    for temperature in (0.0, 1.0):  # without `rows`, all places are one row's
        assert (choose(logits, 3, temperature)[0] != 3).all() and torch.equal(logits, before)


def test_what_a_row_draws_does_not_depend_on_the_others():
    g = torch.Generator().manual_seed(0)
    logits, rows = torch.randn(6, 50, generator=g), torch.tensor([0, 0, 2, 2, 2, 3])
    token, _ = choose(logits, 3, 5.0, rows, [torch.Generator().manual_seed(s) for s in range(4)])
    for row in (0, 2, 3):
        alone, _ = choose(logits[rows == row], 3, 5.0, None, torch.Generator().manual_seed(row))
        assert torch.equal(token[rows == row], alone)


def test_sampling_draws_from_the_softmax():
    """Gumbel-max at temperature T draws from softmax(logits / T); confidence stays the softmax's own."""
    logits, n = torch.tensor([0.0, 1.0, 2.0, 5.0]), 20000
    for temperature in (0.5, 1.0, 2.0):
        rows = torch.zeros(n, dtype=torch.long)
        token, confidence = choose(
            logits.repeat(n, 1), 3, temperature, rows, torch.Generator().manual_seed(0)
        )
        p = (logits[:3] / temperature).softmax(0)
        seen = torch.bincount(token, minlength=4)
        assert seen[3] == 0  # [MASK], the likeliest, is no candidate
        assert ((seen[:3] / n - p).abs() < 4 * (p * (1 - p) / n).sqrt()).all()
        torch.testing.assert_close(confidence, logits[:3].softmax(0)[token])


# ---------------------------------------------------------------------------------- the command line


@pytest.fixture
def clip(tmp_path):
    path = str(tmp_path / "clip.wav")
    soundfile.write(path, 0.3 * np.sin(np.arange(12000) / 20), 16000)
    return path


def test_several_clips_as_json(small_folder, clip, tmp_path, capsys):
    other = str(tmp_path / "other.flac")
    soundfile.write(other, np.random.default_rng(0).uniform(-0.3, 0.3, 30000), 48000)
    options = ["--model", small_folder, "--json", "--answer-length", "8", "--steps", "4"]
    assert main([clip, other, "What is this?", *options]) == 0
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [x["audio"] for x in lines] == [clip, other] and err == ""
    for x in lines:
        assert set(x) == {"audio", "question", "answer", "calls", "seconds", "rtf"}
        assert 1 <= x["calls"] <= 4 and x["seconds"] > 0
    assert lines[0]["rtf"] == pytest.approx(lines[0]["seconds"] / 0.75, rel=0.05)


def test_answers_are_those_of_ask(small_folder, clip, capsys):
    model, tokenizer = load(small_folder, "cpu")
    audio = soundfile.read(clip, dtype="float32")[0]
    expected = ask(model, tokenizer, [audio], ["Hm?"], answer_length=8, block=8)[0].text
    assert main([clip, "Hm?", "--model", small_folder, "--answer-length", "8"]) == 0
    assert capsys.readouterr().out == expected + "\n"


def test_show_falls_back_to_lines(small_folder, clip, capsys):
    assert main([clip, "Hm?", "--model", small_folder, "--show", "--answer-length", "8", "--steps", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("  1  ") and "_" in lines[0] and "\033" not in "".join(lines)
    assert "_" not in lines[-2]


def test_show_redraws_on_a_terminal(small_folder, clip, monkeypatch):
    import io
    import sys

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert main([clip, "Hm?", "--model", small_folder, "--show", "--answer-length", "8"]) == 0
    assert "\r\033[K  1  " in screen.getvalue() and any(
        f"\033[{n}m" in screen.getvalue() for n in (31, 32, 33)
    )


def test_export_writes_half_size(small_folder, tmp_path, clip, capsys):
    out = str(tmp_path / "exported")
    assert main(["--model", small_folder, "--export", out]) == 0

    def size(folder):
        return os.path.getsize(os.path.join(folder, "model.safetensors"))

    assert size(out) < 0.6 * size(small_folder)
    assert main([clip, "Hm?", "--model", out, "--answer-length", "8"]) == 0
    capsys.readouterr()
    refused(["--model", small_folder, "--export", "/proc/nothing"], capsys, "cannot be written")


def wav(path, samples, rate=16000, **kind):
    soundfile.write(path, samples, rate, **kind)
    return path


def cut(path, keep=0.5):
    data = pathlib.Path(path).read_bytes()
    pathlib.Path(path).write_bytes(data[: int(len(data) * keep)])
    return path


def written(path, content):
    pathlib.Path(path).write_text(content)
    return path


NOISE = np.random.default_rng(0).uniform(-0.3, 0.3, 16000)


def nan(position, value):
    samples = NOISE.copy()
    samples[position] = value
    return samples


BAD_CLIPS = {
    "missing": (lambda d: f"{d}/none.wav", "no such file"),
    "directory": (lambda d: str(d), "folder"),
    "empty": (lambda d: written(f"{d}/e.wav", ""), "empty"),
    "text named wav": (lambda d: written(f"{d}/t.wav", "hello, not audio"), "cannot be read"),
    "truncated wav": (lambda d: cut(wav(f"{d}/c.wav", NOISE)), "cut short"),
    "truncated float wav": (lambda d: cut(wav(f"{d}/c.wav", NOISE, subtype="FLOAT")), "cut short"),
    "truncated flac": (lambda d: cut(wav(f"{d}/c.flac", NOISE)), "c.flac"),
    "header only flac": (lambda d: cut(wav(f"{d}/c.flac", NOISE), 0.002), "c.flac"),
    "truncated ogg": (lambda d: cut(wav(f"{d}/c.ogg", NOISE), 0.3), "c.ogg"),
    "zero samples": (lambda d: wav(f"{d}/z.wav", NOISE[:0]), "no samples"),
    "nan": (lambda d: wav(f"{d}/n.wav", nan(9000, np.nan), subtype="FLOAT"), "NaN"),
    "infinite": (lambda d: wav(f"{d}/i.wav", nan(0, np.inf), subtype="FLOAT"), "infinite"),
    "a second a sample": (lambda d: wav(f"{d}/s.wav", NOISE, 1), "rate of 1 Hz"),
    "raw": (lambda d: written(f"{d}/r.raw", "1234"), "cannot be read"),
}


def refused(argv, capsys, says):
    status = main(argv)
    out, err = capsys.readouterr()
    assert status == 2 and out == "", (status, out)
    assert err.count("\n") == 1 and err.startswith("decode.py: ") and says in err, err


@pytest.mark.parametrize("kind", BAD_CLIPS)
def test_bad_clips(kind, tmp_path, small_folder, capsys):
    make, says = BAD_CLIPS[kind]
    refused([make(tmp_path), "What?", "--model", small_folder], capsys, says)


@pytest.mark.parametrize(
    "extra, says",
    [
        (["--model", "nonesuch"], "nonesuch"),
        (["--device", "warp9"], "warp9"),
        (["--device", "cuda:99"], "device"),
        (["--answer-length", "0"], "answer length 0"),
        (["--answer-length", "-4"], "-4"),
        (["--answer-length", "20", "--block", "16"], "not a multiple of block 16"),
        (["--answer-length", "16", "--block", "4", "--steps", "6"], "multiple of the 4 blocks"),
        (["--answer-length", "16", "--steps", "17"], "exceeds"),
        (["--steps", "0"], "steps 0"),
        (["--steps", "4", "--factor", "1"], "not allowed with"),
        (["--factor", "0"], "factor"),
        (["--factor", "nan"], "factor"),
        (["--threshold", "2"], "threshold"),
        (["--temperature", "-1"], "temperature"),
        (["--cache", "magic"], "magic"),
        (["--cache", "dual", "--cache-refresh", "0"], "refresh 0"),
        (["--cache-refresh", "4"], "goes with --cache"),
        (["--answer-length", "992"], "positions"),
        (["--answer-length", "some"], "invalid int value: 'some'"),
        (["--block", "0"], "block 0"),
        (["--seed", str(10**30)], "2^63"),
        (["--factor", "1e30"], "factor"),
        (["--device", "meta"], "meta"),
        (["--device", "hpu"], "hpu"),
        (["--int8", "--compile"], "--compile cannot read"),
        (["--int8", "--export", "somewhere"], "leave --int8 out"),
        (["--export", ""], "--export needs the name of a folder"),
        (["--int8", "--threshold", "2"], "threshold"),
        (["--nonsense"], "nonsense"),
    ],
)
def test_impossible_options(extra, says, clip, small_folder, capsys):
    model = [] if "--model" in extra else ["--model", small_folder]
    refused([clip, "What?", *model, *extra], capsys, says)


def test_what_just_fits_the_context(small, tokenizer):
    """One position less is refused; the message says how many are needed."""
    small.stage, clip = 2, np.zeros(8000, np.float32)
    small.config = dataclasses.replace(small.config, context=1)
    with pytest.raises(UserError) as e:
        ask(small, tokenizer, clip, "What?", answer_length=8, block=8)
    needed = int(re.search("need ([0-9]+) positions", str(e.value))[1])
    small.config = dataclasses.replace(small.config, context=needed - 1)
    with pytest.raises(UserError, match=f"need {needed} positions"):
        ask(small, tokenizer, clip, "What?", answer_length=8, block=8)
    small.config = dataclasses.replace(small.config, context=needed)
    assert ask(small, tokenizer, clip, "What?", answer_length=8, block=8).calls > 0


def test_each_row_of_a_batch_has_the_context_to_itself(small, tokenizer):
    """A long question about a short clip beside a short one about a long clip: what fits alone fits."""
    small.stage = 2
    clips, questions = [np.zeros(4000, np.float32), np.zeros(32000, np.float32)], ["What? " * 8, "What?"]
    needed = []
    for clip, question in zip(clips, questions, strict=True):
        with pytest.raises(UserError) as e:
            small.config = dataclasses.replace(small.config, context=1)
            ask(small, tokenizer, clip, question, answer_length=8, block=8)
        needed.append(int(re.search("need ([0-9]+) positions", str(e.value))[1]))
    small.config = dataclasses.replace(small.config, context=max(needed))
    together = ask(small, tokenizer, clips, questions, answer_length=8, block=8)
    for i, answer in enumerate(together):
        assert answer.text == ask(small, tokenizer, clips[i], questions[i], answer_length=8, block=8).text


@pytest.mark.parametrize("mark", ["eot_id", "eos_id"])
def test_confidence_ends_with_the_turn_or_an_end_mark(small, tokenizer, mark):
    """Of an answer that is nothing else, one token's: the answer's text and its confidence end together."""
    small.stage, end = 2, getattr(small.config, mark)
    loud = torch.nn.functional.one_hot(torch.tensor(end), small.config.vocab) * 1e3
    small.backbone.ff_out.register_forward_hook(lambda module, inputs, logits: logits + loud)
    answer = ask(small, tokenizer, np.zeros(8000, np.float32), "What?", answer_length=8, block=8)
    assert (answer.text, answer.confidence) == ("", [1.0])


def test_the_clips_of_a_batch_share_its_seconds(small, tokenizer):
    small.stage, began = 2, time.perf_counter()
    answers = ask(small, tokenizer, [np.zeros(8000, np.float32)] * 4, "What?", answer_length=8, block=8)
    assert 0 < sum(answer.seconds for answer in answers) <= time.perf_counter() - began
    assert all(answer.rtf == answer.seconds / 0.5 for answer in answers)


def test_bad_questions(clip, small_folder, capsys):
    refused([clip, "  ", "--model", small_folder], capsys, "empty")
    refused([clip, "", "--model", small_folder], capsys, "empty")
    refused([clip, "word " * 2000, "--model", small_folder], capsys, "shorten the question")
    refused([clip, "a <|eot_id|> b", "--model", small_folder], capsys, "control token")
    refused([clip, "--model", small_folder], capsys, "recording and a question")
    refused([clip, clip, "--model", small_folder], capsys, "is a file: the last word must be the question")
    refused([clip, "<|eot_id|>", "--model", "diffa2", "--llada", "gone"], capsys, "control token")
    refused([], capsys, "recording and a question")


def test_bad_checkpoints(clip, small_folder, tmp_path, capsys):
    """Missing keys and wrong shapes are tried in test_weights; here the line and the status."""
    folder = str(tmp_path / "m")
    shutil.copytree(small_folder, folder)
    cut(os.path.join(folder, "model.safetensors"))
    refused([clip, "What?", "--model", folder], capsys, "cut short")
    os.remove(os.path.join(folder, "tokenizer.json"))
    refused([clip, "What?", "--model", folder], capsys, "no tokenizer.json")


def test_clips_that_work_with_a_note(tmp_path, small_folder, capsys):
    silent, long = wav(f"{tmp_path}/s.wav", np.zeros(8000)), wav(f"{tmp_path}/l.wav", np.tile(NOISE, 4))
    assert main([silent, "What?", "--model", small_folder, "--answer-length", "8"]) == 0
    assert "silent" in capsys.readouterr().err
    assert main([long, "What?", "--model", small_folder, "--answer-length", "8", "--long", "cut"]) == 0
    assert "the first 2 s are used" in capsys.readouterr().err
    assert main([long, "What?", "--model", small_folder, "--answer-length", "8"]) == 0
    assert "answered in pieces of at most 2 s" in capsys.readouterr().err


def test_too_short_for_a_token_still_answers(tmp_path, small_folder):
    clip = wav(f"{tmp_path}/s.wav", NOISE[:10])
    assert main([clip, "What?", "--model", small_folder, "--answer-length", "8"]) == 0


def test_ask_reports_the_context(small, tokenizer):
    with pytest.raises(UserError, match="512"):
        ask(small, tokenizer, [NOISE.astype(np.float32)], ["word " * 600], stage=2)


# ---------------------------------------------------------------------------------- long clips, streams


def test_a_long_clip_is_answered_piece_by_piece(small_folder, tmp_path, capsys):
    """Each piece as it would be alone; transcripts joined, other answers with their times."""
    path = wav(f"{tmp_path}/long.wav", np.tile(NOISE, 6))
    model, tokenizer = load(small_folder, "cpu")
    audio, _ = load_audio(path)
    spans = split_clip(audio, window_samples(model.config))
    assert len(spans) > 2
    alone = ask(model, tokenizer, [audio[a:b] for a, b in spans], "Hm?", answer_length=8, block=8)
    whole = ask(model, tokenizer, path, "Hm?", answer_length=8, block=8)
    assert whole.pieces == [(a / 16000, b / 16000, x.text) for (a, b), x in zip(spans, alone, strict=True)]
    lines = whole.text.split("\n[")
    assert len(lines) == len(spans) and lines[0].startswith("[0:00 - 0:0")
    assert whole.calls == sum(x.calls for x in alone)
    assert math.isclose(whole.audio_seconds, len(audio) / 16000)
    spoken = ask(model, tokenizer, path, "What is said?", answer_length=8, block=8)
    assert spoken.text == " ".join(text for *_, text in spoken.pieces if text)
    cut = ask(model, tokenizer, path, "Hm?", long="cut", answer_length=8, block=8)
    assert cut.pieces == [] and cut.audio_seconds == 2.0
    assert main([path, "Hm?", "--model", small_folder, "--answer-length", "8", "--json"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert [(p["start"], p["end"], p["answer"]) for p in line["pieces"]] == whole.pieces


def test_a_piece_draws_its_own_noise(small_folder):
    """Above temperature 0 too, pieces are answered alike one by one, together, and beside other clips."""
    model, tokenizer = load(small_folder, "cpu")
    long, short = np.tile(NOISE, 6).astype(np.float32), NOISE.astype(np.float32)
    options = {"answer_length": 8, "block": 8, "temperature": 1.0}

    def texts(clips, batch, seed=3):
        noise = [torch.Generator().manual_seed(seed) for _ in clips]
        answers = ask(model, tokenizer, clips, "Hm?", generator=noise, batch=batch, **options)
        return [text for answer in answers for *_, text in answer.pieces]

    alone = texts([long], 1)
    assert len(alone) > 2 and len(set(alone)) > 1
    assert texts([long], 16) == texts([long, short], 2) == texts([short, long], 16) == alone
    assert texts([long], 1, seed=4) != alone


def test_ask_takes_paths_arrays_one_or_many(small_folder, clip):
    model, tokenizer = load(small_folder, "cpu")
    audio, _ = load_audio(clip)
    options = {"answer_length": 8, "block": 8}
    one = ask(model, tokenizer, clip, "Hm?", **options)
    for same in (audio, torch.from_numpy(audio), pathlib.Path(clip)):
        assert ask(model, tokenizer, same, "Hm?", **options).text == one.text
    many = ask(model, tokenizer, [clip, audio], ["Hm?", "What?"], **options)
    assert many[0].text == one.text and len(many) == 2
    assert [a.text for a in ask(model, tokenizer, [clip, audio], "Hm?", **options)] == [one.text] * 2
    assert 1 <= len(one.confidence) <= 8 and all(0 < c <= 1 for c in one.confidence)
    with pytest.raises(UserError, match="no such file"):
        ask(model, tokenizer, "gone.wav", "Hm?")


@pytest.mark.parametrize(
    "samples, says",
    [
        (NOISE[:0], "no samples"),
        (nan(3, np.nan), "NaN"),
        (np.stack([NOISE, NOISE]), r"float64 of shape \(2, 16000\)"),
        ((NOISE * 32767).astype(np.int16), "int16"),
        (torch.zeros(9, dtype=torch.int16), "int16"),
        (None, "object"),
        ("none.wav", "no such file"),
    ],
)
def test_arrays_are_checked_as_files_are(small_folder, samples, says):
    model, tokenizer = load(small_folder)
    with pytest.raises(UserError, match=says):
        ask(model, tokenizer, [NOISE, samples], "Hm?", answer_length=8, block=8)


def test_clips_of_other_libraries(small_folder):
    """Views that run backwards, tensors in bf16, those with a gradient, and generators of clips."""
    model, tokenizer = load(small_folder)
    settings = {"answer_length": 8, "block": 8}
    backwards, tensor = NOISE[::-1], torch.tensor(NOISE[::-1].copy(), requires_grad=True)
    clips = (clip for clip in (backwards, tensor, tensor.detach().float().numpy(), tensor.bfloat16()))
    texts = [answer.text for answer in ask(model, tokenizer, clips, "Hm?", **settings)]
    assert len(texts) == 4 and texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"questions": ["Hm?"]}, "1 questions about 2 clips"),
        ({"questions": ["Hm?"] * 3}, "3 questions about 2 clips"),
        ({"generator": []}, "0 generators for 2 clips"),
        ({"questions": "caf\udce9?"}, "not text in UTF-8"),
        ({"questions": [None, None]}, "not text in UTF-8"),
        ({"stage": 9}, "a stage is 1 to 4"),
        ({"long": "shorten"}, "long is split or cut"),
    ],
)
def test_settings_of_ask_that_do_not_fit(small_folder, settings, says):
    model, tokenizer = load(small_folder)
    settings = {"questions": "Hm?", "answer_length": 8, "block": 8} | settings
    with pytest.raises(UserError, match=says):
        ask(model, tokenizer, [NOISE, NOISE], **settings)


@pytest.mark.parametrize("closed, printed", [(">&-", ""), ("2>&-", "an answer\n")])
def test_an_output_that_was_never_there(closed, printed):
    """Notes do not go where the answers go; what nobody can read is no error."""
    program = "from runtime.errors import *; exit_status('x', lambda: tell('a note') or print('an answer'))"
    shell = f'{sys.executable} -c "{program}" {closed}'
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, printed) and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "target, status, says", [("| true", 0, ""), ("> /dev/full", 2, "no space left"), ("| cat", 0, "")]
)
def test_an_output_that_is_closed_full_or_not_utf_8(small_folder, clip, target, status, says):
    command = f"{sys.executable} decode.py {clip} 'caf\u00e9?' --model {small_folder} --show {target}"
    shell = ["bash", "-o", "pipefail", "-c", command]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(shell, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == status and "Traceback" not in done.stderr and says in done.stderr


@pytest.mark.parametrize("options", [{}, {"steps": 4}, {"threshold": 0.9}, {"cache": "dual"}])
def test_broken_weights_end_in_one_line(small, options):
    """Nothing is kept by a confidence that is NaN: the same call would be made for ever."""
    broken = copy.deepcopy(small)
    broken.backbone.ln_f.weight.data[0] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        generate(broken, [[5, 6, 7]], answer_length=8, block=4, **options)
    broken.config = broken.backbone.c = dataclasses.replace(broken.config, causal=True)
    with pytest.raises(UserError, match="NaN"):
        generate_ar(broken, [[5, 6, 7]], answer_length=8)


@pytest.mark.parametrize("length, block", [("48", 48), ("64", 32), ("16", 16)])
def test_the_default_block_tiles_the_answer(length, block):
    assert parse(["a.wav", "Hm?", "--answer-length", length]).options.block == block


def test_what_is_streamed_adds_up_to_the_answer(small, tokenizer):
    """Block by block, never a character that is taken back."""
    for seed in range(4):
        audio = np.random.default_rng(seed).uniform(-0.5, 0.5, 16000).astype(np.float32)
        out = io.StringIO()
        seen = []
        stream = Stream(tokenizer, small.config, out)

        def show(response, end, stream=stream, out=out, seen=seen):
            stream.show(response, end)
            seen.append(out.getvalue())

        answer = ask(small, tokenizer, audio, "Hm?", 2, answer_length=24, block=4, on_block=show)
        assert out.getvalue() == answer.text + "\n"
        assert len(seen) == 6 and all(b.startswith(a) for a, b in zip(seen[:-1], seen[1:], strict=True))


def test_stream_on_the_command_line(small_folder, clip, capsys):
    args = [clip, "Hm?", "--model", small_folder, "--answer-length", "16", "--block", "4"]
    assert main(args) == 0
    plain = capsys.readouterr().out
    assert main([*args, "--stream"]) == 0
    assert capsys.readouterr().out == plain
    refused([*args, "--stream", "--json"], capsys, "--json")


def test_no_float64_reaches_the_models_device(small, tokenizer, monkeypatch):
    """Apple's GPUs have none: no operation of torch on the way from audio to answer gives one."""
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and found.dtype == torch.float64:
                seen.append(str(function))
            return found

    audio = np.random.default_rng(0).uniform(-0.5, 0.5, 16000).astype(np.float32)
    with Watch():
        for cache in ("none", "prefix", "dual"):
            ask(small, tokenizer, audio, "Hm?", 2, answer_length=8, block=8, cache=cache)
    assert seen == []
