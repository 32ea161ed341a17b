"""From files to tensors: manifests, audio, THE prompt, and batches.

One prompt builder serves training, decoding and evaluation, because a model answers the prompt it was
trained on.  One audio reader serves all of them too (runtime/recordings.py): any format libsndfile knows,
resampled by soxr to 16 kHz mono.  The log-mel is openai-whisper's, computed clip by clip: on a batch it
would take its maximum over all clips, and one loud clip would change another.

The batch that leaves `collate` is clean: noise is added in the training step (diffusion.py).  In stage 0
there is no audio: word embeddings of a clip's labels stand in for its tokens (runtime/variations.py).

`python data.py CLIP [QUESTION]` shows what the model is given for a clip.
"""

import itertools
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.nn.utils.rnn import pad_sequence
from whisper.audio import HOP_LENGTH, SAMPLE_RATE, log_mel_spectrogram, pad_or_trim

from model import SPECIAL_TOKENS
from runtime.errors import CANNOT_BE_USED, UserError, unusable
from runtime.manifests import parse_entry, read_entries
from runtime.recordings import load_audio
from runtime.variations import augment, imitate_audio, mask_mel

SAMPLES_PER_FRAME = 2 * HOP_LENGTH  # an encoder frame is two mel frames: 20 ms
RESPONSE_UNIT = 16  # a response is a multiple of this many tokens long
MAX_TEXT = 2048  # tokens of prompt and answer in training, as in the authors' code


# ---------------------------------------------------------------------------------------------
# manifests


@dataclass(frozen=True)
class Example:
    """One question about one clip."""

    id: int  # its place in the data; seeds its random numbers, the same in any batch and process
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
    fields = parse_entry(entry, where, folder, stage, check)
    for text in (fields["question"], fields["answer"], fields["rejected"] or "", *fields["facts"].values()):
        refuse_special_tokens(text, where)
    return Example(id=id, where=where, **fields)


def refuse_special_tokens(text, where):
    """A text that spells a control token would be read as one: it could end its own turn."""
    # Python keeps bytes that are not UTF-8 as lone surrogates, which no tokenizer can read
    if not isinstance(text, str) or any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError(f"{where}: not text in UTF-8: {text!r}")
    for token in SPECIAL_TOKENS.values():
        if token in text:
            raise UserError(f"{where}: the text contains the control token {token}")


# ---------------------------------------------------------------------------------------------
# audio


def window_samples(config):
    """Samples that the encoder takes in at once: 30 s with Whisper's own window, 10 s in the small model."""
    return config.n_frames * SAMPLES_PER_FRAME


def window_seconds(config):
    return window_samples(config) / SAMPLE_RATE


def log_mel(audio, config):
    """Whisper's log-mel of one clip, padded with silence to the encoder's window.

    audio (n,) 16 kHz.  Returns mel (n_mels, 2 * config.n_frames), and how many encoder frames hold real
    audio.  Whisper was trained on padded windows and needs them.  The semantic adapter then reads only the
    real frames, the acoustic adapter the encoded silence too.
    """
    n_frames = min(math.ceil(len(audio) / SAMPLES_PER_FRAME), config.n_frames)
    window = pad_or_trim(torch.as_tensor(audio, dtype=torch.float32), window_samples(config))
    return log_mel_spectrogram(window, n_mels=config.n_mels), n_frames


# ---------------------------------------------------------------------------------------------
# the prompt

# the authors' at inference.  In training they let " Imagine you can hear the audio clips. Focus on the audios
# and respond directly to the prompts." follow; here a model is trained on the prompt it is asked with
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

    How many tokens stand before it is the tokenizer's choice, so the place is found by characters.
    """
    refuse_special_tokens(question, "question")
    text = prompt_text(question)
    # the text has its special tokens: some tokenizers would add a second <|startoftext|>
    encoding = tokenizer.encode(text, add_special_tokens=False)
    at = text.index(" <audio>")
    audio_at = next(i for i, (_, end) in enumerate(encoding.offsets) if end > at)
    return encoding.ids, audio_at


def answer_ids(tokenizer, answer, config):
    """The answer's tokens and its end of turn.  In the response, end marks follow."""
    return tokenizer.encode(answer, add_special_tokens=False).ids + [config.eot_id]


def answer_text(tokenizer, ids, config):
    """What is printed: everything before the first end of turn or end mark, specials removed."""
    ids = itertools.takewhile(lambda token: token not in (config.eot_id, config.eos_id), ids)
    return tokenizer.decode(list(ids), skip_special_tokens=True).strip()


# ---------------------------------------------------------------------------------------------
# examples -> texts -> a batch


