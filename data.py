"""From files to tensors: manifests, audio, THE prompt, and batches.

One prompt builder serves training, decoding and evaluation, because a model answers the prompt it was
trained on.  One audio reader serves all of them too: any format libsndfile knows, any rate, depth and
channel count, resampled by soxr to 16 kHz mono.  The log-mel is openai-whisper's, computed clip by clip:
on a batch it would take its maximum over all clips, and one loud clip would change another.

The batch that leaves `collate` is clean: noise is added in the training step (diffusion.py).  What a run of
days needs beyond that, for manifests that do not fit in memory, is in runtime/loading.py.

`python data.py CLIP [QUESTION]` shows what the model is given for a clip.
"""

import itertools
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import soundfile
import soxr
import torch
from torch.nn.utils.rnn import pad_sequence
from whisper.audio import HOP_LENGTH, SAMPLE_RATE, log_mel_spectrogram, pad_or_trim

from model import SPECIAL_TOKENS
from runtime.errors import UserError, exit_status, first_line
from runtime.manifests import read_entries
from runtime.variations import augment, imitate_audio, mask_mel

SAMPLES_PER_FRAME = 2 * HOP_LENGTH  # an encoder frame is two mel frames: 20 ms
RESPONSE_UNIT = 16  # a response is a multiple of this many tokens long
MAX_TEXT = 2048  # tokens of prompt and answer in training, as in the authors' code
MAX_SECONDS = 1e9  # 30 years: infinity and NaN, which Python's JSON allows, are not below it either
ASR_QUESTION = "Please transcribe the audio to text."  # the first of the paper's 25 (Figure A.1)


# ---------------------------------------------------------------------------------------------
# manifests


@dataclass(frozen=True)
class Example:
    """One question about one clip."""

    id: int  # its place in the data; seeds its noise, so that this depends on no batch and no process
    audio: str | None  # path
    question: str
    answer: str
    rejected: str | None = None  # stage 4: the worse answer
    # what is known of the clip, by kind ("words", "emotion", ...): stage 0 reads it in the audio's place
    facts: dict = field(default_factory=dict)
    dataset: str = ""
    task: str = ""
    offset: float = 0.0  # seconds into the file
    duration: float | None = None  # seconds; None: to the end
    where: str = ""  # file:line, for messages


def read_manifest(path, stage=None, check=True):
    """Reads a whole manifest, in any of three formats, into a list of Examples.

      * {"messages": [user, assistant], "audios": [path]} (ms-swift, LLaMA-Factory), plus
        "rejected_response" in stage 4 and our own "facts" (an object), "task" and "dataset"
      * NeMo's {"audio_filepath", "text", "duration", "offset"}: speech recognition
      * the authors' {"audio_id", "audio_filepath", "input", "target", ...}; in stage 1 the answer is
        "transcription", in stage 4 the worse answer is "rejected"

    Each is JSONL, an object a line, or one JSON list, as the authors' files are.  Paths are relative to
    the manifest.  check: every audio file must exist.  Raises UserError naming file and line.
    """
    entries = list(read_entries(path))
    if not entries:
        raise UserError(f"{path}: holds no example")
    folder = os.path.dirname(os.path.abspath(path))
    return [parse_example(entry, i, where, folder, stage, check) for i, (where, entry) in enumerate(entries)]


