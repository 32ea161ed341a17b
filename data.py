"""From files to tensors: manifests, audio, THE prompt, and batches.

One prompt builder serves training, decoding and evaluation, because a model answers the prompt
it was trained on.  One audio reader serves all of them too: any format libsndfile knows, any
rate, depth and channel count, resampled by soxr to 16 kHz mono.  The log-mel is openai-whisper's,
computed clip by clip: on a batch it would take its maximum over all clips, and one loud clip
would change another.

The batch that leaves `collate` is clean.  Noise is added in the training step (diffusion.py).

`python data.py CLIP [QUESTION]` shows what the model is given for a clip.
"""

import bisect
import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import math
import os
import random
import re
import tempfile
from dataclasses import dataclass, field

import numpy as np
import soundfile
import soxr
import torch
from whisper.audio import HOP_LENGTH, SAMPLE_RATE, log_mel_spectrogram

from model import SPECIAL_TOKENS
from runtime import UserError, first_line, ignore_signals, write_file

SAMPLES_PER_FRAME = 2 * HOP_LENGTH  # an encoder frame is two mel frames: 20 ms
RESPONSE_UNIT = 16  # a response is a multiple of this many tokens long
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
    # what is known of the clip, by kind ("words", "emotion", ...): stage 0 reads it in the audio's place
    facts: dict = field(default_factory=dict)
    dataset: str = ""
    task: str = ""
    offset: float = 0.0  # seconds into the file
    duration: float | None = None  # seconds; None: to the end
    where: str = ""


def read_manifest(path, stage=None, check=True):
    """Reads a whole manifest of any of four kinds into a list of Examples.

      * JSONL, one {"messages": [user, assistant], "audios": [path]} a line (ms-swift, LLaMA-Factory),
        plus "rejected_response" in stage 4 and our own "facts" (an object), "task" and "dataset"
      * JSONL, NeMo's {"audio_filepath", "text", "duration", "offset"}: speech recognition
      * a JSON list (or JSONL) of the authors' {"audio_id", "audio_filepath", "input", "target", ...};
        in stage 1 the answer is "transcription", in stage 4 the worse answer is "rejected"

    Paths are relative to the manifest.  check: every audio file must exist.
    Raises UserError naming file and line.  For training, see Manifest.
    """
    entries = list(read_entries(path))
    if not entries:
        raise UserError(f"{path}: holds no example")
    folder = os.path.dirname(os.path.abspath(path))
    return [parse_example(entry, i, where, folder, stage, check) for i, (where, entry) in enumerate(entries)]


def read_entries(path):
    """The entries of a manifest -> (where, dict), one by one: memory does not grow with it."""
    with open_manifest(path) as f:
        is_list = starts_a_list(f)
        for _, number, raw in scan(f, path):
            yield where_in(path, number, is_list), decode_entry(raw, path, number, is_list)


def open_manifest(path):
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such manifest")
    return open(path, "rb")


def starts_a_list(f):
    """Whether an open manifest is a JSON list; JSONL otherwise."""
    first = b""
    while not first:
        piece = f.read(64)
        first = piece.removeprefix(b"\xef\xbb\xbf").lstrip()
        if not piece:
            break
    f.seek(0)
    return first.startswith(b"[")


def where_in(path, number, is_list):
    return f"{path}: entry {number}" if is_list else f"{path}:{number}"


def decode_entry(raw, path, number, is_list):
    """The bytes of an entry -> what they say.  Raises UserError."""
    try:
        return json.loads(raw)
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file") from None
    except json.JSONDecodeError as e:
        raise UserError(f"{where_in(path, number, is_list)}: not JSON ({e.msg})") from None


