"""Asking: parallel decoding of masked diffusion, and the command line.

    python decode.py clip.wav "What emotion?"                     the shipped small model
    python decode.py a.wav b.flac "What do you hear?" --json      several clips, one line of JSON each
    python decode.py clip.wav "What is said?" --show              watch the answer emerge
    python decode.py clip.wav "What is said?" --steps 32          fixed steps instead of factor decoding

The answer starts as all [MASK].  Each network call predicts every masked token of the current
block; the most confident ones stay, the others are masked again; blocks run from left to right.
How many stay is the whole difference between the samplers:

    --steps N     as many as LLaDA's fixed schedule says: N calls at most
    --factor F    the largest n with (n + 1)(1 - c_n) < F, c_n the n-th highest confidence (Eq. 8)
    --threshold C all whose confidence exceeds C (Fast-dLLM)

Cheaper calls: --cache prefix reuses the keys and values of all columns before the current block, --cache dual
also those after it.  Half the memory: --int8.  A clip beyond the window (30 s; 10 s in the small
model) is answered in pieces (--long).

Two defects of the authors' code are not copied: it keeps the least sure token of a block too where that one
alone fails Eq. 8, and leaves [MASK]s in later blocks where an answer ends early.
"""

import dataclasses
import itertools
import os
import sys
import time

import numpy as np
import torch

from adapters import merge_lora
from data import SAMPLE_RATE, answer_text, build_prompt, log_mel, window_samples, window_seconds
from model import Cache
from runtime import command_line
from runtime.errors import UserError, exit_status, tell
from runtime.pieces import cut_clips, join_answers, load_clips
from runtime.recordings import as_samples, load_audio
from runtime.terminal import Printer
from weights import load, save

# ---------------------------------------------------------------------------------------------
# low-confidence remasking: after a network call the surest tokens stay, the others are masked again


def choose(logits, mask_id, temperature=0.0, rows=None, generator=None):
    """The token that each masked place would take (Eq. 6, 7), and how sure the model is of it.

    logits (N, vocab), one row for each masked place.  Returns token (N,) and confidence (N,), the softmax
    probability of that token, [MASK] left out.  temperature > 0 draws the token, 0 takes the likeliest.
    rows (N,), ascending, says which row of the batch a place is in (None: all in one), and `generator` may
    be a list with one for each row of the batch: what a row draws then does not depend on the other rows.
    Raises UserError for logits that are not numbers: decoding would fill in anything, or nothing for ever.
    """
    logits = logits.to(torch.float32, copy=True)
    logits[:, mask_id] = float("-inf")  # a "predicted" [MASK] would never be filled
    if temperature > 0:
        # argmax(logits + T * Gumbel noise) is a draw from softmax(logits / T).  In float64: coarser numbers
        # cut off the noise's tails and make the draws too greedy (arXiv 2409.02908, as in LLaDA's code).
        # On the CPU: some devices have no float64.
        u = []
        for row, n in enumerate([len(logits)] if rows is None else rows.bincount().tolist()):
            own = generator[row] if isinstance(generator, (list, tuple)) else generator
            u.append(torch.rand(n, logits.size(1), dtype=torch.float64, generator=own))
        noise = -torch.log(-torch.log(torch.cat(u).clamp(min=1e-300)))
        token = (logits.cpu().double() + temperature * noise).argmax(1).to(logits.device)
    else:
        token = logits.argmax(1)
    # without the noise: how sure the model is, not how lucky the draw was
    confidence = (logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(1)).exp()
    if confidence.isnan().any():
        raise UserError("the network's output is NaN: weights or audio are not finite")
    return token, confidence


def most_confident(confidence, options, step):
    """Which of a block's tokens stay, (B, n) bool.  Ties go to the lower position.

    confidence (B, n): -inf where nothing is masked.  options, step: see count_to_keep.

    Why by confidence: a call predicts each token without knowing what the other masked places get.  Where
    the model is unsure, two places may take halves of two answers ("Dog barking", "Baby crying": "Dog
    crying").  What it is sure of hardly depends on the others; the rest is asked again with that filled in.
    """
    ranked, order = confidence.sort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)  # the inverse permutation: the rank of each place, 0 for the surest
    return (rank < count_to_keep(ranked, options, step)[:, None]) & confidence.isfinite()


