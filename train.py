"""Training: one table of stages, one loop, on a laptop or on many GPUs.

    torchrun --nproc_per_node=8 train.py --stage 1     # diffa2 on eight GPUs; add --nnodes for more
    python -m tools.prepare tour --audio DIR --text DIR --out data    # data/stage0.jsonl ... stage4.jsonl
    python train.py --stage 1 --model tiny             # semantic adapter on speech recognition
    python train.py --stage 2 --model tiny             # both adapters on audio questions
    python train.py --stage 3 --model tiny             # both adapters and LoRA
    python train.py --stage 4 --model tiny             # the same parts by preference (vrpo.py)
    python train.py --stage 0 --model tiny             # the small backbone, from text alone
    python train.py --stage 1 --resume                 # goes on where a stopped run was, to the bit
    python train.py --plot out/tiny/stage1 out/b       # the logged curves of runs, curves.png

Each stage starts from the folder the one before it wrote (out/MODEL/stageN).  Stage 1 starts from
what was trained before this project begins: LLaDA and Whisper, or the small backbone and Whisper
tiny.en that lie in assets.  Stage 0 makes that small backbone, by the same loss, on questions about
clips that are written down where the audio will be spliced in (data.write_audio).

The loss is averaged over the global batch: a batch is a list of examples, rank r takes
ids[r::world] in micro-batches under a token budget, gradients of plain sums are added up and divided
by the number of examples once.  What an example is masked and augmented with is seeded by (seed,
epoch, example), so the number of processes changes nothing but the speed.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import os
import re
import resource
import signal
import sys
import time
from dataclasses import dataclass

import numpy as np
import soxr
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from adapters import AcousticAdapter, SemanticAdapter
from data import (
    SAMPLE_RATE,
    SAMPLES_PER_FRAME,
    answer_ids,
    bucket,
    build_prompt,
    collate,
    encode_text,
    load_audio,
    log_mel,
    pad_written,
    read_manifest,
    window_seconds,
    write_audio,
)
from diffusion import corrupt, draw_t, masked_nll, next_token_loss, sft_loss
from model import PRESETS, Parser, UserError, build, pick_device
from vrpo import BETA, SAMPLES, draw_pair_masks, margin, push, score, swapped, vrpo_loss
from weights import ASSETS, RELEASES, assemble, fetch, load, load_tiny_encoder, load_tokenizer, save

# ---------------------------------------------------------------------------------------------
# the table


@dataclass(frozen=True)
class Stage:
    trains: tuple  # prefixes of the names of the parameters that train; all else is frozen
    lr: float
    batch: int  # examples in a step, whatever the number of GPUs
    warmup: int  # steps
    epochs: float = 0  # over the manifest, or
    steps: int = 0  # this many steps whatever its size
    loss: str = "sft"  # a row of LOSSES
    written: bool = False  # clips are written down (data.write_audio) instead of encoded
    least_t: float = 0.0  # t is drawn from (least_t, 1]: decoding begins fully masked
    ctc: float = 0.0  # weight of CTC of the transcript on the semantic tokens
    weight_decay: float = 0.05
    beta2: float = 0.999
    muon: bool = False  # Muon instead of AdamW for the matrices of a small model's blocks


ADAPTERS = ("semantic.", "acoustic.")

STAGES = {
    # paper, Table B.2; soft prompts train with stage 1
    "diffa2": {
        1: Stage(("semantic.", "soft_prompts"), lr=1e-4, batch=1280, warmup=1000, epochs=12),
        2: Stage(ADAPTERS, lr=5e-5, batch=196, warmup=1000, epochs=10),
        3: Stage((*ADAPTERS, "lora"), lr=5e-5, batch=196, warmup=1000, epochs=10),
        4: Stage((*ADAPTERS, "lora"), lr=5e-6, batch=4, warmup=200, epochs=1, loss="vrpo"),
    },
    # the same table with small numbers, and three departures that pay at this size: t is not small
    # while so little is known, CTC teaches the adapter where a word stands, Muon is the faster optimizer
    "tiny": {
        0: Stage(("backbone.",), 2e-3, 32, 30, steps=1200, written=True, least_t=0.3, beta2=0.98, muon=True),
        1: Stage(("semantic.", "soft_prompts"), 1.5e-3, 32, 20, steps=220, least_t=0.3, ctc=0.5, beta2=0.98),
        2: Stage(ADAPTERS, 1.5e-3, 32, 20, steps=620, least_t=0.3, ctc=0.5, beta2=0.98, muon=True),
        3: Stage((*ADAPTERS, "lora"), 1e-3, 32, 10, steps=180, least_t=0.3, ctc=0.5, beta2=0.98, muon=True),
        4: Stage((*ADAPTERS, "lora"), 5e-5, 8, 5, steps=60, loss="vrpo", beta2=0.98),
    },
}


def trainable(model, trains):
    """Freezes everything but the named parts; returns the parameters that train, by name."""
    chosen = {}
    for name, p in model.named_parameters():
        part = "lora" if "lora_" in name else name
        p.requires_grad_(any(part.startswith(prefix) for prefix in trains))
        if p.requires_grad:
            chosen[name] = p
    return chosen


def halve_frozen(model):
    """Frozen matrices in bf16; vectors stay as they are (Whisper's norms want fp32, and weigh nothing)."""
    for p in model.parameters():
        if not p.requires_grad and p.dim() > 1:
            p.data = p.data.to(torch.bfloat16)


def recompute(model):
    """Activation checkpointing: each block's inside is computed again for the backward pass.

    Returns a stack that undoes it.
    """
    undo = contextlib.ExitStack()
    for block in model.backbone.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        undo.callback(delattr, block, "forward")
    return undo


def learning_rate(step, row, steps):
    """Linear warm-up, then a cosine down to zero."""
    if step < row.warmup:
        return row.lr * (step + 1) / row.warmup
    return row.lr * 0.5 * (1 + math.cos(math.pi * (step - row.warmup) / max(1, steps - row.warmup)))


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) for matrices: the momentum's nearest matrix with equal singular values.

    Directions of small gradient move as fast as the others.  Updates are scaled to the size of AdamW's, so
    one learning rate serves both.  torch.optim.Muon does the same in bf16, which processors without bf16
    arithmetic take thirty times as long for; this one computes in fp32.
    """

    def __init__(self, parameters, lr, weight_decay, momentum=0.95):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                # Nesterov's look ahead
                update = orthogonalize(p.grad.lerp(state["momentum"], group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                # root mean square 0.2, as AdamW's
                p.sub_(update, alpha=group["lr"] * 0.2 * max(p.shape) ** 0.5)


def orthogonalize(matrix, steps=5):
    """U V^T of the singular value decomposition U S V^T, to within a few tenths, by Newton-Schulz."""
    x = matrix / (matrix.norm() + 1e-7)
    is_tall = x.size(0) > x.size(1)
    x = x.T if is_tall else x
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315) @ x
    return x.T if is_tall else x


def make_optimizers(chosen, row):
    """AdamW for `chosen` (name -> parameter); with row.muon Muon for the matrices of the blocks."""
    in_blocks = re.compile(r"(backbone\.blocks|acoustic\.layers)\.\d+\..*weight$")
    by_muon = {name for name, p in chosen.items() if row.muon and p.dim() == 2 and in_blocks.match(name)}
    rest = [p for name, p in chosen.items() if name not in by_muon]
    # no decay on vectors: norms, biases, gains
    groups = [
        {"params": [p for p in rest if p.dim() > 1], "weight_decay": row.weight_decay},
        {"params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, lr=row.lr, betas=(0.9, row.beta2), fused=True)]
    if by_muon:
        optimizers.append(Muon([chosen[name] for name in sorted(by_muon)], row.lr, row.weight_decay))
    return optimizers


def generator_for(seed, epoch, example_id, stream=0):
    """Noise, canvas and augmentation of an example: the same whatever batch or process it is in.

    stream: 0 for what the loader draws, 1 for the noise drawn in the training step.
    """
    g = torch.Generator()
    g.manual_seed((((seed * 2 + stream) * 1_000_003 + epoch) * 1_000_003 + example_id) % (1 << 63))
    return g


# ---------------------------------------------------------------------------------------------
# processes


@dataclass(frozen=True)
class World:
    """The processes that train together; one of them alone is a world too."""

    rank: int
    size: int
    device: torch.device

    def add(self, values):
        """Sums a list of numbers over the processes, in fp64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, thing):
        """Every process's `thing`, in order of ranks."""
        if self.size == 1:
            return [thing]
        things = [None] * self.size
        dist.all_gather_object(things, thing)
        return things


