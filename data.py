"""From files to tensors: manifests, audio, THE prompt, and batches.

One prompt builder serves training, decoding and evaluation, because a model answers the prompt
it was trained on.  One audio reader serves all of them too: any format libsndfile knows, any
rate, depth and channel count, resampled by soxr to 16 kHz mono.  The log-mel is openai-whisper's,
computed clip by clip: on a batch it would take its maximum over all clips, and one loud clip
would change another.

The batch that leaves `collate` is clean.  Noise is added in the training step (diffusion.py).

`python data.py CLIP [QUESTION]` shows what the model is given for a clip.
"""

import json
import math
import os
import random
from dataclasses import dataclass, field

import numpy as np
import soundfile
import soxr
import torch
from whisper.audio import HOP_LENGTH, SAMPLE_RATE, log_mel_spectrogram

from model import SPECIAL_TOKENS, UserError

SAMPLES_PER_FRAME = 2 * HOP_LENGTH  # an encoder frame is two mel frames: 20 ms
CANVAS = 16  # an answer's canvas is a multiple of this many tokens
MAX_TEXT = 2048  # tokens of prompt and answer in training
ASR_QUESTION = "Please transcribe the audio to text."


# ---------------------------------------------------------------------------------------------
# manifests


@dataclass(frozen=True)
class Example:
    """One question about one clip.  `where` is file:line, for messages; `id` seeds its noise."""

    id: int
    audio: str | None  # path
    question: str
    answer: str
    rejected: str | None = None  # stage 4
    facts: dict = field(
        default_factory=dict
    )  # what is known of the clip, by kind ("words", "emotion", ...): for stage 0's heads
    dataset: str = ""
    task: str = ""
    offset: float = 0.0  # seconds into the file
    duration: float | None = None  # seconds; None: to the end
    where: str = ""


def read_manifest(path, stage=None, check=True):
    """Reads a manifest of any of four kinds into a list of Examples.

      * JSONL, one {"messages": [user, assistant], "audios": [path]} a line (ms-swift, LLaMA-Factory),
        plus "rejected_response" in stage 4 and our own "facts" (an object), "task" and "dataset"
      * JSONL, NeMo's {"audio_filepath", "text", "duration", "offset"}: speech recognition
      * a JSON list (or JSONL) of the authors' {"audio_id", "audio_filepath", "input", "target", ...};
        in stage 1 the answer is "transcription", in stage 4 the worse answer is "rejected"

    Paths are relative to the manifest.  check: every audio file must exist.
    Raises UserError naming file and line.
    """
    entries = list(read_entries(path))
    if not entries:
        raise UserError(f"{path}: holds no example")
    folder = os.path.dirname(os.path.abspath(path))
    return [parse_example(entry, i, where, folder, stage, check) for i, (where, entry) in enumerate(entries)]