def count_by_schedule(masks, steps, step):
    """LLaDA's code: floor(masks / steps) stay in each step, in the first few one more (Section 3.6, B.4)."""
    return masks // steps + (step < masks % steps)


# Any other sampling rule says how many of a block's masked tokens stay after a call, (B,).  It reads their
# confidences (B, n), sorted in descending order and -inf behind the last one, and its option.  At least one
# token must stay, or the next call would ask the same again.


def count_by_threshold(confidence, threshold):
    """Fast-dLLM: all above a fixed threshold."""
    return (confidence > threshold).sum(1).clamp(min=1)


def count_by_factor(confidence, factor):
    """Factor-parallel decoding (Eq. 8, Appendix B.4): the largest n with (n + 1)(1 - c_n) < factor.

    Factor 1 is the bound of Fast-dLLM's Theorem 1 (Wu et al. 2025): if n tokens each have a probability
    above 1 - e and (n + 1) e <= 1, then they are also the likeliest together, under any joint distribution
    with these probabilities, and greedy decoding of that distribution would find them one by one.  The
    network's next call need not agree with it, though, and a larger factor keeps more than that proves.
    """
    n = torch.arange(1, confidence.size(1) + 1, device=confidence.device)
    passes = (n + 1) * (1 - confidence) < factor  # (B, n)
    # the product grows with n: it passes up to some n and fails after it, so that n is the number of passes
    return passes.sum(1).clamp(min=1)


# ---------------------------------------------------------------------------------------------
# what can be set

CACHES = ("none", "prefix", "dual")  # what is not computed anew at each call of a block, see BlockReader


@dataclasses.dataclass(frozen=True)
class Options:
    """How answers are decoded; the paper's settings are in Table B.4."""

    answer_length: int = 32  # tokens
    block: int = 32  # tokens that are filled before the next ones are begun
    steps: int | None = None  # network calls at most: LLaDA's schedule
    factor: float | None = None  # of Eq. 8; 1 where no rule is given.  With a factor, steps are ignored (B.4)
    threshold: float | None = None  # keep what is surer
    cache: str = "none"  # one of CACHES, see BlockReader
    refresh: int | None = None  # calls after which the cache is filled anew; None: once a block
    temperature: float = 0.0  # of sampling; 0 is greedy

    def check(self):
        """Raises UserError for a value out of its range, or where blocks or steps do not tile the answer."""
        length, block, steps = self.answer_length, self.block, self.steps
        if length < 1 or block < 1:
            raise UserError(f"answer length {length} and block {block} must be at least 1")
        if length % block:
            raise UserError(f"answer length {length} is not a multiple of block {block}")
        if steps is not None:
            blocks = length // block
            if steps < 1 or steps % blocks:
                raise UserError(f"steps {steps} is not a positive multiple of the {blocks} blocks")
            if steps > length:
                raise UserError(f"steps {steps} exceeds the answer length {length}: some would keep nothing")
        if self.factor is not None and not 0 < self.factor < 1e9:  # NaN is refused too
            raise UserError(f"factor {self.factor} must be positive, and below 1e9")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise UserError(f"threshold {self.threshold} must lie between 0 and 1")
        if self.cache not in CACHES:
            raise UserError(f"cache {self.cache!r}: choose {', '.join(CACHES)}")
        if self.refresh is not None and self.refresh < 1:
            raise UserError(f"refresh {self.refresh} must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature {self.temperature} must be 0 or more")


def count_to_keep(confidence, options, step):
    """How many stay, (B,), in a block's call `step` by the rule that `options` ask for; new rules go here."""
    if options.threshold is not None:
        return count_by_threshold(confidence, options.threshold)
    if options.factor is not None or options.steps is None:
        return count_by_factor(confidence, 1.0 if options.factor is None else options.factor)
    steps = options.steps * options.block // options.answer_length  # of this block
    count = count_by_schedule(options.block, steps, step)
    return torch.full((len(confidence),), count, device=confidence.device)