@contextlib.contextmanager
def join_world(device=None):
    """Joins the processes that torchrun started: NCCL on GPUs, gloo on CPUs; a world of one without it."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device is None and torch.cuda.is_available():
        device = f"cuda:{local}"
    device = pick_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size == 1:
        yield World(0, 1, device)
        return
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), size, device)
    finally:
        if ours:
            dist.destroy_process_group()


def leave(code):
    """sys.exit; a process of torchrun's goes at once, without the interpreter's winding up.

    A thread of gloo that then asks for Python once more aborts the process: status 134 after all is written.
    """
    if "WORLD_SIZE" not in os.environ:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def add_gradients(parameters, world):
    """Sums .grad over the processes, once a step.

    DistributedDataParallel would do it from hooks in the backward pass of its own forward; here a step
    has many backward passes that do not go through one forward (VRPO's samples, micro-batches of any
    number), so the sum is taken where it can be seen.
    """
    if world.size == 1:
        return
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    for p, total in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad.copy_(total.view_as(p))


# ---------------------------------------------------------------------------------------------
# examples -> batches


def clip_of(example, config):
    return load_audio(example.audio, example.offset, example.duration, window_seconds(config))[0]


def augment(audio, config, generator, facts):
    """Another speed, level, a moment of silence in front, a little noise: the recordings are few.

    Speed is 0.9 to 1.1, of a sound alone 0.75 to 1.25.
    """
    u = torch.rand(6, generator=generator).tolist()
    # a voice's sex and feeling are in its pitch
    spread = 0.25 if facts.keys() & {"sound", "instrument"} else 0.1
    if u[0] < 0.5:
        audio = soxr.resample(audio, SAMPLE_RATE, SAMPLE_RATE * (1 + spread * (2 * u[1] - 1)), quality="QQ")
    audio = audio * 10 ** ((u[2] - 0.5) * 0.8)
    if u[3] < 0.5:
        audio = np.pad(audio, (int(u[3] * 0.6 * SAMPLE_RATE), 0))
    if u[4] < 0.5:
        level = 10 ** (-4 + 2 * u[5]) * torch.randn(len(audio), generator=generator).numpy()
        audio = audio + level * max(np.abs(audio).max(), 1e-3)
    return audio[: config.n_frames * SAMPLES_PER_FRAME].astype(np.float32)


def mask_mel(mel, generator, n_time=2, n_freq=2, time=25, freq=8):
    """Another microphone: treble up or down by 6 dB, bass the other way; then SpecAugment.

    That blanks out bands of time and of frequency with the mean (Park et al., 2019).
    """
    tilt = 0.15 * (2 * torch.rand((), generator=generator) - 1)  # Whisper's log-mel has four decades in 1
    mel = mel + tilt * torch.linspace(-1, 1, len(mel))[:, None]
    fill = mel.mean()
    for n, most, axis in ((n_time, time, 1), (n_freq, freq, 0)):
        for _ in range(n):
            width = int(torch.randint(most, (1,), generator=generator))
            start = int(torch.randint(mel.size(axis) - width, (1,), generator=generator))
            mel.narrow(axis, start, width).fill_(fill)
    return mel


def pair_text(example, answer, tokenizer, config):
    """Prompt, response and its first end mark, no padding: what VRPO scores, what the baseline learns."""
    ids, audio_at = build_prompt(tokenizer, example.question)
    reply = answer_ids(tokenizer, answer, config) + [config.eos_id]
    return {"ids": ids + reply, "is_answer": [False] * len(ids) + [True] * len(reply), "audio_at": audio_at}


class Maker:
    """Examples -> a clean micro-batch.  An example that cannot be used is left out and told of.

    augmented=False: the clip as it is (held-out loss).
    """

    def __init__(self, tokenizer, config, row, seed, augmented=True):
        self.tokenizer, self.config, self.row, self.seed, self.augmented = (
            tokenizer,
            config,
            row,
            seed,
            augmented,
        )

    def item(self, example, epoch):
        """One example -> {"sides", "transcript", "seconds"} and "written", or "mel" and "n_frames"."""
        c, generator = self.config, generator_for(self.seed, epoch, example.id)
        if self.row.loss == "vrpo":
            both = (("chosen", example.answer), ("rejected", example.rejected))
            sides = {side: pair_text(example, text, self.tokenizer, c) for side, text in both}
        elif c.causal:
            sides = {"text": pair_text(example, example.answer, self.tokenizer, c)}
        else:
            sides = {"text": encode_text(example, self.tokenizer, c, generator)}
        words = example.facts.get("words", "") if self.row.ctc else ""
        item = {"sides": sides, "transcript": self.tokenizer.encode(words, add_special_tokens=False).ids}
        if self.row.written:
            return item | {
                "written": write_audio(example.facts, self.tokenizer, c, generator),
                "seconds": 0.0,
            }
        if example.audio is None:
            raise UserError("has no audio")
        audio = clip_of(example, c)
        if self.augmented:
            audio = augment(audio, c, generator, example.facts)
        mel, n_frames = log_mel(audio, c)
        if self.augmented:
            mel = mask_mel(mel, generator)
        return item | {"mel": mel, "n_frames": n_frames, "seconds": len(audio) / SAMPLE_RATE}

    def __call__(self, examples, epoch):
        """-> {"batch", "ids", "epoch", "skipped", "seconds"}; batch is None when no example is left."""
        items, ids, skipped = [], [], []
        for example in examples:
            try:
                items.append(self.item(example, epoch))
                ids.append(example.id)
            except (UserError, OSError, ValueError, RuntimeError) as e:
                why = str(e).splitlines()[0] if str(e) else type(e).__name__
                skipped.append({"id": example.id, "where": example.where, "why": why})
        made = {"ids": ids, "epoch": epoch, "skipped": skipped, "seconds": sum(i["seconds"] for i in items)}
        if not items:
            return made | {"batch": None}
        if self.row.written:
            batch = {f"written.{k}": v for k, v in pad_written([i["written"] for i in items]).items()}
        else:
            batch = {
                "mel": torch.stack([i["mel"] for i in items]),
                "n_frames": torch.tensor([i["n_frames"] for i in items]),
                "transcript": torch.tensor([t for i in items for t in i["transcript"]], dtype=torch.long),
                "transcript_length": torch.tensor([len(i["transcript"]) for i in items]),
            }
        for side in items[0]["sides"]:
            collated = collate([i["sides"][side] for i in items], self.config)
            batch |= {f"{side}.{k}": v for k, v in collated.items()}
        return made | {"batch": batch}


def side_of(batch, side="text"):
    """The text tensors of one side of a batch, without the prefix."""
    return {k.removeprefix(side + "."): v for k, v in batch.items() if k.startswith(side + ".")}


def to_device(batch, device):
    return {
        k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()
    }


def cost_of(example, config):
    """About how many positions an example takes: a quarter of its letters, its audio tokens, its response."""
    seconds = example.duration or window_seconds(config)
    text = len(example.question) + 2 * len(example.answer) + 2 * len(example.rejected or "")
    return 55 + text // 4 + config.n_queries + round(12.5 * min(seconds, window_seconds(config)))


def schedule_of(n_examples, batch, seed, start=0):
    """(step, epoch, ids of the global batch) for ever, from step `start`: every example once an epoch.

    A global batch is drawn from all lengths alike, and micro-batches sort it: length tells corpora
    apart, and batches of one corpus each pull the model to and fro.
    """
    per_epoch = -(-n_examples // batch)
    for epoch in itertools.count(start // per_epoch):
        order = torch.randperm(
            n_examples, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        ).tolist()
        for n in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            if n >= start:
                first = (n - epoch * per_epoch) * batch
                yield n, epoch, order[first : first + batch]


class MicroBatches(torch.utils.data.IterableDataset):
    """What one rank works on, micro-batch by micro-batch: made["last"] ends a step."""

    def __init__(self, examples, costs, maker, row, world, budget, seed, start, stop):
        self.examples, self.costs, self.maker, self.row = examples, costs, maker, row
        self.rank, self.size, self.budget, self.seed, self.start, self.stop = (
            world.rank,
            world.size,
            budget,
            seed,
            start,
            stop,
        )

    def plan(self):
        for step, epoch, ids in schedule_of(len(self.costs), self.row.batch, self.seed, self.start):
            if step >= self.stop:
                return
            micros = bucket(ids[self.rank :: self.size], self.costs, self.budget)
            for n, micro in enumerate(micros):
                yield step, epoch, micro, n + 1 == len(micros)

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for step, epoch, ids, last in itertools.islice(self.plan(), first, None, stride):
            yield self.maker([self.examples[i] for i in ids], epoch) | {"step": step, "last": last}


def as_is(made):
    return made


def ignore_signals(_):
    """Loader workers leave the answer to SIGTERM and Ctrl-C to the process they work for."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


