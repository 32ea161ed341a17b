"""Whisper itself, the peer of every transcript: its own decoder, greedy, on the transcripts of a manifest.

    python -m tools.peer data/test.jsonl --whisper tiny.en      downloads it, or takes openai-whisper's .pt
    python -m tools.evaluate exact data/test.jsonl              the same clips, by the small model

The small model has this Whisper's encoder, so the two differ in what reads the encoder's states.
"""

import re
import sys
import time
from collections import defaultdict

import torch
import whisper
from tqdm import tqdm

from data import load_audio
from runtime.errors import Parser, UserError, exit_status, first_line, number
from runtime.manifests import ASR_QUESTION
from tools.benchmarks import TRANSCRIPTS, normalise, with_audio, word_errors
from tools.corpora import DIGITS


def spelled(text):
    """Digits as words, as our transcripts have them: Whisper writes "4, 9" for four nine."""
    return re.sub(r"\d", lambda found: f" {DIGITS[int(found[0])]} ", text)


def transcribe(model, path, offset=0.0, duration=None):
    """A clip's transcript, and how often the decoder was called: once a token."""
    samples, notes = load_audio(path, offset, duration, whisper.audio.CHUNK_LENGTH)
    for note in notes:  # of a silent clip, or one longer than Whisper's window
        print(f"peer: {note}", file=sys.stderr)
    mel = whisper.log_mel_spectrogram(whisper.pad_or_trim(samples), model.dims.n_mels)
    options = whisper.DecodingOptions(language="en", without_timestamps=True, fp16=False)
    result = whisper.decode(model, mel.to(model.device), options)
    calls = min(len(result.tokens) + 1, model.dims.n_text_ctx // 2)  # the end mark is a call too
    return result.text, calls


def main(argv=None):
    parser = Parser(prog="peer", description=__doc__)
    parser.add_argument("manifest")
    parser.add_argument("--whisper", default="tiny.en", metavar="NAME|FILE.pt")
    parser.add_argument("--limit", type=number(int, 1), default=100, help="clips a corpus (default 100)")

    def start():
        args = parser.parse_args(argv)
        groups = defaultdict(list)
        for example in with_audio(args.manifest):
            is_transcript = example.task == TRANSCRIPTS or example.question == ASR_QUESTION
            if is_transcript and len(groups[example.dataset]) < args.limit:
                groups[example.dataset].append(example)
        if not groups:
            raise UserError(f"{args.manifest}: has no transcripts")
        try:
            model = whisper.load_model(args.whisper, "cpu")
        except Exception as e:  # the hub's errors, unpickling's, a missing key: whatever the file brings
            raise UserError(f"{args.whisper}: no model of openai-whisper's ({first_line(e)})") from None
        for corpus, examples in sorted(groups.items()):
            answers, calls, started = [], 0, time.perf_counter()
            for example in tqdm(examples, desc=corpus or "-", unit=" clips", leave=False):
                text, n = transcribe(model, example.audio, example.offset, example.duration)
                answers.append(spelled(text))
                calls += n
            n, seconds = len(examples), time.perf_counter() - started
            expected = [example.answer for example in examples]
            right = sum(normalise(e) == normalise(a) for e, a in zip(expected, answers, strict=True))
            wer = word_errors(expected, answers, normalise)["wer"]
            print(f"{corpus or '-':24}{n:>5} clips, {right / n:.1%} exact, WER {wer:.1%}", end=", ")
            print(f"{calls / n:.1f} decoder calls, {seconds / n:.2f} s a clip", flush=True)

    with torch.inference_mode():
        return exit_status("peer", start)


if __name__ == "__main__":
    sys.exit(main())