# ---------------------------------------------------------------------------------------------
# blocks, from left to right


def lay_out(model, prompts, length, fill, audio, is_audio, audio_at):
    """The keyword arguments of DIFFA2.forward: each prompt followed by a response full of `fill`.

    ids, valid (B, P + length): text, and where it is no padding.  audio (B, A, D), is_audio (B, A).
    audio_at (B,): the text column that the audio stands in front of.

    Prompts are padded on the left, so that all responses begin in column P.
    Without any padding `valid` is None: attention without a mask takes a faster kernel.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))  # a test's stub may have none
    P = max(map(len, prompts))
    ids, valid = [], []
    for prompt in prompts:
        before = P - len(prompt)
        ids.append([model.config.eos_id] * before + list(prompt) + [fill] * length)
        valid.append([False] * before + [True] * (len(prompt) + length))
    ids, valid = torch.tensor(ids, device=device), torch.tensor(valid, device=device)
    if valid.all() and (audio is None or is_audio.all()):
        valid = None
    if audio_at is not None:
        audio_at = [P - len(prompt) + at for prompt, at in zip(prompts, audio_at, strict=True)]
        audio_at = torch.tensor(audio_at, device=device)
    return {"ids": ids, "valid": valid, "audio": audio, "is_audio": is_audio, "audio_at": audio_at}


def close_after_end(response, mask_id, eos_id):
    """Once an end mark stands with no [MASK] before it, all that follows is end marks.  (B, L), in place.

    Nothing behind it can be part of the answer, so no call is spent on it.  With a [MASK] before it the end
    mark may be wrong about where it stands: tokens are not kept from left to right.
    """
    has_mask_before = (response == mask_id).cumsum(1) > 0
    ended = ((response == eos_id) & ~has_mask_before).cumsum(1) > 0
    response[ended] = eos_id


class BlockReader:
    """The network calls that fill one block, with what a cache saves of them (Fast-dLLM, Wu et al. 2025).

    The block's first call runs the whole row and fills the cache.  The calls after it recompute the block
    alone ("dual"), or the block and all behind it ("prefix"), and take the keys and values of the other
    columns from the cache: most of the work, with 32 answer tokens behind some 480 of prompt and audio.

    A causal model's cache is exact: no token sees what comes after it.  Here every token sees every token,
    so from the second layer on even the audio's keys and values change a little with each token that is
    filled in.  The cache leaves them as they were in the last full pass, hence `refresh`.  The first call of
    a block is exact in every case.
    """

    def __init__(self, model, inputs, first, options):
        """inputs: from `lay_out`.  first: the block's first column in inputs["ids"]."""
        self.model, self.inputs, self.first, self.options = model, inputs, first, options
        self.live = slice(first, first + options.block if options.cache == "dual" else None)
        # the network counts columns with the audio among them, and the audio stands before every response
        self.start = first if inputs["audio"] is None else first + inputs["audio"].size(1)
        self.cache = self.cached_rows = None  # cached_rows: rows of the batch whose keys and values it holds

    def logits(self, rows, row, column, step):
        """Logits (N, vocab) of the block's N masked tokens.

        rows (n,): rows of the batch that still have masked tokens in this block, ascending; from call to call
        they can only become fewer.  row, column (N,): where the tokens are, in the batch and in the block.
        step: the call's number in the block.
        """
        row = torch.searchsorted(rows, row)  # counted among these n
        refresh = self.options.refresh
        if self.cache is None or (refresh is not None and step % refresh == 0):
            self.cache = None if self.options.cache == "none" else Cache()
            self.cached_rows = rows
            inputs = {name: None if x is None else x[rows] for name, x in self.inputs.items()}
            return self.model(**inputs, where=(row, self.first + column), cache=self.cache)
        if len(rows) < len(self.cached_rows):  # some rows have finished: the cache lets them go as well
            self.cache.keep(torch.searchsorted(self.cached_rows, rows))
            self.cached_rows = rows
        ids = self.inputs["ids"][rows][:, self.live]
        return self.model(ids, None, (row, column), cache=self.cache, start=self.start)


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
    """Answers a batch of prompts (Section 3.6, Appendix B.4).  Each row gets what it would get alone.

    prompts: B lists of token ids.  audio (B, A, D), is_audio (B, A), audio_at (list of B): as
    model.adapt and data.build_prompt give them; audio=None is text alone.
    options: an Options; single fields may be given by name.  generator: one, or a list of B, for sampling.
    on_step(response (B, L), confidence (B, L), call): after each call; call: that of the row with most calls.
    on_block(response (B, L), end): when a block is final; columns before `end` change no more.
    Returns answers (B, L), L the answer length, and the number of network calls each row needed (B,).
    Raises UserError for options that do not fit together, and for logits that are not numbers.
    """
    options = dataclasses.replace(options, **fields)
    options.check()
    c, block = model.config, options.block
    B, P, L = len(prompts), max(map(len, prompts)), options.answer_length
    inputs = lay_out(model, prompts, L, c.mask_id, audio, is_audio, audio_at)
    response = inputs["ids"][:, P:]  # a view: what is written here is what the next call reads
    device = response.device
    confidence = torch.zeros(B, L, device=device)  # of each token when it was kept
    calls = torch.zeros(B, dtype=torch.long)  # on the CPU, as `masked` is
    # LLaDA's semi-autoregressive decoding: a block is filled in any order, and before the next is begun.  A
    # model trained on responses padded with end marks is surest of those, and would keep many of them before
    # a word of a long answer is there.
    for first in range(0, L, block):
        reader = BlockReader(model, inputs, P + first, options)
        for step in itertools.count():
            # (B, block), on the CPU: here each call waits for the device
            masked = (response[:, first : first + block] == c.mask_id).cpu()
            rows = masked.any(1).nonzero()[:, 0]  # (n,): rows that are done cost nothing more
            if not len(rows):
                break
            calls[rows] += 1
            # Eq. 6: predict all masked tokens of the block at once
            row, column = masked.nonzero(as_tuple=True)  # (N,) each: the masked tokens
            rows, row, column = (x.to(device, non_blocking=True) for x in (rows, row, column))
            logits = reader.logits(rows, row, column, step)
            token, token_confidence = choose(logits, c.mask_id, options.temperature, row, generator)  # (N,)
            # keep the surest of each row, mask the others again
            candidates = torch.full((B, block), float("-inf"), device=device)
            candidates[row, column] = token_confidence
            keep = most_confident(candidates, options, step)[row, column]  # (N,)
            position = (row, first + column)
            response[position] = torch.where(keep, token, c.mask_id)
            confidence[position] = torch.where(keep, token_confidence, 0.0)
            close_after_end(response, c.mask_id, c.eos_id)
            if on_step is not None:
                on_step(response, confidence, int(calls.max()))
        if on_block is not None:
            on_block(response, first + block)
    return response.clone(), calls.to(device)


