"""Asking: parallel decoding of masked diffusion, and the command line.

    python decode.py clip.wav "What emotion?"                     the shipped small model
    python decode.py a.wav b.flac "What do you hear?" --json      several clips, one line of JSON each
    python decode.py clip.wav "What is said?" --show              watch the answer emerge
    python decode.py clip.wav "What is said?" --steps 32          fixed steps instead of factor decoding

The answer starts as all [MASK].  Each network call predicts every masked token of the current
block; the most confident ones stay, the others are masked again; blocks run from left to right.
How many stay is the whole difference between the samplers:

    --steps N     as many as the schedule says: N calls in all (LLaDA's low-confidence remasking)
    --factor F    the largest n with (n + 1)(1 - c_n) < F, c_n the n-th highest confidence (Eq. 8)
    --threshold C all whose confidence exceeds C (Fast-dLLM)

Cheaper calls: --cache prefix keeps keys and values of prompt and audio while a block is filled, --cache
dual those of later blocks too.  Fewer: --answer-length auto fits the response to the clip.  Half the memory:
--int8.

A clip beyond the window (30 s; 10 s of the small model) is answered piece by piece, see --long.  With
--block below --answer-length, --stream prints each block as soon as it is final.

Two defects of the released sampler are not here: when only the last candidate fails Eq. 8 it is
not kept all the same, and an early end leaves no [MASK] in later blocks.
"""

import argparse
import dataclasses
import functools
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch

from adapters import merge_lora
from data import (
    SAMPLE_RATE,
    answer_text,
    build_prompt,
    is_transcription,
    load_audio,
    log_mel,
    split_clip,
    window_seconds,
)
from model import Cache
from runtime import Parser, UserError, exit_status
from weights import load, save

# ---------------------------------------------------------------------------------------------
# how many tokens to keep


@dataclass(frozen=True)
class Options:
    """How answers are decoded; the paper's settings are in Table B.4."""

    answer_length: int | list | str = 32  # tokens; a list: of each row; "auto": `ask` fits it to the clip
    block: int = 32  # tokens that are filled before the next ones are begun
    steps: int | list | None = None  # network calls in all; a list: tokens to keep in each call of a block
    factor: float = 1.0  # of Eq. 8
    threshold: float | None = None  # keep what is surer
    cache: str = "none"  # a row of CACHES
    refresh: int | None = None  # calls after which the cache is filled anew; None: once a block
    temperature: float = 0.0  # of sampling; 0 is greedy

    @property
    def longest(self):
        """Tokens of the longest response; one of "auto" is a block."""
        if self.answer_length == "auto":
            return self.block
        return self.answer_length if isinstance(self.answer_length, int) else max(self.answer_length)

    def check(self):
        """Raises UserError for blocks that do not tile the answer, steps that do not tile the blocks, or a
        value out of its range.
        """
        length, block, steps = self.longest, self.block, self.steps
        if length < 1 or block < 1:
            raise UserError(f"answer length {length} and block {block} must be at least 1")
        if length % block:
            raise UserError(f"answer length {length} is not a multiple of block {block}")
        if isinstance(steps, list):
            if min(steps) < 1 or sum(steps) != block:
                raise UserError(f"steps {steps} do not add up to the block of {block}")
        elif steps is not None:
            blocks = length // block
            if steps < 1 or steps % blocks:
                raise UserError(f"steps {steps} is not a positive multiple of the {blocks} blocks")
            if steps > length:
                raise UserError(f"steps {steps} exceeds the answer length {length}: some would keep nothing")
        if not self.factor > 0:
            raise UserError(f"factor {self.factor} must be positive")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise UserError(f"threshold {self.threshold} must lie between 0 and 1")
        if self.cache not in CACHES:
            raise UserError(f"cache {self.cache!r}: choose {', '.join(CACHES)}")
        if self.refresh is not None and self.refresh < 1:
            raise UserError(f"refresh {self.refresh} must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature {self.temperature} must be 0 or more")


CACHES = ("none", "prefix", "dual")


