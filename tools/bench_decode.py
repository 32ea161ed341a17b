"""Decoding, measured: speed on random weights beside a naive reference."""

import contextlib
import dataclasses
import functools
import itertools
import random
import statistics

import torch

import decode
from adapters import merge_lora
from data import load_audio, window_seconds
from decode import ask, count_by_schedule, generate, generate_ar
from model import DIFFA2
from runtime.errors import UserError
from tools.benchmarks import with_audio
from tools.measure import (
    SIZES,
    Laps,
    Peak,
    anonymous_bytes,
    bandwidth,
    everywhere,
    machine,
    seconds_of,
    spread,
)
from weights import load

SECONDS = 30  # of audio in the measurements of speed
PROMPT = 40  # tokens


def naive_generate(model, prompt, audio, is_audio, audio_at, answer_length, block, steps, calls=None):
    """One prompt, decoded the way the released code works.  Returns the answer (answer_length,).

    Each step runs the whole row again, takes the logits of every position, and a float64 softmax over
    all of them.  calls: leave after so many, for timing.
    """
    c, P = model.config, len(prompt)
    ids = torch.tensor([list(prompt) + [c.mask_id] * answer_length], device=audio.device)
    valid, at = torch.ones_like(ids, dtype=torch.bool), torch.tensor([audio_at], device=audio.device)
    fields = {"valid": valid, "audio_at": at}
    if is_audio is None:
        is_audio = torch.ones(audio.shape[:2], dtype=torch.bool, device=audio.device)
    done = 0
    for first in range(P, P + answer_length, block):
        steps_of_block = steps * block // answer_length
        for step in range(steps_of_block):
            keep = count_by_schedule(block, steps_of_block, step)
            with torch.no_grad():
                logits, order = everywhere(model, ids, fields, audio, is_audio)
            logits[..., c.mask_id] = float("-inf")
            confidence, token = logits.double().softmax(-1).max(-1)
            is_text = order < ids.size(1)
            confidence, token = confidence[is_text], token[is_text]
            confidence = torch.where(ids[0] == c.mask_id, confidence, float("-inf"))
            confidence[first + block :] = float("-inf")
            kept = confidence.topk(keep).indices
            ids[0, kept] = token[kept]
            done += 1
            if done == calls:
                return ids[0, P:]
    return ids[0, P:]


def kept_tokens(model, tokenizer, examples, block):
    """Tokens kept in each call of one block, for every example: factor decoding of real recordings."""
    found, limit = [], window_seconds(model.config)
    for e in examples:
        masks = [block]  # left after each call
        count = functools.partial(count_masked, masks, model.config.mask_id)
        clip, _ = load_audio(e.audio, e.offset, e.duration, limit)
        ask(model, tokenizer, clip, e.question, answer_length=block, block=block, on_step=count)
        found.append([a - b for a, b in itertools.pairwise(masks) if a > b])
    return found


def count_masked(counts, mask_id, response, *_):
    """An on_step: appends to `counts` how many tokens of the one response are masked."""
    counts.append(int((response[0] == mask_id).sum()))


# ---------------------------------------------------------------------------------------------
# speed


@contextlib.contextmanager
def causal(model):
    """The same weights as an autoregressive baseline, for a while."""
    config = model.config
    model.config = model.backbone.c = dataclasses.replace(config, causal=True)
    try:
        yield
    finally:
        model.config = model.backbone.c = config


def autoregressive(model, inputs):
    with causal(model):
        return generate_ar(model, *inputs, answer_length=16)


def replay(work, counts, **options):
    """work(**options), where call i of a block keeps counts[i] tokens: random weights are never confident."""
    rule = decode.count_to_keep

    def as_counted(confidence, options, step):
        return torch.full((len(confidence),), counts[step], device=confidence.device)

    decode.count_to_keep = as_counted
    try:
        return work(**options)
    finally:
        decode.count_to_keep = rule


def ways(model, inputs, counts):
    """What is timed: name -> network calls, tokens, work."""
    short = functools.partial(generate, model, *inputs, answer_length=16, block=16)
    long = functools.partial(generate, model, *inputs, answer_length=128, block=32, cache="dual")
    r16, r32 = counts[16], counts[32]
    return {
        "exact, 16 steps": (16, 16, lambda: short(steps=16)),
        "prefix cache, 16 steps": (16, 16, lambda: short(steps=16, cache="prefix")),
        f"prefix cache, factor, replayed {r16}": (len(r16), 16, lambda: replay(short, r16, cache="prefix")),
        f"dual cache, 128 tokens, replayed {r32} x 4": (4 * len(r32), 128, lambda: replay(long, r32)),
        "autoregressive baseline, 16 tokens": (16, 16, lambda: autoregressive(model, inputs)),
    }