@torch.no_grad()
def generate_ar(
    model, prompts, audio=None, is_audio=None, audio_at=None, answer_length=32, temperature=0, generator=None
):
    """An autoregressive baseline (Config.causal): a token a call, left to right, with a K/V cache.

    The paper's in Table 5 is built on LLaMA 3.1; this one is the same backbone with a causal mask.

    Arguments and results as `generate`'s; a row ends with its turn, and end marks follow.
    Raises UserError for a model that looks both ways, and for logits that are not numbers.
    """
    c = model.config
    if not c.causal:
        raise UserError("this model looks both ways: it decodes by masked diffusion")
    B, P = len(prompts), max(map(len, prompts))
    n_audio = 0 if audio is None else audio.size(1)
    inputs = lay_out(model, prompts, answer_length, c.eos_id, audio, is_audio, audio_at)
    ids, cache = inputs["ids"], Cache()
    device = ids.device
    every, zero = torch.arange(B, device=device), torch.zeros(B, dtype=torch.long, device=device)
    calls = zero.clone()
    is_open = torch.ones(B, dtype=torch.bool, device=device)  # the answer has not ended
    # the response's columns are computed too, and again when their tokens are known; until then the causal
    # mask hides them
    logits = model(**inputs, where=(every, zero + P - 1), cache=cache)  # (B, vocab), of the first token
    for column in range(P, ids.size(1)):
        token, _ = choose(logits, c.mask_id, temperature, every, generator)
        ids[:, column] = torch.where(is_open, token, c.eos_id)
        calls += is_open
        is_open &= (token != c.eot_id) & (token != c.eos_id)
        if column + 1 == ids.size(1) or not is_open.any():
            break
        logits = model(ids[:, column : column + 1], None, (every, zero), cache=cache, start=n_audio + column)
    return ids[:, P:].clone(), calls


