"""Training, measured: a step of each stage beside a naive one, and the variance of VRPO's estimators.

A step is timed whole (forward, backward, optimizer) on random data of fixed shapes, each kind in a process
of its own so that peaks of memory are its own too.  The naive step is what one writes first: the whole
model in fp32, logits at every position of the row, all samples of VRPO in one graph and the reference a
second model.
"""

import copy
import functools
import json
import os
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

import train
import vrpo
from data import BatchBuilder, encode_pair, generator_for, part_of, read_manifest, to_device
from diffusion import corrupt, draw_counts, draw_t
from model import DIFFA2
from tools.measure import SIZES, Peak, everywhere, machine
from weights import load

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def random_questions(config, batch, names, prompt=80, response=32, seed=0):
    """A micro-batch as data.BatchBuilder makes them: noise, so many tokens of prompt and of response."""
    g = torch.Generator().manual_seed(seed)
    micro = {
        "mel": torch.randn(batch, config.n_mels, 2 * config.n_frames, generator=g),
        "n_frames": torch.full((batch,), config.n_frames),
    }
    for name in names:
        ids = torch.randint(min(10_000, config.vocab), (batch, prompt + response), generator=g)
        is_answer = torch.arange(prompt + response).expand(batch, -1) >= prompt
        micro |= {
            f"{name}.ids": ids,
            f"{name}.valid": torch.ones_like(is_answer),
            f"{name}.is_answer": is_answer,
            f"{name}.audio_at": torch.full((batch,), 20),
        }
    return {"batch": micro, "ids": list(range(batch)), "epoch": 0, "step": 1}


def naive_nll(model, ids, noisy, is_masked, text, audio, is_audio):
    """Cross-entropy of the masked tokens (B,), out of the logits of all positions."""
    logits, order = everywhere(model, noisy, text, audio, is_audio)

    def spliced(x):
        """(B, T) -> (B, T + A), zeros where the audio is."""
        return torch.cat([x, torch.zeros(is_audio.shape, dtype=x.dtype, device=x.device)], 1).gather(1, order)

    loss = F.cross_entropy(logits.flatten(0, 1), spliced(ids).flatten(), reduction="none").view(order.shape)
    return (loss * spliced(is_masked)).sum(1)


def naive_step(model, other, micro, stage, seed=0):
    """The loss of a step as one writes it first: the same numbers as the losses of train.py, all in fp32."""
    batch = micro["batch"]
    noise = [generator_for(seed, 0, i, stream=1) for i in micro["ids"]]

    def audio_of(m):
        return m.adapt(*m.encode(batch["mel"], batch["n_frames"]), batch["n_frames"], stage)

    if stage < 4:
        text, t = part_of(batch), draw_t(len(micro["ids"]), noise)
        noisy, is_masked = corrupt(text["ids"], text["is_answer"], model.config.mask_id, t, generator=noise)
        nll = naive_nll(model, text["ids"], noisy, is_masked, text, *audio_of(model))
        return nll / t.to(noisy.device) / text["is_answer"].sum(1)
    texts = {name: part_of(batch, name) for name in ("chosen", "rejected")}
    masks = {name: draw_counts(text["is_answer"], vrpo.SAMPLES, noise) for name, text in texts.items()}

    def scores(m, name):
        """ELBO samples (n, B), Eq. 3."""
        audio, text, samples = audio_of(m), texts[name], []
        for is_masked, weight in zip(*masks[name], strict=True):
            noisy = torch.where(is_masked, m.config.mask_id, text["ids"])
            samples.append(-weight * naive_nll(m, text["ids"], noisy, is_masked, text, *audio))
        return torch.stack(samples)

    with torch.no_grad():
        reference = [scores(other, name) for name in texts]
    return vrpo.vrpo_loss(vrpo.margin(*(scores(model, name) for name in texts), *reference))


def one_training_kind(args):
    """Times one stage one way and prints a line of JSON; runs in a process of its own."""
    stage, naive, device = args.stage, args.naive, torch.device(args.device or "cpu")
    config, row = SIZES[args.size], train.STAGES["diffa2"][stage]
    torch.manual_seed(0)
    with torch.device(device):
        model = DIFFA2(config, lora=stage >= 3)
    trained = train.freeze_all_but(model, row.trains)
    if not naive:
        train.frozen_to_bf16(model)
    other = copy.deepcopy(model) if naive and stage == 4 else None
    model.train(stage != 4)
    micro = random_questions(config, args.batch, ("chosen", "rejected") if stage == 4 else ("text",))
    micro["batch"] = to_device(micro["batch"], device)
    autocast = functools.partial(torch.autocast, device.type, dtype=torch.bfloat16)
    reference = tuple(p.detach().clone() for p in trained.values()) if stage == 4 else ()
    context = train.LossContext(model, stage, 0, row, autocast, tuple(trained.values()), reference)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-5, fused=True)
    if args.recompute and not naive:
        train.recompute(model)
    seconds = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with Peak() as peak:
        for _ in range(1 + args.repeats):  # the first one warms up
            start = time.perf_counter()
            if naive:
                naive_step(model, other, micro, stage).sum().backward()
            else:
                row.loss.backward(context, micro)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak.bytes
    print(json.dumps({"seconds": seconds[1:], "memory": memory}))