def parse_example(entry, id, where, folder, stage=None, check=True):
    """One manifest entry -> Example.  All is checked here, where file and line are known (UserError)."""
    if not isinstance(entry, dict):
        raise UserError(f"{where}: not a JSON object")
    if "messages" in entry:
        audio, question, answer, rejected = parse_messages(entry, where)
    elif "audio_filepath" in entry:
        audio, question, answer, rejected = parse_fields(entry, where, stage)
    else:
        raise UserError(f"{where}: has neither 'messages' nor 'audio_filepath'")
    if stage == 4 and rejected is None:
        raise UserError(f"{where}: stage 4 needs a rejected_response")
    if not isinstance(rejected, str | None):
        raise UserError(f"{where}: rejected_response must be text")
    if not question.strip():
        raise UserError(f"{where}: the question is empty")
    facts = need(entry, "facts", where, dict) if "facts" in entry else {}
    if not all(isinstance(value, str) for value in facts.values()):
        raise UserError(f"{where}: facts must be text")
    for text in (question, answer, rejected or "", *facts.values()):
        refuse_special_tokens(text, where)
    if audio is not None:
        audio = os.path.join(folder, audio)
        if check and not os.path.isfile(audio):
            raise UserError(f"{where}: no such audio file: {audio}")
    dataset, task = str(entry.get("dataset", "")), str(entry.get("task", ""))
    offset = seconds_in(entry, "offset", where, 0.0)
    duration = seconds_in(entry, "duration", where, None)
    return Example(id, audio, question, answer, rejected, facts, dataset, task, offset, duration, where)


def parse_messages(entry, where):
    """ms-swift's and LLaMA-Factory's format -> audio, question, answer, rejected answer."""
    match entry["messages"]:
        case [{"role": "user", "content": str(question)}, {"role": "assistant", "content": str(answer)}]:
            pass
        case _:
            how = "one of role user and one of role assistant, in this order, with text as content"
            raise UserError(f"{where}: messages must be {how}")
    audios = entry.get("audios") or []
    if not isinstance(audios, list) or not all(isinstance(audio, str) for audio in audios):
        raise UserError(f"{where}: audios must be a list of paths")
    if len(audios) > 1 or question.count("<audio>") > 1:
        raise UserError(f"{where}: more than one audio in an example")
    question = question.replace("<audio>", "").strip()  # THE prompt has the audio in front of the question
    return audios[0] if audios else None, question, answer, entry.get("rejected_response")


def parse_fields(entry, where, stage):
    """NeMo's format or the authors' -> the same.  One file of the authors' serves several stages."""
    if "text" in entry:
        return need(entry, "audio_filepath", where), ASR_QUESTION, need(entry, "text", where), None
    need(entry, "audio_id", where, (str, int))
    question = entry.get("input")
    if not isinstance(question, str) or not question.strip():
        question = ASR_QUESTION  # their transcripts come without one
    answer = need(entry, "transcription" if stage == 1 else "target", where)
    rejected = need(entry, "rejected", where) if stage == 4 else None
    return need(entry, "audio_filepath", where), question, answer, rejected


def need(entry, field, where, kind=str):
    """entry[field], which must be there and of this kind; True is no number, though Python says so."""
    value = entry.get(field)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"{where}: field {field!r} is missing or not of the right type")
    return value


def seconds_in(entry, field, where, default):
    """A length of time in a manifest, or the default where there is none."""
    if entry.get(field) is None:
        return default
    value = need(entry, field, where, (int, float))
    if not 0 <= value < MAX_SECONDS:
        raise UserError(f"{where}: {field} is {value}")
    return value


def refuse_special_tokens(text, where):
    """A text that spells a control token would be read as one: it could end its own turn."""
    # Python keeps bytes that are not UTF-8 as halves of letters, which no tokenizer can read
    if not isinstance(text, str) or any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError(f"{where}: not text in UTF-8: {text!r}")
    for token in SPECIAL_TOKENS.values():
        if token in text:
            raise UserError(f"{where}: the text contains the control token {token}")


# ---------------------------------------------------------------------------------------------
# audio


