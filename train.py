"""Training: one table of stages, one loop, on a laptop or on many GPUs.

    python prepare.py tour --audio DIR --out data      # makes data/stage0.jsonl ... stage4.jsonl
    python train.py --stage 0 --model tiny             # the stand-ins for Whisper and LLaDA
    python train.py --stage 1 --model tiny             # semantic adapter on speech recognition
    python train.py --stage 2 --model tiny             # both adapters on audio questions
    python train.py --stage 3 --model tiny             # both adapters and LoRA
    python train.py --stage 4 --model tiny             # the same parts by preference (vrpo.py)
    python train.py --stage 0 --model tiny --init assets/tiny --out mine   # on from trained weights, with recordings of one's own
    torchrun --nproc_per_node=8 train.py --stage 1     # diffa2, eight GPUs; add --nnodes for more
    python train.py --stage 1 --resume                 # goes on where a stopped run was, to the bit
    python train.py --plot out/tiny/stage1 out/b       # the logged curves of runs, curves.png

Each stage starts from the folder the one before it wrote (out/MODEL/stageN).  The loss is averaged
over the global batch: a batch is a list of examples, rank r takes ids[r::world] in micro-batches
under a token budget, gradients of plain sums are added up and divided by the number of examples
once.  What an example is masked and augmented with is seeded by (seed, epoch, example), so the
number of processes changes nothing but the speed.

Stage 0 exists for the small model alone.  The paper freezes Whisper and LLaDA, and at this size
there is nothing pretrained to freeze, so stage 0 makes it, in parts: the encoder learns to name what
is heard, and in what order (label heads); the backbone learns to look things up in lettered lists,
then to read through the frozen encoder, single recordings first; last it meets both ways of being
shown a clip.  From stage 1 on the same parts are frozen as in the paper.
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
import random
import re
import resource
import signal
import sys
import time
import zlib
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import soxr
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from adapters import AcousticAdapter, SemanticAdapter, merge_lora
from data import (
    CANVAS, LETTERS, LISTED, SAMPLE_RATE, SAMPLES_PER_FRAME, answer_ids, bucket, build_prompt, capital, collate, encode_text, lay_under, lettered,
    load_audio, log_mel, louder, loudest, read_manifest, window_seconds,
)  # fmt: skip
from diffusion import corrupt, draw_t, draw_uniform, masked_nll, next_token_loss, sft_loss
from model import PRESETS, RELEASES, Parser, UserError, assemble, build, fetch, load, load_tokenizer, pick_device, save
from vrpo import BETA, SAMPLES, draw_pair_masks, margin, push, score, swapped, vrpo_loss


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
    least_t: float = 0.0  # t is drawn from (least_t, 1]
    canvas: int = CANVAS  # unit of the answer's canvas
    single: bool = False  # recordings as they were made, short questions: no strings, no mixtures
    names: int | None = None  # that the lists of stage 0 are drawn from, bare ones: looking up is learned with few; None: all, in any prompt
    lists: float = 0.0  # with this share of the examples comes a list: what is learned about them is soon forgotten among recordings
    frames: int = 0  # of the windows that stage 0's encoder learns on, 50 a second; 0: the model's own
    weight_decay: float = 0.05
    beta2: float = 0.999
    fresh: bool = False  # for a fresh backbone alone: left out where stage 0 goes on from trained weights
    muon: bool = False  # Muon instead of AdamW for the matrices of encoder and backbone


ADAPTERS = ("semantic.", "acoustic.")
READ = ("semantic.", "soft_prompts", "backbone.")

# looking up in bare lists: among so many names (79: all of the tour's), for so many steps
LISTS = ((8, 400), (24, 250), (79, 400), (8, 300), (16, 150), (32, 150), (79, 300))

STAGES = {  # a stage is a list of parts; only the small model's stage 0 has more than one
    # paper, Table B.2; soft prompts train with stage 1
    "diffa2": {
        1: [Stage(("semantic.", "soft_prompts"), lr=1e-4, batch=1280, warmup=1000, epochs=12)],
        2: [Stage(ADAPTERS, lr=5e-5, batch=196, warmup=1000, epochs=10)],
        3: [Stage((*ADAPTERS, "lora"), lr=5e-5, batch=196, warmup=1000, epochs=10)],
        4: [Stage((*ADAPTERS, "lora"), lr=5e-6, batch=4, warmup=200, epochs=1, loss="vrpo")],
    },
    "tiny": {
        0: [  # encoder on short windows and on whole ones, looking up, reading single clips, reading everything, both ways of being shown a clip
            Stage(("encoder.",), lr=1e-3, batch=8, warmup=200, steps=7500, loss="ear", frames=250, beta2=0.98, muon=True),
            Stage(("encoder.",), lr=4e-4, batch=4, warmup=50, steps=1500, loss="ear", beta2=0.98, muon=True),
            *(Stage(("backbone.",), lr=2e-3, batch=32, warmup=50, steps=steps, loss="look", names=names, fresh=True, beta2=0.98, muon=True) for names, steps in LISTS),
            Stage(("backbone.",), lr=1e-3, batch=32, warmup=50, steps=400, loss="look", fresh=True, beta2=0.98, muon=True),
            Stage(READ, lr=1.5e-3, batch=64, warmup=50, steps=300, loss="read", least_t=0.6, canvas=8, single=True, lists=0.25, fresh=True, beta2=0.98, muon=True),
            Stage(READ, lr=1e-3, batch=48, warmup=50, steps=1600, loss="read", least_t=0.3, canvas=8, lists=0.25, beta2=0.98, muon=True),
            Stage((*READ, "acoustic."), lr=7e-4, batch=32, warmup=50, steps=800, least_t=0.2, lists=0.25, beta2=0.98, muon=True),
        ],
        1: [Stage(("semantic.", "soft_prompts"), lr=2e-4, batch=16, warmup=20, steps=40, beta2=0.98)],
        2: [Stage(ADAPTERS, lr=2e-4, batch=16, warmup=20, steps=120, beta2=0.98)],
        3: [Stage((*ADAPTERS, "lora"), lr=2e-4, batch=16, warmup=20, steps=160, beta2=0.98)],
        4: [Stage((*ADAPTERS, "lora"), lr=3e-5, batch=4, warmup=10, steps=30, loss="vrpo", beta2=0.98)],
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
    """Activation checkpointing: each block's inside is computed again for the backward pass.  Returns a stack that undoes it."""
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