def train_bench(args):
    """Every stage, ours and naive in turn; each in its own process."""
    where = f"{machine(args.device)}, torch {torch.__version__}"
    how = f"{args.repeats} steps each, median (least - most)"
    print(f"size {args.size}, batch {args.batch}, 30 s clips, {where}; {how}\n")
    heads = f"{'s/step':>24}{'steps/s':>9}{'audio h/s':>11}{'peak GB':>9}{'speed':>8}{'memory':>8}"
    print(f"{'stage':6}{'':8}{heads}")
    for stage in args.stages:
        found = {}
        for kind in ("naive", "ours"):
            command = [
                sys.executable,
                "-m",
                "tools.bench",
                "train",
                "--stage",
                str(stage),
                "--size",
                args.size,
            ]
            command += ["--batch", str(args.batch), "--repeats", str(args.repeats)]
            command += ["--naive"] * (kind == "naive") + ["--recompute"] * args.recompute
            command += ["--device", args.device] if args.device else []
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                why = (done.stderr.strip().splitlines() or ["killed: out of memory?"])[-1]
                print(f"{stage:<6}{kind:8} failed: {why}")
                continue
            found[kind] = json.loads(done.stdout.splitlines()[-1])
            times, memory = found[kind]["seconds"], found[kind]["memory"]
            median, ratios = statistics.median(times), ""
            if kind == "ours" and "naive" in found:
                naive_median, naive_memory = (
                    statistics.median(found["naive"]["seconds"]),
                    found["naive"]["memory"],
                )
                ratios = f"{naive_median / median:7.1f}x{memory / naive_memory:7.2f}x"
            hours = args.batch * 30 / 3600 / median
            seconds = f"{median:10.2f} ({min(times):5.2f} - {max(times):5.2f})"
            speed = f"{1 / median:9.3f}{hours:11.4f}{memory / 1e9:9.2f}{ratios}"
            print(f"{stage:<6}{kind:8}{seconds}{speed}", flush=True)


# ---------------------------------------------------------------------------------------------
# VRPO's estimators


def draw_masks(text, n, is_stratified, mask_id, generator):
    """is_masked (n, B, T) and weight (n, B) of an estimate: stratified exact counts, or t drawn n times."""
    if is_stratified:
        return draw_counts(text["is_answer"], n, generator)
    t = torch.stack([draw_t(1, generator) for _ in range(n)])  # (n, 1)
    masks = [corrupt(text["ids"], text["is_answer"], mask_id, x, generator=generator)[1] for x in t]
    return torch.stack(masks), 1 / t


def estimates(model, example, trained, reference, times, is_shared, is_stratified, generator):
    """Variance of the margin of one pair, and of its loss's gradient (trace), over `times` estimates.

    example: a batch of one pair.  trained: the parameters that train; reference: their values
    in the reference model.  is_shared: policy and reference meet the same masks (Eq. 4).
    """
    c, n, names = model.config, vrpo.SAMPLES, ("chosen", "rejected")
    texts = {name: part_of(example, name) for name in names}
    encoded = model.encode(example["mel"], example["n_frames"])

    def draw():
        return {name: draw_masks(texts[name], n, is_stratified, c.mask_id, generator) for name in names}

    def scores(masks):
        audio, found = model.adapt(*encoded, example["n_frames"], 4), []
        for name in names:
            predict = model.predictor(texts[name], *audio)
            found.append(vrpo.score(predict, texts[name]["ids"], masks[name], c.mask_id))
        return found

    margins, mean, square = [], 0.0, 0.0
    for _ in range(times):
        masks = draw()
        other_masks = masks if is_shared else draw()
        policy = scores(masks)
        with torch.no_grad(), vrpo.swapped(trained, reference):
            old = scores(other_masks)
        margin = vrpo.margin(*policy, *old)
        parts = torch.autograd.grad(vrpo.vrpo_loss(margin).sum(), trained, allow_unused=True)
        gradient = torch.cat([x.flatten() for x in parts if x is not None])
        margins.append(margin.item())
        mean, square = mean + gradient, square + gradient**2
    trace = ((square - mean**2 / times) / (times - 1)).sum()
    return statistics.variance(margins), trace.item()


def variance_bench(args):
    """Variance of the margin and of its gradient on a trained model, at one budget of samples.

    Shared against independent masks, stratified exact counts against independent t.
    """
    model, tokenizer = load(args.model, args.device)
    if not any("lora_" in n for n, _ in model.named_parameters()):
        model.add_lora()
    row = train.STAGES["tiny"][4]
    trained = list(train.freeze_all_but(model, row.trains).values())
    examples = read_manifest(args.manifest, 4)[: args.pairs]
    reference = [p.detach().clone() for p in trained]
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():  # a policy some steps away: as far as steps of 3e-5 would bring every weight
        for p in trained:
            p.add_(args.distance * torch.randn(p.shape, generator=g))
    builder = BatchBuilder(tokenizer, model.config, encode_pair, 0)
    what = f"{args.repeats} estimates of {vrpo.SAMPLES} samples each"
    print(f"{args.model}, {len(examples)} pairs, {what}, policy {args.distance:g} (std) from the reference\n")
    print(f"{'masks':14}{'t':22}{'variance of the margin':>24}{'of the gradient (trace)':>26}")
    for is_shared in (True, False):
        for is_stratified in (True, False):
            found = []
            for example in examples:
                batch = builder([example], 0)["batch"]
                kind = (args.repeats, is_shared, is_stratified, g)
                found.append(estimates(model, batch, trained, reference, *kind))
            margin, trace = (statistics.mean(values) for values in zip(*found, strict=True))
            name = f"{'shared' if is_shared else 'independent':14}"
            name += f"{'stratified counts' if is_stratified else 'independent t':22}"
            print(f"{name}{margin:24.4f}{trace:26.5f}", flush=True)