def load_audio(path, offset=0.0, duration=None, limit=None):
    """Reads a clip as 16 kHz mono float32.

    offset, duration: seconds, to read a part; GigaSpeech's clips are parts of recordings of hours, so the
    place is sought and not read up to.  limit: at most this many seconds are returned.
    Returns samples (n,) and notes for the user (clip was cut, clip is silent).  UserError: no recording.
    """
    if not os.path.isfile(path):
        why = "is a folder, not a recording" if os.path.isdir(path) else "no such file"
        raise UserError(f"{path}: {why}")
    if not 0 <= offset < MAX_SECONDS or not 0 <= (duration or 0) < MAX_SECONDS:
        raise UserError(f"{path}: offset {offset} s and duration {duration} s are no part of a clip")
    if os.path.getsize(path) == 0:
        raise UserError(f"{path}: the file is empty")
    try:
        with soundfile.SoundFile(os.fsencode(path)) as f:  # a name need not be UTF-8
            if f.format in ("WAV", "WAVEX") and is_cut_wav(path):
                raise UserError(f"{path}: the file is cut short")
            rate = f.samplerate
            if rate < 1000:  # no recording: at 1 Hz a second file of samples is a day
                raise UserError(f"{path}: has a rate of {rate} Hz")
            start = round(offset * rate)
            available = f.frames - start  # samples of each channel, as are all counts here
            if available < 0:
                raise UserError(f"{path}: offset {offset} s lies behind the end of the clip")
            if duration is not None:
                available = min(available, round(duration * rate))
            wanted = available if limit is None else min(available, math.ceil(limit * rate))
            f.seek(start)
            audio = f.read(wanted, dtype="float32", always_2d=True)  # (samples, channels)
    except (soundfile.LibsndfileError, OSError, TypeError) as e:  # TypeError: .raw, which says no rate
        raise UserError(f"{path}: cannot be read as audio ({getattr(e, 'error_string', e)})") from None
    if len(audio) < wanted:
        raise UserError(f"{path}: the file is cut short ({len(audio)} of {wanted} samples)")
    audio = audio.mean(1)
    if rate != SAMPLE_RATE:
        audio = soxr.resample(audio, rate, SAMPLE_RATE)
    if limit is not None:
        audio = audio[: round(limit * SAMPLE_RATE)]
    check_samples(audio, path)
    notes = []
    if wanted < available:
        notes.append(f"{path}: {available / rate:.1f} s long; the first {limit:g} s are used")
    if np.abs(audio).max() < 1e-4:  # -80 dB: below any recording, above the rounding of 16 bits
        notes.append(f"{path}: the clip is silent")
    return audio, notes


def check_samples(audio, name):
    """Raises UserError for what is no 16 kHz mono clip (n,); name: of the clip, for the message."""
    if audio.ndim != 1 or audio.dtype.kind != "f":
        found = f"{audio.dtype} of shape {audio.shape}"
        raise UserError(f"{name}: samples must be floating-point numbers (n,) from -1 to 1, not {found}")
    if len(audio) == 0:  # none in the file, or too few to make one at 16 kHz
        raise UserError(f"{name}: holds no samples at 16 kHz")
    if not np.isfinite(audio).all():  # one NaN makes the whole log-mel NaN, through its maximum
        raise UserError(f"{name}: holds samples that are NaN or infinite")


def is_cut_wav(path):
    """Whether a RIFF file says that it holds more bytes than it does.

    libsndfile reads what is left of it and says nothing: a broken download would pass for a short clip.
    Sizes of 0 and 2^31 and more are what a program writes that streams to a pipe: no claim.
    """
    with open(path, "rb") as f:
        f.seek(12)  # behind "RIFF", a size and "WAVE" come chunks: four letters, a size, so many bytes
        while len(header := f.read(8)) == 8:
            size = int.from_bytes(header[4:], "little")
            if header[:4] == b"data":  # the samples
                return 0 < size < 1 << 31 and f.tell() + size > os.path.getsize(path)
            f.seek(size + size % 2, os.SEEK_CUR)
    return False


def window_samples(config):
    """Samples that the encoder takes in at once: 30 s with Whisper's own window, 10 s in the small model."""
    return config.n_frames * SAMPLES_PER_FRAME


def window_seconds(config):
    return window_samples(config) / SAMPLE_RATE