# ---------------------------------------------------------------------------------------------
# asking about a clip


@dataclasses.dataclass
class Answer:
    """What a clip was answered, and what it cost."""

    text: str
    calls: int  # network calls
    seconds: float  # from log-mel to the last token, shared evenly by the clips of a batch
    audio_seconds: float
    confidence: list  # of each token, the end of the turn included; empty for an autoregressive model
    pieces: list  # of a clip beyond the window: [(start, end in seconds, text)]; empty otherwise

    @property
    def rtf(self):
        """Real-time factor (Table 4): seconds of work per second of audio."""
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
    list.  A clip beyond the window is answered in pieces (recordings.split_clip): a transcript is joined,
    another answer is given for each piece with its time.  long="cut": its beginning alone is answered.
    stage: reads the audio as that stage does; by default the model's.  options, generator (one or a list,
    one a clip), on_step, on_block, fields: as in `generate`; an autoregressive model takes
    answer_length, temperature and generator alone.  batch: clips, or pieces of long ones, that pass the
    network together (default: as many as there are clips, at least 16).
    Raises UserError for a clip that cannot be read or is no (n,) of finite numbers, and when prompt, audio
    and answer exceed the context.
    """
    is_one = isinstance(audios, (str, os.PathLike, np.ndarray, torch.Tensor))
    audios = [audios] if is_one else list(audios)
    n = len(audios)
    if stage not in (None, 1, 2, 3, 4) or long not in ("split", "cut"):
        raise UserError(f"stage {stage!r}, long {long!r}: a stage is 1 to 4, long is split or cut")
    questions = [questions] * n if isinstance(questions, str) else list(questions)
    generators = generator if isinstance(generator, (list, tuple)) else [generator] * n
    for given, what in ((questions, "questions about"), (generators, "generators for")):
        if len(given) != n:
            raise UserError(f"{len(given)} {what} {n} clips: give one, or one a clip")
    options, batch = dataclasses.replace(options, **fields), batch or max(16, n)
    clips = [as_samples(audio, f"clip {i + 1}") for i, audio in enumerate(audios)]
    pieces, spans = cut_clips(clips, questions, generators, window_samples(model.config), long)
    # pieces of long clips and whole short ones pass the network side by side
    answers = []
    for i in range(0, len(pieces), batch):
        answers += ask_pieces(model, tokenizer, pieces[i : i + batch], stage, options, on_step, on_block)
    answers = join_answers(answers, spans, questions)
    return answers[0] if is_one else answers


@torch.no_grad()
def ask_pieces(model, tokenizer, pieces, stage, options, on_step, on_block):
    """Answers pieces that fit the window, (samples, question, generator) each, as one batch.

    The whole way of a recording: log-mel, Whisper's encoder, the adapters (Section 3.1), decoding, text.
    """
    c, began = model.config, time.perf_counter()
    adapter = model.semantic.fc1.weight
    audios, questions, generator = zip(*pieces, strict=True)
    mels, n_frames = zip(*(log_mel(samples, c) for samples in audios), strict=True)
    prompts, audio_at = zip(*(build_prompt(tokenizer, question) for question in questions), strict=True)
    n_frames = torch.tensor(n_frames, device=adapter.device)
    encoded = model.encode(torch.stack(mels).to(adapter.device), n_frames)  # in fp32
    encoded = (x.to(adapter.dtype) for x in encoded)
    audio, is_audio = model.adapt(*encoded, n_frames, stage or model.stage)  # (B, A, D), (B, A)
    rows = zip(prompts, is_audio.sum(1).tolist(), strict=True)
    total = max(len(prompt) + n_audio for prompt, n_audio in rows) + options.answer_length
    if total > c.context:
        needs = f"question, audio and answer need {total} positions; the model has {c.context}"
        raise UserError(f"{needs}: shorten the question")
    inputs, last_confidence = (prompts, audio, is_audio, audio_at), None

    def watch(response, confidence, call):
        nonlocal last_confidence
        last_confidence = confidence
        if on_step is not None:
            on_step(response, confidence, call)

    if c.causal:
        ids, calls = generate_ar(model, *inputs, options.answer_length, options.temperature, generator)
    else:
        ids, calls = generate(model, *inputs, options, generator, watch, on_block)
    seconds = (time.perf_counter() - began) / len(audios)
    answers = []
    for row, samples in enumerate(audios):
        tokens = ids[row].tolist()
        ends = [i for i, token in enumerate(tokens, 1) if token in (c.eot_id, c.eos_id)]
        n = min(ends, default=len(tokens))  # tokens up to and including the end of the turn
        confidence = [] if c.causal else last_confidence[row, :n].tolist()
        text = answer_text(tokenizer, tokens, c)
        answers.append(Answer(text, int(calls[row]), seconds, len(samples) / SAMPLE_RATE, confidence, []))
    return answers


# ---------------------------------------------------------------------------------------------
# the command line


def parse(argv):
    """The command line -> args, with args.options the Options.  UserError for what does not go together."""
    args = command_line.decode(argv, __doc__, CACHES)
    args.options = Options(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Options)})
    args.options.check()
    return args


def run(args):
    """Loads, reads the clips, asks, prints.  Notes go to stderr: a file or a pipe gets the answers alone."""

    def note(text):
        tell(f"decode.py: {text}")

    if args.model is None:
        note("this is the shipped small model; --model diffa2 runs the released one")
    *paths, question = args.words or [""]
    for path in paths:
        load_audio(path, limit=0.1)  # a wrong name is told before the weights are loaded
    files = (args.llada, args.whisper, args.diffa)
    model, tokenizer = load(args.model or "tiny", args.device, None, args.stage, *files, args.int8)
    if args.export is not None:
        save(model, tokenizer, args.export)
        note(f"{args.export}: written")
    merge_lora(model)  # after the export, which keeps LoRA apart: one matrix is read instead of three
    if args.compile:
        for block in model.backbone.blocks:
            block.compile(dynamic=True)  # the number of tokens changes between calls
    printer = Printer(args, tokenizer, model.config)
    batch = 1 if printer.live else 16  # what is watched is watched one by one
    settings = {"stage": args.stage, "options": args.options, "long": args.long} | printer.live
    # a batch at a time: the first answers are printed before the last clips are read
    for i in range(0, len(paths), batch):
        some_paths = paths[i : i + batch]
        clips, notes = load_clips(some_paths, window_seconds(model.config), args.long)
        for text in notes:
            note(text)
        # a generator for each clip: an answer does not depend on which clips are asked beside it
        settings["generator"] = [torch.Generator().manual_seed(args.seed) for _ in clips]
        printer.begin(paths[i])
        answers = ask(model, tokenizer, clips, question, batch=batch, **settings)
        for path, answer in zip(some_paths, answers, strict=True):
            printer.end(path, question, answer)


def main(argv=None):
    return exit_status("decode.py", lambda: run(parse(argv)))


if __name__ == "__main__":
    from runtime import tutorials

    if len(sys.argv) > 1:
        sys.exit(main())
    tutorials.decode(Options, count_to_keep, main)