# ---------------------------------------------------------------------------------------------
# losses.  Each takes what Maker made, adds the gradient of the SUM over its examples to .grad, and
# returns the loss of every example (B,), detached.


@dataclass(frozen=True)
class Context:
    """What a loss needs beside its micro-batch."""

    model: nn.Module
    stage: int
    seed: int
    row: Stage
    autocast: object  # () -> context manager
    trained: tuple = ()  # the parameters that train
    reference: tuple = ()  # their values before stage 4

    def noise(self, made):
        """One generator for each example, on the stream that training draws t and masks from."""
        return [generator_for(self.seed, made["epoch"], i, stream=1) for i in made["ids"]]


def reader(model, side, audio, is_audio):
    """`predict` of diffusion.py for the text of one side of a batch."""
    return lambda noisy, where: model(noisy, side["valid"], where, audio, is_audio, side["audio_at"])


def audio_tokens(context, batch):
    """What the backbone reads of a batch's clips, heard or written down: audio (B, A, D), is_audio (B, A)."""
    model = context.model
    if "mel" in batch:
        taps, final = model.encode(batch["mel"], batch["n_frames"])
        return model.adapt(taps, final, batch["n_frames"], context.stage)
    written = side_of(batch, "written")
    return model.embed_written(written["ids"], written["weights"], written["noise"]), written["valid"]


