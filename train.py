"""Training: one table of stages, one loop.

    python prepare.py tour --audio DIR --out data      # makes data/stage0.jsonl ... stage3.jsonl
    python train.py --stage 0 --model tiny             # the stand-ins for Whisper and LLaDA
    python train.py --stage 1 --model tiny             # semantic adapter on speech recognition
    python train.py --stage 2 --model tiny             # both adapters on audio questions
    python train.py --stage 3 --model tiny             # both adapters and LoRA

Each stage starts from the folder the one before it wrote (out/MODEL/stageN).

Stage 0 exists for the small model alone.  The paper freezes Whisper and LLaDA, and at this size
there is nothing pretrained to freeze, so stage 0 makes it, in three parts: the encoder learns to
recognise words (CTC) and clips (a label head); the adapters learn to tell clips apart (0.3 in the
table); backbone and adapters learn to answer, through the frozen encoder (0.6).  From stage 1 on
the same parts are frozen as in the paper, and the loss is L_sft-a (diffusion.py).
"""

import argparse
import functools
import math
import os
import random
import resource
import sys
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import soxr
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data import (
    SAMPLE_RATE, SAMPLES_PER_FRAME, bucket, collate, encode_text, load_audio, log_mel, read_manifest, window_seconds,
)  # fmt: skip
from diffusion import draw_t, sft_loss
from model import PRESETS, Parser, UserError, build, load, load_tokenizer, pick_device, save


# ---------------------------------------------------------------------------------------------
# the table


@dataclass(frozen=True)
class Stage:
    trains: tuple  # prefixes of the names of the parameters that train; all else is frozen
    lr: float
    batch: int  # examples in a step
    warmup: int  # steps
    epochs: float = 0  # over the manifest, or
    steps: int = 0  # this many steps whatever its size
    weight_decay: float = 0.05


ADAPTERS = ("semantic.", "acoustic.")