def make_optimizers(chosen, row):
    """AdamW for the parameters `chosen` (name -> parameter); with row.muon Muon for the matrices of the blocks, AdamW for the rest.

    Muon (Jordan et al., 2024) replaces the momentum by the nearest matrix with equal singular values, so that directions of
    small gradient move as fast as the others; its updates are scaled to the size of AdamW's, and one learning rate serves both.
    """
    by_muon = {name for name, p in chosen.items() if row.muon and p.dim() == 2 and ".blocks." in name}
    rest = [p for name, p in chosen.items() if name not in by_muon]
    # no decay on vectors: norms, biases, gains
    groups = [
        {"params": [p for p in rest if p.dim() > 1], "weight_decay": row.weight_decay},
        {"params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, lr=row.lr, betas=(0.9, row.beta2), fused=True)]
    if by_muon:
        optimizers.append(torch.optim.Muon([chosen[name] for name in sorted(by_muon)], lr=row.lr, weight_decay=row.weight_decay, adjust_lr_fn="match_rms_adamw"))
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


class Meeting(nn.Module):
    """Brings the gradients of all processes together by DDP, once a step.

    Each micro-batch adds to .grad on its own, whatever the loss and however many backward passes it
    takes; nothing travels meanwhile.  Then one backward pass of a zero through DDP makes it add up
    what has been gathered.  DDP divides by the number of processes; the step multiplies it back.
    """

    def __init__(self, parameters):
        super().__init__()
        self.parameters_ = nn.ParameterList(parameters)

    def forward(self):
        return sum(p.flatten()[:1].sum() for p in self.parameters_) * 0.0


# ---------------------------------------------------------------------------------------------
# examples -> batches


def clip_of(example, config):
    return load_audio(example.audio, example.offset, example.duration, window_seconds(config))[0]


def augment(audio, config, generator, facts):
    """Another speed (0.9-1.1; 0.75-1.25 of a sound alone), level, a moment of silence in front, a little noise: the recordings are few."""
    u = torch.rand(6, generator=generator).tolist()
    spread = 0.25 if facts.keys() & {"sound", "instrument"} else 0.1  # a voice's sex and feeling are in its pitch
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
    """Another microphone: treble up or down by 6 dB, bass the other way; then SpecAugment: blanks out bands of time and of frequency with the mean."""
    tilt = 0.15 * (2 * torch.rand((), generator=generator) - 1)  # Whisper's log-mel has four decades in 1
    mel = mel + tilt * torch.linspace(-1, 1, len(mel))[:, None]
    fill = mel.mean()
    for n, most, axis in ((n_time, time, 1), (n_freq, freq, 0)):
        for _ in range(n):
            width = int(torch.randint(most, (1,), generator=generator))
            start = int(torch.randint(mel.size(axis) - width, (1,), generator=generator))
            mel.narrow(axis, start, width).fill_(fill)
    return mel


BARE = (("", ""),)  # a question that is nothing but its choices


def draw_list(labels, prompts, rng, tokenizer, causal=False):
    """A question's choices, and the same again in another order, where of each pair the letter or the name is to be found -> as encode_text.

    labels: names to draw the choices from.  prompts: (before, after) the choices, to draw from.
    causal: what is to be found comes after what it is found by, for who cannot look ahead.
    """
    names = [capital(name) for name in rng.sample(labels, rng.randint(2, min(8, len(labels))))]
    before, after = rng.choice(prompts)
    ids, _ = build_prompt(tokenizer, before + "\n" + lettered(names) + after)
    pairs, is_answer = list(zip(LETTERS, names)), [False] * len(ids)
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    for letter, name in rng.sample(pairs, len(pairs)):
        letter, name, end = encode(f"{letter}."), encode(f" {name}"), encode(".") + encode("\n")
        hide_letter = rng.random() < 0.9  # the harder half: to be matched among many names, not among eight letters
        pair = [(letter, hide_letter), (name, not hide_letter)]
        for part, is_hidden in sorted(pair, key=lambda p: p[1]) if causal else pair:
            ids += part
            is_answer += [is_hidden] * len(part)
        ids += end
        is_answer += [False] * len(end)
    return {"ids": ids, "is_answer": is_answer, "audio_at": 0}


def pair_text(example, answer, tokenizer, config):
    """What VRPO scores and the autoregressive twin learns: prompt, response and its first end mark, nothing after it (no canvas, no padding)."""
    ids, audio_at = build_prompt(tokenizer, example.question)
    reply = answer_ids(tokenizer, answer, config) + [config.eos_id]
    return {"ids": ids + reply, "is_answer": [False] * len(ids) + [True] * len(reply), "audio_at": audio_at}


class Maker:
    """Examples -> a clean micro-batch.  An example that cannot be used is left out and told of.

    packer: stage 0's windows of clips, and names of its lists.  memory: stage 0's outputs of the frozen encoder, by clip and
    epoch; a clip found there is not read again.  augmented=False: the clip as it is (held-out loss).
    """

    def __init__(self, tokenizer, config, loss, seed, packer=None, memory=None, augmented=True, canvas=CANVAS, names=None, lists=0.0):
        self.tokenizer, self.config, self.loss, self.seed = tokenizer, config, loss, seed
        self.packer, self.memory, self.augmented, self.canvas, self.names, self.lists = packer, memory, augmented, canvas, names, lists

    def one_list(self, generator):
        """Bare among few names, in any prompt among all."""
        prompts = BARE if self.names else self.packer.prompts
        return draw_list(self.packer.names[: self.names], prompts, random.Random(generator.initial_seed()), self.tokenizer, self.config.causal)

    def item(self, example, epoch):
        """One example -> {"mel", "n_frames", "sides", "seconds"}; for stage 0's encoder a window of clips, for looking up a list, whatever the example."""
        c, generator = self.config, generator_for(self.seed, epoch, example.id)
        if self.loss == "ear":
            return self.packer.pack(generator, c)
        if self.loss == "look":
            return {"mel": None, "n_frames": 0, "sides": {"text": self.one_list(generator)}, "seconds": 0.0}
        if self.loss == "vrpo":
            sides = {side: pair_text(example, text, self.tokenizer, c) for side, text in (("chosen", example.answer), ("rejected", example.rejected))}
        elif c.causal:
            sides = {"text": pair_text(example, example.answer, self.tokenizer, c)}
        else:
            sides = {"text": encode_text(example, self.tokenizer, c, generator, self.canvas)}
        if self.lists and torch.rand(1, generator=generator) < self.lists:
            sides["list"] = self.one_list(generator)
        key = (example.audio, epoch // HEAR_AGAIN)
        if self.memory is not None:
            if key in self.memory:
                return {"mel": None, "n_frames": len(self.memory[key]), "sides": sides, "seconds": 0.0, "key": key, "facts": example.facts}
            # all questions about a clip share its augmentation, whichever comes first
            generator = generator_for(self.seed, key[1], zlib.crc32(example.audio.encode()))
        audio = clip_of(example, c)
        if self.augmented:
            audio = augment(audio, c, generator, example.facts)
        mel, n_frames = log_mel(audio, c)
        if self.augmented:
            mel = mask_mel(mel, generator)
        return {"mel": mel, "n_frames": n_frames, "sides": sides, "seconds": len(audio) / SAMPLE_RATE, "key": key, "facts": example.facts}

    def __call__(self, examples, epoch):
        """-> {"batch", "ids", "epoch", "skipped", "seconds"}; batch is None when no example is left."""
        items, ids, skipped = [], [], []
        for example in examples:
            try:
                items.append(self.item(example, epoch))
                ids.append(example.id)
            except (UserError, OSError, ValueError, RuntimeError) as e:
                skipped.append({"id": example.id, "where": example.where, "why": str(e).splitlines()[0] if str(e) else type(e).__name__})
        made = {"batch": None, "ids": ids, "epoch": epoch, "skipped": skipped, "seconds": sum(i["seconds"] for i in items)}
        if not items:
            return made
        mels = [i["mel"] for i in items if i["mel"] is not None]
        batch = {"mel": torch.stack(mels)} if mels else {}
        if self.loss == "ear":
            batch["clips"] = [i["clips"] for i in items]
        else:
            batch["n_frames"] = torch.tensor([i["n_frames"] for i in items])
            for side in sorted({side for i in items for side in i["sides"]}):
                batch |= {f"{side}.{k}": v for k, v in collate([i["sides"][side] for i in items if side in i["sides"]], self.config).items()}
        if self.memory is not None:
            batch |= {"keys": [i["key"] for i in items], "is_new": [i["mel"] is not None for i in items], "facts": [i["facts"] for i in items]}
        return made | {"batch": batch}


def side_of(batch, side="text"):
    """The text tensors of one side of a batch, without the prefix."""
    return {k.removeprefix(side + "."): v for k, v in batch.items() if k.startswith(side + ".")}


def to_device(batch, device):
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def cost_of(example, config):
    """About how many positions a row of this example takes: a quarter of its letters, its audio tokens, its canvas."""
    seconds = example.duration or window_seconds(config)
    text = len(example.question) + 2 * len(example.answer) + 2 * len(example.rejected or "")
    return 55 + text // 4 + config.n_queries + round(12.5 * min(seconds, window_seconds(config)))


LIST_COST = 64  # positions of draw_list's rows, about


def schedule_of(n_examples, batch, seed, start=0):
    """(step, epoch, ids of the global batch) for ever, from step `start`: every example once an epoch.

    A global batch is drawn from all lengths alike, and micro-batches sort it: length tells corpora
    apart, and batches of one corpus each pull the model to and fro.
    """
    per_epoch = -(-n_examples // batch)
    for epoch in itertools.count(start // per_epoch):
        order = torch.randperm(n_examples, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
        for n in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            if n >= start:
                first = (n - epoch * per_epoch) * batch
                yield n, epoch, order[first : first + batch]


class MicroBatches(torch.utils.data.IterableDataset):
    """What one rank works on, micro-batch by micro-batch: made["last"] ends a step."""

    def __init__(self, examples, costs, maker, row, world, budget, seed, start, stop):
        self.examples, self.costs, self.maker, self.row = examples, costs, maker, row
        self.rank, self.size, self.budget, self.seed, self.start, self.stop = world.rank, world.size, budget, seed, start, stop

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
    heads: nn.Module = None  # stage 0's
    memory: dict = None  # stage 0's, see Maker

    def noise(self, made):
        """One generator for each example, on the stream that training draws t and masks from."""
        return [generator_for(self.seed, made["epoch"], i, stream=1) for i in made["ids"]]


def reader(model, side, audio, is_audio):
    """`predict` of diffusion.py for the text of one side of a batch."""
    return lambda noisy, where: model(noisy, side["valid"], where, audio, is_audio, side["audio_at"])


def question_loss(model, batch, audio, is_audio, generators, least_t=0.0):
    """L_sft-a of a clean batch, one value per example (B,), with gradient; of the autoregressive twin its own loss.

    audio, is_audio: model.adapt's.  least_t: draw t from (least_t, 1] instead of (0, 1].
    """
    side = side_of(batch)
    predict = reader(model, side, audio, is_audio)
    if model.config.causal:
        return next_token_loss(predict, side["ids"], side["is_answer"])
    t = least_t + (1 - least_t) * draw_t(len(side["ids"]), generators)
    return sft_loss(predict, side["ids"], side["is_answer"], model.config.mask_id, t, generator=generators)


def backward(losses):
    """Adds the gradient of the sum to .grad; a small t may have hidden nothing in any row: no loss, no gradient."""
    if losses.requires_grad:
        losses.sum().backward()


def sft(context, made):
    """Stages 1-3; in stage 0 backbone and adapters meet both layouts, soft prompts one step in four."""
    model, batch, stage = context.model, made["batch"], context.stage
    if stage == 0:
        stage = 1 if made["step"] % 4 == 0 else 2
    with context.autocast():
        heard = model.adapt(*model.encode(batch["mel"]), batch["n_frames"], stage)
        losses = question_loss(model, batch, *heard, context.noise(made), context.row.least_t)
    backward(losses)
    return losses.detach()


def vrpo(context, made):
    """Stage 4: Eq. 4, 5.  The backbone's graph lives for one sample at a time, the adapters' once."""
    model, batch = context.model, made["batch"]
    sides = {name: side_of(batch, name) for name in ("chosen", "rejected")}
    masks = draw_pair_masks(sides["chosen"]["is_answer"], sides["rejected"]["is_answer"], SAMPLES, context.noise(made))

    def sample(name, audio, j=None):
        # autocast would remember the policy's weights in bf16 and use them for the reference
        with context.autocast(cache_enabled=False):
            return score(reader(model, sides[name], audio, is_audio), sides[name]["ids"], masks[name], model.config.mask_id, j)

    def hear():
        with context.autocast(cache_enabled=False):
            return model.adapt(*encoded, batch["n_frames"], context.stage)

    with context.autocast():
        encoded = model.encode(batch["mel"])
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


# ---------------------------------------------------------------------------------------------
# stage 0: the stand-ins for Whisper and LLaDA


STRINGS = 0.45  # share of windows that hold a string of words or of short sounds
OVER_SOUND = 0.5  # share of all other speech that is packed over a sound
STRETCHES, STRETCH = 2, 4  # of every clip so many stretches of so many frames (a semantic token's worth) name it as well
EVEN = ("emotion", "sound", "instrument", "words", "sex")  # what clips of a corpus are drawn evenly by
LABELLED = ("words", "sound", "instrument", "emotion", "intensity", "sex", "speaker")
PLACES = 6  # a clip is the first, second, ... of its window, and so many from the end, counted up to here


def is_single(example):
    """A recording as it was made: composed strings and mixtures would be packed twice."""
    return bool(example.facts) and "strings" not in example.dataset and not example.facts.keys() & {"background", "first_sound"}


def merged(pools):
    """Pools of several corpora (value -> clips) as one."""
    together = defaultdict(list)
    for value, clips in (item for pool in pools for item in pool.items()):
        together[value] += clips
    return dict(together)


class Packer:
    """Windows filled with single clips: one clip in ten seconds would leave the encoder idle nine tenths of its time."""

    def __init__(self, examples):
        single = {e.audio: e for e in examples if is_single(e)}
        pools = defaultdict(lambda: defaultdict(list))  # corpus, kind of fact -> value -> clips
        for e in single.values():
            kind = next(kind for kind in (*EVEN, *e.facts) if kind in e.facts)
            pools[e.dataset, kind][e.facts[kind]].append(e)
        of_kind = defaultdict(list)  # kind -> pools of several corpora
        for (corpus, kind), pool in sorted(pools.items()):
            alone = kind not in EVEN or kind == "words" and any(" " in words for words in pool)  # sentences are no strings of words
            of_kind[corpus if alone else kind].append(pool)
        self.pools = {kind: merged(some) for kind, some in of_kind.items()}  # or windows would be half words
        self.strings = of_kind["words"] + of_kind["sound"]
        self.often = [math.sqrt(sum(map(len, pool.values()))) for pool in self.strings]  # more recordings, more to tell apart
        self.sounds = [self.pools[kind] for kind in ("sound", "sound", "sound", "instrument") if kind in self.pools]  # sounds are what is asked for
        hardest = [self.pools[kind] for kind in ("emotion", "emotion", "sound", "instrument") if kind in self.pools]
        self.draws = [*self.pools.values(), *hardest]  # what is hard to hear oftener
        self.labels = {kind: sorted({e.facts[kind] for e in single.values() if kind in e.facts}) for kind in LABELLED}
        self.names = list(dict.fromkeys(v for kind in LABELLED if kind != "speaker" for v in self.labels[kind] if len(v) < 20))  # no sentences
        self.labels["louder"] = ["the background", "the voice"]
        self.labels |= {kind: [str(i) for i in range(PLACES)] for kind in ("place", "left")}
        self.prompts = sorted({tuple(parts) for e in examples if len(parts := LISTED.split(e.question)) == 2} | set(BARE))

    def draw_clip(self, rng, generator, config, pools):
        """A corpus, then a word, sound or feeling of it, then a clip: rare classes as often as common ones.  -> facts, audio."""
        pool = rng.choice(pools)
        example = rng.choice(pool[rng.choice(sorted(pool))])
        return example.facts, augment(clip_of(example, config), config, generator, example.facts)

    def draw(self, rng, generator, config):
        """A clip, or now and then speech over a sound -> audio, [(facts, first sample, last sample)]."""
        facts, voice = self.draw_clip(rng, generator, config, self.draws)
        if "words" not in facts or not self.sounds or rng.random() > OVER_SOUND:
            return voice, [(facts, 0, len(voice))]
        of_sound, sound = self.draw_clip(rng, generator, config, self.sounds)
        audio, start, decibels = lay_under(voice, sound, rng)
        audio[start : start + len(voice)] += voice
        return audio, [(facts | louder(decibels), start, start + len(voice)), (of_sound, 0, len(audio))]

    def pack(self, generator, config):
        """A window of config.n_frames -> {"mel", "clips": [(facts, first frame, last frame)], "seconds"}.

        Some hold a string of one corpus' words or sounds, some a single clip, as in use; the rest whatever fits.
        """
        rng = random.Random(generator.initial_seed())
        window = config.n_frames * SAMPLES_PER_FRAME
        string = rng.choices(self.strings, self.often)[0] if self.strings and rng.random() < STRINGS else None
        if string:
            most, stop, gap = rng.randint(1, PLACES), window, 0.4
        else:
            most, stop, gap = 1 if rng.random() < 0.25 else math.inf, int(rng.uniform(0.3, 1.0) * window), 0.6
        audio, at = np.zeros(window, np.float32), int(rng.random() * 0.3 * SAMPLE_RATE)
        clips, n = [], 0
        while n < most and at <= stop:
            if string:
                facts, clip = self.draw_clip(rng, generator, config, [string])
                if "sound" in facts:
                    clip = loudest(clip, int(rng.uniform(1.0, 2.5) * SAMPLE_RATE))
                layers = [(facts, 0, len(clip))]
            else:
                clip, layers = self.draw(rng, generator, config)
            if at + len(clip) > window:
                if clips:
                    break
                at, clip = 0, clip[:window]
            audio[at : at + len(clip)] += clip
            for facts, start, end in layers:
                first = min((at + start) // SAMPLES_PER_FRAME, config.n_frames - 1)
                last = min((at + end) // SAMPLES_PER_FRAME, config.n_frames)
                clips.append((n, facts, first, max(last, first + 1)))
            n, at = n + 1, at + len(clip) + int(rng.uniform(0.02, gap) * SAMPLE_RATE)
        counted = lambda i: {"place": str(min(i, PLACES - 1)), "left": str(min(n - 1 - i, PLACES - 1))}
        clips = [(facts | counted(i), first, last) for i, facts, first, last in clips]
        if rng.random() < 0.5:
            audio += 10 ** rng.uniform(-4, -2) * torch.randn(window, generator=generator).numpy()
        mel = mask_mel(log_mel(audio, config)[0], generator)
        return {"mel": mel, "clips": clips, "seconds": window / SAMPLE_RATE}


class Heads(nn.Module):
    """What stage 0 needs and nobody else: label heads on the encoder's frames and on the audio tokens.

    They name each clip's word, sound, emotion, ... and its place in the window, from the mean of its
    frames and from single stretches of them: every semantic token is to say what clip it belongs to,
    so that a reader who is after the third word can find it.
    """

    def __init__(self, packer, config):
        super().__init__()
        self.labels = {kind: values for kind, values in packer.labels.items() if len(values) > 1}
        self.on_frames = nn.ModuleDict({kind: nn.Linear(config.audio_width, len(v)) for kind, v in self.labels.items()})
        self.on_tokens = nn.ModuleDict({kind: nn.Linear(config.width, len(v)) for kind, v in self.labels.items() if kind in (*LABELLED, "louder")})

    def name(self, heads, x, facts, row_of, B):
        """Cross-entropy of naming every fact of what x (N, d) stands for, averaged within each of the B rows."""
        total, n = torch.zeros(B, device=x.device), torch.zeros(B, device=x.device)
        for kind, head in heads.items():
            rows = [i for i, f in enumerate(facts) if f.get(kind) in self.labels[kind]]
            if rows:
                wanted = torch.tensor([self.labels[kind].index(facts[i][kind]) for i in rows], device=x.device)
                loss = F.cross_entropy(head(x[rows]).float(), wanted, label_smoothing=0.1, reduction="none")
                total = total.index_add(0, torch.tensor([row_of[i] for i in rows], device=x.device), loss)
        n = n.index_add(0, torch.tensor(row_of, device=x.device), torch.ones(len(row_of), device=x.device))
        return total / n.clamp(min=1)

    def listen(self, final, clips, generators):
        """Label loss of the clips in the encoder's output (B, F, d), a value a window (B,)."""
        parts = []  # (window, facts, first frame, last frame)
        for b, found in enumerate(clips):
            for facts, i, j in found:
                starts = draw_uniform(STRETCHES, generators, b).mul(max(j - i - STRETCH, 0) + 1).long().tolist()
                parts += [(b, facts, i, j)] + [(b, facts, i + k, min(i + k + STRETCH, j)) for k in starts]
        means = torch.stack([final[b, i:j].mean(0) for b, _, i, j in parts])  # (N, d)
        return self.name(self.on_frames, means, [facts for _, facts, _, _ in parts], [b for b, *_ in parts], len(clips))


def ear(context, made):
    """The encoder's part: what is heard where, by label heads."""
    batch = made["batch"]
    with context.autocast():
        _, final = context.model.encoder(batch["mel"])
        losses = context.heads.listen(final, batch["clips"], context.noise(made))
    losses.sum().backward()
    return losses.detach()


def look(context, made, name="text"):
    """The backbone learns to look up the letter of a name, and the name of a letter, in a list; there is no audio.  name: of the batch's side."""
    model, side = context.model, side_of(made["batch"], name)
    predict = lambda noisy, where: model(noisy, side["valid"], where)
    with context.autocast():
        if model.config.causal:
            losses = next_token_loss(predict, side["ids"], side["is_answer"])
        else:
            noisy = side["ids"].masked_fill(side["is_answer"], model.config.mask_id)
            losses = masked_nll(predict, side["ids"], noisy, side["is_answer"]) / side["is_answer"].sum(1)
    losses.sum().backward()
    return losses.detach()


NAMING_WEIGHT, HEAR_AGAIN = 0.2, 2  # a clip is augmented and encoded anew every other epoch


def read(context, made):
    """The backbone learns to read semantic tokens; the tokens learn to name their clip."""
    model, batch, memory = context.model, made["batch"], context.memory
    if "mel" in batch:
        new = [i for i, is_new in enumerate(batch["is_new"]) if is_new]
        if memory and next(iter(memory))[1] != made["epoch"] // HEAR_AGAIN:
            keep = {k: memory[k] for k in batch["keys"] if k in memory}
            memory.clear()
            memory |= keep
        with context.autocast():
            final = model.encode(batch["mel"])[1]
        for i, f in zip(new, final):
            memory[batch["keys"][i]] = f[: max(int(batch["n_frames"][i]), 4)].to(torch.float16)
    found = [memory[k].float() for k in batch["keys"]]
    final = nn.utils.rnn.pad_sequence(found, batch_first=True)
    batch["n_frames"] = torch.tensor([len(f) for f in found], device=final.device)
    with context.autocast():
        audio, is_audio = model.adapt(None, final, batch["n_frames"], 1)
        tokens, is_token = (x[:, model.config.n_soft_prompts :] for x in (audio, is_audio))
        losses = question_loss(model, batch, audio, is_audio, context.noise(made), context.row.least_t)
        tokens = F.layer_norm(tokens.float(), tokens.shape[-1:]) * is_token[:, :, None]
        pooled = tokens.sum(1) / is_token.sum(1, keepdim=True)  # (B, D)
        naming = context.heads.name(context.heads.on_tokens, pooled, batch["facts"], list(range(len(found))), len(found))
    backward(losses + NAMING_WEIGHT * naming)
    return losses.detach()


LOSSES = {"sft": sft, "vrpo": vrpo, "ear": ear, "look": look, "read": read}


def learn(context, made):
    """The row's loss and, where lists come with the examples, its gradient and theirs."""
    losses = LOSSES[context.row.loss](context, made)
    if "list.ids" in made["batch"]:
        look(context, made, "list")
    return losses


@torch.no_grad()
def match_loudness(model, examples, maker, n=64):
    """Scales the untrained adapters until what differs between tokens is as loud as the backbone's words.

    As initialised the semantic one is 1.5 times, the acoustic one 2.9 times too quiet.
    """
    rms = model.eval().backbone.wte.weight.pow(2).mean().sqrt()  # eval: without dropout
    made = maker([e for e in examples if is_single(e)][:n], 0)["batch"]
    n_frames = made["n_frames"].to(rms.device)
    taps, final = model.encode(made["mel"].to(rms.device))
    out, is_audio = model.semantic(final, n_frames)
    for out, last in ((out[is_audio], model.semantic.norm), (model.acoustic(taps).flatten(0, 1), model.acoustic.proj)):
        gain = rms / (out - out.mean(0)).pow(2).mean().sqrt()
        last.weight.mul_(gain)
        last.bias.mul_(gain)


# ---------------------------------------------------------------------------------------------
# checkpoints of a running stage


KEEP = 2


def write_state(state, out, part, step):
    """Writes out/state-PART-STEP.pt under a temporary name, syncs it, renames it, drops all but the last KEEP.

    Whatever moment the process dies at, a whole checkpoint is there.  Raises UserError when the disk
    is full; the older checkpoints stay.
    """
    path = os.path.join(out, f"state-{part}-{step:07}.pt")
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
        raise UserError(f"{path}: cannot be written ({getattr(e, 'strerror', None) or str(e).splitlines()[0]}); older checkpoints are kept") from None
    for old in list_states(out)[:-KEEP]:
        os.remove(old)


def list_states(out):
    """Checkpoints in `out`, oldest first."""
    names = [n for n in os.listdir(out) if re.fullmatch(r"state-\d+-\d{7}\.pt", n)] if os.path.isdir(out) else []
    return [os.path.join(out, n) for n in sorted(names, key=lambda n: [int(number) for number in re.findall(r"\d+", n)])]


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
            audio, is_audio = model.adapt(*model.encode(batch["mel"]), batch["n_frames"], context.stage or 1)
            if c.causal:  # one loss, whatever t
                n = side["is_answer"].sum(1)
                nll = (next_token_loss(reader(model, side, audio, is_audio), side["ids"], side["is_answer"]) * n).sum().item()
                sums = [a + b for a, b in zip(sums, [nll, n.sum().item()] * len(HELD_OUT_T))]
                continue
            for k, t in enumerate(HELD_OUT_T):
                noise = [generator_for(k, 0, i, stream=1) for i in made["ids"]]
                noisy, is_masked = corrupt(side["ids"], side["is_answer"], c.mask_id, torch.full((len(noise),), t), generator=noise)
                sums[2 * k] += masked_nll(reader(model, side, audio, is_audio), side["ids"], noisy, is_masked).sum().item()
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
    init: str | None = None  # stage 0: the folder it goes on from


MAX_BAD_STEPS = 10


class Log:
    """out/log.jsonl, a line a step, cut back to `step` when a run is resumed; TensorBoard beside it if wanted."""

    def __init__(self, out, part, step, tensorboard):
        path, lines = os.path.join(out, "log.jsonl"), []
        if os.path.exists(path) and (part or step):
            with open(path, encoding="utf-8") as f:
                lines = [line for line in f if line.endswith("\n") and ((e := json.loads(line))["part"], e["step"]) <= (part, step)]
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
                if isinstance(value, (int, float)) and name not in ("step", "part"):
                    self.board.add_scalar(f"part {entry['part']}/{name}", value, entry["step"])

    def close(self):
        self.file.close()
        if self.board:
            self.board.close()


def record_skipped(out, skipped, seen):
    """Appends what was not seen before to out/skipped.jsonl.  Returns how many different examples there are."""
    with open(os.path.join(out, "skipped.jsonl"), "a", encoding="utf-8") as f:
        for s in skipped:
            if s["id"] not in seen:
                seen.add(s["id"])
                f.write(json.dumps(s) + "\n")
    return len(seen)


def train(world, model, tokenizer, examples, stage, row, out, options=Options(), part=0, state=None, heads=None, held_out=()):
    """Runs one part of a stage.  Returns True when it is finished, False when it was asked to stop and has saved.

    state: what write_state wrote, to go on from.  heads: (Packer, Heads, memory) of stage 0.
    """
    config, device, o = model.config, world.device, options
    row_steps = row.steps or math.ceil(row.epochs * math.ceil(len(examples) / row.batch))
    steps = o.steps or row_steps
    chosen = trainable(model, row.trains)
    if model.base and o.precision == "bf16":  # the released models; ours keeps to the bit what it froze
        halve_frozen(model)
    packer, heads, memory = heads or (None, None, None)
    if heads is not None and row.loss in ("ear", "read"):
        heads.to(device)
        chosen |= {f"heads.{n}": p for n, p in heads.named_parameters()}
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
    autocast = functools.partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=o.precision == "bf16")
    memory = memory if row.loss == "read" else None
    context = Context(model, stage, o.seed, row, autocast, tuple(chosen.values()), reference, heads, memory)
    window = dataclasses.replace(config, n_frames=row.frames or config.n_frames)
    maker = Maker(tokenizer, window, row.loss, o.seed, packer, memory, canvas=row.canvas, names=row.names, lists=row.lists)
    meeting = DistributedDataParallel(Meeting(chosen.values())) if world.size > 1 else None
    costs = [LIST_COST if row.loss == "look" else cost_of(e, config) for e in examples]
    stop = steps if o.stop_after is None else min(steps, step + o.stop_after)
    data = MicroBatches(examples, costs, maker, row, world, o.tokens, o.seed, step, stop)
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, num_workers=0 if memory is not None else o.workers, collate_fn=as_is, worker_init_fn=ignore_signals,
        pin_memory=device.type == "cuda", generator=torch.Generator(),  # its own: a loader must not shift dropout's numbers
    )  # fmt: skip
    log = Log(out, part, step, o.tensorboard) if world.rank == 0 else None
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
                write_state({
                    "step": at, "part": part, "stage": stage, "hours": hours, "skipped": sorted(seen), "reference": list(reference),
                    "trained": {n: p.detach() for n, p in chosen.items()}, "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "random": random_states, "random_cuda": random_cuda, "init": o.init,
                }, out, part, at)  # fmt: skip
            except UserError as e:
                failed = str(e)
        (failed, *_) = world.gather(failed)  # every rank stops, not rank 0 alone
        if failed:
            raise UserError(failed)

    progress = tqdm(total=steps, initial=step, desc=f"stage {stage}" + (f", part {part + 1}" if stage == 0 else ""), unit=" steps", mininterval=1,
                    disable=world.rank != 0)  # fmt: skip
    with Asked() as asked, progress, undo, contextlib.closing(log) if log else contextlib.nullcontext():
        lr, losses, made_ids, skipped, seconds = 0.0, [], [], [], 0.0
        for made in loader:
            skipped += made["skipped"]
            if made["batch"] is not None:
                made["batch"] = to_device(made["batch"], device)
                losses.append(learn(context, made))
                made_ids += made["ids"]
                seconds += made["seconds"]
            if not made["last"]:
                continue
            # ---- the end of a step: what every rank has to say, in one reduction
            loss = torch.cat(losses).double() if losses else torch.zeros(0)
            is_bad = not bool(loss.isfinite().all())
            total, n, n_skipped, n_bad, n_asked, heard = world.add(
                [0.0 if is_bad else float(loss.sum()), len(loss), len(skipped), is_bad, asked.to_stop, seconds]
            )
            if n_skipped:
                all_skipped = [s for some in world.gather(skipped) for s in some]
                count = record_skipped(out, all_skipped, seen) if world.rank == 0 else None
                (count, *_) = world.gather(count)
                if count > o.skip_limit * max(len(examples), 1 / o.skip_limit):
                    raise UserError(f"{count} of {len(examples)} examples cannot be used, more than {o.skip_limit:.0%}: see {out}/skipped.jsonl")
            lr = learning_rate(step, row, steps)
            for group in (g for optimizer in optimizers for g in optimizer.param_groups):
                group["lr"] = lr
            for p in chosen.values():  # a rank without examples, a head without a label: zeros meet too
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
            if meeting is not None:
                meeting().backward()
            for p in chosen.values():
                p.grad.mul_(world.size / max(n, 1))
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
                    raise UserError(f"loss or gradient not finite {MAX_BAD_STEPS} steps in a row; the last step's examples: {', '.join(places)}")
            for p in chosen.values():
                p.grad = None
            step, hours = step + 1, hours + heard / 3600
            if log is not None:
                log.write(part=part, step=step, loss=total / n if n and not n_bad else None, lr=lr, norm=norm.item() if norm.isfinite() else None, n=int(n), hours=hours,
                          bad=int(bad_steps > 0), skipped=len(seen), seconds=time.perf_counter() - started)  # fmt: skip
                shown = {"loss": f"{mean:.3f}" if mean is not None else "-", "lr": f"{lr:.1e}", "norm": f"{norm:.2f}", "audio": f"{hours:.2f}h"}
                shown |= {"skipped": len(seen)} if seen else {}
                progress.set_postfix(shown | {"ex/s": f"{row.batch * progress.format_dict['rate']:.0f}"} if progress.format_dict["rate"] else shown, refresh=False)
                progress.update()
            if len(held_out) and row.loss in ("sft", "read") and (step % o.held_out_every == 0 or step == steps):
                quiet = Maker(tokenizer, config, "sft", 0, augmented=False, canvas=row.canvas)
                value, per_t = held_out_loss(context, quiet, held_out, world, o.tokens)
                if log is not None:
                    log.write(part=part, step=step, held_out=value, held_out_t=dict(zip(map(str, HELD_OUT_T), per_t)))
            if step % o.save_every == 0 and step < steps:
                keep(step)
            if n_asked:
                break
            losses, made_ids, skipped, seconds = [], [], [], 0.0
        if step < steps and kept != step:
            keep(step)
    return step == steps


def finish(world, model, tokenizer, out, stage, part, heads=None, init=None):
    """The trained model as out/model.safetensors; then a mark that says that this part is done, with stage 0's heads for the next."""
    failed = None
    if world.rank == 0:
        try:
            model.stage = stage
            save(model, tokenizer, out, dtype=torch.float32)
            write_state({"step": 0, "part": part + 1, "heads": heads[1].state_dict() if heads else {}, "init": init}, out, part + 1, 0)
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


def scale_calls(axis, most):
    """A logarithmic axis of network calls, marked 1, 2, 4, ... up to `most`."""
    ticks = [2**k for k in range(int(math.log2(most)) + 1)]
    axis.set_xscale("log")
    axis.set_xticks(ticks, ticks)
    axis.minorticks_off()


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
        for part in sorted({e["part"] for e in entries}):
            name = folder + (f", part {part + 1}" if any(e["part"] for e in entries) else "")
            for axis, key, decay in ((axes[0], "loss", 0.95), (axes[1], "held_out", 0.0)):
                points, curve = [(e["step"], e[key]) for e in entries if e["part"] == part and e.get(key) is not None], []
                for _, y in points:
                    curve.append(decay * curve[-1] + (1 - decay) * y if curve else y)
                if points:
                    axis.plot([x for x, _ in points], curve, label=name)
    for axis, title in zip(axes, ("training loss, smoothed", "held-out loss, mean over fixed t")):
        axis.set(title=title, xlabel="step")
        if axis.lines:
            axis.legend(fontsize=7)
    save_figure(fig, path, 120)


TWIN = {"diffusion": "", "ar": "-ar"}  # objective -> what its folder is called by


def start_from(args, stage, name, device):
    """The model a stage begins with, and its tokenizer.  Stage 0 begins with a fresh one, or goes on with --init's in the manifests' vocabulary."""
    if stage == 0 and not args.init:
        tokenizer = load_tokenizer(os.path.dirname(args.data) or ".")
        config = dataclasses.replace(PRESETS[name].with_tokenizer(tokenizer), causal=args.objective == "ar")
        return build(config, device, seed=args.seed), tokenizer
    if stage == 1 and name in RELEASES and not args.init:
        # nothing of ours comes before: LLaDA and Whisper as released, fresh adapters
        llada, whisper, _ = fetch(name, None, args.llada, args.whisper, adapters=False)
        model, tokenizer = assemble(PRESETS[name], llada, whisper, None, device, torch.bfloat16, 1, name)
        c = PRESETS[name]
        torch.manual_seed(args.seed)
        model.semantic = SemanticAdapter(c.audio_width, c.width).to(device)
        model.acoustic = AcousticAdapter(c.audio_width, c.width, len(c.taps), c.audio_heads, c.qformer_ffn, c.n_queries).to(device)
        model.soft_prompts = nn.Parameter(torch.randn(c.n_soft_prompts, c.width, device=device) * 0.02)
        return model, tokenizer
    init = args.init or f"out/{name}{TWIN[args.objective]}/stage{stage - 1}"
    if not os.path.exists(os.path.join(init, "model.safetensors")):
        raise UserError(f"{init}: no checkpoint to start from" + (f"; `python train.py --stage {stage - 1} --model {name}` makes it" if stage else ""))
    model, tokenizer = load(init, device, None if name in RELEASES else torch.float32)
    if model.config.causal != (args.objective == "ar"):
        raise UserError(f"{init}: a backbone of the other kind; --objective {'ar' if model.config.causal else 'diffusion'} goes with it")
    if stage:
        return model, tokenizer
    new = load_tokenizer(os.path.dirname(args.data) or ".")
    return change_vocabulary(merge_lora(model), tokenizer, new), new


@torch.no_grad()
def change_vocabulary(model, old, new):
    """The model (no LoRA) with the vocabulary of another tokenizer: a token of both keeps its rows, a new one gets the mean of its pieces'."""
    pieces = []
    for i in range(new.get_vocab_size()):
        same = old.token_to_id(new.id_to_token(i))
        pieces.append(old.encode(new.decode([i], skip_special_tokens=False), add_special_tokens=False).ids if same is None else [same])
    state = model.state_dict()
    for name in ("backbone.wte.weight", "backbone.ff_out.weight"):
        state[name] = torch.stack([state[name][ids].mean(0) for ids in pieces])
    changed = build(model.config.with_tokenizer(new), model.backbone.wte.weight.device)
    changed.load_state_dict(state)
    return changed


def run(args):
    """Trains one stage; 0 when it is done or was asked to stop and has saved."""
    stage, name = args.stage, args.model
    if stage not in STAGES.get(name, {}):
        raise UserError(f"there is no stage {stage} for {name}; there are {sorted(STAGES.get(name, {}))}")
    if args.objective == "ar" and (name in RELEASES or stage == 4):
        raise UserError("the autoregressive twin is a small model's, stages 0 to 3")
    args.data = args.data or f"data/stage{stage}.jsonl"
    out = args.out or f"out/{name}{TWIN[args.objective]}/stage{stage}"
    if not os.path.exists(args.data):
        raise UserError(f"{args.data}: no such manifest; `python prepare.py tour --audio DIR --out data` makes it")
    if args.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise UserError("--tensorboard needs a package that is not installed: pip install tensorboard")
    states = list_states(out)
    if args.restart:
        for path in states:
            os.remove(path)
        states = []
    if states and not args.resume:
        raise UserError(f"{out}: holds a run already; --resume goes on with it, --restart begins anew, --out writes elsewhere")
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as e:
        raise UserError(f"{out}: cannot be written ({e.strerror})") from None
    with join_world(args.device) as world:
        state = read_state(states[-1]) if states else None
        parts, first = STAGES[name][stage], state["part"] if state else 0
        args.init = args.init or (state or {}).get("init")
        options = Options(
            args.seed, args.max_steps, args.stop_after, args.tokens, args.workers, args.save_every, args.held_out_every, args.precision,
            args.recompute, args.compile, not args.no_dropout, args.skip_limit, args.tensorboard, args.init,
        )  # fmt: skip
        if first == len(parts):
            if world.rank == 0:
                print(f"{out}: finished already")
            return 0
        model, tokenizer = load(out, world.device, torch.float32) if first else start_from(args, stage, name, world.device)
        torch.manual_seed(args.seed)
        if any("lora" in row.trains for row in parts) and not any("lora_" in n for n, _ in model.named_parameters()):
            model.add_lora()
        # clips are looked for when they are read: a missing one is skipped and told of, not the end of the run
        examples = read_manifest(args.data, stage, check=False)
        held_out_path = args.held_out or os.path.join(os.path.dirname(args.data), "held_out.jsonl")
        held_out = read_manifest(held_out_path, None, check=False) if args.held_out or os.path.exists(held_out_path) else []
        heads = None
        if stage == 0:
            if not any("words" in e.facts for e in examples):
                raise UserError(f"{args.data}: stage 0 needs lines with facts, words among them")
            packer = Packer(examples)
            heads = packer, Heads(packer, model.config), {}  # all parts that read hear a clip once
            if state and state.get("heads"):
                heads[1].load_state_dict(state["heads"])
        for part in range(first, len(parts)):
            row = parts[part]
            if args.init and row.fresh:
                continue
            if not args.init and row.loss == "read" and parts[part - 1].loss != "read" and not (state and state["step"]):
                match_loudness(model, examples, Maker(tokenizer, model.config, "sft", args.seed, augmented=False))
            chosen = [e for e in examples if not row.single or is_single(e) and len(e.question) + len(e.answer) < 80]
            chosen = [e if e.id == i else dataclasses.replace(e, id=i) for i, e in enumerate(chosen)]
            resumed = state if state and state["part"] == part and state["step"] else None
            if not train(world, model, tokenizer, chosen, stage, row, out, options, part, resumed, heads, held_out):
                if world.rank == 0:
                    print(f"{out}: stopped and saved; --resume goes on")
                return 0
            finish(world, model, tokenizer, out, stage, part, heads, args.init)
        if world.rank == 0:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(f"{out}: written; peak memory {peak:.0f} MiB")
    return 0


def main(argv=None):
    parser = Parser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, choices=range(5))
    parser.add_argument("--model", default="diffa2", choices=sorted(PRESETS))
    parser.add_argument("--objective", choices=sorted(TWIN), default="diffusion", help="ar: the same model with a causal mask and next-token loss, for comparison")
    parser.add_argument("--data", help="manifest (default: data/stageN.jsonl)")
    parser.add_argument("--held-out", help="manifest of held-out examples (default: held_out.jsonl beside --data, if there)")
    parser.add_argument("--init", help="checkpoint to start from (default: out/MODEL/stage(N-1)); stage 0: to go on from, in the vocabulary beside --data")
    parser.add_argument("--out", help="folder to write (default: out/MODEL/stageN)")
    parser.add_argument("--llada", help="diffa1, diffa2, stage 1: folder of LLaDA-8B-Instruct, instead of the hub's")
    parser.add_argument("--whisper", help="diffa1, diffa2, stage 1: the encoder's file, instead of the hub's")
    parser.add_argument("--resume", action="store_true", help="go on with the run that --out holds")
    parser.add_argument("--restart", action="store_true", help="begin anew over the run that --out holds")
    parser.add_argument("--max-steps", type=int, help="end each part of the stage, and its schedule, here")
    parser.add_argument("--stop-after", type=int, help="save and leave after so many steps (the schedule stays)")
    parser.add_argument("--tokens", type=int, default=6144, help="positions in a micro-batch (default 6144: ten questions of diffa2)")
    parser.add_argument("--workers", type=int, default=0, help="processes that read clips, for each GPU")
    parser.add_argument("--save-every", type=int, default=250, metavar="STEPS")
    parser.add_argument("--held-out-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of the computation; trained weights are fp32")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing: less memory, a third more time")
    parser.add_argument("--compile", action="store_true", help="torch.compile the backbone's blocks")
    parser.add_argument("--no-dropout", action="store_true")
    parser.add_argument("--skip-limit", type=float, default=0.01, help="stop when more than this share cannot be used (default 0.01)")
    parser.add_argument("--tensorboard", action="store_true", help="write TensorBoard's files beside log.jsonl")
    parser.add_argument("--plot", nargs="+", metavar="OUT", help="draw the logged curves of these folders to curves.png")
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