def ctc_loss(model, batch, audio, is_audio, stage):
    """CTC of the transcripts through the backbone's embeddings, nats a piece (B,); 0 without a transcript.

    A semantic token is read as the word whose embedding it is most like, the end mark as CTC's blank.
    """
    c = model.config
    n_first = c.n_soft_prompts if stage == 1 else c.n_queries
    semantic, n_tokens = audio[:, n_first:], is_audio[:, n_first:].sum(1)
    logits = semantic.float() @ model.backbone.wte.weight.float().T * c.width**-0.5
    n_pieces = batch["transcript_length"]
    loss = F.ctc_loss(
        logits.log_softmax(-1).transpose(0, 1), batch["transcript"], n_tokens, n_pieces,
        blank=c.eos_id, reduction="none", zero_infinity=True,
    )  # fmt: skip
    return loss / n_pieces.clamp(min=1) * (n_pieces > 0)


def question_loss(context, batch, audio, is_audio, generators):
    """L_sft-a of a clean batch, one value per example (B,), with gradient; of a causal model its own loss.

    audio, is_audio: audio_tokens'.
    """
    model, least_t, side = context.model, context.row.least_t, side_of(batch)
    predict = reader(model, side, audio, is_audio)
    if model.config.causal:
        return next_token_loss(predict, side["ids"], side["is_answer"])
    t = least_t + (1 - least_t) * draw_t(len(side["ids"]), generators)
    return sft_loss(predict, side["ids"], side["is_answer"], model.config.mask_id, t, generator=generators)


def backward(losses):
    """Adds the gradient of the sum to .grad; where a small t has hidden nothing in any row, there is none."""
    if losses.requires_grad:
        losses.sum().backward()


def sft(context, made):
    """Stages 0-3: Eq. 1, 2, and CTC beside it where the row says so."""
    batch = made["batch"]
    with context.autocast():
        audio, is_audio = audio_tokens(context, batch)
        losses = question_loss(context, batch, audio, is_audio, context.noise(made))
    beside = (
        context.row.ctc * ctc_loss(context.model, batch, audio, is_audio, context.stage)
        if context.row.ctc
        else 0.0
    )
    backward(losses + beside)
    return losses.detach()


def vrpo(context, made):
    """Stage 4: Eq. 4, 5.  The backbone's graph lives for one sample at a time, the adapters' once."""
    model, batch = context.model, made["batch"]
    sides = {name: side_of(batch, name) for name in ("chosen", "rejected")}
    masks = draw_pair_masks(
        sides["chosen"]["is_answer"], sides["rejected"]["is_answer"], SAMPLES, context.noise(made)
    )

    def sample(name, audio, j=None):
        # autocast would remember the policy's weights in bf16 and use them for the reference
        with context.autocast(cache_enabled=False):
            return score(
                reader(model, sides[name], audio, is_audio),
                sides[name]["ids"],
                masks[name],
                model.config.mask_id,
                j,
            )

    def hear():
        with context.autocast(cache_enabled=False):
            return model.adapt(*encoded, batch["n_frames"], context.stage)

    with context.autocast():
        encoded = model.encode(batch["mel"], batch["n_frames"])
    audio, is_audio = hear()
    with torch.no_grad():
        policy = {name: sample(name, audio) for name in sides}
        with swapped(context.trained, context.reference):
            other = hear()[0]
            reference = {name: sample(name, other) for name in sides}
    margins = margin(policy["chosen"], policy["rejected"], reference["chosen"], reference["rejected"])
    leaf = audio.detach().requires_grad_()
    push(lambda name, j: sample(name, leaf, j), SAMPLES, margins, BETA)
    audio.backward(leaf.grad)
    return vrpo_loss(margins, BETA)


LOSSES = {"sft": sft, "vrpo": vrpo}


# ---------------------------------------------------------------------------------------------
# checkpoints of a running stage


KEEP = 2