def read_entries(path):
    """The entries of a manifest -> (where, dict), JSONL line by line: memory does not grow with it."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such manifest")
    n = 0
    try:
        with open(path, encoding="utf-8") as f:
            first = f.read(64).lstrip()
            f.seek(0)
            if first.startswith("["):
                for n, entry in enumerate(json.load(f), 1):
                    yield f"{path}: entry {n}", entry
                return
            for n, line in enumerate(f, 1):
                if line.strip():
                    yield f"{path}:{n}", json.loads(line)
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file") from None
    except json.JSONDecodeError as e:
        raise UserError(f"{path}:{e.lineno if not n else n}: not JSON ({e.msg})") from None


def parse_example(entry, id, where, folder, stage=None, check=True):
    """One manifest entry -> Example.  Raises UserError for what cannot be used."""
    if not isinstance(entry, dict):
        raise UserError(f"{where}: not a JSON object")

    def need(field, kind=str, of=None):
        value = (entry if of is None else of).get(field)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{where}: field {field!r} is missing or not of the right type")
        return value

    def number(field, default):
        value = need(field, (int, float)) if entry.get(field) is not None else default
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise UserError(f"{where}: {field} is {value}")
        return value

    if "messages" in entry:
        by_role = {}
        for message in need("messages", list):
            if (
                not isinstance(message, dict)
                or message.get("role") not in ("user", "assistant")
                or message["role"] in by_role
            ):
                raise UserError(f"{where}: messages must be one of role user and one of role assistant")
            by_role[message["role"]] = need("content", of=message)
        if len(by_role) != 2:
            raise UserError(f"{where}: messages must be one of role user and one of role assistant")
        question, answer, rejected = by_role["user"], by_role["assistant"], entry.get("rejected_response")
        audios = entry.get("audios") or []
        if not isinstance(audios, list) or not all(isinstance(a, str) for a in audios):
            raise UserError(f"{where}: audios must be a list of paths")
        if len(audios) > 1 or question.count("<audio>") > 1:
            raise UserError(f"{where}: more than one audio in an example")
        audio = audios[0] if audios else None
        question = question.replace("<audio>", "").strip()
    elif "audio_filepath" in entry and "text" in entry:
        audio, question, answer, rejected = need("audio_filepath"), ASR_QUESTION, need("text"), None
    elif "audio_filepath" in entry:
        need("audio_id", (str, int))
        audio, rejected = need("audio_filepath"), None
        question = (
            entry["input"] if isinstance(entry.get("input"), str) and entry["input"].strip() else ASR_QUESTION
        )
        answer = need("transcription" if stage == 1 else "target")
        if stage == 4:
            rejected = need("rejected")
    else:
        raise UserError(f"{where}: has neither 'messages' nor 'audio_filepath'")
    if stage == 4 and not isinstance(rejected, str):
        raise UserError(f"{where}: stage 4 needs a rejected_response")
    if not question.strip():
        raise UserError(f"{where}: the question is empty")
    for text in (question, answer, rejected or ""):
        refuse_special_tokens(text, where)
    if audio is not None:
        audio = os.path.join(folder, audio)
        if check and not os.path.isfile(audio):
            raise UserError(f"{where}: no such audio file: {audio}")
    facts = need("facts", dict) if "facts" in entry else {}
    return Example(
        id, audio, question, answer, rejected, facts,
        str(entry.get("dataset", "")), str(entry.get("task", "")),
        number("offset", 0.0), number("duration", None), where,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------
# audio


def load_audio(path, offset=0.0, duration=None, limit=None):
    """Reads a clip as 16 kHz mono float32.

    offset, duration: seconds, to read a part.  limit: at most this many seconds are returned.
    Returns samples (n,) and a list of notes for the user (clip was cut, clip is silent).
    Raises UserError for what is no usable recording.
    """
    if os.path.isdir(path):
        raise UserError(f"{path}: is a folder, not a recording")
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    if os.path.getsize(path) == 0:
        raise UserError(f"{path}: the file is empty")
    notes = []
    try:
        with soundfile.SoundFile(path) as f:
            rate, total = f.samplerate, f.frames
            # libsndfile would read what is left of a truncated WAV and say nothing
            if f.format in ("WAV", "WAVEX") and is_cut_wav(path):
                raise UserError(f"{path}: the file is cut short")
            start = round(offset * rate)
            if start > total:
                raise UserError(f"{path}: offset {offset} s lies behind the end of the clip")
            f.seek(start)
            left = total - start if duration is None else min(total - start, round(duration * rate))
            wanted = left
            if limit is not None and left > math.ceil(limit * rate):
                notes.append(f"{path}: {left / rate:.1f} s long; the first {limit:g} s are used")
                wanted = math.ceil(limit * rate)
            audio = f.read(wanted, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as e:
        raise UserError(f"{path}: cannot be read as audio ({getattr(e, 'error_string', e)})") from None
    if len(audio) < wanted:
        raise UserError(f"{path}: the file is cut short ({len(audio)} of {wanted} samples)")
    if len(audio) == 0:
        raise UserError(f"{path}: holds no samples")
    if not np.isfinite(audio).all():
        raise UserError(f"{path}: holds samples that are NaN or infinite")
    audio = audio.mean(1)
    if rate != SAMPLE_RATE:
        audio = soxr.resample(audio, rate, SAMPLE_RATE)
        if len(audio) == 0:
            raise UserError(f"{path}: too short: not one sample at 16 kHz")
    if limit is not None:
        audio = audio[: round(limit * SAMPLE_RATE)]
    if np.abs(audio).max() < 1e-4:
        notes.append(f"{path}: the clip is silent")
    return audio, notes


def is_cut_wav(path):
    """Whether a RIFF file says that it holds more bytes than it does.

    Sizes of 0 and 2^31 and more are what a program writes that streams to a pipe: no claim.
    """
    with open(path, "rb") as f:
        data = f.read(1 << 16)
    at = data.find(b"data", 12)
    size = int.from_bytes(data[at + 4 : at + 8], "little")
    return at > 0 and 0 < size < 1 << 31 and at + 8 + size > os.path.getsize(path)


def loudest(audio, n):
    """The n samples in a row of most energy: a bark may stand anywhere in its clip."""
    n = min(len(audio), n)
    energy = np.cumsum(np.concatenate([[0.0], audio.astype(np.float64) ** 2]))
    start = int(np.argmax(energy[n:] - energy[: len(energy) - n]))
    return audio[start : start + n]


def loop(sound, n, voice, decibels):
    """A sound repeated or cut to n samples, so loud that `voice` is so many decibels above it."""
    rms = lambda x: float(np.sqrt(np.mean(x**2)) + 1e-5)
    return np.tile(sound, -(-n // len(sound)))[:n] * (rms(voice) / rms(sound) * 10 ** (-decibels / 20))


def lay_under(voice, sound, rng, low=-6.0, high=9.0):
    """The sound behind a voice that is low..high dB louder -> samples (n,), where the voice starts, dB."""
    n = max(len(voice) + int(rng.uniform(0.2, 1.5) * SAMPLE_RATE), min(len(sound), int(3.5 * SAMPLE_RATE)))
    start, decibels = rng.randint(0, n - len(voice)), rng.uniform(low, high)
    return loop(sound, n, voice, decibels), start, decibels


def louder(decibels):
    """The fact that a voice so many decibels above a sound tells; none where few would say so."""
    return {"louder": "the voice" if decibels > 0 else "the background"} if abs(decibels) >= 2 else {}


def window_seconds(config):
    return config.n_frames * SAMPLES_PER_FRAME / SAMPLE_RATE


def log_mel(audio, config):
    """Whisper's log-mel of one clip, padded with silence to the encoder's window.

    audio (n,) 16 kHz.  Returns mel (n_mels, 2 * n_frames) and the number of encoder frames that
    hold real audio: ceil(n / 160) mel frames, halved by the encoder's stride.
    """
    window = config.n_frames * SAMPLES_PER_FRAME
    audio = torch.as_tensor(audio, dtype=torch.float32)[:window]
    n_frames = (math.ceil(len(audio) / HOP_LENGTH) - 1) // 2 + 1
    padded = torch.nn.functional.pad(audio, (0, window - len(audio)))
    return log_mel_spectrogram(padded, n_mels=config.n_mels), n_frames


# ---------------------------------------------------------------------------------------------
# the prompt

SYSTEM = "You are a helpful voice assistant."
BEFORE_AUDIO = "This is the audio:"


def refuse_special_tokens(text, where):
    """A question or answer that spells a control token would be read as one."""
    for token in SPECIAL_TOKENS.values():
        if token in text:
            raise UserError(f"{where}: the text contains the control token {token}")


def prompt_text(question, system=SYSTEM):
    """LLaDA's chat format, byte for byte; the literal <audio> stays."""
    header = lambda role: f"<|start_header_id|>{role}<|end_header_id|>\n\n"
    return (
        f"<|startoftext|>{header('system')}{system}<|eot_id|>"
        f"{header('user')}{BEFORE_AUDIO} <audio>. {question}<|eot_id|>{header('assistant')}"
    )


