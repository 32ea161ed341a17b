"""Speed and memory, measured.

    python bench.py fullsize DIR             dress rehearsal of diffa2 with random weights (20 GB of disk)
    python bench.py fullsize DIR --device cuda
    python bench.py train                    a training step of each stage beside a naive one
    python bench.py variance data/stage4.jsonl --model out/tiny/stage3     VRPO's estimators
    python bench.py decode                   decoding beside a naive reference, 12-layer 1024-wide backbone
    python bench.py decode --data data/test.jsonl --choices data/mmsu.jsonl --plot decode.png     and the small model's accuracy

`fullsize` writes files with the names, shapes and formats of LLaDA-8B-Instruct (6 shards, 16.03 GB),
Whisper-large-v3's encoder and DIFFA-2's pytorch_model.bin, loads them by the ordinary path, holds the
parameter counts against the paper's Table B.3, and answers one clip.  Random weights mean nothing:
the answer is noise; what it proves is shapes, memory and speed.

`train` times whole steps (forward, backward, optimizer) on random data of fixed shapes, each kind in a
process of its own so that peaks of memory are its own too.  The naive step is what one writes first:
the whole model in fp32, logits at every position of the row, all samples of VRPO in one graph and the
reference a second model.
"""

import argparse
import copy
import dataclasses
import functools
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import evaluate
import train
import vrpo
from adapters import count, merge_lora
from data import SAMPLE_RATE, load_audio, read_manifest, window_seconds
from decode import ask, choose, generate, generate_ar, schedule
from diffusion import corrupt, draw_counts, draw_t
from model import DIFFA2, PRESETS, Cache, SPECIAL_TOKENS, Config, Parser, UserError, load, released_name, splice_order

LLADA_BYTES, SHARDS = 16_031_162_368, 6  # FACTS section 6
TABLE_B3 = {"encoder": 636_968_960, "semantic": 36_392_448, "acoustic": 47_892_992, "backbone": 8_015_581_184, "LoRA": 14_680_064}


class Peak:
    """Samples this process's anonymous memory (mapped files are not counted) while a block runs."""

    def __enter__(self):
        self.bytes, self.done = 0, threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self):
        while not self.done.wait(0.02):
            self.bytes = max(self.bytes, anonymous_bytes())

    def __exit__(self, *error):
        self.done.set()
        self.thread.join()
        self.bytes = max(self.bytes, anonymous_bytes())


def anonymous_bytes():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("RssAnon"))


# ---------------------------------------------------------------------------------------------
# files like the published ones