def write_state(state, out, step):
    """Writes out/state-STEP.pt under a temporary name, syncs it, renames it, drops all but the last KEEP.

    Whatever moment the process dies at, a whole checkpoint is there.  Raises UserError when the disk
    is full; the older checkpoints stay.
    """
    path = os.path.join(out, f"state-{step:07}.pt")
    temporary = path + ".tmp"
    try:
        with open(temporary, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        folder = os.open(out, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name itself
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as e:  # torch.save reports a failed write as RuntimeError
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise UserError(
            f"{path}: cannot be written ({getattr(e, 'strerror', None) or str(e).splitlines()[0]}); "
            "older checkpoints are kept"
        ) from None
    for old in list_states(out)[:-KEEP]:
        os.remove(old)


def list_states(out):
    """Checkpoints in `out`, oldest first."""
    names = [n for n in os.listdir(out) if re.fullmatch(r"state-\d{7}\.pt", n)] if os.path.isdir(out) else []
    return [os.path.join(out, n) for n in sorted(names)]


def read_state(path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        raise UserError(f"{path}: not a checkpoint of a running stage ({str(e).splitlines()[0]})") from None


class Asked:
    """Remembers SIGTERM and Ctrl-C until the step is done; a second Ctrl-C is not waited for."""

    def __enter__(self):
        self.to_stop = False
        self.before = {n: signal.signal(n, self.note) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def note(self, number, _):
        if self.to_stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.to_stop = True

    def __exit__(self, *error):
        for n, handler in self.before.items():
            signal.signal(n, handler)


# ---------------------------------------------------------------------------------------------
# held-out loss


HELD_OUT_T = (0.1, 0.3, 0.5, 0.7, 0.9)


@torch.no_grad()
def held_out_loss(context, maker, examples, world, tokens):
    """Cross-entropy per masked token at fixed t, masks fixed by the example: a curve without sampling noise.

    Examples are shared out over the ranks.  Returns the mean over HELD_OUT_T and a list, one per t.
    """
    model, c = context.model, context.model.config
    was_training = model.training
    model.eval()
    sums = [0.0] * (2 * len(HELD_OUT_T))
    costs = {i: cost_of(e, c) for i, e in enumerate(examples)}
    for ids in bucket(range(world.rank, len(examples), world.size), costs, tokens):
        made = maker([examples[i] for i in ids], 0)
        if made["batch"] is None:
            continue
        batch = to_device(made["batch"], world.device)
        side = side_of(batch)
        with context.autocast():
            audio, is_audio = audio_tokens(context, batch)
            if c.causal:  # one loss, whatever t
                n = side["is_answer"].sum(1)
                predict = reader(model, side, audio, is_audio)
                nll = (next_token_loss(predict, side["ids"], side["is_answer"]) * n).sum().item()
                sums = [a + b for a, b in zip(sums, [nll, n.sum().item()] * len(HELD_OUT_T))]
                continue
            for k, t in enumerate(HELD_OUT_T):
                noise = [generator_for(k, 0, i, stream=1) for i in made["ids"]]
                noisy, is_masked = corrupt(
                    side["ids"], side["is_answer"], c.mask_id, torch.full((len(noise),), t), generator=noise
                )
                sums[2 * k] += (
                    masked_nll(reader(model, side, audio, is_audio), side["ids"], noisy, is_masked)
                    .sum()
                    .item()
                )
                sums[2 * k + 1] += is_masked.sum().item()
    model.train(was_training)
    sums = world.add(sums)
    per_t = [a / max(1, n) for a, n in zip(sums[::2], sums[1::2])]
    return sum(per_t) / len(per_t), per_t


# ---------------------------------------------------------------------------------------------
# the loop


@dataclass(frozen=True)
class Options:
    """Settings of a run that are not the stage's."""

    seed: int = 42
    steps: int | None = None  # ends the schedule here
    stop_after: int | None = None  # saves and leaves after so many steps, the schedule unchanged
    tokens: int = 6144  # positions in a micro-batch
    workers: int = 0
    save_every: int = 250
    held_out_every: int = 100
    precision: str = "bf16"
    recompute: bool = False
    compile: bool = False
    dropout: bool = True
    skip_limit: float = 0.01
    tensorboard: bool = False


MAX_BAD_STEPS = 10


class Log:
    """out/log.jsonl, a line a step, cut back to `step` when a run is resumed; TensorBoard if wanted."""

    def __init__(self, out, step, tensorboard):
        path, lines = os.path.join(out, "log.jsonl"), []
        if os.path.exists(path) and step:
            with open(path, encoding="utf-8") as f:
                lines = [line for line in f if line.endswith("\n") and json.loads(line)["step"] <= step]
        with open(path + ".tmp", "w", encoding="utf-8") as f:
            f.writelines(lines)
        os.replace(path + ".tmp", path)
        self.file = open(path, "a", encoding="utf-8")
        self.board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(out)

    def write(self, **entry):
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()
        if self.board:
            for name, value in entry.items():
                if isinstance(value, (int, float)) and name != "step":
                    self.board.add_scalar(name, value, entry["step"])

    def close(self):
        self.file.close()
        if self.board:
            self.board.close()


def record_skipped(out, skipped, seen):
    """Appends what was not seen before to out/skipped.jsonl.  Returns the number of different examples."""
    with open(os.path.join(out, "skipped.jsonl"), "a", encoding="utf-8") as f:
        for s in skipped:
            if s["id"] not in seen:
                seen.add(s["id"])
                f.write(json.dumps(s) + "\n")
    return len(seen)


def train(world, model, tokenizer, examples, stage, row, out, options=Options(), state=None, held_out=()):
    """Runs a stage.  Returns True when it is finished, False when it was asked to stop and has saved.

    state: what write_state wrote, to go on from.
    """
    config, device, o = model.config, world.device, options
    row_steps = row.steps or math.ceil(row.epochs * math.ceil(len(examples) / row.batch))
    steps = o.steps or row_steps
    chosen = trainable(model, row.trains)
    is_released = (model.base or {}).get("name") in RELEASES
    if is_released and o.precision == "bf16":  # ours keeps to the bit what it froze
        halve_frozen(model)
    optimizers = make_optimizers(chosen, row)
    reference = tuple(p.detach().clone() for p in chosen.values()) if row.loss == "vrpo" else ()
    step, seen, bad_steps, hours = 0, set(), 0, 0.0
    torch.manual_seed(o.seed + world.rank)  # dropout: all other randomness has generators of its own
    if state is not None:
        step, hours = state["step"], state["hours"]
        for name, p in chosen.items():
            p.data.copy_(state["trained"][name])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        reference = tuple(r.to(device) for r in state["reference"])
        if world.size == len(state["random"]):
            torch.set_rng_state(state["random"][world.rank])
            if device.type == "cuda" and state["random_cuda"]:
                torch.cuda.set_rng_state(state["random_cuda"][world.rank], device)
        seen = set(state["skipped"])
    undo = recompute(model) if o.recompute else contextlib.ExitStack()
    if o.compile:
        for block in model.backbone.blocks:
            block.compile()
    autocast = functools.partial(
        torch.autocast, device.type, dtype=torch.bfloat16, enabled=o.precision == "bf16"
    )
    context = Context(model, stage, o.seed, row, autocast, tuple(chosen.values()), reference)
    maker = Maker(tokenizer, config, row, o.seed)
    costs = [cost_of(e, config) for e in examples]
    stop = steps if o.stop_after is None else min(steps, step + o.stop_after)
    data = MicroBatches(examples, costs, maker, row, world, o.tokens, o.seed, step, stop)
    loader = torch.utils.data.DataLoader(
        data,
        batch_size=None,
        num_workers=o.workers,
        collate_fn=as_is,
        worker_init_fn=ignore_signals,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # its own: a loader must not shift dropout's numbers
    )
    log = Log(out, step, o.tensorboard) if world.rank == 0 else None
    model.train(o.dropout and row.loss != "vrpo")
    mean, started, kept = None, time.perf_counter(), step

    def keep(at):
        nonlocal kept
        kept = at
        random_states = world.gather(torch.get_rng_state())
        random_cuda = world.gather(torch.cuda.get_rng_state(device)) if device.type == "cuda" else []
        failed = None
        if world.rank == 0:
            try:
                whole = {
                    "step": at,
                    "stage": stage,
                    "hours": hours,
                    "skipped": sorted(seen),
                    "reference": list(reference),
                    "trained": {n: p.detach() for n, p in chosen.items()},
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "random": random_states,
                    "random_cuda": random_cuda,
                }
                write_state(whole, out, at)
            except UserError as e:
                failed = str(e)
        (failed, *_) = world.gather(failed)  # every rank stops, not rank 0 alone
        if failed:
            raise UserError(failed)

    progress = tqdm(
        total=steps,
        initial=step,
        desc=f"stage {stage}",
        unit=" steps",
        mininterval=1,
        disable=world.rank != 0,
    )
    with Asked() as asked, progress, undo, contextlib.closing(log) if log else contextlib.nullcontext():
        lr, losses, made_ids, skipped, seconds = 0.0, [], [], [], 0.0
        for made in loader:
            skipped += made["skipped"]
            if made["batch"] is not None:
                made["batch"] = to_device(made["batch"], device)
                losses.append(LOSSES[row.loss](context, made))
                made_ids += made["ids"]
                seconds += made["seconds"]
            if not made["last"]:
                continue
            # ---- the end of a step: what every rank has to say, in one reduction
            loss = torch.cat(losses).double() if losses else torch.zeros(0)
            is_bad = not bool(loss.isfinite().all())
            total, n, n_skipped, n_bad, n_asked, heard = world.add(
                [
                    0.0 if is_bad else float(loss.sum()),
                    len(loss),
                    len(skipped),
                    is_bad,
                    asked.to_stop,
                    seconds,
                ]
            )
            if n_skipped:
                all_skipped = [s for some in world.gather(skipped) for s in some]
                count = record_skipped(out, all_skipped, seen) if world.rank == 0 else None
                (count, *_) = world.gather(count)
                if count > o.skip_limit * max(len(examples), 1 / o.skip_limit):
                    raise UserError(
                        f"{count} of {len(examples)} examples cannot be used, more than {o.skip_limit:.0%}: "
                        f"see {out}/skipped.jsonl"
                    )
            lr = learning_rate(step, row, steps)
            for group in (g for optimizer in optimizers for g in optimizer.param_groups):
                group["lr"] = lr
            for p in chosen.values():  # a rank without examples adds zeros
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
            add_gradients(chosen.values(), world)
            for p in chosen.values():
                p.grad.div_(max(n, 1))
            norm = nn.utils.clip_grad_norm_(chosen.values(), 1.0)
            if n and not n_bad and norm.isfinite():
                for optimizer in optimizers:
                    optimizer.step()
                bad_steps = 0
                mean = total / n if mean is None else mean + (total / n - mean) * max(0.02, 1 / (step + 1))
            elif n:
                bad_steps += 1
                ids = [i for some in world.gather(made_ids) for i in some]
                if bad_steps >= MAX_BAD_STEPS:
                    places = [examples[i].where or str(i) for i in sorted(ids)[:20]]
                    raise UserError(
                        f"loss or gradient not finite {MAX_BAD_STEPS} steps in a row; "
                        f"the last step's examples: {', '.join(places)}"
                    )
            for p in chosen.values():
                p.grad = None
            step, hours = step + 1, hours + heard / 3600
            if log is not None:
                log.write(
                    step=step,
                    loss=total / n if n and not n_bad else None,
                    lr=lr,
                    norm=norm.item() if norm.isfinite() else None,
                    n=int(n),
                    hours=hours,
                    bad=int(bad_steps > 0),
                    skipped=len(seen),
                    seconds=time.perf_counter() - started,
                )
                shown = {
                    "loss": f"{mean:.3f}" if mean is not None else "-",
                    "lr": f"{lr:.1e}",
                    "norm": f"{norm:.2f}",
                    "audio": f"{hours:.2f}h",
                }
                shown |= {"skipped": len(seen)} if seen else {}
                progress.set_postfix(
                    shown | {"ex/s": f"{row.batch * progress.format_dict['rate']:.0f}"}
                    if progress.format_dict["rate"]
                    else shown,
                    refresh=False,
                )
                progress.update()
            if len(held_out) and row.loss == "sft" and (step % o.held_out_every == 0 or step == steps):
                quiet = Maker(tokenizer, config, row, 0, augmented=False)
                value, per_t = held_out_loss(context, quiet, held_out, world, o.tokens)
                if log is not None:
                    log.write(step=step, held_out=value, held_out_t=dict(zip(map(str, HELD_OUT_T), per_t)))
            if step % o.save_every == 0 and step < steps:
                keep(step)
            if n_asked:
                break
            losses, made_ids, skipped, seconds = [], [], [], 0.0
        if step < steps and kept != step:
            keep(step)
    return step == steps


def finish(world, model, tokenizer, out, stage):
    """The trained model as out/model.safetensors, and a mark that the stage is done for its checkpoints."""
    failed = None
    if world.rank == 0:
        try:
            model.stage = stage
            save(model, tokenizer, out, dtype=torch.float32)
            last = int(re.search(r"\d{7}", (list_states(out) or ["0000000"])[-1])[0])
            write_state({"finished": True}, out, last + 1)
            for path in list_states(out)[:-1]:
                os.remove(path)
        except UserError as e:
            failed = str(e)
    (failed, *_) = world.gather(failed)
    if failed:
        raise UserError(failed)


# ---------------------------------------------------------------------------------------------
# the command line


def new_figure(width, height):
    """An empty figure, inches; matplotlib takes a second to import, and nothing else needs it."""
    from matplotlib.figure import Figure

    return Figure((width, height), layout="constrained")


def save_figure(fig, path, dpi):
    """A figure as a PNG, under a temporary name and renamed."""
    try:
        fig.savefig(path + ".tmp", format="png", dpi=dpi)
        os.replace(path + ".tmp", path)
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror})") from None
    print(f"{path}: written")


def plot(folders, path="curves.png"):
    """Draws the logged loss, smoothed, and the held-out loss of one or several runs."""
    runs = {}
    for folder in folders:
        log = os.path.join(folder, "log.jsonl")
        if not os.path.exists(log):
            raise UserError(f"{folder}: no log.jsonl; train.py writes one there")
        with open(log, encoding="utf-8") as f:
            runs[folder] = [json.loads(line) for line in f]
    fig = new_figure(11, 4)
    axes = fig.subplots(1, 2)
    for folder, entries in runs.items():
        for axis, key, decay in ((axes[0], "loss", 0.95), (axes[1], "held_out", 0.0)):
            points, curve = [(e["step"], e[key]) for e in entries if e.get(key) is not None], []
            for _, y in points:
                curve.append(decay * curve[-1] + (1 - decay) * y if curve else y)
            if points:
                axis.plot([x for x, _ in points], curve, label=folder)
    for axis, title in zip(axes, ("training loss, smoothed", "held-out loss, mean over fixed t")):
        axis.set(title=title, xlabel="step")
        if axis.lines:
            axis.legend(fontsize=7)
    save_figure(fig, path, 120)


OBJECTIVES = {"diffusion": "", "ar": "-ar"}  # -> what its folder is called by


def fresh_adapters(model, seed):
    """Untrained adapters and soft prompts in place of what the model has."""
    c, device = model.config, model.backbone.wte.weight.device
    torch.manual_seed(seed)
    model.semantic = SemanticAdapter(c.audio_width, c.width).to(device)
    acoustic = AcousticAdapter(c.audio_width, c.width, len(c.taps), c.audio_heads, c.qformer_ffn, c.n_queries)
    model.acoustic = acoustic.to(device)
    model.soft_prompts = nn.Parameter(torch.randn(c.n_soft_prompts, c.width, device=device) * 0.02)


def start_from(args, stage, name, device):
    """The model a stage begins with, and its tokenizer."""
    causal = args.objective == "ar"
    if stage == 0 and not args.init:
        tokenizer = load_tokenizer(os.path.dirname(args.data) or ".")
        config = dataclasses.replace(PRESETS[name].with_tokenizer(tokenizer), causal=causal)
        model = build(config, device, seed=args.seed)
        if name in ASSETS:
            load_tiny_encoder(model, args.whisper, device)
        return model, tokenizer
    if stage == 1 and name in RELEASES and not args.init:
        # nothing of ours comes before: LLaDA and Whisper as released, fresh adapters
        llada, whisper, _ = fetch(name, None, args.llada, args.whisper, adapters=False)
        model, tokenizer = assemble(PRESETS[name], llada, whisper, None, device, torch.bfloat16, 1, name)
        fresh_adapters(model, args.seed)
        return model, tokenizer
    init = args.init or f"out/{name}{OBJECTIVES[args.objective]}/stage{stage - 1}"
    if stage == 1 and name in ASSETS and not args.init and not causal:
        init = ASSETS[name]  # the shipped backbone, as it was before anything was heard
    if not os.path.exists(os.path.join(init, "model.safetensors")):
        how = f"; `python train.py --stage {stage - 1} --model {name}` makes it" if stage else ""
        raise UserError(f"{init}: no checkpoint to start from{how}")
    dtype = None if name in RELEASES else torch.float32
    model, tokenizer = load(init, device, dtype, llada=args.llada, whisper=args.whisper)
    if model.config.causal != causal:
        kind = "ar" if model.config.causal else "diffusion"
        raise UserError(f"{init}: a backbone of the other kind; --objective {kind} goes with it")
    if stage == 1 and name in ASSETS:
        start = build(model.config, device, seed=args.seed)
        start.backbone.load_state_dict(
            {k: v for k, v in model.backbone.state_dict().items() if "lora_" not in k}
        )
        start.encoder, start.base = model.encoder, model.base
        return start, tokenizer
    return model, tokenizer


def run(args):
    """Trains one stage; 0 when it is done or was asked to stop and has saved."""
    stage, name = args.stage, args.model
    if stage not in STAGES.get(name, {}):
        raise UserError(f"there is no stage {stage} for {name}; there are {sorted(STAGES.get(name, {}))}")
    if args.objective == "ar" and (name in RELEASES or stage == 4):
        raise UserError("the autoregressive baseline is a small model's, stages 0 to 3")
    args.data = args.data or f"data/stage{stage}.jsonl"
    out = args.out or f"out/{name}{OBJECTIVES[args.objective]}/stage{stage}"
    if not os.path.exists(args.data):
        raise UserError(
            f"{args.data}: no such manifest; `python -m tools.prepare tour --audio DIR --out data` makes it"
        )
    if args.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise UserError("--tensorboard needs a package that is not installed: pip install tensorboard")
    states = list_states(out)
    if args.restart:
        for path in states:
            os.remove(path)
        states = []
    if states and not args.resume:
        raise UserError(
            f"{out}: holds a run already; --resume goes on with it, --restart begins anew, "
            "--out writes elsewhere"
        )
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as e:
        raise UserError(f"{out}: cannot be written ({e.strerror})") from None
    with join_world(args.device) as world:
        state = read_state(states[-1]) if states else None
        row = STAGES[name][stage]
        precision = args.precision or ("bf16" if world.device.type == "cuda" else "fp32")
        options = Options(
            seed=args.seed,
            steps=args.max_steps,
            stop_after=args.stop_after,
            tokens=args.tokens,
            workers=args.workers,
            save_every=args.save_every,
            held_out_every=args.held_out_every,
            precision=precision,
            recompute=args.recompute,
            compile=args.compile,
            dropout=not args.no_dropout,
            skip_limit=args.skip_limit,
            tensorboard=args.tensorboard,
        )
        if state and state.get("finished"):
            if world.rank == 0:
                print(f"{out}: finished already")
            return 0
        model, tokenizer = start_from(args, stage, name, world.device)
        torch.manual_seed(args.seed)
        if "lora" in row.trains and not any("lora_" in n for n, _ in model.named_parameters()):
            model.add_lora()
        # clips are looked for when they are read: a missing one is skipped and told of
        examples = read_manifest(args.data, stage, check=False)
        held_out_path = args.held_out or os.path.join(os.path.dirname(args.data), "held_out.jsonl")
        held_out = (
            read_manifest(held_out_path, None, check=False)
            if args.held_out or os.path.exists(held_out_path)
            else []
        )
        if not train(world, model, tokenizer, examples, stage, row, out, options, state, held_out):
            if world.rank == 0:
                print(f"{out}: stopped and saved; --resume goes on")
            return 0
        finish(world, model, tokenizer, out, stage)
        if world.rank == 0:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(f"{out}: written; peak memory {peak:.0f} MiB")
    return 0


def main(argv=None):
    parser = Parser(
        prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", type=int, choices=range(5))
    parser.add_argument("--model", default="diffa2", choices=sorted(PRESETS))
    parser.add_argument(
        "--objective",
        choices=sorted(OBJECTIVES),
        default="diffusion",
        help="ar: the same model with a causal mask and next-token loss",
    )
    parser.add_argument("--data", help="manifest (default: data/stageN.jsonl)")
    parser.add_argument(
        "--held-out", help="manifest of held-out examples (default: held_out.jsonl beside --data, if there)"
    )
    parser.add_argument("--init", help="checkpoint to start from (default: out/MODEL/stage(N-1))")
    parser.add_argument("--out", help="folder to write (default: out/MODEL/stageN)")
    parser.add_argument(
        "--llada", help="diffa1, diffa2, stage 1: folder of LLaDA-8B-Instruct, instead of the hub's"
    )
    parser.add_argument("--whisper", help="the encoder's file, instead of the hub's or the shipped one")
    parser.add_argument("--resume", action="store_true", help="go on with the run that --out holds")
    parser.add_argument("--restart", action="store_true", help="begin anew over the run that --out holds")
    parser.add_argument("--max-steps", type=int, help="end the stage, and its schedule, here")
    parser.add_argument(
        "--stop-after", type=int, help="save and leave after so many steps (the schedule stays)"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=6144,
        help="positions in a micro-batch (default 6144: ten questions of diffa2)",
    )
    parser.add_argument("--workers", type=int, default=0, help="processes that read clips, for each GPU")
    parser.add_argument("--save-every", type=int, default=250, metavar="STEPS")
    parser.add_argument("--held-out-every", type=int, default=100, metavar="STEPS")
    parser.add_argument(
        "--precision", choices=("bf16", "fp32"), help="of the computation (default: bf16 on a GPU, else fp32)"
    )
    parser.add_argument(
        "--recompute", action="store_true", help="activation checkpointing: less memory, a third more time"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the backbone's blocks")
    parser.add_argument("--no-dropout", action="store_true")
    parser.add_argument(
        "--skip-limit",
        type=float,
        default=0.01,
        help="stop when more than this share cannot be used (default 0.01)",
    )
    parser.add_argument(
        "--tensorboard", action="store_true", help="write TensorBoard's files beside log.jsonl"
    )
    parser.add_argument(
        "--plot", nargs="+", metavar="OUT", help="draw the logged curves of these folders to curves.png"
    )
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--device")
    try:
        args = parser.parse_args(argv)
        for flag in ("max_steps", "stop_after", "tokens", "save_every", "held_out_every"):
            if getattr(args, flag) is not None and getattr(args, flag) < 1:
                raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)} must be at least 1")
        if args.plot:
            plot(args.plot)
            return 0
        if args.stage is None:
            raise UserError("give a stage: python train.py --stage 1 --model tiny")
        return run(args)
    except UserError as e:
        print(f"train.py: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    leave(main())