def split_clip(audio, config, quiet=0.3):
    """A clip that may be longer than the window -> [(start, end)], samples, cut at its quietest moments.

    Each piece fits the window, and none but the last is shorter than a quarter of it.  A cut lies in the
    middle of the `quiet` seconds of least energy after that quarter: a pause is worth more than a long piece.
    """
    window, width = window_samples(config), round(quiet * SAMPLE_RATE)
    # running sums, so that the energy of any stretch is one difference; fp64, for the sums grow large
    energy = np.concatenate([[0.0], np.cumsum(np.square(audio, dtype=np.float64))])
    pieces, start = [], 0
    while len(audio) - start > window:
        first, last = start + window // 4, start + window - width  # where the quiet stretch may begin
        loudness = energy[first + width : last + width + 1] - energy[first : last + 1]
        cut = first + int(loudness.argmin()) + width // 2
        pieces.append((start, cut))
        start = cut
    return [*pieces, (start, len(audio))]


def log_mel(audio, config):
    """Whisper's log-mel of one clip, padded with silence to the encoder's window.

    audio (n,) 16 kHz.  Returns mel (n_mels, 2 * n_frames) and the number of encoder frames that hold real
    audio.  Whisper was trained on padded windows and needs them; the adapters read the real frames alone.
    """
    n_frames = min(math.ceil(len(audio) / SAMPLES_PER_FRAME), config.n_frames)
    window = pad_or_trim(torch.as_tensor(audio, dtype=torch.float32), window_samples(config))
    return log_mel_spectrogram(window, n_mels=config.n_mels), n_frames


# ---------------------------------------------------------------------------------------------
# the prompt

SYSTEM = "You are a helpful voice assistant."
BEFORE_AUDIO = "This is the audio:"