def schedule(masks, steps):
    """Tokens that each of `steps` steps keeps: floor(masks / steps), the first few one more."""
    return [masks // steps + (i < masks % steps) for i in range(steps)]


# A sampling rule says how many of a block's candidates stay, (B,).  It takes their confidences (B, n),
# sorted in descending order, -inf where there is no candidate; its option; the call's number in the block.


def count_by_schedule(confidence, counts, step):
    """LLaDA's low-confidence remasking: as many as the schedule says."""
    return torch.full((len(confidence),), counts[step], device=confidence.device)


def count_by_factor(confidence, factor, step=0):
    """Eq. 8: the largest n with (n + 1)(1 - c_n) < factor, at least 1."""
    n = torch.arange(1, confidence.size(1) + 1, device=confidence.device)
    passes = (n + 1) * (1 - confidence) < factor  # (B, n)
    return (passes * n).amax(1).clamp(min=1)


def count_by_threshold(confidence, threshold, step=0):
    """Fast-dLLM: all candidates above the threshold, at least 1."""
    return (confidence > threshold).sum(1).clamp(min=1)


def rule_of(options):
    """The sampling rule that `options` ask for, (confidence, step=) -> (B,); a new one gets its line here."""
    if options.steps is not None:
        counts = options.steps
        if isinstance(counts, int):
            counts = schedule(options.block, counts * options.block // options.longest)
        return functools.partial(count_by_schedule, counts=counts)
    if options.threshold is not None:
        return functools.partial(count_by_threshold, threshold=options.threshold)
    return functools.partial(count_by_factor, factor=options.factor)


def most_confident(confidence, counter):
    """Which of the block's tokens to keep, (B, n) bool.  Ties go to the lower position.

    confidence (B, n), -inf where nothing is masked; counter: sorted confidences -> how many (B,).
    """
    ranked, order = confidence.sort(dim=1, descending=True, stable=True)
    place = torch.arange(order.size(1), device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, place)
    return (rank < counter(ranked)[:, None]) & confidence.isfinite()


def choose(logits, mask_id, temperature=0.0, rows=None, generator=None):
    """The token each position would take and its probability.

    logits (N, vocab).  temperature > 0 adds Gumbel noise in float64 (lower precision skews the
    draw, LLaDA); rows (N,) and `generator`, a list with one per row, keep a row's draws its own.
    Returns token (N,), confidence (N,) = softmax probability of that token, without noise.
    """
    logits = logits.float()
    logits[:, mask_id] = float("-inf")  # [MASK] is no answer
    if temperature > 0:
        noise = torch.empty(logits.shape, dtype=torch.float64)
        for row in rows.unique().tolist():
            at = (rows == row).cpu()
            own = generator[row] if isinstance(generator, (list, tuple)) else generator
            u = torch.rand(int(at.sum()), logits.size(1), dtype=torch.float64, generator=own)
            noise[at] = -torch.log(-torch.log(u.clamp(min=1e-300)))
        # on the CPU, where the noise is: some devices have no float64
        token = (logits.cpu().double() + temperature * noise).argmax(1).to(logits.device)
    else:
        token = logits.argmax(1)
    confidence = (logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(1)).exp()
    return token, confidence


def close_after_end(response, mask_id, eos_id):
    """Once an end mark stands with no [MASK] before it, all that follows is end marks.  (B, L), in place."""
    is_open = (response == mask_id).cumsum(1) > 0
    ended = ((response == eos_id) & ~is_open).cumsum(1) > 0
    response[ended] = eos_id


# ---------------------------------------------------------------------------------------------
# the sampler


def length_for(seconds, most=128):
    """Answer length for transcribing `seconds` of speech: six tokens a second and four to spare, in eights.

    Fast speech has four words a second; the paper's fixed 128 is for 30 s (Table B.4).
    """
    return min(most, -(-int(6 * seconds + 4) // 8) * 8)


@dataclass
class Batch:
    """What the network reads: prompts and responses, in rows."""

    ids: torch.Tensor  # (B, P + L); responses are the last L columns
    valid: torch.Tensor | None  # (B, P + L): where there is no padding; None: everywhere
    audio: torch.Tensor | None  # (B, A, D)
    is_audio: torch.Tensor | None  # (B, A)
    audio_at: torch.Tensor | None  # (B,): the text column that the audio stands in front of

    @property
    def n_audio(self):
        return 0 if self.audio is None else self.audio.size(1)

    def take(self, rows):
        """These rows (n,) alone."""
        if len(rows) == len(self.ids):
            return self
        parts = (getattr(self, field.name) for field in dataclasses.fields(self))
        return Batch(*(None if x is None else x[rows] for x in parts))


def lay_out(prompts, lengths, mark, audio, is_audio, audio_at, config, device):
    """A Batch of prompts and responses full of `mark`.

    Prompts are padded on the left, so that all responses begin in one column, shorter responses on the
    right.  Without any padding `valid` is None: attention needs no mask.
    """
    P, L = max(map(len, prompts)), max(lengths)
    ids, valid, at = [], [], None
    for prompt, length in zip(prompts, lengths, strict=True):
        before, after = P - len(prompt), L - length
        ids.append([config.eos_id] * before + list(prompt) + [mark] * length + [config.eos_id] * after)
        valid.append([False] * before + [True] * (len(prompt) + length) + [False] * after)
    if audio_at is not None:
        at = torch.tensor([P - len(p) + a for p, a in zip(prompts, audio_at, strict=True)], device=device)
    ids, valid = torch.tensor(ids, device=device), torch.tensor(valid, device=device)
    if valid.all() and (audio is None or is_audio.all()):
        valid = None
    return Batch(ids, valid, audio, is_audio, at)


class BlockReader:
    """Calls the network for one block, with what a cache saves (Fast-dLLM, Wu et al. 2025).

    A full pass fills the cache.  Calls after it recompute the block alone (dual) or the block and what
    stands behind it (prefix); keys and values of all other columns stay as they were in that pass.  They
    are approximate: every token sees every token, and those of the block have changed since.
    """

    def __init__(self, model, batch, first, options):
        """first: the block's first column in batch.ids."""
        self.model, self.batch, self.first, self.options = model, batch, first, options
        self.columns = slice(first, first + options.block if options.cache == "dual" else None)
        self.cache, self.held = None, None  # held: the rows that the cache holds

    def logits(self, rows, where, step):
        """Logits (N, vocab) of the block's N masked tokens.

        rows (n,): those that are not finished, on the CPU.  where: (row (N,), column (N,)) of each token,
        counted among these rows and from the block's first column.  step: the call's number in the block.
        """
        start = self.batch.n_audio + self.first  # the audio stands before every response
        now = rows.to(where[0].device, non_blocking=True)
        is_cached = self.options.cache != "none"
        refresh = self.options.refresh
        is_full = not is_cached or step == 0 or (refresh is not None and step % refresh == 0)
        if is_full:
            self.cache = Cache() if is_cached else None
            self.held = rows
            row, column = where
            b = self.batch.take(now)
            inputs = (b.ids, b.valid, (row, self.first + column), b.audio, b.is_audio, b.audio_at)
            return self.model(*inputs, cache=self.cache, read_from=start)
        if len(self.held) > len(rows):
            self.cache.keep(torch.searchsorted(self.held, rows))
            self.held = rows
        ids = self.batch.ids[now][:, self.columns]
        return self.model(ids, None, where, cache=self.cache, start=start)


@torch.no_grad()
def generate(
    model,
    prompts,
    audio=None,
    is_audio=None,
    audio_at=None,
    options=Options(),
    generator=None,
    on_step=None,
    on_block=None,
    **fields,
):
    """Answers a batch of prompts (paper 3.6, B.4).  Each row gets what it would get alone.

    prompts: B lists of token ids.  audio (B, A, D), is_audio (B, A), audio_at (list of B): as
    model.adapt and data.build_prompt give them; audio=None is text alone.
    options: an Options; single fields of it may be given by name.
    generator: one, or a list of B, for temperatures above 0.
    on_step(response (B, L), confidence (B, L), call): after each call.
    on_block(response (B, L), end): when a block is final; columns before `end` change no more.
    Returns answers (B, L), L the longest length, and the number of network calls each row needed (B,).
    Raises UserError for options that do not fit together.
    """
    options = dataclasses.replace(options, **fields)
    options.check()
    c, device, block = model.config, next(model.parameters()).device, options.block
    B, P, L = len(prompts), max(map(len, prompts)), options.longest
    lengths = options.answer_length if isinstance(options.answer_length, list) else [L] * B
    if min(lengths) < L and (options.steps is not None or block < L):
        raise UserError("answers of different lengths go with factor or threshold and a single block")
    rule = rule_of(options)
    batch = lay_out(prompts, lengths, c.mask_id, audio, is_audio, audio_at, c, device)
    response = batch.ids[:, P:]  # a view: writing to it writes batch.ids
    confidence = torch.zeros(B, L, device=device)
    calls = torch.zeros(B, dtype=torch.long)
    for first in range(0, L, block):
        span = slice(first, first + block)
        reader = BlockReader(model, batch, P + first, options)
        step = 0
        while True:
            # the one place of a step that waits for the device (full passes over padded rows aside)
            masked = (response[:, span] == c.mask_id).cpu()  # (B, block)
            if not masked.any():
                break
            rows = masked.any(1).nonzero()[:, 0]  # (n,): the others have left the batch
            where = masked[rows].nonzero(as_tuple=True)
            row, column = (x.to(device, non_blocking=True) for x in where)
            now = rows.to(device, non_blocking=True)
            logits = reader.logits(rows, (row, column), step)
            token, sure = choose(logits, c.mask_id, options.temperature, now[row], generator)
            shape = (len(rows), block)
            predicted = torch.full(shape, c.mask_id, device=device).index_put((row, column), token)
            candidates = torch.full(shape, float("-inf"), device=device).index_put((row, column), sure)
            keep = most_confident(candidates, functools.partial(rule, step=step))
            response[now, span] = torch.where(keep, predicted, response[now, span])
            confidence[now, span] = torch.where(keep, candidates, confidence[now, span])
            close_after_end(response, c.mask_id, c.eos_id)
            calls[rows] += 1
            step += 1
            if on_step is not None:
                on_step(response, confidence, int(calls.max()))
        if on_block is not None:
            on_block(response, first + block)
    return response.clone(), calls.to(device)


@torch.no_grad()
def generate_ar(
    model,
    prompts,
    audio=None,
    is_audio=None,
    audio_at=None,
    answer_length=32,
    temperature=0.0,
    generator=None,
):
    """The autoregressive baseline (Config.causal): one token a call, left to right, with a K/V cache.

    Arguments and results as `generate`'s; a row ends at its end mark.  Raises UserError for a model that
    looks both ways.
    """
    c, device = model.config, next(model.parameters()).device
    if not c.causal:
        raise UserError("this model looks both ways: it decodes by masked diffusion")
    B, P = len(prompts), max(map(len, prompts))
    b = lay_out(prompts, [answer_length] * B, c.eos_id, audio, is_audio, audio_at, c, device)
    cache, calls = Cache(), torch.zeros(B, dtype=torch.long, device=device)
    is_open = torch.ones(B, dtype=torch.bool, device=device)
    every, zero = torch.arange(B, device=device), torch.zeros(B, dtype=torch.long, device=device)
    for i in range(answer_length):
        last = P + i - 1  # the newest column
        if i == 0:
            # the response's columns are computed with the prompt, and overwritten before anyone may see them
            logits = model(b.ids, b.valid, (every, zero + last), b.audio, b.is_audio, b.audio_at, cache=cache)
        else:
            newest = b.ids[:, last : last + 1]
            logits = model(newest, None, (every, zero), cache=cache, start=b.n_audio + last)
        token, _ = choose(logits, c.mask_id, temperature, every, generator)
        b.ids[:, P + i] = torch.where(is_open, token, c.eos_id)
        calls += is_open
        is_open &= token != c.eos_id
        if not is_open.any():
            break
    return b.ids[:, P:].clone(), calls


# ---------------------------------------------------------------------------------------------
# asking a clip


@dataclass
class Answer:
    """What a clip was answered, and what it cost."""

    text: str
    calls: int  # network calls
    seconds: float  # from mel to text, shared evenly by the clips of a batch
    audio_seconds: float
    confidence: list  # of each token, end mark included; empty for an autoregressive model
    pieces: list  # of a clip beyond the window: [(start, end in seconds, text)]; empty otherwise

    @property
    def rtf(self):
        """Real-time factor: seconds of work per second of audio."""
        return self.seconds / self.audio_seconds


def ask(
    model,
    tokenizer,
    audios,
    questions,
    stage=None,
    options=Options(),
    generator=None,
    on_step=None,
    on_block=None,
    long="split",
    batch=None,
    **fields,
):
    """Answers questions about clips.  Returns a list of Answers, or one for one clip.

    audios: a path, an array (n,) of 16 kHz samples, or a list of them.  questions: one for all clips, or a
    list.  A clip beyond the window is answered piece by piece (data.split_clip): a transcript is joined,
    another answer is given for each piece with its time.  long="cut": its beginning alone is answered.
    stage: reads the audio as that stage does; by default the model's.  options, generator (one or a list,
    one a clip), on_step, on_block, fields: as of `generate`; an autoregressive model takes length,
    temperature and generator from them.  answer_length="auto" gives each clip `length_for` its seconds, as
    one block.  batch: clips or pieces that pass the network together (default: all the clips, at least 16).
    Raises UserError for a clip that cannot be read, and when prompt, audio and answer exceed the context.
    """
    is_one = isinstance(audios, (str, os.PathLike, np.ndarray, torch.Tensor))
    audios = [audios] if is_one else audios
    questions = [questions] * len(audios) if isinstance(questions, str) else questions
    options, batch = dataclasses.replace(options, **fields), batch or max(16, len(audios))
    window = round(window_seconds(model.config) * SAMPLE_RATE)
    jobs = []  # (clip's number, start, end, samples, generator)
    for n, audio in enumerate(audios):
        if isinstance(audio, (str, os.PathLike)):
            audio, _ = load_audio(os.fspath(audio))
        audio = np.asarray(audio, dtype=np.float32)
        spans = split_clip(audio, model.config) if long == "split" else [(0, min(len(audio), window))]
        own = generator[n] if isinstance(generator, (list, tuple)) else generator
        noise = [own] * len(spans)
        if len(spans) > 1:
            # a piece draws from a generator of its own, so that its answer does not depend on the others
            seed = int(torch.randint(2**62, (), generator=own))
            noise = [torch.Generator().manual_seed(seed + k) for k in range(len(spans))]
        jobs += [(n, *span, audio[slice(*span)], g) for span, g in zip(spans, noise, strict=True)]
    found = [[] for _ in audios]  # (start, end, answer) of each clip
    for i in range(0, len(jobs), batch):
        some = jobs[i : i + batch]
        asked, own = [questions[n] for n, *_ in some], [g for *_, g in some]
        samples = [piece for *_, piece, _ in some]
        answers = ask_pieces(model, tokenizer, samples, asked, stage, options, own, on_step, on_block)
        for (n, start, end, *_), answer in zip(some, answers, strict=True):
            found[n].append((start / SAMPLE_RATE, end / SAMPLE_RATE, answer))
    answers = [join_pieces(*some) for some in zip(found, questions, strict=True)]
    return answers[0] if is_one else answers


def join_pieces(pieces, question):
    """The Answers of a clip's pieces, (start, end, answer) in order, as one."""
    if len(pieces) == 1:
        return pieces[0][2]
    if is_transcription(question):
        text = " ".join(answer.text for *_, answer in pieces if answer.text)
    else:
        text = "\n".join(f"{clock(start, end)} {answer.text}" for start, end, answer in pieces)
    return Answer(
        text=text,
        calls=sum(answer.calls for *_, answer in pieces),
        seconds=sum(answer.seconds for *_, answer in pieces),
        audio_seconds=sum(answer.audio_seconds for *_, answer in pieces),
        confidence=[c for *_, answer in pieces for c in answer.confidence],
        pieces=[(start, end, answer.text) for start, end, answer in pieces],
    )


def clock(start, end):
    """[minutes:seconds - minutes:seconds]."""
    minutes = [f"{int(t) // 60}:{int(t) % 60:02}" for t in (start, end)]
    return f"[{minutes[0]} - {minutes[1]}]"


@torch.no_grad()
def ask_pieces(model, tokenizer, audios, questions, stage, options, generator, on_step, on_block):
    """`ask` of arrays that fit the window, as one batch."""
    c, began, weight = model.config, time.perf_counter(), next(model.parameters())
    mels, n_frames = zip(*(log_mel(a, c) for a in audios), strict=True)
    prompts, audio_at = zip(*(build_prompt(tokenizer, q) for q in questions), strict=True)
    n_frames = torch.tensor(n_frames, device=weight.device)
    taps, final = model.encode(torch.stack(mels).to(weight.device, weight.dtype), n_frames)
    audio, is_audio = model.adapt(taps, final, n_frames, stage or model.stage)
    if options.answer_length == "auto":
        lengths = [length_for(len(a) / SAMPLE_RATE) for a in audios]
        options = dataclasses.replace(options, answer_length=lengths, block=max(lengths))
    total = max(map(len, prompts)) + audio.size(1) + options.longest
    if total > c.context:
        needs = f"question, audio and answer need {total} positions; the model has {c.context}"
        raise UserError(f"{needs}: shorten the question")
    inputs, sure = (prompts, audio, is_audio, audio_at), None
    if c.causal:
        ids, calls = generate_ar(model, *inputs, options.longest, options.temperature, generator)
    else:

        def note(response, confidence, call):
            nonlocal sure
            sure = confidence
            if on_step is not None:
                on_step(response, confidence, call)

        ids, calls = generate(model, *inputs, options, generator, note, on_block)
    seconds = (time.perf_counter() - began) / len(audios)
    answers = []
    for row, samples in enumerate(audios):
        tokens = ids[row].tolist()
        n = next((i for i, token in enumerate(tokens, 1) if token in (c.eot_id, c.eos_id)), len(tokens))
        confidence = [] if sure is None else sure[row, :n].tolist()
        text = answer_text(tokenizer, tokens, c)
        answers.append(Answer(text, int(calls[row]), seconds, len(samples) / SAMPLE_RATE, confidence, []))
    return answers


# ---------------------------------------------------------------------------------------------
# the command line


class Screen:
    """Redraws an answer as it emerges; plain lines when the output is no terminal."""

    COLOURS = ((0.9, "32"), (0.5, "33"), (0.0, "31"))  # green above 0.9, yellow above 0.5, red below

    def __init__(self, tokenizer, config, stream):
        self.tokenizer, self.config, self.stream = tokenizer, config, stream
        self.is_terminal = stream.isatty()

    def draw(self, response, confidence, call):
        """response, confidence (1, L), after network call `call`; `generate`'s on_step."""
        pieces, width = [], 0
        room = shutil.get_terminal_size().columns - 8 if self.is_terminal else 10**9
        for token, sure in zip(response[0].tolist(), confidence[0].tolist(), strict=True):
            if token in (self.config.eos_id, self.config.eot_id):
                continue
            masked = token == self.config.mask_id
            text = "_" if masked else self.tokenizer.decode([token]).replace("\n", " ")
            width += len(text)
            if width > room:
                break
            if self.is_terminal and not masked and "NO_COLOR" not in os.environ:
                colour = next(code for least, code in self.COLOURS if sure >= least)
                text = f"\033[{colour}m{text}\033[0m"
            pieces.append(text)
        line = f"{call:3}  {''.join(pieces)}"
        self.stream.write(f"\r\033[K{line}" if self.is_terminal else line + "\n")
        self.stream.flush()

    def finish(self):
        if self.is_terminal:
            self.stream.write("\n")


class Stream:
    """Prints an answer's text as far as its blocks are final; what it has printed adds up to the answer.

    The answer about each piece of a clip beyond the window is a line of its own.
    """

    def __init__(self, tokenizer, config, out):
        self.tokenizer, self.config, self.out, self.printed = tokenizer, config, out, ""

    def show(self, response, end):
        """response (1, L): final before column `end`; `generate`'s on_block."""
        text = answer_text(self.tokenizer, response[0, :end].tolist(), self.config)
        if end < response.size(1):
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")  # half of a letter: the rest is in the next block
        self.out.write(text[len(self.printed) :])
        self.out.flush()
        self.printed = text
        if end == response.size(1):  # the answer about the next piece of the clip begins anew
            self.out.write("\n")
            self.printed = ""


def length_option(text):
    return text if text == "auto" else int(text)


def compile_blocks(model):
    """torch.compile for every block of the backbone; shapes may change between calls."""
    for block in model.backbone.blocks:
        block.compile(dynamic=True)


def parse(argv):
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="decode.py", description=__doc__, formatter_class=raw)
    parser.add_argument("words", nargs="*", metavar='CLIP... "QUESTION"')
    parser.add_argument("--model", help="tiny (default), diffa1, diffa2, or a checkpoint folder")
    files = {
        "llada": "folder of LLaDA (which: docs/MODELS.md)",
        "whisper": "encoder: .pt, .safetensors, model.bin",
        "diffa": "pytorch_model.bin",
    }
    for part, what in files.items():
        text = f"{what}, instead of the hub's (diffa1, diffa2)"
        parser.add_argument(f"--{part}", metavar="PATH", help=text)
    text = "read the audio as this stage does (default: the checkpoint's)"
    parser.add_argument("--stage", type=int, choices=(1, 2, 3, 4), help=text)
    text = "tokens (default 32); auto: from the clip's seconds, for transcripts"
    parser.add_argument("--answer-length", type=length_option, default=32, metavar="N", help=text)
    text = "tokens (default 32, or the answer length if that is less)"
    parser.add_argument("--block", type=int, metavar="N", help=text)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--steps", type=int, metavar="N", help="fixed-step remasking in N network calls")
    how.add_argument("--factor", type=float, metavar="F", help="factor-parallel decoding (default, 1)")
    how.add_argument("--threshold", type=float, metavar="C", help="keep what is surer than C")
    parser.add_argument("--cache", choices=CACHES, default="none")
    parser.add_argument("--cache-refresh", type=int, metavar="K", help="refresh the cache every K calls")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    text = "matrices in int8: half the memory of bf16, about 1 %% off each"
    parser.add_argument("--int8", action="store_true", help=text)
    parser.add_argument("--compile", action="store_true", help="torch.compile the backbone's blocks")
    text = "clips beyond the window: answered piece by piece (default), or cut to their beginning"
    parser.add_argument("--long", choices=("split", "cut"), default="split", help=text)
    live = parser.add_mutually_exclusive_group()
    live.add_argument("--show", action="store_true", help="watch the answer emerge")
    live.add_argument("--stream", action="store_true", help="print each block as soon as it is final")
    parser.add_argument("--json", action="store_true", help="one JSON object a clip")
    parser.add_argument("--export", metavar="DIR", help="write the model as a compact bf16 checkpoint")
    args = parser.parse_args(argv)
    if args.export is None or args.words:
        if len(args.words) < 2:
            raise UserError('give a recording and a question: python decode.py clip.wav "What do you hear?"')
        if not args.words[-1].strip():
            raise UserError("the question is empty")
    if args.answer_length == "auto" and (args.block or args.steps):
        raise UserError("--answer-length auto is one block, without --steps")
    if args.int8 and args.compile:
        raise UserError("--compile cannot read matrices in int8: give one of the two")
    if args.int8 and args.export is not None:
        raise UserError("--export writes the weights as they were trained: leave --int8 out")
    if args.stream and args.json:
        raise UserError("--stream prints text as it becomes final; --json comes after it")
    args.block = args.block or (32 if args.answer_length == "auto" else min(32, args.answer_length))
    return args


def options_of(args):
    """The command line's Options.  Raises UserError when they do not fit together."""
    options = Options(
        answer_length=args.answer_length,
        block=args.block,
        steps=args.steps,
        threshold=args.threshold,
        cache=args.cache,
        refresh=args.cache_refresh,
        temperature=args.temperature,
    )
    if args.factor is not None:
        options = dataclasses.replace(options, factor=args.factor)
    options.check()
    return options


def run(args):
    if args.model is None:
        args.model = "tiny"
        note = "this is the shipped small model; --model diffa2 runs the released one"
        print(f"decode.py: {note}", file=sys.stderr)
    options = options_of(args)
    *paths, question = args.words or [""]
    for path in paths:
        load_audio(path, limit=0.1)  # a wrong name is told before the weights are loaded
    files = (args.llada, args.whisper, args.diffa)
    model, tokenizer = load(args.model, args.device, None, args.stage, *files, args.int8)
    if args.export is not None:
        save(model, tokenizer, args.export)
        print(f"{args.export}: written", file=sys.stderr)
    merge_lora(model)
    if args.compile:
        compile_blocks(model)
    clips, limit = [], window_seconds(model.config)
    for path in paths:
        audio, notes = load_audio(path, limit=limit if args.long == "cut" else None)
        clips.append(audio)
        seconds = len(audio) / SAMPLE_RATE
        if seconds > limit:
            notes.append(f"{path}: {seconds:.1f} s long; answered in pieces of at most {limit:g} s")
        for note in notes:
            print(f"decode.py: {note}", file=sys.stderr)
    is_streamed = args.stream and not model.config.causal  # that one has no blocks
    size = 1 if args.show or is_streamed else 16
    for i in range(0, len(clips), size):
        batch = clips[i : i + size]
        generator = [torch.Generator().manual_seed(args.seed) for _ in batch]
        screen = Screen(tokenizer, model.config, sys.stderr if args.json else sys.stdout)
        stream = Stream(tokenizer, model.config, sys.stdout)
        if is_streamed and len(paths) > 1:
            print(f"{paths[i]}: ", end="")
        answers = ask(
            model,
            tokenizer,
            batch,
            [question] * len(batch),
            args.stage,
            options,
            generator,
            on_step=screen.draw if args.show else None,
            on_block=stream.show if is_streamed else None,
            long=args.long,
            batch=size,
        )
        if args.show:
            screen.finish()
        for path, answer in zip(paths[i : i + size], answers, strict=True):
            if args.json:
                line = {"audio": path, "question": question, "answer": answer.text, "calls": answer.calls}
                line |= {"seconds": round(answer.seconds, 4), "rtf": round(answer.rtf, 4)}
                if answer.pieces:
                    line["pieces"] = [{"start": a, "end": b, "answer": text} for a, b, text in answer.pieces]
                print(json.dumps(line))
            elif is_streamed:
                continue  # it stands there already
            elif len(paths) > 1:
                print(f"{path}: {answer.text}")
            else:
                print(answer.text)


def main(argv=None):
    return exit_status("decode.py", lambda: run(parse(argv)))


def tutorial():
    """What `python decode.py` alone shows: how many of six guesses each rule keeps, then a real answer."""
    confidence = torch.tensor([[0.99, 0.97, 0.93, 0.85, 0.6, 0.3]])
    print("Six [MASK]s were guessed with these confidences:", *(f"{c:.2f}" for c in confidence[0]))
    print("Each rule says how many of them stay; the others are masked again.\n")
    rules = {
        "--steps 3 of 6 (two a call)": Options(6, 6, steps=3),
        "--factor 0.5 (Eq. 8)": Options(6, 6, factor=0.5),
        "--factor 1": Options(6, 6, factor=1.0),
        "--factor 2": Options(6, 6, factor=2.0),
        "--threshold 0.9": Options(6, 6, threshold=0.9),
    }
    for name, options in rules.items():
        print(f"  {name:30} keeps {int(rule_of(options)(confidence, step=0))}")
    clip = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "demo", "digits.wav")
    print(f"\nThe small model, {os.path.basename(clip)}, call by call (_ is a [MASK]):\n")
    return main([clip, "What is said?", "--model", "tiny", "--show"])


if __name__ == "__main__":
    sys.exit(main() if len(sys.argv) > 1 else tutorial())