def random_tensor(shape, pool, rng):
    """std 0.02, cut from a pool of random numbers: drawing eight billion anew would take many minutes."""
    n = int(np.prod(shape))
    start = int(rng.integers(len(pool)))
    return torch.cat([pool[start:], *[pool] * (n // len(pool)), pool])[:n].reshape(shape).clone()


def full_tokenizer(config):
    """A byte-level tokenizer of LLaDA's size with its special tokens at their exact ids."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    special = {getattr(config, field): token for field, token in SPECIAL_TOKENS.items()}
    for i in range(len(vocab), max(special) + 1):
        vocab[special.get(i, f"<filler {i}>")] = i
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special.values()))
    return tokenizer


def write_fullsize(folder, config):
    """LLaDA's shards, Whisper's .pt and DIFFA-2's pytorch_model.bin, random; each under a temporary name first."""
    os.makedirs(f"{folder}/llada", exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < 20e9:
        raise UserError(f"{folder}: {free / 1e9:.0f} GB free; the rehearsal writes 18 GB")
    rng = np.random.default_rng(0)
    pool = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    half = pool.to(torch.bfloat16)
    with torch.device("meta"):
        model = DIFFA2(config, lora=True)
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    backbone = {k.removeprefix("backbone."): s for k, s in shapes.items() if k.startswith("backbone.") and "lora_" not in k}

    def written(name, write):
        path = f"{folder}/{name}"
        write(path + ".tmp")
        os.replace(path + ".tmp", path)

    per_shard, where = -(-len(backbone) // SHARDS), {}
    for i in range(SHARDS):
        name = f"model-{i + 1:05}-of-{SHARDS:05}.safetensors"
        chosen = dict(list(backbone.items())[i * per_shard : (i + 1) * per_shard])
        tensors = {f"model.transformer.{k}": torch.ones(s, dtype=half.dtype) if len(s) == 1 else random_tensor(s, half, rng) for k, s in chosen.items()}
        written(f"llada/{name}", functools.partial(save_file, tensors))
        where |= dict.fromkeys(tensors, name)
    size = sum(int(np.prod(s)) * 2 for s in backbone.values())
    assert size == LLADA_BYTES, size
    for name, content in (("model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": where}), ("config.json", {"model_type": "llada"})):
        with open(f"{folder}/llada/{name}", "w") as f:
            json.dump(content, f)
    full_tokenizer(config).save(f"{folder}/llada/tokenizer.json")
    ear = {k: random_tensor(s, pool, rng).half() for k, s in shapes.items() if k.startswith("encoder.")}
    written("large-v3.pt", functools.partial(torch.save, {"dims": {}, "model_state_dict": ear}))
    trained = {}
    for key, name in released_keys(config):
        shape = (1, *shapes[name][1:]) if name == "acoustic.queries" else shapes[name]
        trained[key] = random_tensor(shape, pool, rng)
    written("pytorch_model.bin", functools.partial(torch.save, trained))


def released_keys(config):
    """(the authors' key, ours) of everything in DIFFA-2's file, peft's wrapping included."""
    semantic = [f"semantic_connector.{m}.{leaf}" for m in ("conv.0", "conv.2", "linear_connector.0", "linear_connector.2", "layernorm") for leaf in ("weight", "bias")]
    layers = [
        f"acoustic_connector.qformer.layer.{n}.{m}.{leaf}"
        for n in (0, 1)
        for m in [f"{a}.{p}" for a in ("attention", "crossattention") for p in ("self.query", "self.key", "self.value", "output.dense", "output.LayerNorm")]
        + ["intermediate.dense", "output.dense", "output.LayerNorm"]
        for leaf in ("weight", "bias")
    ]
    proj = [f"acoustic_connector.proj.{i}.{leaf}" for i in (0, 1) for leaf in ("weight", "bias")]
    lora = [
        f"llm_model.base_model.model.model.transformer.blocks.{n}.{p}.lora_{x}.default.weight"
        for n in range(config.layers)
        for p in ("q_proj", "k_proj", "v_proj", "ff_proj", "up_proj")
        for x in "AB"
    ]
    for key in [*semantic, *layers, *proj, *lora, "acoustic_connector.layer_weights", "trainable_prompts.weight"]:
        yield key, released_name(key)
    for i in range(len(config.taps)):
        yield f"acoustic_connector.layer_prompts.{i}", "acoustic.queries"


# ---------------------------------------------------------------------------------------------
# the rehearsal


def fullsize(folder, device, keep):
    config = PRESETS["diffa2"]
    if not os.path.exists(f"{folder}/pytorch_model.bin"):
        start = time.perf_counter()
        write_fullsize(folder, config)
        print(f"wrote random weights in {time.perf_counter() - start:.0f} s")
    files = [os.path.join(d, f) for d, _, names in os.walk(folder) for f in names if f.endswith((".safetensors", ".pt", ".bin"))]
    on_disk = sum(map(os.path.getsize, files))
    threads = torch.get_num_threads()
    print(f"{platform.system()}, {threads} CPU threads, device {device or 'cpu'}, torch {torch.__version__}, {on_disk / 1e9:.2f} GB of weights on disk")
    start = time.perf_counter()
    with Peak() as peak:
        model, tokenizer = load("diffa2", device or "cpu", None, 4, f"{folder}/llada", f"{folder}/large-v3.pt", f"{folder}/pytorch_model.bin")
    print(f"load              {time.perf_counter() - start:8.1f} s   peak anonymous memory {peak.bytes / 1e9:.2f} GB")
    lora = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    ours = {part: count(getattr(model, part)) for part in ("encoder", "semantic", "acoustic", "backbone")}
    ours["encoder"] += model.encoder.positional_embedding.numel()
    ours["backbone"] -= lora
    ours["LoRA"] = lora
    assert ours == TABLE_B3, ours
    print("parameters        " + ", ".join(f"{part} {n:,}" for part, n in ours.items()) + ": Table B.3")
    start = time.perf_counter()
    with Peak() as peak:
        merge_lora(model)
    print(f"merge LoRA        {time.perf_counter() - start:8.1f} s   peak anonymous memory {peak.bytes / 1e9:.2f} GB")
    clip = np.random.default_rng(0).uniform(-0.3, 0.3, 10 * SAMPLE_RATE).astype(np.float32)
    for cache in ("none", "prefix"):
        calls, last = [], [0.0]

        def on_step(*_):
            now = time.perf_counter()
            calls.append(now - last[0])
            last[0] = now

        last[0] = start = time.perf_counter()
        with Peak() as peak:
            (answer,) = ask(model, tokenizer, [clip], ["What emotion?"], answer_length=16, block=16, steps=16, cache=cache, on_step=on_step)
        wall, rest = time.perf_counter() - start, calls[1:]
        print(
            f"16 tokens, cache {cache:8}{wall:8.1f} s   {answer.calls} calls; first with encoder {calls[0]:.1f} s, "
            f"others median {statistics.median(rest):.2f} s ({min(rest):.2f} - {max(rest):.2f})   peak anonymous memory {peak.bytes / 1e9:.2f} GB"
        )
    if device and torch.device(device).type == "cuda":
        print(f"peak GPU memory   {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
    if not keep:
        for path in files:
            os.remove(path)


# ---------------------------------------------------------------------------------------------
# training steps

BENCH_SIZES = {  # the real vocabulary and window on a backbone that a CPU can train
    "wide": Config(
        n_mels=80, audio_width=384, audio_heads=6, audio_layers=4, taps=(1, 2, 3, 4), qformer_ffn=1536,
        width=512, layers=6, heads=8, ffn=1536,
    ),
}  # fmt: skip


def random_questions(config, batch, sides, text=80, canvas=32, seed=0):
    """A micro-batch as train.Maker makes them: full windows of noise, `text` prompt tokens, `canvas` answer tokens."""
    g = torch.Generator().manual_seed(seed)
    made = {"mel": torch.randn(batch, config.n_mels, 2 * config.n_frames, generator=g), "n_frames": torch.full((batch,), config.n_frames)}
    for side in sides:
        ids = torch.randint(min(10_000, config.vocab), (batch, text + canvas), generator=g)
        is_answer = torch.arange(text + canvas).expand(batch, -1) >= text
        made |= {f"{side}.ids": ids, f"{side}.valid": torch.ones_like(is_answer), f"{side}.is_answer": is_answer, f"{side}.audio_at": torch.full((batch,), 20)}
    return {"batch": made, "ids": list(range(batch)), "epoch": 0, "step": 1}


def everywhere(model, noisy, side, audio, is_audio):
    """The naive forward pass: logits (B, T + A, vocab) in fp32 at every position, and where the text stands among them."""
    order = splice_order(noisy.size(1), audio.size(1), side["audio_at"])
    x = torch.cat([model.backbone.wte(noisy), audio], 1)
    x = x.gather(1, order[:, :, None].expand(-1, -1, x.size(2)))
    valid = torch.cat([side["valid"], is_audio], 1).gather(1, order)
    return model.backbone.ff_out(model.backbone(x, valid)).float(), order


def naive_nll(model, ids, noisy, is_masked, side, audio, is_audio):
    """Cross-entropy of the masked tokens (B,), out of the logits of all positions."""
    logits, order = everywhere(model, noisy, side, audio, is_audio)
    pad = lambda x, fill: torch.cat([x, torch.full(is_audio.shape, fill, dtype=x.dtype, device=x.device)], 1).gather(1, order)
    loss = F.cross_entropy(logits.flatten(0, 1), pad(ids, 0).flatten(), reduction="none").view(order.shape)
    return (loss * pad(is_masked, False)).sum(1)


def naive_step(model, other, made, stage, seed=0):
    """The loss of a step as one writes it first; the same numbers as train.LOSSES, all of it in fp32."""
    batch = made["batch"]
    noise = [train.generator_for(seed, 0, i, stream=1) for i in made["ids"]]
    hear = lambda m: m.adapt(*m.encode(batch["mel"]), batch["n_frames"], stage)
    if stage < 4:
        side, t = train.side_of(batch), draw_t(len(made["ids"]), noise)
        noisy, is_masked = corrupt(side["ids"], side["is_answer"], model.config.mask_id, t, generator=noise)
        return naive_nll(model, side["ids"], noisy, is_masked, side, *hear(model)) / t.to(noisy.device) / side["is_answer"].sum(1)
    sides = {name: train.side_of(batch, name) for name in ("chosen", "rejected")}
    masks = vrpo.draw_pair_masks(*(s["is_answer"] for s in sides.values()), vrpo.SAMPLES, noise)

    def scores(m, name):
        heard, side, (is_masked, weight) = hear(m), sides[name], masks[name]
        rows = [-w * naive_nll(m, side["ids"], torch.where(x, m.config.mask_id, side["ids"]), x, side, *heard) for x, w in zip(is_masked, weight)]
        return torch.stack(rows)

    with torch.no_grad():
        reference = [scores(other, name) for name in sides]
    return vrpo.vrpo_loss(vrpo.margin(*(scores(model, name) for name in sides), *reference))


def one_training_kind(args):
    """Times one stage one way and prints a line of JSON; runs in a process of its own."""
    stage, naive, device = args.stage, args.naive, torch.device(args.device or "cpu")
    config = BENCH_SIZES[args.size] if args.size in BENCH_SIZES else PRESETS[args.size]
    torch.manual_seed(0)
    with torch.device(device):
        model = DIFFA2(config, lora=stage >= 3)
    chosen = train.trainable(model, train.STAGES["diffa2"][stage][0].trains)
    if not naive:
        train.halve_frozen(model)
    other = copy.deepcopy(model) if naive and stage == 4 else None
    model.train(stage != 4)
    made = random_questions(config, args.batch, ("chosen", "rejected") if stage == 4 else ("text",))
    made["batch"] = train.to_device(made["batch"], device)
    autocast = functools.partial(torch.autocast, device.type, dtype=torch.bfloat16)
    reference = tuple(p.detach().clone() for p in chosen.values()) if stage == 4 else ()
    context = train.Context(model, stage, 0, train.STAGES["diffa2"][stage][0], autocast, tuple(chosen.values()), reference)
    optimizer = torch.optim.AdamW(chosen.values(), lr=1e-5, fused=True)
    if args.recompute and not naive:
        train.recompute(model)
    seconds = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with Peak() as peak:
        for _ in range(1 + args.repeats):  # the first one warms up
            start = time.perf_counter()
            if naive:
                naive_step(model, other, made, stage).sum().backward()
            else:
                train.LOSSES[context.row.loss](context, made)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak.bytes
    print(json.dumps({"seconds": seconds[1:], "memory": memory}))


def train_bench(args):
    """Every stage, ours and naive in turn; each in its own process."""
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"size {args.size}, batch {args.batch}, 30 s clips, {name}, torch {torch.__version__}; {args.repeats} steps each, median (least - most)\n")
    print(f"{'stage':6}{'':8}{'s/step':>24}{'steps/s':>9}{'audio h/s':>11}{'peak GB':>9}{'speed':>8}{'memory':>8}")
    for stage in args.stages:
        found = {}
        for kind in ("naive", "ours"):
            command = [sys.executable, os.path.abspath(__file__), "train", "--stage", str(stage), "--size", args.size, "--batch", str(args.batch),
                       "--repeats", str(args.repeats)] + ["--naive"] * (kind == "naive") + ["--recompute"] * args.recompute  # fmt: skip
            done = subprocess.run(command + (["--device", args.device] if args.device else []), capture_output=True, text=True)
            if done.returncode:
                print(f"{stage:<6}{kind:8} failed: {(done.stderr.strip().splitlines() or ['killed: out of memory?'])[-1]}")
                continue
            found[kind] = json.loads(done.stdout.splitlines()[-1])
            times, memory = found[kind]["seconds"], found[kind]["memory"]
            median = statistics.median(times)
            ratios = ""
            if kind == "ours" and "naive" in found:
                ratios = f"{statistics.median(found['naive']['seconds']) / median:7.1f}x{memory / found['naive']['memory']:7.2f}x"
            hours = args.batch * 30 / 3600 / median
            print(f"{stage:<6}{kind:8}{median:10.2f} ({min(times):5.2f} - {max(times):5.2f}){1 / median:9.3f}{hours:11.4f}{memory / 1e9:9.2f}{ratios}", flush=True)


# ---------------------------------------------------------------------------------------------
# VRPO's estimators


def variance_bench(args):
    """Variance of the margin and of its gradient on a trained model: shared against independent masks,
    stratified exact counts against independent t, at one budget of samples."""
    model, tokenizer = load(args.model, args.device)
    if not any("lora_" in n for n, _ in model.named_parameters()):
        model.add_lora()
    c = model.config
    chosen = train.trainable(model, train.STAGES["tiny"][4][0].trains)
    examples = read_manifest(args.manifest, 4)[: args.pairs]
    reference = [p.detach().clone() for p in chosen.values()]
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():  # a policy some steps away: as far as steps of 3e-5 would bring every weight
        for p in chosen.values():
            p.add_(args.distance * torch.randn(p.shape, generator=g))
    maker = train.Maker(tokenizer, c, "vrpo", 0, augmented=False)
    n, names = vrpo.SAMPLES, ("chosen", "rejected")
    print(f"{args.model}, {len(examples)} pairs, {args.repeats} estimates of {n} samples each, policy {args.distance:g} (std) from the reference\n")
    print(f"{'masks':14}{'t':22}{'variance of the margin':>24}{'of the gradient (trace)':>26}")
    for shared in (True, False):
        for stratified in (True, False):
            spread, trace = [], []
            for example in examples:
                made = maker([example], 0)["batch"]
                sides = {name: train.side_of(made, name) for name in names}

                def draw(name):
                    is_answer = sides[name]["is_answer"]
                    if stratified:
                        return draw_counts(is_answer, n, g)
                    t = torch.stack([draw_t(1, g) for _ in range(n)])  # (n, 1)
                    return torch.stack([corrupt(sides[name]["ids"], is_answer, c.mask_id, x, generator=g)[1] for x in t]), 1 / t

                margins, mean, square = [], None, None
                encoded = model.encode(made["mel"])
                for _ in range(args.repeats):
                    masks = {name: draw(name) for name in names}
                    others = masks if shared else {name: draw(name) for name in names}

                    def scores(masks):
                        heard = model.adapt(*encoded, made["n_frames"], 4)
                        return [vrpo.score(train.reader(model, sides[name], *heard), sides[name]["ids"], masks[name], c.mask_id) for name in names]

                    policy = scores(masks)
                    with torch.no_grad(), vrpo.swapped(chosen.values(), reference):
                        old = scores(others)
                    m = vrpo.margin(*policy, *old)
                    gradient = torch.cat([x.flatten() for x in torch.autograd.grad(vrpo.vrpo_loss(m).sum(), list(chosen.values()), allow_unused=True) if x is not None])
                    margins.append(m.item())
                    mean = gradient if mean is None else mean + gradient
                    square = gradient**2 if square is None else square + gradient**2
                k = args.repeats
                spread.append(statistics.variance(margins))
                trace.append(((square - mean**2 / k) / (k - 1)).sum().item())
            kinds = ("shared" if shared else "independent", "stratified counts" if stratified else "independent t")
            print(f"{kinds[0]:14}{kinds[1]:22}{statistics.mean(spread):24.4f}{statistics.mean(trace):26.5f}", flush=True)


# ---------------------------------------------------------------------------------------------
# decoding


def naive_generate(model, prompt, audio, is_audio, audio_at, answer_length, block, steps, calls=None):
    """One prompt, decoded the way the released code works (FACTS section 10): each step runs the whole row again,
    takes the logits of every position, and a float64 softmax over all of them.  Returns the answer (answer_length,).
    calls: leave after so many, for timing."""
    c, P = model.config, len(prompt)
    ids = torch.tensor([list(prompt) + [c.mask_id] * answer_length], device=audio.device)
    side = {"valid": torch.ones_like(ids, dtype=torch.bool), "audio_at": torch.tensor([audio_at], device=audio.device)}
    is_audio = torch.ones(audio.shape[:2], dtype=torch.bool, device=audio.device) if is_audio is None else is_audio
    done = 0
    for first in range(P, P + answer_length, block):
        for keep in schedule(block, steps * block // answer_length):
            with torch.no_grad():
                logits, order = everywhere(model, ids, side, audio, is_audio)
            logits[..., c.mask_id] = float("-inf")
            confidence, token = (x[order < ids.size(1)] for x in logits.double().softmax(-1).max(-1))  # of these the text's
            confidence = torch.where(ids[0] == c.mask_id, confidence, float("-inf"))
            confidence[first + block :] = float("-inf")
            chosen = confidence.topk(keep).indices
            ids[0, chosen] = token[chosen]
            done += 1
            if done == calls:
                return ids[0, P:]
    return ids[0, P:]


BENCH_SIZES["mid"] = Config(  # a CPU's stand-in for the real thing: the full vocabulary on a backbone of 0.4 billion
    n_mels=80, n_frames=500, audio_width=192, audio_heads=4, audio_layers=4, taps=(1, 2, 3, 4), qformer_ffn=768,
    width=1024, layers=12, heads=16, ffn=3072, lora_rank=0,
)  # fmt: skip


def bandwidth(device, n=1 << 28, times=5):
    """Bytes a second at which this machine reads a gigabyte of memory: the best of `times` sums."""
    x, best = torch.ones(n, device=device), float("inf")
    for _ in range(times):
        best = min(best, clock(lambda: x.sum(), device))
    return x.nbytes / best


def clock(work, device):
    """Seconds that work() takes, its kernels included."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def hear(asked, model):
    """The clips of examples or questions, as far as the model's window reaches."""
    return [load_audio(x.audio, x.offset, x.duration, window_seconds(model.config))[0] for x in asked]


def ask_all(model, tokenizer, clips, prompts, batch, **options):
    """`ask` in batches of this size."""
    starts = range(0, len(clips), batch)
    return [answer for i in starts for answer in ask(model, tokenizer, clips[i : i + batch], prompts[i : i + batch], **options)]


def commits(model, tokenizer, examples, answer_length, block):
    """Tokens kept in each call of the first block, for every example: factor decoding of real recordings."""
    found = []
    for e in examples:
        left = [block]
        ask(model, tokenizer, hear([e], model), [e.question], answer_length=answer_length, block=block,
            on_step=lambda canvas, *_: left.append(int((canvas[0, :block] == model.config.mask_id).sum())))  # fmt: skip
        found.append([a - b for a, b in zip(left, left[1:]) if a > b])
    return found


def spread(values, form="{:.2f}"):
    middle = form.format(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({form.format(min(values))} - {form.format(max(values))})"


def speed_bench(args, replay):
    """Naive, exact, cached and autoregressive decoding on the same weights, in turn, timed after the audio is encoded."""
    device = torch.device(args.device or "cpu")
    config = BENCH_SIZES[args.size] if args.size in BENCH_SIZES else PRESETS[args.size]
    torch.manual_seed(0)
    with torch.device(device):
        model = DIFFA2(config).eval().requires_grad_(False)
    n_audio = config.n_queries + 375  # 30 s
    prompt, audio_at = list(range(1, 41)), 20
    seconds_of_audio, results = 30, {}
    print(f"size {args.size}: {config.layers} layers, {config.width} wide, vocabulary {config.vocab:,}; 30 s clip ({n_audio} audio tokens), 40 tokens of prompt")
    print(f"{'':44}{'calls':>6}{'seconds':>26}{'tokens/s':>10}{'RTF':>8}{'x naive':>9}{'+ memory GB':>13}")
    for dtype in args.dtypes:
        model.to(getattr(torch, dtype))
        audio = torch.randn(1, n_audio, config.width, generator=torch.Generator().manual_seed(1)).mul_(0.02).to(device, getattr(torch, dtype))
        is_audio = torch.ones(1, n_audio, dtype=torch.bool, device=device)
        heard = ([prompt], audio, is_audio, [audio_at])
        gen = functools.partial(generate, model, *heard, answer_length=16, block=16)
        long = functools.partial(generate, model, *heard, answer_length=128, block=32, cache="dual", steps=replay[32])

        def autoregressive():
            model.config = model.backbone.c = dataclasses.replace(config, causal=True)
            try:
                return generate_ar(model, *heard, answer_length=16)
            finally:
                model.config = model.backbone.c = config

        kinds = {  # name -> calls, tokens, work
            "exact, 16 steps": (16, 16, lambda: gen(steps=16)),
            "prefix cache, 16 steps": (16, 16, lambda: gen(steps=16, cache="prefix")),
            f"prefix cache, factor, replayed {replay[16]}": (len(replay[16]), 16, lambda: gen(steps=replay[16], cache="prefix")),
            f"dual cache, 128 tokens, replayed {replay[32]} x 4": (4 * len(replay[32]), 128, long),
            "autoregressive twin, 16 tokens": (16, 16, autoregressive),
        }
        times = {name: [] for name in ("naive call", *kinds)}
        memory = dict.fromkeys(times, 0.0)
        for repeat in range(args.repeats + 1):  # the first warms up
            for name in times:
                n_calls = 5 if name == "naive call" and repeat else 1
                work = (lambda: naive_generate(model, prompt, audio, is_audio, audio_at, 16, 16, 16, n_calls)) if name == "naive call" else kinds[name][2]
                before = anonymous_bytes()
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                with Peak() as peak:
                    took = clock(work, device)
                most = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak.bytes
                if repeat:
                    times[name].append(took / n_calls if name == "naive call" else took)
                    memory[name] = max(memory[name], most - before)
        naive = statistics.median(times["naive call"])
        weights = sum(p.numel() * p.element_size() for n, p in model.backbone.named_parameters() if n != "wte.weight")
        bound = weights / bandwidth(device)
        show = lambda name, calls, tokens, values, ratio: print(
            f"{dtype + ': ' + name:44}{calls:6}{spread(values):>26}{tokens / statistics.median(values):10.2f}{statistics.median(values) / seconds_of_audio:8.3f}{ratio:>9}"
            f"{memory.get(name, memory['naive call']) / 1e9:13.2f}"
        )
        for tokens in (16, 128):
            show(f"naive, {tokens} steps (5 calls timed x {args.repeats})", tokens, tokens, [tokens * t for t in times["naive call"]], "1.0 x")
        for name, (calls, tokens, _) in kinds.items():
            show(name, calls, tokens, times[name], f"{tokens * naive / statistics.median(times[name]):.1f} x")
        step = []  # a cached call alone
        last = [0.0]

        def on_step(*_):
            if device.type == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            step.append(now - last[0])
            last[0] = now

        for _ in range(args.repeats):
            gen(steps=16, cache="prefix", on_step=on_step)
        cached = [t for i, t in enumerate(step) if i % 16]  # without the calls that fill the cache
        print(f"{dtype}: a cached call {spread(cached, '{:.3f}')} s; reading {weights / 1e9:.2f} GB of weights once at {weights / bound / 1e9:.1f} GB/s: {bound:.3f} s; "
              f"ratio {statistics.median(cached) / bound:.2f}", flush=True)  # fmt: skip
        results[dtype] = {"bound": bound, "parts": parts_of_a_call(model, audio, device)}
    return results


def parts_of_a_call(model, audio, device):
    """Seconds of the backbone, the vocabulary and the choice of tokens, in a naive and in a cached call of 16 tokens."""
    c, found = model.config, {}
    dtype = model.backbone.wte.weight.dtype
    for kind, rows in (("naive", audio.size(1) + 56), ("cached", 16)):
        x = torch.randn(1, rows, c.width, device=device).to(dtype)
        cache = Cache()
        with torch.no_grad():
            h = model.backbone(torch.randn(1, audio.size(1) + 56, c.width, device=device).to(dtype), None, cache)
            forward = (lambda: model.backbone(x, None)) if kind == "naive" else (lambda: model.backbone(x, None, cache, audio.size(1) + 40))
            h = h[0, -rows:]
            logits = model.backbone.ff_out(h)
            pick = (lambda: logits.float().double().softmax(-1).max(-1)) if kind == "naive" else (lambda: choose(logits, c.mask_id))
            found[kind] = {}
            for name, work in (("backbone", forward), ("vocabulary", lambda: model.backbone.ff_out(h)), ("choice of tokens", pick)):
                work()
                found[kind][name] = statistics.median(clock(work, device) for _ in range(3))
    return found


SWEEP = {  # what is varied -> options of `ask`
    "fixed steps": [{"steps": n} for n in (1, 2, 4, 8, 16)],
    "factor": [{"factor": f} for f in (0.25, 0.5, 1.0, 2.0, 4.0)],
    "threshold": [{"threshold": c} for c in (0.5, 0.7, 0.9)],
    "factor 1, prefix cache": [{"cache": "prefix"}],
    "factor 1, dual cache": [{"cache": "dual"}],
    "factor 1, dual cache, refreshed every 2": [{"cache": "dual", "refresh": 2}],
}


def accuracy_bench(args):
    """The small model on real recordings: share of right answers against network calls, for every way to decode."""
    model, tokenizer = load(args.model, args.device)
    merge_lora(model)
    points = []
    free = list(evaluate.read_exact(args.data, None))
    rng = random.Random(0)
    sets = {"free questions": (rng.sample(free, min(args.limit, len(free))), evaluate.score_exact, SWEEP)}
    if args.choices:
        several = list(evaluate.read_mmsu(args.choices, os.path.dirname(args.choices)))
        early = {"fixed steps": [{"steps": 16}], "factor": [{"factor": 1.0}], "factor 1, early answer": [{"early": g} for g in (0.5, 1.0, 2.0, 4.0)]}
        sets["multiple choice"] = (rng.sample(several, min(args.limit, len(several))), evaluate.score_mmsu, early)
    spoken = [q for q in free if evaluate.is_transcript(q)]
    if spoken:
        sets["transcripts"] = (spoken[: args.limit], evaluate.score_exact, {"128 tokens": [{"answer_length": 128, "block": 128}], "length from the clip": [{"answer_length": "auto"}]})
    for name, (questions, score, sweep) in sets.items():
        heard, prompts = hear(questions, model), [q.prompt for q in questions]
        if name == "free questions":
            free_heard, free_prompts = heard[:128], prompts[:128]
        print(f"\n{name}: {len(questions)} clips\n{'':44}{'right':>8}{'95 % interval':>18}{'calls':>8}{'clips/s':>9}{'like the first':>16}")
        first = None
        for kind, variants in sweep.items():
            for options in variants:
                options = {"answer_length": 16, "block": 16} | options
                start = time.perf_counter()
                answers = ask_all(model, tokenizer, heard, prompts, args.batch, **options)
                took = time.perf_counter() - start
                right = [score(q, a.text)["right"] for q, a in zip(questions, answers)]
                low, high = evaluate.wilson(sum(right), len(right))
                calls = statistics.mean(a.calls for a in answers)
                first = first or [a.text for a in answers]
                same = sum(a.text == b for a, b in zip(answers, first)) / len(first)
                value = ", ".join(str(options[k]) for k in ("steps", "factor", "threshold", "early") if k in options and len(variants) > 1)
                print(f"{kind + (' ' + value if value else ''):44}{sum(right) / len(right):8.1%}{f'{low:.1%} - {high:.1%}':>18}{calls:8.2f}{len(answers) / took:9.2f}{same:16.1%}", flush=True)
                points.append((name, kind, calls, sum(right) / len(right), low, high))
    rates = []
    for size in (1, 4, 16, 64):
        took = clock(lambda: ask_all(model, tokenizer, free_heard, free_prompts, size, answer_length=16, block=16), "cpu")
        rates.append(f"batch {size}: {len(free_heard) / took:.1f}")
    print("\nclips a second, from samples to text, factor 1: " + ", ".join(rates))
    return points


def decode_plot(path, results, points):
    """Left: where the time of a call goes, naive and cached.  Right: accuracy against network calls."""
    fig = train.new_figure(12, 4.5)
    axes = fig.subplots(1, 2)
    names = [(dtype, kind) for dtype in results for kind in ("naive", "cached")]
    bottom = np.zeros(len(names))
    for part in ("backbone", "vocabulary", "choice of tokens"):
        height = np.array([results[d]["parts"][k][part] for d, k in names])
        axes[0].barh([f"{k}, {d}" for d, k in names], height, left=bottom, label=part)
        bottom += height
    for i, (dtype, _) in enumerate(names):
        axes[0].plot([results[dtype]["bound"]] * 2, [i - 0.45, i + 0.45], "k--", linewidth=1, label=None if i else "reading every weight once")
    axes[0].set(title="where the time of a call goes", xlabel="seconds")
    axes[0].legend(fontsize=7)
    for kind in sorted({(p[0], p[1]) for p in points}):
        some = sorted((p[2], p[3], p[4], p[5]) for p in points if (p[0], p[1]) == kind)
        x, y, low, high = map(np.array, zip(*some))
        axes[1].errorbar(x, 100 * y, 100 * np.array([y - low, high - y]), fmt="o-", markersize=4, linewidth=1, capsize=2, label=", ".join(kind))
    axes[1].set(title="small model: right answers against network calls", xlabel="network calls an answer", ylabel="% right")
    if points:
        train.scale_calls(axes[1], max(p[2] for p in points))
        axes[1].legend(fontsize=6)
    train.save_figure(fig, path, 110)


def decode_bench(args):
    """Speed on random weights, accuracy on the small model."""
    name = torch.cuda.get_device_name() if (args.device or "").startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
    print(f"{name}, torch {torch.__version__}; {args.repeats} repeats in turn, median (least - most)\n")
    replay = {16: [1, 1, 14], 32: [1, 1, 30]}
    if args.data:
        model, tokenizer = load(args.model, args.device)
        merge_lora(model)
        examples = random.Random(0).sample(read_manifest(args.data), min(args.limit, 100))
        for block in replay:
            ranked = sorted(commits(model, tokenizer, examples, block, block), key=lambda c: (len(c), c))
            replay[block] = ranked[len(ranked) // 2]
        print(f"tokens kept in each call: those of the median of {len(ranked)} real recordings, small model, factor 1: {replay[16]} of 16, {replay[32]} of 32\n")
    else:
        print(f"tokens kept in each call: assumed {replay[16]} and {replay[32]}; --data FILE takes the small model's on real recordings\n")
    results = speed_bench(args, replay)
    points = accuracy_bench(args) if args.data else []
    if args.plot:
        decode_plot(args.plot, results, points)


def main(argv=None):
    parser = Parser(prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    p = commands.add_parser("fullsize", help="diffa2 with random weights: shapes, memory, speed")
    p.add_argument("folder")
    p.add_argument("--device")
    p.add_argument("--keep", action="store_true", help="leave the weights on the disk")
    p = commands.add_parser("train", help="training steps of every stage beside naive ones")
    p.add_argument("--size", default="wide", choices=sorted([*BENCH_SIZES, *PRESETS]))
    p.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3, 4], choices=(1, 2, 3, 4))
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--recompute", action="store_true", help="activation checkpointing in ours")
    p.add_argument("--device")
    p.add_argument("--stage", type=int, help="this one alone, and one line of JSON")
    p.add_argument("--naive", action="store_true", help="with --stage: the naive step")
    p = commands.add_parser("variance", help="VRPO's estimators on a trained model")
    p.add_argument("manifest")
    p.add_argument("--model", default="tiny")
    p.add_argument("--pairs", type=int, default=8)
    p.add_argument("--repeats", type=int, default=30)
    p.add_argument("--distance", type=float, default=1e-3)
    p.add_argument("--device")
    p = commands.add_parser("decode", help="decoding: speed beside a naive reference, accuracy against network calls")
    p.add_argument("--size", default="mid", choices=sorted([*BENCH_SIZES, *PRESETS]))
    p.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=("float32", "bfloat16", "float16"))
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--model", default="tiny", help="the small model, for commit counts and accuracy")
    p.add_argument("--data", help="manifest of real recordings")
    p.add_argument("--choices", help="question file in MMSU's format")
    p.add_argument("--limit", type=int, default=300, help="clips of each kind")
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--plot", metavar="PNG")
    p.add_argument("--device")
    try:
        args = parser.parse_args(argv)
        if args.command == "decode":
            decode_bench(args)
        elif args.command == "fullsize":
            fullsize(args.folder, args.device, args.keep)
        elif args.command == "variance":
            variance_bench(args)
        elif args.stage is None:
            train_bench(args)
        else:
            one_training_kind(args)
    except UserError as e:
        print(f"bench.py: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
