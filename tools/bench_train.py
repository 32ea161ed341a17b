"""Training, measured: a step of each stage beside a naive one.

A step is timed whole (forward, backward, optimizer) on random data of fixed shapes, each kind in a process
of its own so that peaks of memory are its own too.  The naive step is what one writes first: the whole
model in fp32, logits at every position of the row, all samples of VRPO in one graph and the reference a
second model.
"""

import copy
import functools
import statistics
import time

import torch
import torch.nn.functional as F

import train
import vrpo
from data import generator_for, to_device, window_seconds
from diffusion import corrupt, draw_counts, draw_t
from model import DIFFA2
from runtime.errors import first_line
from runtime.processes import pick_precision
from tools.measure import SIZES, Peak, everywhere, in_a_process, machine


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
        micro[name] = {
            "ids": ids,
            "valid": torch.ones_like(is_answer),
            "is_answer": is_answer,
            "audio_at": torch.full((batch,), 20),
        }
    return {"batch": micro, "ids": list(range(batch)), "epoch": 0}


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
        text, t = batch["text"], draw_t(len(micro["ids"]), noise)
        noisy, is_masked = corrupt(text["ids"], text["is_answer"], model.config.mask_id, t, generator=noise)
        nll = naive_nll(model, text["ids"], noisy, is_masked, text, *audio_of(model))
        return nll / t.to(noisy.device) / text["is_answer"].sum(1)
    texts = {name: batch[name] for name in ("chosen", "rejected")}
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


def one_training_kind(args, stage, naive):
    """Times a stage, ours or naive -> the seconds of its steps, the peak of memory in bytes."""
    config, row, device = SIZES[args.size], train.STAGES["diffa2"][stage], torch.device(args.device or "cpu")
    torch.manual_seed(0)
    with torch.device(device):
        model = DIFFA2(config, lora=stage >= 3)
    trained = train.freeze_all_but(model, row.trains)
    is_bf16 = pick_precision(args.precision, device) == "bf16" and not naive
    if is_bf16:
        train.frozen_to_bf16(model)
    other = copy.deepcopy(model) if naive and stage == 4 else None
    model.train(stage != 4)
    micro = random_questions(config, args.batch, ("chosen", "rejected") if stage == 4 else ("text",))
    micro["batch"] = to_device(micro["batch"], device)
    autocast = functools.partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=is_bf16)
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
    return seconds[1:], memory


def train_bench(args):
    """Every stage, ours and naive in turn; each in its own process."""
    where = f"{machine(args.device)}, torch {torch.__version__}"
    how = f"{args.repeats} steps each, median (least - most)"
    clip = window_seconds(SIZES[args.size])
    size = f"size {args.size}, batch {args.batch}, {clip:.0f} s clips"
    precision = pick_precision(args.precision, torch.device(args.device or "cpu"))
    print(f"{size}, naive in fp32, ours in {precision}, {where}; {how}\n")
    heads = f"{'s/step':>24}{'steps/s':>9}{'audio h/s':>11}{'peak GB':>9}{'speed':>8}{'memory':>8}"
    print(f"{'stage':6}{'':8}{heads}")
    for stage in args.stages:
        found = {}
        for kind in ("naive", "ours"):
            try:
                times, memory = in_a_process(one_training_kind, args, stage, kind == "naive")
            except Exception as e:  # out of memory: torch's own error, or the process was killed
                print(f"{stage:<6}{kind:8} failed: {first_line(e)}")
                continue
            median, ratios = statistics.median(times), ""
            found[kind] = median, memory
            if kind == "ours" and "naive" in found:
                naive_median, naive_memory = found["naive"]
                ratios = f"{naive_median / median:7.1f}x{memory / naive_memory:7.2f}x"
            hours = args.batch * clip / 3600 / median
            seconds = f"{median:10.2f} ({min(times):5.2f} - {max(times):5.2f})"
            speed = f"{1 / median:9.3f}{hours:11.4f}{memory / 1e9:9.2f}{ratios}"
            print(f"{stage:<6}{kind:8}{seconds}{speed}", flush=True)