def prompt_text(question):
    """LLaDA's chat format, byte for byte, up to where the answer begins.

    The literal <audio> stays beside the audio itself: the released model was trained with it.
    """
    return (
        f"<|startoftext|><|start_header_id|>system<|end_header_id|>\n\n{SYSTEM}<|eot_id|>"
        f"<|start_header_id|>user<|end_header_id|>\n\n{BEFORE_AUDIO} <audio>. {question}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def build_prompt(tokenizer, question):
    """-> token ids (list), audio_at: the audio tokens go in front of the token that begins " <audio>".

    How many tokens stand before it is the tokenizer's choice, so the place is found by characters; in the
    prompt without a question, for that may contain <audio> too.
    """
    refuse_special_tokens(question, "question")
    # the text has its special tokens: some tokenizers would add a second <|startoftext|>
    encoding = tokenizer.encode(prompt_text(question), add_special_tokens=False)
    at = prompt_text("").index(" <audio>")
    audio_at = next(i for i, (_, end) in enumerate(encoding.offsets) if end > at)
    return encoding.ids, audio_at


def is_transcription(question):
    """Whether a question, by its first words, asks for a transcript: answers about pieces can be joined."""
    words_alone = r"\W*(please )?(transcribe|write down what is said|what is said)\b.{0,40}$"
    return re.match(words_alone, question, re.IGNORECASE) is not None


def answer_ids(tokenizer, answer, config):
    """The response and its end of turn; what follows in the response is end marks."""
    return tokenizer.encode(answer, add_special_tokens=False).ids + [config.eot_id]


def answer_text(tokenizer, ids, config):
    """What is printed: everything before the first end of turn or end mark, specials removed."""
    ids = itertools.takewhile(lambda token: token not in (config.eot_id, config.eos_id), ids)
    return tokenizer.decode(list(ids), skip_special_tokens=True).strip()


# ---------------------------------------------------------------------------------------------
# examples -> texts -> a batch


def response_length(n, extra):
    """The next multiple of RESPONSE_UNIT after n tokens, `extra` more of them: an end mark always follows.

    The end mark <|endoftext|> is also the padding, and the model must learn to predict it (Section 3.4):
    an answer that filled its response exactly would show it none.
    """
    return (n // RESPONSE_UNIT + 1 + extra) * RESPONSE_UNIT


def encode_text(example, tokenizer, config, generator=None):
    """The item of an example in stages 0 to 3: encode_answer with a response of random length.

    That depends on the example and `generator` alone, never on the batch's longest.  It varies, since
    decoding fixes one that is mostly too long (Table B.4), and the rest must become end marks.
    """
    # a causal model stops at the first end mark and needs no more of them
    extra = None if config.causal else int(torch.randint(3, (1,), generator=generator))
    return encode_answer(example, example.answer, tokenizer, config, extra)


def encode_answer(example, answer, tokenizer, config, extra=None):
    """Prompt, answer and end marks -> {"ids", "is_answer", "audio_at"}, an item for `collate`.

    extra: of response_length; None: one end mark, no more.  Raises UserError when too long to train on.
    """
    ids, audio_at = build_prompt(tokenizer, example.question)
    reply = answer_ids(tokenizer, answer, config)
    length = len(reply) + 1 if extra is None else response_length(len(reply), extra)
    n_text = len(ids) + len(reply)
    if n_text > MAX_TEXT:
        raise UserError(f"{example.where}: {n_text} tokens of text; at most {MAX_TEXT} in training")
    # the clip's own length is not known here: there must be room for the audio of a whole window
    if len(ids) + config.n_queries + config.n_frames // 4 + length > config.context:
        raise UserError(f"{example.where}: text and audio do not fit the model's {config.context} positions")
    response = reply + [config.eos_id] * (length - len(reply))
    is_answer = [False] * len(ids) + [True] * length
    return {"ids": ids + response, "is_answer": is_answer, "audio_at": audio_at}


def encode_question(example, tokenizer, config, generator):
    """The texts of an example in stages 0 to 3, by name."""
    return {"text": encode_text(example, tokenizer, config, generator)}


def encode_pair(example, tokenizer, config, generator):
    """The texts of an example in stage 4, by name: answer and first end mark are what VRPO scores (Eq. 3)."""
    answers = {"chosen": example.answer, "rejected": example.rejected}
    return {name: encode_answer(example, answer, tokenizer, config) for name, answer in answers.items()}


def pad_rows(rows, fill=0):
    """Rows of different lengths -> one tensor (B, longest, ...), filled up on the right."""
    return pad_sequence([torch.as_tensor(row) for row in rows], batch_first=True, padding_value=fill)


def collate(items, config):
    """Items of encode_answer -> a clean batch: ids, valid and is_answer (B, T), audio_at (B,).

    valid: False on padding.  Never read it off the ids: the end mark is also the padding id.
    """
    return {
        "ids": pad_rows([item["ids"] for item in items], config.eos_id),
        "valid": pad_rows([[True] * len(item["ids"]) for item in items]),
        "is_answer": pad_rows([item["is_answer"] for item in items]),
        "audio_at": torch.tensor([item["audio_at"] for item in items]),
    }


def pad_imitations(items):
    """Items of imitate_audio as one batch: ids, weights (B, A, 2), noise (B, A, width), valid (B, A)."""
    batch = {name: pad_rows([item[name] for item in items]) for name in ("ids", "weights", "noise")}
    return batch | {"valid": pad_rows([[True] * len(item["ids"]) for item in items])}


def part_of(batch, name="text"):
    """The tensors of one text of a batch, or of "imitated", by name: BatchBuilder puts NAME. in front."""
    return {k.removeprefix(name + "."): v for k, v in batch.items() if k.startswith(name + ".")}


# ---------------------------------------------------------------------------------------------
# examples -> micro-batches

CANNOT_BE_USED = (UserError, OSError, ValueError, RuntimeError)  # a line or a clip that raises one is skipped


def generator_for(seed, epoch, example_id, stream=0):
    """An example's randomness, the same in any batch and process.  stream: 0 the loader's, 1 the loss's."""
    # digits of one number.  Beyond a million examples two may share their draws, but in different epochs
    number = ((seed * 2 + stream) * 1_000_003 + epoch) * 1_000_003 + example_id
    return torch.Generator().manual_seed(number % (1 << 63))


def unusable(id, where, error):
    """What skipped.jsonl says of an example."""
    return {"id": id, "where": where, "why": first_line(error)}


@dataclass(frozen=True)
class BatchBuilder:
    """Examples -> a clean micro-batch.  An example that cannot be used is left out and told of."""

    tokenizer: object
    config: object
    encode: Callable  # encode_question or encode_pair
    seed: int
    is_imitated: bool = False  # clips are imitated (imitate_audio) instead of read
    is_augmented: bool = False  # `augment` and `mask_mel` on each clip

    def item(self, example, epoch):
        """One example -> {"texts", "seconds"} and "imitated", or "mel", "n_frames" and "transcript"."""
        c, generator = self.config, generator_for(self.seed, epoch, example.id)
        item = {"texts": self.encode(example, self.tokenizer, c, generator)}
        if self.is_imitated:
            is_transcript = example.answer == example.facts.get("words")
            imitated = imitate_audio(example.facts, self.tokenizer, c, generator, is_transcript)
            return item | {"imitated": imitated, "seconds": 0.0}
        if example.audio is None:
            raise UserError("has no audio")
        audio, _ = load_audio(example.audio, example.offset, example.duration, window_seconds(c))
        if self.is_augmented:
            audio = augment(audio, generator, example.facts)[: window_samples(c)]
        mel, n_frames = log_mel(audio, c)
        if self.is_augmented:
            mel = mask_mel(mel, generator)
        pieces = self.tokenizer.encode(example.facts.get("words", ""), add_special_tokens=False).ids
        item |= {"transcript": torch.tensor(pieces, dtype=torch.long)}  # for CTC
        return item | {"mel": mel, "n_frames": n_frames, "seconds": len(audio) / SAMPLE_RATE}

    def batch_of(self, items):
        """Items -> one flat dict of tensors, which a line moves to a GPU."""
        batch, parts = {}, {}
        if self.is_imitated:
            parts["imitated"] = pad_imitations([item["imitated"] for item in items])
        else:
            batch = {
                "mel": torch.stack([item["mel"] for item in items]),
                "n_frames": torch.tensor([item["n_frames"] for item in items]),
                "transcript": torch.cat([item["transcript"] for item in items]),  # end to end: CTC's form
                "transcript_length": torch.tensor([len(item["transcript"]) for item in items]),
            }
        for name in items[0]["texts"]:
            parts[name] = collate([item["texts"][name] for item in items], self.config)
        for part, tensors in parts.items():
            batch |= {f"{part}.{name}": tensor for name, tensor in tensors.items()}
        return batch

    def __call__(self, examples, epoch):
        """-> {"batch", "ids", "epoch", "skipped", "seconds"}; batch is None when no example is left."""
        items, ids, skipped = [], [], []
        for example in examples:
            try:
                items.append(self.item(example, epoch))
                ids.append(example.id)
            except CANNOT_BE_USED as e:
                skipped.append(unusable(example.id, example.where, e))
        batch = self.batch_of(items) if items else None
        seconds = sum(item["seconds"] for item in items)
        return {"ids": ids, "epoch": epoch, "skipped": skipped, "seconds": seconds, "batch": batch}


def main(argv):
    from weights import load

    model, tokenizer = load("tiny")
    config = model.config
    clip, *question = argv or [os.path.join(os.path.dirname(__file__), "assets", "demo", "seven.wav")]
    audio, notes = load_audio(clip, limit=window_seconds(config))
    mel, n_frames = log_mel(audio, config)
    ids, audio_at = build_prompt(tokenizer, " ".join(question) or "What do you hear?")
    seconds = f"{len(audio) / SAMPLE_RATE:.2f} s at 16 kHz"
    print(*notes, f"{seconds} -> mel {tuple(mel.shape)} -> {n_frames} encoder frames", sep="\n")
    n_semantic = max(n_frames // 4, 1)
    print(f"-> {config.n_queries} acoustic + {n_semantic} semantic tokens before token {audio_at}:\n")
    # a byte-level tokenizer writes a space as Ġ and a line feed as Ċ
    tokens = [tokenizer.id_to_token(i).replace("Ġ", "_").replace("Ċ", "\\n") for i in ids]
    print(" ".join(tokens[:audio_at]), "[ audio ]", " ".join(tokens[audio_at:]), sep="\n")


if __name__ == "__main__":
    sys.exit(exit_status("data.py", lambda: main(sys.argv[1:])))