def scan(f, path, chunk=1 << 20):
    """Where the entries of an open manifest lie: (first byte, number of the line or entry, bytes)."""
    if not starts_a_list(f):
        start = 0
        for number, line in enumerate(f, 1):
            if line.strip():
                yield start, number, line
            start += len(line)
        return
    # a list may be larger than memory: entries are cut out of it a megabyte at a time.  As latin-1 a
    # character is a byte, and what JSON is made of is ASCII.
    decoder, text, base, at, number = json.JSONDecoder(), f.read(chunk).decode("latin-1"), 0, 0, 1
    at = text.index("[") + 1
    while True:
        at = GAP.match(text, at).end()
        if text[at : at + 1] == "]":
            if (text[at + 1 :] + f.read(chunk).decode("latin-1")).strip():
                raise UserError(f"{path}: something follows the list")
            return
        try:
            _, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as e:
            more = f.read(chunk).decode("latin-1")
            if not more:
                raise UserError(f"{path}: entry {number}: not JSON ({e.msg})") from None
            text, base, at = text[at:] + more, base + at, 0
            continue
        yield base + at, number, text[at:end].encode("latin-1")
        at, number = end, number + 1


GAP = re.compile(r"[ \t\r\n,]*")  # between the entries of a list

# Where an entry lies, and what its cost is made of; 24 bytes an entry
INDEX = np.dtype(
    [("start", "<i8"), ("size", "<i4"), ("number", "<i4"), ("letters", "<i4"), ("seconds", "<f4")]
)


class Manifest:
    """A manifest of any length, opened and not read: manifest[i] is the Example, parsed when asked for.

    What is in memory is the mapped index (PATH.index.npy, or in the temporary folder where that cannot be
    written), built once by one process while the others wait, and again when the manifest has changed.
    manifest[i] raises UserError for a line that cannot be used.
    """

    def __init__(self, path, stage=None):
        self.path, self.stage, self.folder = path, stage, os.path.dirname(os.path.abspath(path))
        with open_manifest(path) as f:
            self.is_list = starts_a_list(f)
        self.index = open_index(path)
        if not len(self.index):
            raise UserError(f"{path}: holds no example")

    def __len__(self):
        return len(self.index)

    def where(self, i):
        return where_in(self.path, int(self.index["number"][i]), self.is_list)

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        _, size, number, *_ = self.index[i]
        with open_manifest(self.path) as f:
            f.seek(int(self.index["start"][i]))
            entry = decode_entry(f.read(int(size)), self.path, number, self.is_list)
        return parse_example(entry, int(i), self.where(i), self.folder, self.stage, check=False)


def path_and_share(source):
    """ "FILE" or "FILE:SHARE" -> path, share.  A file whose name looks like the latter is a file."""
    if not os.path.exists(source) and (match := re.fullmatch(r"(.+):([0-9.]+)", source)):
        return match[1], float(match[2] if match[2].strip(".") else 0)
    return source, 1.0


class Mixture:
    """Several manifests as one: mixture[i] is an Example of one of them, its id i.

    sources: "FILE" or "FILE:SHARE".  A share of 0.05 is a twentieth of the manifest in each epoch, another
    one each time; 2 is all of it twice.  `shares` are what `schedule_of` draws the epochs by.
    """

    def __init__(self, sources, stage=None):
        self.manifests, self.shares = [], []
        for source in sources:
            path, share = path_and_share(source)
            if not share > 0:
                raise UserError(f"{source}: the share must be above 0")
            self.manifests.append(Manifest(path, stage))
            self.shares.append((len(self.manifests[-1]), share))
        self.ends = list(itertools.accumulate(n for n, _ in self.shares))

    def __len__(self):
        return self.ends[-1]

    def place(self, i):
        """The manifest that holds example i, and its place there."""
        part = bisect.bisect_right(self.ends, i)
        return self.manifests[part], i - (self.ends[part - 1] if part else 0)

    def where(self, i):
        manifest, j = self.place(i)
        return manifest.where(j)

    def __getitem__(self, i):
        manifest, j = self.place(i)
        return dataclasses.replace(manifest[j], id=i)

    def size(self, i):
        """size_of example i, read off the index: no line is parsed."""
        manifest, j = self.place(i)
        return int(manifest.index["letters"][j]), float(manifest.index["seconds"][j])

    def read(self, ids):
        """These examples, and what is to be told (`unusable`) of those whose lines cannot be used."""
        examples, skipped = [], []
        for i in ids:
            try:
                examples.append(self[i])
            except CANNOT_BE_USED as e:
                skipped.append(unusable(i, self.where(i), e))
        return examples, skipped