STAGES = {
    # paper, Table B.2; soft prompts train with stage 1
    "diffa2": {
        1: Stage(("semantic.", "soft_prompts"), lr=1e-4, batch=1280, warmup=1000, epochs=12),
        2: Stage(ADAPTERS, lr=5e-5, batch=196, warmup=1000, epochs=10),
        3: Stage((*ADAPTERS, "lora"), lr=5e-5, batch=196, warmup=1000, epochs=10),
    },
    "tiny": {
        0: Stage(("encoder.",), lr=1e-3, batch=4, warmup=200, steps=4000),
        0.3: Stage(ADAPTERS, lr=1e-3, batch=16, warmup=20, steps=350),
        0.6: Stage((*ADAPTERS, "soft_prompts", "backbone."), lr=1e-3, batch=16, warmup=50, steps=550),
        1: Stage(("semantic.", "soft_prompts"), lr=3e-4, batch=16, warmup=20, steps=100),
        2: Stage(ADAPTERS, lr=4e-4, batch=16, warmup=20, steps=200),
        3: Stage((*ADAPTERS, "lora"), lr=3e-4, batch=16, warmup=20, steps=150),
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


def learning_rate(step, row, steps):
    """Linear warm-up, then a cosine down to zero."""
    if step < row.warmup:
        return row.lr * (step + 1) / row.warmup
    return row.lr * 0.5 * (1 + math.cos(math.pi * (step - row.warmup) / max(1, steps - row.warmup)))


def generator_for(seed, epoch, example_id):
    """Noise, canvas and augmentation of an example: the same whatever batch it is in."""
    g = torch.Generator()
    g.manual_seed(((seed * 1_000_003 + epoch) * 1_000_003 + example_id) % (1 << 63))
    return g


# ---------------------------------------------------------------------------------------------
# examples -> batches


@functools.cache
def read_clip(path, offset, duration, limit):
    """A clip as 16-bit samples, decoded once and kept: 1.9 MB a minute."""
    return (load_audio(path, offset, duration, limit)[0] * 32767).clip(-32768, 32767).astype(np.int16)


def clip_of(example, config):
    return read_clip(example.audio, example.offset, example.duration, window_seconds(config)).astype(np.float32) / 32767


def augment(audio, config, generator):
    """Another speed (0.9-1.1), level, a moment of silence in front, a little noise: the recordings are few."""
    u = torch.rand(6, generator=generator).tolist()
    if u[0] < 0.5:
        audio = soxr.resample(audio, SAMPLE_RATE, SAMPLE_RATE * (0.9 + 0.2 * u[1]), quality="QQ")
    audio = audio * 10 ** ((u[2] - 0.5) * 0.8)
    if u[3] < 0.5:
        audio = np.pad(audio, (int(u[3] * 0.6 * SAMPLE_RATE), 0))
    if u[4] < 0.5:
        level = 10 ** (-4 + 2 * u[5]) * torch.randn(len(audio), generator=generator).numpy()
        audio = audio + level * max(np.abs(audio).max(), 1e-3)
    return audio[: config.n_frames * SAMPLES_PER_FRAME].astype(np.float32)


def mask_mel(mel, generator, n_time=2, n_freq=2, time=25, freq=8):
    """SpecAugment: blanks out bands of time and of frequency with the clip's mean."""
    mel, fill = mel.clone(), mel.mean()
    for n, most, axis in ((n_time, time, 1), (n_freq, freq, 0)):
        for _ in range(n):
            width = int(torch.randint(most, (1,), generator=generator))
            start = int(torch.randint(mel.size(axis) - width, (1,), generator=generator))
            mel.narrow(axis, start, width).fill_(fill)
    return mel


def make_batch(examples, tokenizer, config, generators):
    items = []
    for example, g in zip(examples, generators):
        item = encode_text(example, tokenizer, config, g)
        mel, item["n_frames"] = log_mel(augment(clip_of(example, config), config, g), config)
        item["mel"] = mask_mel(mel, g)
        items.append(item)
    return collate(items, config)


def example_stream(examples, batch_size, lengths, seed):
    """(epoch, examples) for ever: every example once an epoch, batches of similar length."""
    epoch = 0
    while True:
        order = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        for indices in bucket(lengths, batch_size, order):
            yield epoch, [examples[i] for i in indices]
        epoch += 1


# ---------------------------------------------------------------------------------------------
# stages 1-3: L_sft-a


def question_loss(model, batch, generators, stage, least_t=0.0):
    """L_sft-a of a clean batch, one value per example (B,).  The encoder runs without gradient.

    least_t: draw t from (least_t, 1] instead of (0, 1].
    """
    taps, final = model.encode(batch["mel"])
    audio, is_audio = model.adapt(taps, final, batch["n_frames"], stage)

    def predict(noisy, where):
        return model(noisy, batch["valid"], where, audio, is_audio, batch["audio_at"])

    t = least_t + (1 - least_t) * draw_t(len(batch["ids"]), generators)
    return sft_loss(predict, batch["ids"], batch["is_answer"], model.config.mask_id, t, generator=generators)


# ---------------------------------------------------------------------------------------------
# stage 0: the stand-ins for Whisper and LLaDA


CTC_WEIGHT = 0.1  # per word it starts a hundred times larger than the label's loss


class Pretraining(nn.Module):
    """Heads on the encoder that stage 0 needs and nobody else.

    CTC names the words in order; the label head names each clip, word or sound, from the mean of
    its frames.  CTC alone sat on its plateau (blanks everywhere) for hundreds of steps.
    """

    def __init__(self, examples, config):
        super().__init__()
        single = {e.audio: e for e in examples if "strings" not in e.dataset}  # strings are packed anew here
        self.pools = defaultdict(lambda: defaultdict(list))  # corpus -> word or label -> clips
        for e in single.values():
            self.pools[e.dataset][e.transcript or e.label].append(e)
        self.words = sorted({w for e in single.values() if e.transcript for w in e.transcript.split()})
        self.labels = sorted({e.transcript or e.label for e in single.values()})
        self.ctc = nn.Linear(config.audio_width, 1 + len(self.words))  # class 0: CTC's blank
        self.label = nn.Linear(config.audio_width, len(self.labels))
        self.name = nn.Linear(config.width, len(self.labels))  # reads audio tokens
        self.config = config

    def draw_clip(self, rng):
        """A corpus, then a word or label of it, then a clip: rare classes as often as common ones."""
        corpus = self.pools[rng.choice(sorted(self.pools))]
        return rng.choice(corpus[rng.choice(sorted(corpus))])

    def pack(self, rng, generator):
        """A window filled with clips -> mel, word classes, [(label, first frame, last frame)].

        One clip in ten seconds would leave the encoder idle nine tenths of its time; several
        give CTC something to say about every frame.  A third of the windows hold one clip,
        as in use.
        """
        window = self.config.n_frames * SAMPLES_PER_FRAME
        alone, audio, at = rng.random() < 0.34, np.zeros(window, np.float32), int(rng.random() * 0.3 * SAMPLE_RATE)
        stop = int(rng.uniform(0.3, 1.0) * window)
        words, labels = [], []
        while True:
            example = self.draw_clip(rng)
            clip = augment(clip_of(example, self.config), self.config, generator)
            if at + len(clip) > window:
                if labels:
                    break
                at = 0
            audio[at : at + len(clip)] += clip
            words += [1 + self.words.index(w) for w in (example.transcript or "").split()]
            first, last = at // SAMPLES_PER_FRAME, (at + len(clip)) // SAMPLES_PER_FRAME
            labels.append((self.labels.index(example.transcript or example.label), first, max(last, first + 1)))
            at += len(clip) + int(rng.uniform(0.02, 0.6) * SAMPLE_RATE)
            if alone or at > stop:
                break
        if rng.random() < 0.5:
            audio += 10 ** rng.uniform(-4, -2) * torch.randn(window, generator=generator).numpy()
        return mask_mel(log_mel(audio, self.config)[0], generator), words, labels

    def forward(self, encoder, packs):
        """CTC loss per word, cross-entropy of the labels."""
        _, final = encoder(torch.stack([mel for mel, _, _ in packs]).to(self.ctc.weight.device))
        log_p = self.ctc(final).float().log_softmax(-1).transpose(0, 1)  # (F, B, 1 + words)
        lengths = torch.tensor([len(w) for _, w, _ in packs])
        targets = torch.tensor([i for _, w, _ in packs for i in w])
        frames = torch.full((len(packs),), len(log_p))
        loss = F.ctc_loss(log_p, targets, frames, lengths, reduction="sum", zero_infinity=True) / max(1, len(targets))
        means = torch.stack([final[b, i:j].mean(0) for b, (_, _, found) in enumerate(packs) for _, i, j in found])
        wanted = torch.tensor([k for _, _, found in packs for k, _, _ in found], device=final.device)
        return loss, F.cross_entropy(self.label(means).float(), wanted, label_smoothing=0.1)


def naming_loss(model, heads, rng, generators):
    """Cross-entropy of every audio token, semantic or acoustic, naming the clip it belongs to.

    Adapters start with outputs that hardly differ between clips (the Q-Former's by a tenth of their
    length), and a backbone as untaught as this one is long in finding the difference.
    """
    examples = [heads.draw_clip(rng) for _ in generators]
    clips = [augment(clip_of(e, model.config), model.config, g) for e, g in zip(examples, generators)]
    mels, n_frames = zip(*(log_mel(clip, model.config) for clip in clips))
    taps, final = model.encode(torch.stack(mels).to(model.soft_prompts.device))
    audio, is_audio = model.adapt(taps, final, torch.tensor(n_frames, device=final.device), stage=2)
    wanted = torch.tensor([heads.labels.index(e.transcript or e.label) for e in examples], device=final.device)
    logits = heads.name(F.layer_norm(audio.float(), audio.shape[-1:]))  # (B, A, labels)
    return F.cross_entropy(logits[is_audio].float(), wanted[:, None].expand_as(is_audio)[is_audio])


@torch.no_grad()
def match_loudness(model):
    """Turns the untrained adapters down to the loudness of the backbone's words (rms of its embeddings).

    As initialised they are forty times louder.
    """
    rms = model.backbone.wte.weight.pow(2).mean().sqrt()
    model.semantic.norm.weight.fill_(rms)
    for p in (model.acoustic.proj.weight, model.acoustic.proj.bias):
        p.mul_(rms * 3**0.5)  # default init on a normalised input: 1/sqrt(3)
    return model


# ---------------------------------------------------------------------------------------------
# the loop


def train(model, tokenizer, examples, stage, row, out, seed=0, steps=None, save_every=250):
    """Runs one stage and leaves `out` as a checkpoint folder.  Returns the list of losses."""
    config, device = model.config, next(model.parameters()).device
    steps = steps or row.steps or math.ceil(row.epochs * len(examples) / row.batch)
    chosen = trainable(model, row.trains)
    heads = Pretraining(examples, config).to(device) if stage < 0.6 else None
    if heads is not None:
        chosen |= {f"heads.{n}": p for n, p in heads.named_parameters()}
    # no decay on vectors: norms, biases, gains
    groups = [
        {"params": [p for p in chosen.values() if p.dim() > 1], "weight_decay": row.weight_decay},
        {"params": [p for p in chosen.values() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=row.lr, betas=(0.9, 0.98))
    rng = random.Random(seed)
    lengths = [len(e.question) + len(e.answer) + len(e.transcript or "") for e in examples]
    stream = example_stream(examples, row.batch, lengths, seed)
    losses, smooth = [], defaultdict(float)
    model.train()
    with tqdm(total=steps, desc=f"stage {stage}", unit=" steps", mininterval=1) as progress:
        for step in range(steps):
            epoch, chosen_examples = next(stream)
            generators = [generator_for(seed, epoch, e.id) for e in chosen_examples]
            lr = learning_rate(step, row, steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            with torch.autocast(device.type, dtype=torch.bfloat16):
                if stage == 0.3:
                    parts = {"naming": naming_loss(model, heads, rng, generators)}
                elif stage == 0:
                    ctc, label = heads(model.encoder, [heads.pack(rng, g) for g in generators])
                    parts = {"ctc": CTC_WEIGHT * ctc, "label": label}
                else:
                    batch = make_batch(chosen_examples, tokenizer, config, generators)
                    batch = {k: v.to(device) for k, v in batch.items()}
                    # stage 0.6 meets both ways of showing the backbone a clip, and hides at least half of
                    # the answer: what a few tokens of it give away need not be heard
                    layout, least_t = ((1 if step % 4 == 0 else 2), 0.5) if stage == 0.6 else (stage, 0.0)
                    parts = {"loss": question_loss(model, batch, generators, layout, least_t).mean()}
            loss = sum(parts.values())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(chosen.values(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            for name, value in parts.items():
                smooth[name] += (value.item() - smooth[name]) * max(0.01, 1 / (step + 1))
            shown = {name: f"{value:.3f}" for name, value in smooth.items()}
            progress.set_postfix(shown | {"lr": f"{lr:.1e}", "norm": f"{norm:.2f}"}, refresh=False)
            progress.update()
            if (step + 1) % save_every == 0 or step + 1 == steps:
                model.stage = int(stage)
                if stage == 0 and step + 1 == steps:
                    match_loudness(model)
                save(model, tokenizer, out, dtype=torch.float32)
    return losses


def main(argv=None):
    parser = Parser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, required=True, choices=range(5))
    parser.add_argument("--model", default="diffa2", choices=sorted(PRESETS))
    parser.add_argument("--data", help="manifest (default: data/stageN.jsonl)")
    parser.add_argument("--init", help="checkpoint to start from (default: out/MODEL/stage(N-1)); with stage 0: its first part, already trained")
    parser.add_argument("--out", help="folder to write (default: out/MODEL/stageN)")
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--device")
    try:
        args = parser.parse_args(argv)
        run(args)
    except UserError as e:
        print(f"train.py: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def run(args):
    stage, name = args.stage, args.model
    if stage not in STAGES.get(name, {}):
        raise UserError(f"there is no stage {stage} for {name}; there are {sorted(STAGES.get(name, {}))}")
    data = args.data or f"data/stage{stage}.jsonl"
    out = args.out or f"out/{name}/stage{stage}"
    if not os.path.exists(data):
        raise UserError(f"{data}: no such manifest; `python prepare.py tour --audio DIR --out data` makes it")
    device = pick_device(args.device)
    row = STAGES[name][stage]
    if stage == 0 and not args.init:
        tokenizer = load_tokenizer(os.path.dirname(data) or ".")
        model = build(PRESETS[name].with_tokenizer(tokenizer), device, seed=args.seed)
    else:
        init = args.init or f"out/{name}/stage{stage - 1}"
        if not os.path.exists(os.path.join(init, "model.safetensors")):
            raise UserError(f"{init}: no checkpoint to start from; `python train.py --stage {stage - 1} --model {name}` makes it")
        model, tokenizer = load(init, device, torch.float32)
        torch.manual_seed(args.seed)
        if "lora" in row.trains and not any("lora_" in n for n, _ in model.named_parameters()):
            model.add_lora()
    examples = read_manifest(data, stage)
    if stage == 0 and not any(e.transcript for e in examples):
        raise UserError(f"{data}: stage 0 needs lines with a transcript")
    if not (stage == 0 and args.init):
        train(model, tokenizer, examples, stage, row, out, args.seed, args.max_steps)
    for part in (0.3, 0.6) if stage == 0 else ():
        train(model, tokenizer, examples, part, STAGES[name][part], out, args.seed, args.max_steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{out}: written; peak memory {peak:.0f} MiB")


if __name__ == "__main__":
    sys.exit(main())