def response_length(n, extra):
    """The first multiple of RESPONSE_UNIT above n tokens, plus `extra` units: an end mark always follows.

    The end mark <|endoftext|> is also the padding, and the model must learn to predict it (Section 3.4):
    an answer that filled its response exactly would show it none.
    """
    return (n // RESPONSE_UNIT + 1 + extra) * RESPONSE_UNIT


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


def encode_question(example, tokenizer, config, generator=None):
    """{"text": prompt and response}, all that stages 0 to 3 need; the response has a random length.

    Random, because decoding uses one fixed length, usually longer than the answer (Table B.4), and the model
    must fill the rest with end marks.  It depends on the example and `generator`, never on the batch.  (The
    authors pad to the longest answer of a micro-batch.)
    """
    # a causal model stops at the first end mark and needs no more of them
    extra = None if config.causal else int(torch.randint(3, (1,), generator=generator))
    return {"text": encode_answer(example, example.answer, tokenizer, config, extra)}


def encode_pair(example, tokenizer, config, generator):
    """Stage 4's two texts, {"chosen", "rejected"}: answer and first end mark are what VRPO scores (Eq. 3)."""
    answers = {"chosen": example.answer, "rejected": example.rejected}
    return {name: encode_answer(example, answer, tokenizer, config) for name, answer in answers.items()}


def pad_rows(rows, fill=0):
    """Rows of different lengths -> one tensor (B, longest, ...), filled up on the right."""
    return pad_sequence([torch.as_tensor(row) for row in rows], batch_first=True, padding_value=fill)


def collate(items, config):
    """Items from encode_answer -> a clean batch: ids, valid and is_answer (B, T), audio_at (B,).

    valid: False on padding.  Never read it off the ids: the end mark is also the padding id.
    """
    return {
        "ids": pad_rows([item["ids"] for item in items], config.eos_id),
        "valid": pad_rows([[True] * len(item["ids"]) for item in items]),
        "is_answer": pad_rows([item["is_answer"] for item in items]),
        "audio_at": torch.tensor([item["audio_at"] for item in items]),
    }


def pad_imitations(items):
    """Items from imitate_audio as one batch: ids, weights (B, A, 2), noise (B, A, width), valid (B, A)."""
    batch = {name: pad_rows([item[name] for item in items]) for name in ("ids", "weights", "noise")}
    return batch | {"valid": pad_rows([[True] * len(item["ids"]) for item in items])}


def audio_tokens(model, batch, stage):
    """The audio tokens of a batch's clips, encoded or imitated: audio (B, A, D), is_audio (B, A).

    To the backbone they are embeddings like those of words, and that is all it ever learns of sound.
    """
    if "mel" in batch:
        encoded = model.encode(batch["mel"], batch["n_frames"])
        return model.adapt(*encoded, batch["n_frames"], stage)
    # stage 0: no audio; weighted sums of word embeddings plus noise stand where audio tokens will
    imitated = batch["imitated"]
    audio = model.embed_imitation(imitated["ids"], imitated["weights"], imitated["noise"])
    return audio, imitated["valid"]


def to_device(batch, device):
    """A batch, a dict of tensors and of such dicts, on another device."""
    if isinstance(batch, dict):
        return {name: to_device(value, device) for name, value in batch.items()}
    return batch.to(device, non_blocking=True)


# ---------------------------------------------------------------------------------------------
# examples -> micro-batches


def generator_for(seed, epoch, example_id, stream=0):
    """An example's randomness, the same in any batch and process.  stream: 0 the loader's, 1 the loss's."""
    # four numbers packed into one.  Beyond a million examples two may get the same, but in different epochs
    number = ((seed * 2 + stream) * 1_000_003 + epoch) * 1_000_003 + example_id
    return torch.Generator().manual_seed(number % (1 << 63))


@dataclass(frozen=True)
class BatchBuilder:
    """Examples -> a clean micro-batch.  An example that cannot be used is left out and reported."""

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
        # what lies behind the window is cut off; `prepare check` counts such transcripts
        audio, _ = load_audio(example.audio, example.offset, example.duration, window_seconds(c))
        if self.is_augmented:
            audio = augment(audio, generator, example.facts, window_samples(c))
        mel, n_frames = log_mel(audio, c)
        if self.is_augmented:
            mel = mask_mel(mel, generator)
        transcript = self.tokenizer.encode(example.facts.get("words", ""), add_special_tokens=False).ids
        item["transcript"] = torch.tensor(transcript, dtype=torch.long)  # for CTC; may be empty
        return item | {"mel": mel, "n_frames": n_frames, "seconds": len(audio) / SAMPLE_RATE}

    def batch_of(self, items):
        """Items -> {"mel", "n_frames", ...} or {"imitated"}, and each text by name, from `collate`."""
        if self.is_imitated:
            batch = {"imitated": pad_imitations([item["imitated"] for item in items])}
        else:
            batch = {
                "mel": torch.stack([item["mel"] for item in items]),
                "n_frames": torch.tensor([item["n_frames"] for item in items]),
                "transcript": torch.cat([item["transcript"] for item in items]),  # end to end: CTC's form
                "transcript_length": torch.tensor([len(item["transcript"]) for item in items]),
            }
        for name in items[0]["texts"]:
            batch[name] = collate([item["texts"][name] for item in items], self.config)
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


if __name__ == "__main__":
    from runtime import tutorials
    from weights import load

    tutorials.data(sys.argv[1:], load, load_audio, log_mel, build_prompt, window_seconds)
