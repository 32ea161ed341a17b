"""Decoding, measured: speed on random weights beside a naive reference, accuracy of the small model."""

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import random
import statistics
import time

import numpy as np
import torch

import decode
from adapters import merge_lora
from data import load_audio, read_manifest, window_seconds
from decode import ask, choose, generate, generate_ar, schedule
from model import DIFFA2, Cache
from tools.benchmarks import is_transcript, read_exact, read_mmsu, score_exact, score_mmsu, wilson
from tools.figures import new_figure, save_figure
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


def scale_calls(axis, most):
    """A logarithmic axis of network calls, marked 1, 2, 4, ... up to `most`."""
    ticks = [2**k for k in range(int(math.log2(most)) + 1)]
    axis.set_xscale("log")
    axis.set_xticks(ticks, ticks)
    axis.minorticks_off()


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
        for keep in schedule(block, steps * block // answer_length):
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


def clips_of(asked, model):
    """The clips of examples or questions, as far as the model's window reaches."""
    limit = window_seconds(model.config)
    return [load_audio(x.audio, x.offset, x.duration, limit)[0] for x in asked]


def kept_tokens(model, tokenizer, examples, block):
    """Tokens kept in each call of one block, for every example: factor decoding of real recordings."""
    found = []
    for e in examples:
        masks = [block]  # left after each call
        count = functools.partial(count_masked, masks, model.config.mask_id)
        clips = clips_of([e], model)
        ask(model, tokenizer, clips, [e.question], answer_length=block, block=block, on_step=count)
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
    results = {}
    for name in args.dtypes:
        dtype = getattr(torch, name)
        model.to(dtype)
        noise = torch.randn(1, n_audio, config.width, generator=torch.Generator().manual_seed(1))
        audio = noise.mul_(0.02).to(device, dtype)
        is_audio = torch.ones(1, n_audio, dtype=torch.bool, device=device)
        inputs = ([list(range(1, PROMPT + 1))], audio, is_audio, [20])
        results[name] = speed_of(model, inputs, replay, args.repeats, name)
    return results


def speed_of(model, inputs, replay, repeats, dtype):
    """One data type's rows of the table.

    Returns the bound of a cached call and the parts of a call, seconds.
    """
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
    return {"bound": bound, "parts": parts_of_a_call(model, inputs[1], device)}


@torch.no_grad()
def parts_of_a_call(model, audio, device):
    """Seconds of the backbone, the vocabulary and the choice of tokens, in a naive and in a cached call.

    The cached call recomputes an answer of 16 tokens, the naive one the whole row.
    """
    c, dtype = model.config, model.backbone.wte.weight.dtype
    before = audio.size(1) + PROMPT
    row = torch.randn(1, before + 16, c.width, device=device).to(dtype)
    cache = Cache()
    h = model.backbone(row, None, cache)[0]
    logits, answer_logits = model.backbone.ff_out(h), model.backbone.ff_out(h[-16:])
    work = {
        "naive": {
            "backbone": lambda: model.backbone(row, None),
            "vocabulary": lambda: model.backbone.ff_out(h),
            "choice of tokens": lambda: logits.float().double().softmax(-1).max(-1),
        },
        "cached": {
            "backbone": lambda: model.backbone(row[:, -16:], None, cache, before),
            "vocabulary": lambda: model.backbone.ff_out(h[-16:]),
            "choice of tokens": lambda: choose(answer_logits, c.mask_id),
        },
    }
    found = {}
    for kind, parts in work.items():
        found[kind] = {}
        for name, part in parts.items():
            part()
            found[kind][name] = statistics.median(seconds_of(part, device) for _ in range(3))
    return found


# ---------------------------------------------------------------------------------------------
# accuracy

SWEEP = {  # what is varied -> options of `ask`
    "fixed steps": [{"steps": n} for n in (1, 2, 4, 8, 16)],
    "factor": [{"factor": f} for f in (0.25, 0.5, 1.0, 2.0, 4.0)],
    "threshold": [{"threshold": c} for c in (0.5, 0.7, 0.9)],
    "factor 1, prefix cache": [{"cache": "prefix"}],
    "factor 1, dual cache": [{"cache": "dual"}],
    "factor 1, dual cache, refreshed every 2": [{"cache": "dual", "refresh": 2}],
}
CHOICES_SWEEP = {"fixed steps": [{"steps": 16}], "factor": [{"factor": 1.0}]}
TRANSCRIPTS_SWEEP = {
    "128 tokens": [{"answer_length": 128, "block": 128}],
    "length from the clip": [{"answer_length": "auto"}],
}


def question_sets(args):
    """What is asked: name -> questions, the rule that scores them, what is varied."""
    rng, sets = random.Random(0), {}
    free = list(read_exact(args.data, None))
    sets["free questions"] = rng.sample(free, min(args.limit, len(free))), score_exact, SWEEP
    if args.choices:
        several = list(read_mmsu(args.choices, os.path.dirname(args.choices)))
        several = rng.sample(several, min(args.limit, len(several)))
        sets["multiple choice"] = several, score_mmsu, CHOICES_SWEEP
    spoken = [q for q in free if is_transcript(q)]
    if spoken:
        sets["transcripts"] = spoken[: args.limit], score_exact, TRANSCRIPTS_SWEEP
    return sets


def accuracy_bench(args):
    """The small model on real recordings: share of right answers against network calls.

    Returns [(questions, what is varied, calls, share, low, high)].
    """
    model, tokenizer = load(args.model, args.device)
    merge_lora(model)
    points, sets = [], question_sets(args)
    for name, (questions, score, sweep) in sets.items():
        clips, prompts = clips_of(questions, model), [q.prompt for q in questions]
        heads = f"{'right':>8}{'95 % interval':>18}{'calls':>8}{'clips/s':>9}{'like the first':>16}"
        print(f"\n{name}: {len(questions)} clips\n{'':44}{heads}")
        first = None
        for kind, variants in sweep.items():
            for variant in variants:
                options = {"answer_length": 16, "block": 16} | variant
                start = time.perf_counter()
                answers = ask(model, tokenizer, clips, prompts, batch=args.batch, **options)
                took = time.perf_counter() - start
                n = len(answers)
                right = sum(score(q, a.text)["right"] for q, a in zip(questions, answers, strict=True))
                low, high = wilson(right, n)
                calls = statistics.mean(a.calls for a in answers)
                first = first or [a.text for a in answers]
                same = sum(a.text == text for a, text in zip(answers, first, strict=True)) / n
                label = f"{kind} {next(iter(variant.values()))}" if len(variants) > 1 else kind
                share = f"{right / n:8.1%}{f'{low:.1%} - {high:.1%}':>18}"
                print(f"{label:44}{share}{calls:8.2f}{n / took:9.2f}{same:16.1%}", flush=True)
                points.append((name, kind, calls, right / n, low, high))
    questions = sets["free questions"][0][:128]
    clips, prompts = clips_of(questions, model), [q.prompt for q in questions]
    rates = []
    for size in (1, 4, 16, 64):
        options = {"answer_length": 16, "block": 16, "batch": size}
        work = functools.partial(ask, model, tokenizer, clips, prompts, **options)
        rates.append(f"batch {size}: {len(clips) / seconds_of(work, 'cpu'):.1f}")
    print("\nclips a second, from samples to text, factor 1: " + ", ".join(rates))
    return points


def decode_plot(path, results, points):
    """Left: where the time of a call goes, naive and cached.  Right: accuracy against network calls.

    results: speed_bench's; points: accuracy_bench's.
    """
    fig = new_figure(12, 4.5)
    left, right = fig.subplots(1, 2)
    names = [(dtype, kind) for dtype in results for kind in ("naive", "cached")]
    bottom = np.zeros(len(names))
    for part in ("backbone", "vocabulary", "choice of tokens"):
        height = np.array([results[dtype]["parts"][kind][part] for dtype, kind in names])
        left.barh([f"{kind}, {dtype}" for dtype, kind in names], height, left=bottom, label=part)
        bottom += height
    for i, (dtype, _) in enumerate(names):
        bound, label = results[dtype]["bound"], None if i else "reading every weight once"
        left.plot([bound, bound], [i - 0.45, i + 0.45], "k--", linewidth=1, label=label)
    left.set(title="where the time of a call goes", xlabel="seconds")
    left.legend(fontsize=7)
    for kind in sorted({p[:2] for p in points}):
        some = sorted(p[2:] for p in points if p[:2] == kind)
        x, y, low, high = (np.array(values) for values in zip(*some, strict=True))
        bars = 100 * np.array([y - low, high - y])
        right.errorbar(
            x, 100 * y, bars, fmt="o-", markersize=4, linewidth=1, capsize=2, label=", ".join(kind)
        )
    title = "small model: right answers against network calls"
    right.set(title=title, xlabel="network calls an answer", ylabel="% right")
    if points:
        scale_calls(right, max(p[2] for p in points))
        right.legend(fontsize=6)
    save_figure(fig, path, 110)


def decode_bench(args):
    """Speed on random weights, accuracy on the small model."""
    how = f"{args.repeats} repeats in turn, median (least - most)"
    print(f"{machine(args.device)}, torch {torch.__version__}; {how}\n")
    replay = {16: [1, 1, 14], 32: [1, 1, 30]}
    source = "assumed; --data FILE takes the small model's on real recordings"
    if args.data:
        model, tokenizer = load(args.model, args.device)
        merge_lora(model)
        examples = random.Random(0).sample(read_manifest(args.data), min(args.limit, 100))
        for block in replay:
            ranked = sorted(
                kept_tokens(model, tokenizer, examples, block), key=lambda kept: (len(kept), kept)
            )
            replay[block] = ranked[len(ranked) // 2]
        source = f"those of the median of {len(examples)} real recordings, small model, factor 1"
    print(f"tokens kept in each call: {replay[16]} of 16, {replay[32]} of 32: {source}\n")
    results = speed_bench(args, replay)
    points = accuracy_bench(args) if args.data else []
    if args.plot:
        decode_plot(args.plot, results, points)