CANNOT_BE_USED = (UserError, OSError, ValueError, RuntimeError)  # a line or a clip that raises one is skipped


def unusable(id, where, error):
    """What skipped.jsonl says of an example."""
    return {"id": id, "where": where, "why": first_line(error)}


def record_skipped(group, out, skipped, seen):
    """Appends what all processes skipped, and was not seen before, to out/skipped.jsonl.

    seen: ids, kept by rank 0.  Returns how many different examples there are by now.
    """
    everything = [entry for some in group.gather(skipped) for entry in some]

    def write():
        with open(os.path.join(out, "skipped.jsonl"), "a", encoding="utf-8") as f:
            for entry in everything:
                if entry["id"] not in seen:
                    seen.add(entry["id"])
                    f.write(json.dumps(entry) + "\n")
        return len(seen)

    return group.first_only(write)


def open_index(path):
    """The index of a manifest (n,), mapped; built where there is none or the manifest has changed since."""
    name = hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:16]
    places = [path + ".index.npy", os.path.join(tempfile.gettempdir(), f"{name}.index.npy")]
    with open_manifest(path) as f:
        # one process builds it, the others find it built; where a disk cannot lock, several may build it
        with contextlib.suppress(OSError):
            fcntl.flock(f, fcntl.LOCK_EX)
        now = os.fstat(f.fileno())
        for place in places:
            index = index_at(place, now)
            if index is not None:
                return index

        def write(temporary):
            with open(temporary, "wb") as out:
                np.save(out, index)
            os.utime(temporary, ns=(now.st_mtime_ns, now.st_mtime_ns))

        index = build_index(f, path, now.st_size)
        for place in places:
            try:
                write_file(place, write)
            except UserError:
                continue
            found = index_at(place, now)
            if found is not None:
                return found
    return index[1:]


def index_at(place, manifest):
    """The index at `place` if it is whole and of the manifest with this stat, else None."""
    try:
        index = np.load(place, mmap_mode="r")
        is_current = os.stat(place).st_mtime_ns == manifest.st_mtime_ns
    except (OSError, ValueError, EOFError):
        return None
    if not is_current or index.dtype != INDEX or index["start"][0] != manifest.st_size:
        return None
    return index[1:]


def build_index(f, path, size):
    """The index of an open manifest; its first row says how long the manifest is."""
    parts, rows = [], [(size, 0, 0, 0, 0.0)]
    for start, number, raw in scan(f, path):
        letters, seconds = 0, -1.0
        # what cannot be used is found, and told of, when it is asked for; the index serves every stage, so
        # the longest reading counts where they differ (the authors' format)
        with contextlib.suppress(UserError, ValueError):
            entry = json.loads(raw)
            is_authors = isinstance(entry, dict) and "audio_id" in entry
            for stage in (None, 1, 4) if is_authors else (None,):
                with contextlib.suppress(UserError):
                    example = parse_example(entry, 0, path, "", stage, check=False)
                    n, seconds = size_of(example)
                    letters = max(letters, n)
        rows.append((start, len(raw), number, letters, seconds))
        if len(rows) == 1 << 16:
            parts.append(np.array(rows, dtype=INDEX))
            rows = []
    return np.concatenate([*parts, np.array(rows, dtype=INDEX)])


def need(entry, field, where, kind=str):
    """entry[field], which must be there and of this kind."""
    value = entry.get(field)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"{where}: field {field!r} is missing or not of the right type")
    return value


def seconds_in(entry, field, where, default):
    """A length of time in a manifest, or the default where there is none."""
    if entry.get(field) is None:
        return default
    value = need(entry, field, where, (int, float))
    if not (math.isfinite(value) and value >= 0):
        raise UserError(f"{where}: {field} is {value}")
    return value


