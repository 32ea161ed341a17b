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
dual those of later blocks too.  Fewer: --early G takes the block as it stands once the first token
leads by G (Prophet), --answer-length auto fits the canvas to the clip.

Two defects of the released sampler are not here: when only the last candidate fails Eq. 8 it is
not committed all the same, and an early stop leaves no [MASK] in later blocks.
"""

import argparse
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch

from adapters import merge_lora
from data import SAMPLE_RATE, answer_text, build_prompt, load_audio, log_mel, window_seconds
from model import Cache, Parser, UserError, load, save


# ---------------------------------------------------------------------------------------------
# how many tokens to keep


def schedule(masks, steps):
    """Tokens that each of `steps` steps commits: floor(masks / steps), the first few one more."""
    return [masks // steps + (i < masks % steps) for i in range(steps)]


def count_by_factor(confidence, factor):
    """Eq. 8: the largest n with (n + 1)(1 - c_n) < factor, at least 1.

    confidence (B, n), sorted in descending order, -inf where there is no candidate.  Returns (B,).
    """
    n = torch.arange(1, confidence.size(1) + 1, device=confidence.device)
    passes = (n + 1) * (1 - confidence) < factor  # (B, n)
    return (passes * n).amax(1).clamp(min=1)


def count_by_threshold(confidence, threshold):
    """All candidates above the threshold, at least 1.  Shapes as in count_by_factor."""
    return (confidence > threshold).sum(1).clamp(min=1)


def most_confident(confidence, counter):
    """Which of the block's tokens to keep.  confidence (B, n), -inf where nothing is masked;
    counter: sorted confidences -> how many (B,).  Ties go to the lower position.  Returns (B, n) bool."""
    ranked, order = confidence.sort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.size(1), device=order.device).expand_as(order))
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
            g = generator[row] if isinstance(generator, (list, tuple)) else generator
            u = torch.rand(int(at.sum()), logits.size(1), dtype=torch.float64, generator=g)
            noise[at] = -torch.log(-torch.log(u.clamp(min=1e-300)))
        token = (logits.double() + temperature * noise.to(logits.device)).argmax(1)
    else:
        token = logits.argmax(1)
    confidence = (logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(1)).exp()
    return token, confidence


def close_after_end(canvas, mask_id, eos_id):
    """Once an end mark stands with no [MASK] before it, all that follows is end marks.  In place."""
    is_open = (canvas == mask_id).cumsum(1) > 0
    ended = ((canvas == eos_id) & ~is_open).cumsum(1) > 0
    canvas[ended] = eos_id


# ---------------------------------------------------------------------------------------------
# the sampler


def check_budget(answer_length, block, steps=None, factor=1.0, threshold=None, temperature=0.0, early=None):
    """Raises UserError when blocks do not tile the answer or steps do not tile the blocks."""
    if answer_length < 1 or block < 1:
        raise UserError(f"answer length {answer_length} and block {block} must be at least 1")
    if answer_length % block:
        raise UserError(f"answer length {answer_length} is not a multiple of block {block}")
    if isinstance(steps, list):
        if min(steps) < 1 or sum(steps) != block:
            raise UserError(f"steps {steps} do not add up to the block of {block}")
    elif steps is not None:
        blocks = answer_length // block
        if steps < 1 or steps % blocks:
            raise UserError(f"steps {steps} is not a positive multiple of the {blocks} blocks")
        if steps > answer_length:
            raise UserError(f"steps {steps} exceeds the answer length {answer_length}: some would commit nothing")
    if not factor > 0:
        raise UserError(f"factor {factor} must be positive")
    if threshold is not None and not 0 <= threshold <= 1:
        raise UserError(f"threshold {threshold} must lie between 0 and 1")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature {temperature} must be 0 or more")
    if early is not None and not early >= 0:
        raise UserError(f"early {early} must be 0 or more")


def length_for(seconds, most=128):
    """Answer length for transcribing `seconds` of speech: six tokens a second and four to spare, in eights.

    Fast speech has four words a second; the paper's fixed 128 is for 30 s (Table B.4).
    """
    return min(most, -(-int(6 * seconds + 4) // 8) * 8)


def lay_out(prompts, lengths, mark, audio_at, config, device):
    """Rows of prompt and empty answer: ids (B, P + L) with `mark` where the answers go, valid (B, P + L), audio_at (B,).

    Prompts are padded on the left, so that all answers stand in the same columns; shorter answers on the right.
    """
    P, L, eos = max(map(len, prompts)), max(lengths), config.eos_id
    pads = [P - len(p) for p in prompts]
    ids = [[eos] * n + list(p) + [mark] * k + [eos] * (L - k) for n, p, k in zip(pads, prompts, lengths)]
    valid = [[False] * n + [True] * (P - n + k) + [False] * (L - k) for n, k in zip(pads, lengths)]
    at = None if audio_at is None else torch.tensor([n + a for n, a in zip(pads, audio_at)], device=device)
    return torch.tensor(ids, device=device), torch.tensor(valid, device=device), at


@torch.no_grad()
def generate(
    model, prompts, audio=None, is_audio=None, audio_at=None, answer_length=32, block=32, steps=None, factor=1.0,
    threshold=None, cache="none", refresh=None, temperature=0.0, generator=None, on_step=None, early=None,
):  # fmt: skip
    """Answers a batch of prompts (paper 3.6, B.4).  Each row gets what it would get alone.

    prompts: B lists of token ids.  audio (B, A, D), is_audio (B, A), audio_at (list of B): as
    model.adapt and data.build_prompt give them; audio=None is text alone.
    answer_length, block: tokens; a list of B lengths gives each row its own, at most `block`.
    steps: fixed-step remasking (a list: tokens to keep in each call of a block); else threshold; else factor.
    cache: "none" recomputes the whole row each call; "prefix" recomputes from the block on;
    "dual" the block alone (Fast-dLLM, approximate); both refresh at each block, and within a
    block every `refresh` calls.  temperature: 0 is greedy; generator: one, or a list of B.
    early: once the first answer token's best logit leads the second by this much, the rest of its
    block is taken as it stands (Prophet): for questions that the first token answers.
    on_step(canvas (B, L), confidence (B, L), call): after each call.
    Returns answers (B, L), L the longest length, and the number of network calls each row needed (B,).
    """
    c = model.config
    device = next(model.parameters()).device
    lengths = [answer_length] * len(prompts) if isinstance(answer_length, int) else answer_length
    B, P, L = len(prompts), max(map(len, prompts)), max(lengths)
    check_budget(L, block, steps, factor, threshold, temperature, early)
    if cache not in ("none", "prefix", "dual"):
        raise UserError(f"cache {cache!r}: choose none, prefix or dual")
    if min(lengths) < L and (steps is not None or L > block):
        raise UserError("answers of different lengths go with factor or threshold and a single block")
    A = 0 if audio is None else audio.size(1)
    ids, valid, at = lay_out(prompts, lengths, c.mask_id, audio_at, c, device)
    if valid.all() and (audio is None or is_audio.all()):
        valid = None  # one row, or rows of one size: attention needs no mask
    canvas = ids[:, P:]  # a view: writing to it writes ids
    confidence = torch.zeros(B, L, device=device)
    calls = torch.zeros(B, dtype=torch.long)
    of = lambda x, rows: x if x is None or len(rows) == B else x[rows]
    for first in range(0, L, block):
        span, store = slice(first, first + block), None
        counts = schedule(block, steps // (L // block)) if isinstance(steps, int) else steps
        step = 0
        # the one place of a step that waits for the device: what is still masked (a full pass over padded rows asks for the padding, too)
        while (masked := (canvas[:, span] == c.mask_id).cpu()).any():  # (B, block)
            open_rows = masked.any(1).nonzero()[:, 0]  # (n,): the others have left the batch
            row, column = masked[open_rows].nonzero(as_tuple=True)  # of each masked token, within the batch that is left
            now, row, column = (x.to(device, non_blocking=True) for x in (open_rows, row, column))
            if cache == "none" or step % (refresh or L + 1) == 0:
                store, held = (None if cache == "none" else Cache()), open_rows
                logits = model(of(ids, now), of(valid, now), (row, P + first + column), *(of(x, now) for x in (audio, is_audio, at)), cache=store,
                               read_from=A + P + first)  # fmt: skip
            else:
                if len(held) > len(open_rows):
                    store.keep(torch.searchsorted(held, open_rows))
                    held = open_rows
                part = slice(P + first, P + (first + block if cache == "dual" else L))
                logits = model(of(ids, now)[:, part], None, (row, column), cache=store, start=A + part.start)
            token, sure = choose(logits, c.mask_id, temperature, now[row], generator)
            predicted = torch.full((len(now), block), c.mask_id, device=device).index_put((row, column), token)
            block_confidence = torch.full(predicted.shape, float("-inf"), device=device).index_put((row, column), sure)
            if counts is not None:
                counter = lambda ranked: torch.full((len(ranked),), counts[step], device=device)
            elif threshold is not None:
                counter = lambda ranked: count_by_threshold(ranked, threshold)
            else:
                counter = lambda ranked: count_by_factor(ranked, factor)
            keep = most_confident(block_confidence, counter)
            if early is not None and first == 0:
                best = logits.float().index_fill(1, torch.tensor([c.mask_id], device=device), float("-inf")).topk(2, dim=1).values
                lead = torch.zeros_like(block_confidence).index_put((row, column), best[:, 0] - best[:, 1])
                keep |= (lead[:, :1] >= early) & (predicted[:, :1] != c.mask_id) & block_confidence.isfinite()
            canvas[now, span] = torch.where(keep, predicted, canvas[now, span])
            confidence[now, span] = torch.where(keep, block_confidence, confidence[now, span])
            calls[open_rows] += 1
            close_after_end(canvas, c.mask_id, c.eos_id)
            step += 1
            if on_step is not None:
                on_step(canvas, confidence, int(calls.max()))
    return canvas.clone(), calls.to(device)


@torch.no_grad()
def generate_ar(model, prompts, audio=None, is_audio=None, audio_at=None, answer_length=32, temperature=0.0, generator=None):
    """The autoregressive twin (Config.causal): one token a call, left to right, with a K/V cache.

    Arguments and results as `generate`'s; a row ends at its end mark.
    """
    c = model.config
    if not c.causal:
        raise UserError("this model looks both ways: it decodes by masked diffusion")
    device = next(model.parameters()).device
    B, P, A = len(prompts), max(map(len, prompts)), 0 if audio is None else audio.size(1)
    ids, valid, at = lay_out(prompts, [answer_length] * B, c.eos_id, audio_at, c, device)
    cache, calls = Cache(), torch.zeros(B, dtype=torch.long, device=device)
    is_open, every = torch.ones(B, dtype=torch.bool, device=device), torch.arange(B, device=device)
    for i in range(answer_length):
        if i == 0:  # the answer's columns are computed with the prompt; each is overwritten before anybody may look at it
            logits = model(ids, valid, (every, torch.full_like(every, P - 1)), audio, is_audio, at, cache=cache)
        else:
            logits = model(ids[:, P + i - 1 : P + i], None, (every, torch.zeros_like(every)), cache=cache, start=A + P + i - 1)
        token, _ = choose(logits, c.mask_id, temperature, every, generator)
        ids[:, P + i] = torch.where(is_open, token, c.eos_id)
        calls += is_open
        is_open &= token != c.eos_id
        if not is_open.any():
            break
    return ids[:, P:].clone(), calls


# ---------------------------------------------------------------------------------------------
# asking a clip


@dataclass
class Answer:
    text: str
    calls: int  # network calls
    seconds: float  # from mel to text, shared evenly by the clips of a batch
    audio_seconds: float

    @property
    def rtf(self):
        """Real-time factor: seconds of work per second of audio."""
        return self.seconds / self.audio_seconds


def ask(model, tokenizer, audios, questions, stage=None, **options):
    """Answers questions[i] about audios[i] (16 kHz arrays), as one batch.  Returns a list of Answers.

    options go to `generate`, or of them what `generate_ar` knows if the model is causal.
    answer_length="auto" gives each clip `length_for` its seconds, as one block.
    Raises UserError when prompt, audio and answer exceed the context.
    """
    c, start = model.config, time.perf_counter()
    weight = next(model.parameters())
    mels, n_frames = zip(*(log_mel(a, c) for a in audios))
    prompts, audio_at = zip(*(build_prompt(tokenizer, q) for q in questions))
    taps, final = model.encode(torch.stack(mels).to(weight.device, weight.dtype))
    with torch.no_grad():
        audio, is_audio = model.adapt(taps, final, torch.tensor(n_frames, device=weight.device), stage or model.stage)
    if options.get("answer_length") == "auto":
        lengths = [length_for(len(a) / SAMPLE_RATE) for a in audios]
        options |= {"answer_length": lengths, "block": max(lengths)}
    longest = np.max(options.get("answer_length", 32))
    total = max(map(len, prompts)) + audio.size(1) + longest
    if total > c.context:
        raise UserError(f"question, audio and answer need {total} positions; the model has {c.context}: shorten the question")
    if c.causal:
        known = {k: options[k] for k in ("temperature", "generator") if k in options}
        ids, calls = generate_ar(model, prompts, audio, is_audio, audio_at, int(longest), **known)
    else:
        ids, calls = generate(model, prompts, audio, is_audio, audio_at, **options)
    texts = [answer_text(tokenizer, row, c) for row in ids.tolist()]
    seconds = (time.perf_counter() - start) / len(audios)
    return [Answer(t, n, seconds, len(a) / SAMPLE_RATE) for t, n, a in zip(texts, calls.tolist(), audios)]


# ---------------------------------------------------------------------------------------------
# the command line


class Screen:
    """Redraws an answer as it emerges; plain lines when the output is no terminal."""

    COLOURS = ((0.9, "32"), (0.5, "33"), (0.0, "31"))  # green above 0.9, yellow above 0.5, red below

    def __init__(self, tokenizer, config, stream):
        self.tokenizer, self.config, self.stream = tokenizer, config, stream
        self.is_terminal = stream.isatty()

    def draw(self, canvas, confidence, call):
        pieces, width = [], 0
        room = shutil.get_terminal_size().columns - 8 if self.is_terminal else 10**9
        for token, sure in zip(canvas[0].tolist(), confidence[0].tolist()):
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


def length_option(text):
    return text if text == "auto" else int(text)


def compile_blocks(model):
    """torch.compile for every block of the backbone; shapes may change between calls."""
    for block in model.backbone.blocks:
        block.compile(dynamic=True)


def parse(argv):
    parser = Parser(prog="decode.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar='CLIP... "QUESTION"')
    parser.add_argument("--model", help="tiny (default), diffa1, diffa2, or a checkpoint folder")
    for part, what in (("llada", "folder of LLaDA-8B-Instruct"), ("whisper", "encoder's .pt or .safetensors"), ("diffa", "pytorch_model.bin")):
        parser.add_argument(f"--{part}", metavar="PATH", help=f"{what}, instead of the hub's (diffa1, diffa2)")
    parser.add_argument("--stage", type=int, choices=(1, 2, 3, 4), help="read the audio as this stage does (default: the checkpoint's)")
    parser.add_argument("--answer-length", type=length_option, default=32, metavar="N", help="tokens (default 32); auto: from the clip's seconds, for transcripts")
    parser.add_argument("--block", type=int, metavar="N", help="tokens (default 32, or the answer length if that is less)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--steps", type=int, metavar="N", help="fixed-step remasking in N network calls")
    how.add_argument("--factor", type=float, metavar="F", help="factor-parallel decoding (default, 1)")
    how.add_argument("--threshold", type=float, metavar="C", help="keep what is surer than C")
    parser.add_argument("--early", type=float, metavar="G", help="finish the first block once its first token's best logit leads by G (multiple choice)")
    parser.add_argument("--cache", choices=("none", "prefix", "dual"), default="none")
    parser.add_argument("--cache-refresh", type=int, metavar="K", help="refresh the cache every K calls")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--compile", action="store_true", help="torch.compile the backbone's blocks")
    parser.add_argument("--show", action="store_true", help="watch the answer emerge")
    parser.add_argument("--json", action="store_true", help="one JSON object a clip")
    parser.add_argument("--export", metavar="DIR", help="write the model as a compact bf16 checkpoint")
    args = parser.parse_args(argv)
    if args.export is None or args.words:
        if len(args.words) < 2:
            raise UserError('give a recording and a question: python decode.py clip.wav "What do you hear?"')
        if not args.words[-1].strip():
            raise UserError("the question is empty")
    if args.cache_refresh is not None and args.cache_refresh < 1:
        raise UserError(f"--cache-refresh {args.cache_refresh} must be at least 1")
    if args.answer_length == "auto" and (args.block or args.steps):
        raise UserError("--answer-length auto is one block, without --steps")
    args.block = args.block or (32 if args.answer_length == "auto" else min(32, args.answer_length))
    return args


def run(args):
    if args.model is None:
        args.model = "tiny"
        print("decode.py: this is the shipped small model; --model diffa2 runs the released one", file=sys.stderr)
    options = dict(answer_length=args.answer_length, block=args.block, steps=args.steps, threshold=args.threshold,
                   cache=args.cache, refresh=args.cache_refresh, temperature=args.temperature, early=args.early)  # fmt: skip
    if args.factor is not None:
        options["factor"] = args.factor
    length = args.block if args.answer_length == "auto" else args.answer_length
    check_budget(length, args.block, args.steps, options.get("factor", 1.0), args.threshold, args.temperature, args.early)
    *paths, question = args.words or [""]
    for path in paths:
        load_audio(path, limit=0.1)  # a wrong name is told before the weights are loaded
    model, tokenizer = load(args.model, args.device, None, args.stage, args.llada, args.whisper, args.diffa)
    if args.export is not None:
        save(model, tokenizer, args.export)
        print(f"{args.export}: written", file=sys.stderr)
    merge_lora(model)
    if args.compile:
        compile_blocks(model)
    clips = []
    for path in paths:
        audio, notes = load_audio(path, limit=window_seconds(model.config))
        clips.append(audio)
        for note in notes:
            print(f"decode.py: {note}", file=sys.stderr)
    size = 1 if args.show else 16
    for i in range(0, len(clips), size):
        batch = clips[i : i + size]
        options["generator"] = [torch.Generator().manual_seed(args.seed) for _ in batch]
        screen = Screen(tokenizer, model.config, sys.stderr if args.json else sys.stdout)
        answers = ask(
            model, tokenizer, batch, [question] * len(batch), args.stage, on_step=screen.draw if args.show else None, **options
        )
        if args.show:
            screen.finish()
        for path, answer in zip(paths[i : i + size], answers):
            if args.json:
                line = {"audio": path, "question": question, "answer": answer.text, "calls": answer.calls}
                print(json.dumps(line | {"seconds": round(answer.seconds, 4), "rtf": round(answer.rtf, 4)}))
            elif len(paths) > 1:
                print(f"{path}: {answer.text}")
            else:
                print(answer.text)


def main(argv=None):
    try:
        run(parse(argv))
    except UserError as e:
        print(f"decode.py: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