def build_prompt(tokenizer, question, system=SYSTEM):
    """-> token ids (list), audio_at: the audio tokens go in front of the token that begins " <audio>"."""
    refuse_special_tokens(question, "question")
    text = prompt_text(question, system)
    encoding = tokenizer.encode(text, add_special_tokens=False)
    at = len(prompt_text("", system).split(" <audio>")[0])  # in characters; not searched for in the question
    audio_at = next(i for i, (_, end) in enumerate(encoding.offsets) if end > at)
    return encoding.ids, audio_at


def mmsu_prompt(question, choices):
    """How MMSU asks, byte for byte."""
    return (
        "Choose the most suitable answer from options A, B, C, and D to respond the question in next line, "
        "**you should only choose A or B or C or D.** "
        f"Do not provide any additional explanations or content.\n\nQuestion: {question}\n\n"
        + lettered(choices)
    )


def mmau_prompt(question, choices):
    """How MMAU and MMAR ask, byte for byte."""
    return (
        "You are given the audio and a multiple-choice question. "
        "Choose the best answer based only on the speech content and style.\n\n"
        f"Question: {question}\n\nChoices:\n{lettered(choices)}\nAnswer:"
    )


LETTERS = "ABCDEFGHIJ"  # of multiple choice


def capital(text):
    return text[:1].upper() + text[1:]