# One parser a format: (entry, where, stage) -> audio, question, answer, rejected answer.


def parse_messages(entry, where, stage):
    """ms-swift's and LLaMA-Factory's: {"messages": [user, assistant], "audios": [path]}."""
    roles = UserError(f"{where}: messages must be one of role user and one of role assistant")
    by_role = {}
    for message in need(entry, "messages", where, list):
        if not isinstance(message, dict) or message.get("role") not in ("user", "assistant"):
            raise roles
        if message["role"] in by_role:
            raise roles
        by_role[message["role"]] = need(message, "content", where)
    if len(by_role) != 2:
        raise roles
    audios = entry.get("audios") or []
    if not isinstance(audios, list) or not all(isinstance(audio, str) for audio in audios):
        raise UserError(f"{where}: audios must be a list of paths")
    question = by_role["user"]
    if len(audios) > 1 or question.count("<audio>") > 1:
        raise UserError(f"{where}: more than one audio in an example")
    question = question.replace("<audio>", "").strip()
    return audios[0] if audios else None, question, by_role["assistant"], entry.get("rejected_response")


def parse_nemo(entry, where, stage):
    """NeMo's: {"audio_filepath", "text"}: speech recognition."""
    return need(entry, "audio_filepath", where), ASR_QUESTION, need(entry, "text", where), None


def parse_authors(entry, where, stage):
    """The authors': {"audio_id", "audio_filepath", "input", "target", "transcription", "rejected"}."""
    need(entry, "audio_id", where, (str, int))
    question = entry.get("input")
    if not isinstance(question, str) or not question.strip():
        question = ASR_QUESTION
    answer = need(entry, "transcription" if stage == 1 else "target", where)
    rejected = need(entry, "rejected", where) if stage == 4 else None
    return need(entry, "audio_filepath", where), question, answer, rejected


def parse_example(entry, id, where, folder, stage=None, check=True):
    """One manifest entry -> Example.  Raises UserError for what cannot be used."""
    if not isinstance(entry, dict):
        raise UserError(f"{where}: not a JSON object")
    if "messages" in entry:
        parse = parse_messages
    elif "audio_filepath" in entry:
        parse = parse_nemo if "text" in entry else parse_authors
    else:
        raise UserError(f"{where}: has neither 'messages' nor 'audio_filepath'")
    audio, question, answer, rejected = parse(entry, where, stage)
    if stage == 4 and not isinstance(rejected, str):
        raise UserError(f"{where}: stage 4 needs a rejected_response")
    if rejected is not None and not isinstance(rejected, str):
        raise UserError(f"{where}: rejected_response must be text")
    if not question.strip():
        raise UserError(f"{where}: the question is empty")
    for text in (question, answer, rejected or ""):
        refuse_special_tokens(text, where)
    facts = need(entry, "facts", where, dict) if "facts" in entry else {}
    if not all(isinstance(value, str) for value in facts.values()):
        raise UserError(f"{where}: facts must be text")
    if audio is not None:
        audio = os.path.join(folder, audio)
        if check and not os.path.isfile(audio):
            raise UserError(f"{where}: no such audio file: {audio}")
    return Example(
        id=id,
        audio=audio,
        question=question,
        answer=answer,
        rejected=rejected,
        facts=facts,
        dataset=str(entry.get("dataset", "")),
        task=str(entry.get("task", "")),
        offset=seconds_in(entry, "offset", where, 0.0),
        duration=seconds_in(entry, "duration", where, None),
        where=where,
    )


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