def measured(work, device):
    """Seconds and bytes beyond what was allocated before."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else anonymous_bytes()
    with Peak() as peak:
        seconds = seconds_of(work, device)
    most = torch.cuda.max_memory_allocated() if on_gpu else peak.bytes
    return seconds, most - before


def time_all(model, inputs, kinds, repeats):
    """Every way in turn, `repeats` times after a warm-up -> {name: seconds}, {name: bytes}.

    "naive call" is one call of the naive sampler, the mean of five.
    """
    device = inputs[1].device
    times = {name: [] for name in ("naive call", *kinds)}
    memory = dict.fromkeys(times, 0)
    for repeat in range(repeats + 1):
        for name in times:
            n_calls, work = 1, None
            if name == "naive call":
                n_calls = 5 if repeat else 1
                (prompt,), audio, is_audio, (at,) = inputs
                work = functools.partial(
                    naive_generate, model, prompt, audio, is_audio, at, 16, 16, 16, n_calls
                )
            else:
                work = kinds[name][2]
            seconds, grown = measured(work, device)
            if repeat:
                times[name].append(seconds / n_calls)
                memory[name] = max(memory[name], grown)
    return times, memory


def cached_calls(model, inputs, repeats):
    """Seconds of a call that reads the prefix cache, without those that fill it."""
    laps = Laps(inputs[1].device)
    for _ in range(repeats):
        generate(model, *inputs, answer_length=16, block=16, steps=16, cache="prefix", on_step=laps)
    return [t for i, t in enumerate(laps.seconds) if i % 16]


def speed_bench(args, replay):
    """Naive, exact, cached and autoregressive decoding on the same weights, timed after the audio is encoded.

    replay: {16: tokens kept in each call of a block of 16, 32: ...}.
    """
    device, config = torch.device(args.device or "cpu"), SIZES[args.size]
    torch.manual_seed(0)
    with torch.device(device):
        model = DIFFA2(config).eval().requires_grad_(False)
    n_audio = config.n_queries + 25 * SECONDS // 2  # acoustic tokens, and semantic ones at 12.5 a second
    size = f"{config.layers} layers, {config.width} wide, vocabulary {config.vocab:,}"
    row = f"{SECONDS} s clip ({n_audio} audio tokens), {PROMPT} tokens of prompt"
    print(f"size {args.size}: {size}; {row}")
    print(f"{'':44}{'calls':>6}{'seconds':>26}{'tokens/s':>10}{'RTF':>8}{'x naive':>9}{'+ memory GB':>13}")
    for name in args.dtypes:
        dtype = getattr(torch, name)
        model.to(dtype)
        noise = torch.randn(1, n_audio, config.width, generator=torch.Generator().manual_seed(1))
        audio = noise.mul_(0.02).to(device, dtype)
        is_audio = torch.ones(1, n_audio, dtype=torch.bool, device=device)
        inputs = ([list(range(1, PROMPT + 1))], audio, is_audio, [20])
        speed_of(model, inputs, replay, args.repeats, name)


def speed_of(model, inputs, replay, repeats, dtype):
    """One data type's rows of the table, and the least that a cached call could take."""
    device = inputs[1].device
    kinds = ways(model, inputs, replay)
    times, memory = time_all(model, inputs, kinds, repeats)
    naive = statistics.median(times["naive call"])

    def show(name, calls, tokens, values, grown):
        median = statistics.median(values)
        ratio = f"{tokens * naive / median:.1f} x"
        speed = f"{tokens / median:10.2f}{median / SECONDS:8.3f}{ratio:>9}{grown / 1e9:13.2f}"
        print(f"{dtype + ': ' + name:44}{calls:6}{spread(values):>26}{speed}")

    for n in (16, 128):
        values = [n * t for t in times["naive call"]]
        show(f"naive, {n} steps (5 calls timed x {repeats})", n, n, values, memory["naive call"])
    for name, (calls, tokens, _) in kinds.items():
        show(name, calls, tokens, times[name], memory[name])
    weights = 0
    for name, p in model.backbone.named_parameters():
        if name != "wte.weight":  # of the embeddings a call reads a few rows
            weights += p.numel() * p.element_size()
    speed = bandwidth(device)
    bound, cached = weights / speed, cached_calls(model, inputs, repeats)
    reading = f"reading {weights / 1e9:.2f} GB of weights once at {speed / 1e9:.1f} GB/s: {bound:.3f} s"
    ratio = f"ratio {statistics.median(cached) / bound:.2f}"
    print(f"{dtype}: a cached call {spread(cached, '{:.3f}')} s; {reading}; {ratio}", flush=True)


# ---------------------------------------------------------------------------------------------
# the command


def decode_bench(args):
    """Speed on random weights, with as many tokens a call as the small model keeps on real recordings."""
    how = f"{args.repeats} repeats in turn, median (least - most)"
    print(f"{machine(args.device)}, torch {torch.__version__}; {how}\n")
    replay = {16: [1, 1, 14], 32: [1, 1, 30]}
    source = "assumed; --data FILE takes the small model's on real recordings"
    if args.data:
        model, tokenizer = load(args.model, args.device)
        if model.config.causal:
            raise UserError(f"{args.model} is autoregressive: it keeps one token a call")
        merge_lora(model)
        examples = list(with_audio(args.data))
        examples = random.Random(0).sample(examples, min(args.limit, len(examples)))
        for block in replay:
            found = kept_tokens(model, tokenizer, examples, block)
            ranked = sorted(found, key=lambda kept: (len(kept), kept))
            replay[block] = ranked[len(ranked) // 2]
        source = f"those of the median of {len(examples)} real recordings, small model, factor 1"
    print(f"tokens kept in each call: {replay[16]} of 16, {replay[32]} of 32: {source}\n")
    speed_bench(args, replay)