def lettered(choices):
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices))


def answer_ids(tokenizer, answer, config):
    """The response and its end of turn; what follows on the canvas is end marks."""
    return tokenizer.encode(answer, add_special_tokens=False).ids + [config.eot_id]


def answer_text(tokenizer, ids, config):
    """What is printed: everything before the first end of turn or end mark, specials removed."""
    ids = list(ids)
    for i, token in enumerate(ids):
        if token in (config.eot_id, config.eos_id):
            ids = ids[:i]
            break
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def canvas_length(n, extra, unit=CANVAS):
    """The next multiple of `unit` after n tokens, plus `extra` further ones: an end mark always follows."""
    return (n // unit + 1 + extra) * unit


# ---------------------------------------------------------------------------------------------
# a clip in words: what stage 0 reads in the place of audio

SPOKEN = ("words", "speaker", "caption")  # facts that no acoustic token stands for


def write_audio(facts, tokenizer, config, generator):
    """Imitates the audio tokens of a clip by word embeddings: the facts known of it, written down.

    LLaDA-8B can answer questions about a description before it hears anything, and the adapters only
    have to learn to describe.  A small backbone learns this from text alone (stage 0) if the description
    looks as adapters write: a semantic token is a piece of the transcript, with blanks between pieces
    and now and then a piece twice, as CTC aligns them; an acoustic token is a mixture of facts in no
    order; all of them louder or softer than words, under noise.

    Returns ids (A, 2), weights (A, 2), both mixed as weights @ embeddings, and noise (A, width) in
    units of the embeddings' root mean square.  The first tokens are the acoustic ones, or as many
    empty ones as stage 1 has soft prompts.
    """
    rng = random.Random(int(torch.randint(1 << 62, (1,), generator=generator)))
    blank = config.eos_id
    pieces = tokenizer.encode(facts.get("words", ""), add_special_tokens=False).ids
    known = []
    for kind, value in facts.items():
        if kind not in SPOKEN:
            known += tokenizer.encode(" " + value, add_special_tokens=False).ids
    rng.shuffle(known)
    if pieces and rng.random() < 0.25:
        tokens = [(blank, blank, 1.0)] * config.n_soft_prompts  # as stage 1 shows a clip
    else:
        tokens = []
        for place in range(config.n_queries):
            first = known[place % len(known)] if known else blank
            tokens.append((first, rng.choice(known) if known else blank, rng.uniform(0.5, 1.0)))
    rng.shuffle(tokens)
    gap = rng.choice((1, 2, 3, 4))  # slow speech has more blanks
    before = None
    semantic = [(blank, blank, 1.0)] * rng.randint(0, 4)
    for piece in pieces:
        semantic += [(blank, blank, 1.0)] * rng.randint(int(piece == before), gap)
        semantic += [(piece, piece, 1.0)] * rng.choice((1, 1, 1, 1, 2))
        before = piece
    semantic += [(blank, blank, 1.0)] * rng.randint(0, 4)
    if not pieces:  # a sound makes the semantic adapter write anything
        any_piece = rng.random() < 0.5
        for _ in range(rng.randint(4, 40)):
            piece = rng.randrange(config.vocab) if any_piece and rng.random() < 0.3 else blank
            semantic.append((piece, piece, 1.0))
    tokens += semantic or [(blank, blank, 1.0)]
    tokens = tokens[: config.n_queries + config.n_frames // 4]
    loudness = torch.tensor([rng.uniform(0.4, 1.4) for _ in tokens])
    share = torch.tensor([w for _, _, w in tokens])
    noise = rng.uniform(0.0, 0.8) * torch.randn(len(tokens), config.width, generator=generator)
    ids = torch.tensor([[a, b] for a, b, _ in tokens])
    return {"ids": ids, "weights": torch.stack([share, 1 - share], 1) * loudness[:, None], "noise": noise}


# ---------------------------------------------------------------------------------------------
# batches


def encode_text(example, tokenizer, config, generator=None, unit=CANVAS):
    """Prompt, answer and canvas of one example -> {"ids", "is_answer", "audio_at"}.

    The canvas depends on the example and `generator` alone, never on the batch.  unit: of canvas_length.
    Raises UserError when too long.
    """
    ids, audio_at = build_prompt(tokenizer, example.question)
    reply = answer_ids(tokenizer, example.answer, config)
    extra = int(torch.randint(3, (1,), generator=generator))
    canvas = canvas_length(len(reply), extra, unit)
    if len(ids) + len(reply) > MAX_TEXT:
        raise UserError(
            f"{example.where}: {len(ids) + len(reply)} tokens of text; at most {MAX_TEXT} in training"
        )
    audio_tokens = config.n_queries + config.n_frames // 4
    if len(ids) + audio_tokens + canvas > config.context:
        raise UserError(f"{example.where}: text and audio do not fit the model's {config.context} positions")
    is_answer = [False] * len(ids) + [True] * canvas
    return {
        "ids": ids + reply + [config.eos_id] * (canvas - len(reply)),
        "is_answer": is_answer,
        "audio_at": audio_at,
    }


def collate(items, config):
    """Clean batch from items of encode_text, each with "mel" and "n_frames" where there is audio.

    Returns a dict: ids (B, T), valid (B, T) (False on padding: never read it off the ids, the
    end mark is also the padding id), is_answer (B, T), audio_at (B,), and if the items have
    audio mel (B, n_mels, 2 * n_frames), n_frames (B,).
    """
    T = max(len(item["ids"]) for item in items)
    pad = lambda values, fill: values + [fill] * (T - len(values))
    batch = {
        "ids": torch.tensor([pad(item["ids"], config.eos_id) for item in items]),
        "valid": torch.tensor([pad([True] * len(item["ids"]), False) for item in items]),
        "is_answer": torch.tensor([pad(item["is_answer"], False) for item in items]),
        "audio_at": torch.tensor([item["audio_at"] for item in items]),
    }
    if "mel" in items[0]:
        batch["mel"] = torch.stack([item["mel"] for item in items])
        batch["n_frames"] = torch.tensor([item["n_frames"] for item in items])
    return batch


def pad_written(items):
    """Items of write_audio as one batch: ids, weights (B, A, 2), noise (B, A, width), valid (B, A)."""
    pad = torch.nn.utils.rnn.pad_sequence
    batch = {k: pad([item[k] for item in items], batch_first=True) for k in ("ids", "weights", "noise")}
    return batch | {
        "valid": pad([torch.ones(len(item["ids"]), dtype=torch.bool) for item in items], batch_first=True)
    }


def bucket(ids, costs, budget):
    """ids in batches of similar cost, each at most `budget` with its padding, or one example.

    costs[i]: about how many positions example i takes.  An empty list gives one empty batch.
    """
    batches = []
    for i in sorted(ids, key=lambda i: (costs[i], i)):
        if batches and costs[i] * (len(batches[-1]) + 1) <= budget:  # costs ascend: i is the widest
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches or [[]]


if __name__ == "__main__":
    import sys

    from weights import load

    if len(sys.argv) < 2:
        sys.exit("usage: python data.py CLIP [QUESTION]")
    model, tokenizer = load("tiny")
    config = model.config
    audio, notes = load_audio(sys.argv[1], limit=window_seconds(config))
    mel, n_frames = log_mel(audio, config)
    ids, audio_at = build_prompt(tokenizer, " ".join(sys.argv[2:]) or "What do you hear?")
    print(*notes, sep="\n", end="")
    print(
        f"{len(audio) / SAMPLE_RATE:.2f} s at 16 kHz -> mel {tuple(mel.shape)} -> {n_frames} encoder frames"
    )
    print(
        f"-> {config.n_queries} acoustic + {max(n_frames // 4, 1)} semantic tokens before token {audio_at}:\n"
    )
    tokens = [tokenizer.id_to_token(i).replace("Ġ", "_").replace("Ċ", "\\n") for i in ids]
    print(" ".join(tokens[:audio_at]), "\n   [ audio ]\n" + " ".join(tokens[audio_at:]))