def split_clip(audio, config, quiet=0.3):
    """A clip that may be longer than the window -> [(start, end)], samples, cut at its quietest moments.

    Each piece fits the window, none is shorter than a quarter of it but the last, and every sample is in one
    piece.  A cut lies in the middle of the `quiet` seconds of least energy after that quarter: a pause
    between sentences is worth more than a piece as long as can be.
    """
    window, width = config.n_frames * SAMPLES_PER_FRAME, round(quiet * SAMPLE_RATE)
    energy = np.concatenate([[0.0], np.cumsum(np.square(audio, dtype=np.float64))])
    pieces, start = [], 0
    while len(audio) - start > window:
        first, last = start + window // 4, start + window - width  # where the quiet stretch may begin
        loudness = energy[first + width : last + width + 1] - energy[first : last + 1]
        cut = first + int(loudness.argmin()) + width // 2
        pieces.append((start, cut))
        start = cut
    return [*pieces, (start, len(audio))]


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

    def header(role):
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

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


TRANSCRIPTION = re.compile(r"\W*(please )?(transcribe|write down what is said|what is said)\b.{0,40}$", re.I)


def is_transcription(question):
    """Whether a question asks for the words alone: answers about the pieces of a clip can then be joined."""
    return TRANSCRIPTION.match(question) is not None


def answer_ids(tokenizer, answer, config):
    """The response and its end of turn; what follows in the response is end marks."""
    return tokenizer.encode(answer, add_special_tokens=False).ids + [config.eot_id]


def answer_text(tokenizer, ids, config):
    """What is printed: everything before the first end of turn or end mark, specials removed."""
    ids = list(ids)
    for i, token in enumerate(ids):
        if token in (config.eot_id, config.eos_id):
            ids = ids[:i]
            break
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


# ---------------------------------------------------------------------------------------------
# a clip in words: what stage 0 reads in the place of audio

SPOKEN = ("words", "speaker", "caption")  # facts that no acoustic token stands for


def imitate_audio(facts, tokenizer, config, generator, is_transcript=False):
    """Imitates the audio tokens of a clip by word embeddings: the facts known of it.

    LLaDA-8B can answer questions about a description before it hears anything, and the adapters only
    have to learn to describe.  A small backbone learns this from text alone (stage 0) if the description
    looks as adapters write: a semantic token is a piece of the transcript, with blanks between pieces
    and now and then a piece twice, as CTC aligns them; an acoustic token is a mixture of facts in no
    order; all of them louder or softer than words, under noise.

    Returns ids (A, 2), weights (A, 2), both mixed as weights @ embeddings, and noise (A, width) in
    units of the embeddings' root mean square.  The first tokens are the acoustic ones, or, for a part
    of the transcripts (is_transcript), as many empty ones as stage 1 has soft prompts.
    """
    rng = random.Random(int(torch.randint(1 << 62, (1,), generator=generator)))
    blank = config.eos_id
    pieces = tokenizer.encode(facts.get("words", ""), add_special_tokens=False).ids
    known = []
    for kind, value in facts.items():
        if kind not in SPOKEN:
            known += tokenizer.encode(" " + value, add_special_tokens=False).ids
    rng.shuffle(known)
    if is_transcript and rng.random() < 0.25:
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
# examples -> text


def response_length(n, extra):
    """The next multiple of RESPONSE_UNIT after n tokens, `extra` more of them: an end mark always follows."""
    return (n // RESPONSE_UNIT + 1 + extra) * RESPONSE_UNIT


def encode_text(example, tokenizer, config, generator=None):
    """Prompt, answer and end marks of one example -> {"ids", "is_answer", "audio_at"}.

    The length of the response depends on the example and `generator` alone, never on the batch.
    Raises UserError when too long.
    """
    ids, audio_at = build_prompt(tokenizer, example.question)
    reply = answer_ids(tokenizer, example.answer, config)
    length = response_length(len(reply), int(torch.randint(3, (1,), generator=generator)))
    if len(ids) + len(reply) > MAX_TEXT:
        n = len(ids) + len(reply)
        raise UserError(f"{example.where}: {n} tokens of text; at most {MAX_TEXT} in training")
    audio_tokens = config.n_queries + config.n_frames // 4
    if len(ids) + audio_tokens + length > config.context:
        raise UserError(f"{example.where}: text and audio do not fit the model's {config.context} positions")
    is_answer = [False] * len(ids) + [True] * length
    reply += [config.eos_id] * (length - len(reply))
    return {"ids": ids + reply, "is_answer": is_answer, "audio_at": audio_at}


def encode_closely(example, answer, tokenizer, config):
    """Prompt, answer and its first end mark, no padding: what VRPO scores and a causal model learns."""
    ids, audio_at = build_prompt(tokenizer, example.question)
    reply = answer_ids(tokenizer, answer, config) + [config.eos_id]
    is_answer = [False] * len(ids) + [True] * len(reply)
    return {"ids": ids + reply, "is_answer": is_answer, "audio_at": audio_at}


def encode_question(example, tokenizer, config, generator):
    """The texts of an example in stages 0 to 3, by name."""
    if config.causal:
        return {"text": encode_closely(example, example.answer, tokenizer, config)}
    return {"text": encode_text(example, tokenizer, config, generator)}


def encode_pair(example, tokenizer, config, generator):
    """The texts of an example in stage 4, by name."""
    texts = {"chosen": example.answer, "rejected": example.rejected}
    return {name: encode_closely(example, text, tokenizer, config) for name, text in texts.items()}


# ---------------------------------------------------------------------------------------------
# examples -> micro-batches


def generator_for(seed, epoch, example_id, stream=0):
    """Randomness of an example: the same whatever batch or process it is in.

    stream: 0 for what the loader draws, 1 for the noise drawn in the training step.
    """
    g = torch.Generator()
    g.manual_seed((((seed * 2 + stream) * 1_000_003 + epoch) * 1_000_003 + example_id) % (1 << 63))
    return g


def augment(audio, config, generator, facts):
    """Another speed, level, a moment of silence in front, a little noise: for few recordings.

    Speed is 0.9 to 1.1, of a sound alone 0.75 to 1.25.
    """
    u = torch.rand(6, generator=generator).tolist()
    # a voice's sex and feeling are in its pitch
    spread = 0.25 if facts.keys() & {"sound", "instrument"} else 0.1
    if u[0] < 0.5:
        rate = SAMPLE_RATE * (1 + spread * (2 * u[1] - 1))
        audio = soxr.resample(audio, SAMPLE_RATE, rate, quality="QQ")
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
    mean = mel.mean()
    for n, most, axis in ((n_time, time, 1), (n_freq, freq, 0)):
        for _ in range(n):
            width = int(torch.randint(most, (1,), generator=generator))
            start = int(torch.randint(mel.size(axis) - width, (1,), generator=generator))
            mel.narrow(axis, start, width).fill_(mean)
    return mel


def collate(items, config):
    """Clean batch from items of encode_text: a dict of tensors.

    ids (B, T), valid (B, T) (False on padding: never read it off the ids, the end mark is also the
    padding id), is_answer (B, T), audio_at (B,).
    """
    T = max(len(item["ids"]) for item in items)

    def pad(values, fill):
        return values + [fill] * (T - len(values))

    return {
        "ids": torch.tensor([pad(item["ids"], config.eos_id) for item in items]),
        "valid": torch.tensor([pad([True] * len(item["ids"]), False) for item in items]),
        "is_answer": torch.tensor([pad(item["is_answer"], False) for item in items]),
        "audio_at": torch.tensor([item["audio_at"] for item in items]),
    }


def pad_imitations(items):
    """Items of imitate_audio as one batch: ids, weights (B, A, 2), noise (B, A, width), valid (B, A)."""
    pad = torch.nn.utils.rnn.pad_sequence
    batch = {k: pad([item[k] for item in items], batch_first=True) for k in ("ids", "weights", "noise")}
    is_token = [torch.ones(len(item["ids"]), dtype=torch.bool) for item in items]
    return batch | {"valid": pad(is_token, batch_first=True)}


def part_of(batch, name="text"):
    """The tensors of one text of a batch, or of "imitated", by name."""
    return {k.removeprefix(name + "."): v for k, v in batch.items() if k.startswith(name + ".")}


class BatchBuilder:
    """Examples -> a clean micro-batch.  An example that cannot be used is left out and told of.

    encode: encode_question or encode_pair.  is_imitated: clips are imitated (imitate_audio) instead of
    read.  is_augmented: `augment` and `mask_mel` on each clip.
    """

    def __init__(self, tokenizer, config, encode, seed, is_imitated=False, is_augmented=False):
        self.tokenizer, self.config, self.encode, self.seed = tokenizer, config, encode, seed
        self.is_imitated, self.is_augmented = is_imitated, is_augmented

    def item(self, example, epoch):
        """One example -> {"texts", "transcript", "seconds"} and "imitated", or "mel" and "n_frames"."""
        c, generator = self.config, generator_for(self.seed, epoch, example.id)
        words = self.tokenizer.encode(example.facts.get("words", ""), add_special_tokens=False).ids
        item = {"texts": self.encode(example, self.tokenizer, c, generator), "transcript": words}
        if self.is_imitated:
            is_transcript = example.answer == example.facts.get("words")
            imitated = imitate_audio(example.facts, self.tokenizer, c, generator, is_transcript)
            return item | {"imitated": imitated, "seconds": 0.0}
        if example.audio is None:
            raise UserError("has no audio")
        audio, _ = load_audio(example.audio, example.offset, example.duration, window_seconds(c))
        if self.is_augmented:
            audio = augment(audio, c, generator, example.facts)
        mel, n_frames = log_mel(audio, c)
        if self.is_augmented:
            mel = mask_mel(mel, generator)
        return item | {"mel": mel, "n_frames": n_frames, "seconds": len(audio) / SAMPLE_RATE}

    def __call__(self, examples, epoch):
        """-> {"batch", "ids", "epoch", "skipped", "seconds"}; batch is None when no example is left."""
        items, ids, skipped = [], [], []
        for example in examples:
            try:
                items.append(self.item(example, epoch))
                ids.append(example.id)
            except CANNOT_BE_USED as e:
                skipped.append(unusable(example.id, example.where, e))
        seconds = sum(item["seconds"] for item in items)
        micro = {"ids": ids, "epoch": epoch, "skipped": skipped, "seconds": seconds, "batch": None}
        if not items:
            return micro
        if self.is_imitated:
            parts = {"imitated": pad_imitations([item["imitated"] for item in items])}
            batch = {}
        else:
            parts = {}
            batch = {
                "mel": torch.stack([item["mel"] for item in items]),
                "n_frames": torch.tensor([item["n_frames"] for item in items]),
                "transcript": torch.tensor(
                    [t for item in items for t in item["transcript"]], dtype=torch.long
                ),
                "transcript_length": torch.tensor([len(item["transcript"]) for item in items]),
            }
        for name in items[0]["texts"]:
            parts[name] = collate([item["texts"][name] for item in items], self.config)
        for name, part in parts.items():
            batch |= {f"{name}.{k}": v for k, v in part.items()}
        return micro | {"batch": batch}


def size_of(example):
    """Letters of an example's text and seconds of its clip; negative: unknown.

    Letters of an answer count twice, its response has end marks too.
    """
    letters = len(example.question) + 2 * len(example.answer) + 2 * len(example.rejected or "")
    return letters, -1.0 if example.duration is None else example.duration


def cost_of(size, config):
    """About how many positions an example takes: a quarter of its letters, its audio tokens, its response.

    size: size_of the example.  A clip of unknown length counts as the whole window.
    """
    (letters, seconds), window = size, window_seconds(config)
    seconds = window if seconds < 0 else min(seconds, window)
    return 55 + letters // 4 + config.n_queries + round(12.5 * seconds)


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


def epoch_length(shares):
    """Examples in an epoch.  shares: (examples, share) of each manifest of a Mixture."""
    return sum(round(n * share) for n, share in shares)


class EpochOrder:
    """The ids of an epoch, shuffled: order[a:b] is a list of them.

    Where each manifest is read whole, the permutation is all that is held: 68 MB for 8.5 million examples.
    Of a share below 1, or of what is left of one above, the ids come from a permutation of that manifest,
    the next piece of it in each epoch until all were read.
    """

    def __init__(self, shares, seed, epoch):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        self.order = torch.randperm(epoch_length(shares), generator=generator)
        self.parts, first_id = [], 0  # (drawn, examples, first id, those of the share that is no whole)
        for part, (n, share) in enumerate(shares):
            drawn = round(n * share)
            rest = drawn % n
            some = None
            if rest:  # a walk through the manifest that no epoch begins anew, in an order that is the run's
                walk = torch.randperm(n, generator=torch.Generator().manual_seed(seed + part))
                some = walk[(epoch * rest + torch.arange(rest)) % n]
            self.parts.append((drawn, n, first_id, some))
            first_id += n

    def __getitem__(self, places):
        return [self.id_at(at) for at in self.order[places].tolist()]

    def id_at(self, at):
        for drawn, n, first_id, some in self.parts:
            if at < drawn:
                is_whole = at < drawn - drawn % n
                return first_id + (at % n if is_whole else int(some[at % n]))
            at -= drawn
        raise IndexError(at)


def schedule_of(shares, batch, seed, start=0):
    """(step, epoch, ids of the global batch) for ever, from step `start`: every example once an epoch.

    shares: (examples, share) of each manifest.  A global batch is drawn from all lengths alike, and
    micro-batches sort it: length tells corpora apart, and batches of one corpus each pull the model to
    and fro.
    """
    per_epoch = -(-epoch_length(shares) // batch)
    for epoch in itertools.count(start // per_epoch):
        order = EpochOrder(shares, seed, epoch)
        for n in range(max(start, epoch * per_epoch), (epoch + 1) * per_epoch):
            first = (n - epoch * per_epoch) * batch
            yield n, epoch, order[first : first + batch]


class MicroBatches(torch.utils.data.IterableDataset):
    """What rank `rank` of `size` works on, micro-batch by micro-batch: "last" ends a step.

    budget: positions in a micro-batch.  start, stop: the first step, and the one after the last.
    """

    def __init__(self, examples, builder, batch, rank, size, budget, seed, start, stop):
        self.examples, self.builder, self.batch = examples, builder, batch
        self.rank, self.size, self.budget, self.seed = rank, size, budget, seed
        self.start, self.stop = start, stop

    def plan(self):
        """(step, epoch, ids, whether the step ends here) of every micro-batch."""
        for step, epoch, ids in schedule_of(self.examples.shares, self.batch, self.seed, self.start):
            if step >= self.stop:
                return
            mine = ids[self.rank :: self.size]
            costs = {i: cost_of(self.examples.size(i), self.builder.config) for i in mine}
            parts = bucket(mine, costs, self.budget)
            for n, part in enumerate(parts, 1):
                yield step, epoch, part, n == len(parts)

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        if worker:
            ignore_signals()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for step, epoch, ids, last in itertools.islice(self.plan(), first, None, stride):
            examples, skipped = self.examples.read(ids)
            micro = self.builder(examples, epoch)
            yield micro | {"skipped": skipped + micro["skipped"], "step": step, "last": last}


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
    for note in notes:
        print(note)
    print(
        f"{len(audio) / SAMPLE_RATE:.2f} s at 16 kHz -> mel {tuple(mel.shape)} -> {n_frames} encoder frames"
    )
    print(
        f"-> {config.n_queries} acoustic + {max(n_frames // 4, 1)} semantic tokens before token {audio_at}:\n"
    )
    tokens = [tokenizer.id_to_token(i).replace("Ġ", "_").replace("Ċ", "\\n") for i in ids]
    print(" ".join(tokens[:audio_at]), "\n   [ audio ]\n" + " ".join(tokens[audio_at:]))
