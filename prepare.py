"""Corpora on disk -> manifests that train.py reads.

    python prepare.py tour --audio DIR --out data     all manifests of the small model, and its tokenizer
    python prepare.py fsdd DIR --out fsdd.jsonl       one corpus, plain questions
    python prepare.py show data/stage2.jsonl -n 5     examples as the model sees them

A corpus is a row of CORPORA: where its files are, what their names tell, which of them are for
testing.  Everything else is shared: wordings, composed strings, writing.  The same seed writes
the same bytes.
"""

import argparse
import glob
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from typing import Callable

import numpy as np
import soundfile
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from data import ASR_QUESTION, SAMPLE_RATE, build_prompt, encode_text, load_audio, prompt_text, read_manifest
from model import PRESETS, SPECIAL_TOKENS, Parser, UserError, load_tokenizer

DIGITS = "zero one two three four five six seven eight nine".split()


# ---------------------------------------------------------------------------------------------
# reading corpora


@dataclass(frozen=True)
class Clip:
    """One recording: either words are spoken in it (transcript) or it is some sound (label)."""

    path: str
    dataset: str
    transcript: str | None = None
    label: str | None = None
    is_test: bool = False


@dataclass(frozen=True)
class Corpus:
    """How to read a corpus: `name` matches a path relative to its folder and names what it holds."""

    name: str  # regular expression with groups word / digit / label and whatever is_test needs
    is_test: Callable  # (match, last) -> bool; last: the clip is its folder's last by name
    licence: str


CORPORA = {
    "fsdd": Corpus(
        r"(recordings/)?(?P<digit>\d)_(?P<speaker>[a-z]+)_(?P<index>\d+)\.\w+$",
        lambda m, last: int(m["index"]) <= 2,
        "CC BY-SA 4.0",
    ),
    "speech_commands": Corpus(
        r"(?P<word>[a-z]+)/(?P<speaker>[0-9a-f]+)_nohash_\d+\.\w+$",
        lambda m, last: m["speaker"].startswith("0") or last,
        "CC BY 4.0",
    ),
    "esc10": Corpus(
        r"\d+ - (?P<label>[A-Za-z ]+)/(?P<fold>\d)-\w+-\w+\.\w+$",
        lambda m, last: m["fold"] == "4",
        "CC BY 3.0",
    ),
}


def read_corpus(name, folder):
    """All clips of a corpus in order of their paths.  Raises UserError when there is none."""
    if name not in CORPORA:
        raise UserError(f"unknown corpus {name!r}; known: {', '.join(CORPORA)}")
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder")
    row = CORPORA[name]
    paths = sorted(glob.glob(os.path.join(glob.escape(folder), "**", "*.*"), recursive=True))
    found = [(p, m) for p in paths if (m := re.match(row.name, os.path.relpath(p, folder).replace(os.sep, "/")))]
    if not found:
        raise UserError(f"{folder}: no file here is named like {name}'s: {row.name}")
    last = {os.path.dirname(p): p for p, _ in found}
    clips = []
    for path, m in found:
        g = m.groupdict()
        words = DIGITS[int(g["digit"])] if "digit" in g else g.get("word")
        label = g["label"].lower() if "label" in g else None
        clips.append(Clip(path, name, words, label, row.is_test(m, last[os.path.dirname(path)] == path)))
    return clips


# ---------------------------------------------------------------------------------------------
# questions.  {} in an answer is the label or the words.

QUESTIONS = {
    "asr": [
        ASR_QUESTION,
        "Write down what is said.",
        "What is being said in this recording?",
        "Turn the speech into text.",
        "Give the exact words of the speaker.",
        "Which words can be heard?",
        "Write out the spoken words.",
        "What does the speaker say?",
        "What is said?",
        "Type what you hear being said.",
    ],
    "digit": [
        "Which digit is spoken?",
        "What digit is spoken?",
        "What number is said?",
        "Which number do you hear?",
        "What digit do you hear?",
        "Name the digit.",
        "Which digit is it?",
        "What number does the speaker say?",
    ],
    "word": [
        "Which word is spoken?",
        "What word is said?",
        "What word do you hear?",
        "Which word does the speaker say?",
        "What is the spoken word?",
        "Name the word.",
        "What single word is this?",
    ],
    "sound": [
        "What sound is this?",
        "Which sound do you hear?",
        "What makes this sound?",
        "What can be heard in the recording?",
        "What is the source of the sound?",
        "Name the sound.",
        "Which environmental sound is it?",
        "What is making the noise?",
        "What kind of sound is this?",
        "Identify the sound.",
    ],
    "any": [
        "What do you hear?",
        "What is in this recording?",
        "What is this?",
        "What can you hear?",
        "Describe what you hear.",
        "What is happening in the audio?",
        "Listen and answer: what is it?",
    ],
    "first": ["Which digit comes first?", "What is the first digit?", "Name the first digit you hear."],
    "last": ["Which digit comes last?", "What is the last digit?", "Name the last digit you hear."],
    "count": ["How many digits are spoken?", "How many digits do you hear?", "Count the digits."],
    "kind": ["Is this speech or a sound?", "Do you hear speech or a sound?", "Speech or sound?"],
    "sentence": ["Answer in a full sentence: what do you hear?", "Say in a sentence what you hear."],
}


def capital(text):
    return text[:1].upper() + text[1:]


SELDOM = {"kind": 0.3, "sentence": 0.5}  # how often a task is asked, beside 1 for the others


def questions_about(clip):
    """All (task, answer) pairs a clip allows; the wording of the question is drawn later."""
    short = capital(clip.transcript or clip.label) + "."
    if clip.label:
        yield from (("sound", short), ("any", short), ("kind", "A sound."))
        yield "sentence", f"This is the sound of {clip.label}."
        return
    words = clip.transcript.split()
    yield from (("asr", clip.transcript), ("any", short), ("kind", "Speech."))
    yield "sentence", f"The speaker says {clip.transcript}."
    if all(word in DIGITS for word in words):
        if len(words) > 1:
            yield "first", capital(words[0]) + "."
            yield "last", capital(words[-1]) + "."
            yield "count", capital(DIGITS[len(words)]) + "."
        else:
            yield from (("digit", short), ("word", short))
    elif len(words) == 1:
        yield "word", short


def ask(clips, rng, out, tasks=tuple(QUESTIONS), repeat=1):
    """`repeat` manifest lines for each clip, their tasks drawn from those in `tasks` that the clip allows."""
    for clip in clips:
        allowed = [(task, answer) for task, answer in questions_about(clip) if task in tasks]
        weights = [SELDOM.get(task, 1) for task, _ in allowed]
        for task, answer in rng.choices(allowed, weights, k=repeat) if allowed else ():
            yield entry(clip, task, answer, rng, out)


def entry(clip, task, answer, rng, out):
    """A manifest line (a dict) in the canonical form of FACTS; audio paths relative to the manifest."""
    line = {
        "messages": [
            {"role": "user", "content": "<audio>" + rng.choice(QUESTIONS[task])},
            {"role": "assistant", "content": answer},
        ],
        "audios": [os.path.relpath(clip.path, os.path.dirname(os.path.abspath(out)))],
        "dataset": clip.dataset,
        "task": task,
    }
    if clip.transcript:
        line["transcript"] = clip.transcript
    if clip.label:
        line["label"] = clip.label
    return line


def write_lines(lines, out):
    """Writes a manifest under a temporary name and renames it.  Returns the number of lines."""
    temporary = out + ".tmp"
    try:
        make_folder(os.path.dirname(os.path.abspath(out)))
        with open(temporary, "w", encoding="utf-8") as f:
            f.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        os.replace(temporary, out)
    except OSError as e:
        raise UserError(f"{out}: cannot be written ({e.strerror})") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    return len(lines)


# ---------------------------------------------------------------------------------------------
# composing


def compose(clips, rng, path):
    """Joins the clips with random gaps and levels under a little noise; writes a FLAC at `path`."""
    noise = 10 ** rng.uniform(-4, -2.5)
    silence = lambda low, high: np.zeros(int(rng.uniform(low, high) * SAMPLE_RATE), np.float32)
    parts = [silence(0.0, 0.3)]
    for clip in clips:
        audio, _ = load_audio(clip.path)
        parts += [audio / max(np.abs(audio).max(), 1e-3) * 10 ** rng.uniform(-0.8, -0.1), silence(0.02, 0.4)]
    audio = np.concatenate(parts)
    audio += noise * np.random.default_rng(rng.getrandbits(32)).standard_normal(len(audio), dtype=np.float32)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    soundfile.write(path, audio.clip(-1, 1), SAMPLE_RATE)
    return Clip(path, clips[0].dataset + "_strings", " ".join(c.transcript for c in clips))


def espeak(words, n, rng, folder):
    """n readings of each word by espeak-ng in voices, speeds and pitches drawn at random; [] without it.

    A few synthetic voices among the human ones keep the model from being deaf to them.
    """
    if not shutil.which("espeak-ng"):
        print("espeak-ng is not installed: no synthetic voices (apt install espeak-ng)", file=sys.stderr)
        return []
    os.makedirs(folder, exist_ok=True)
    clips = []
    for word in words:
        for i in range(n):
            voice = rng.choice(ESPEAK_VOICES) + "+" + rng.choice(ESPEAK_VARIANTS)
            path = os.path.join(folder, f"{word}_{i}.wav")
            speak(word, path, voice, speed=rng.randint(110, 190), pitch=rng.randint(25, 75))
            clips.append(Clip(path, "espeak", word))
    return clips


ESPEAK_VOICES = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp")
ESPEAK_VARIANTS = ("m1", "m2", "m4", "m5", "m6", "f1", "f3", "f4")


def speak(text, path, voice="en-us", speed=150, pitch=50):
    """text -> WAV by espeak-ng."""
    if not shutil.which("espeak-ng"):
        raise UserError("espeak-ng is not installed: apt install espeak-ng")
    subprocess.run(["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "-w", path, text], check=True)


def by_label(clips):
    """label or words -> clips, so that rare classes can be drawn as often as common ones."""
    groups = defaultdict(list)
    for clip in clips:
        groups[clip.transcript or clip.label].append(clip)
    return groups


def strings(clips, n, most, rng, folder, progress):
    """n strings of 1..most clips, their words drawn uniformly."""
    groups = by_label(clips)
    names = sorted(groups)
    for i in range(n):
        chosen = [rng.choice(groups[rng.choice(names)]) for _ in range(rng.randint(1, most))]
        yield compose(chosen, rng, os.path.join(folder, f"{i:05}.flac"))
        progress.update()


# ---------------------------------------------------------------------------------------------
# the small model's tokenizer and manifests


def train_tokenizer(lines, vocab=640):
    """Byte-level BPE on the prompts and answers of `lines`, with LLaDA's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [prompt_text("")] + [m["content"].replace("<audio>", " ") for line in lines for m in line["messages"]]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tour(audio, out, seed=0, n_strings=4000, repeat=4):
    """All manifests of the small model from a folder that holds fsdd, speech_commands and esc10.

    Stage 0 and 1 read what is said and heard, stages 2 and 3 ask about it; test.jsonl holds the
    test split, a question a clip.  Test clips appear in no other manifest, nor in any string.
    """
    rng = random.Random(seed)
    clips = [clip for name in CORPORA for clip in read_corpus(name, os.path.join(audio, name))]
    train = [c for c in clips if not c.is_test]
    test = [c for c in clips if c.is_test]
    speech = {name: [c for c in train if c.dataset == name] for name in ("fsdd", "speech_commands")}
    test_digits = [c for c in test if c.dataset == "fsdd"]
    voices = espeak(sorted({c.transcript for c in train if c.transcript}), 12, rng, os.path.join(out, "clips", "espeak"))
    train += voices
    with tqdm(total=n_strings * 3 // 2 + 200, desc="composing", unit=" strings") as progress:
        folder = os.path.join(out, "clips")
        composed = list(strings(speech["fsdd"], n_strings, 5, rng, os.path.join(folder, "digits"), progress))
        composed += strings(speech["speech_commands"] + voices, n_strings // 2, 3, rng, os.path.join(folder, "words"), progress)
        test_strings = list(strings(test_digits, 200, 5, rng, os.path.join(folder, "test_digits"), progress))

    balanced = []  # single clips, every word and sound equally often
    for pool, size in ((speech["fsdd"], 1500), (speech["speech_commands"], 1500), ([c for c in train if c.label], 1500), (voices, 360)):
        groups = by_label(pool)
        balanced += [clip for name in sorted(groups) for clip in rng.choices(groups[name], k=size // len(groups))]
    here = os.path.join(out, "manifest")  # audio paths are relative to its folder
    stages = {
        0: [*ask(train, rng, here), *ask(composed, rng, here), *ask(balanced, rng, here, repeat=repeat)],
        1: [*ask(composed, rng, here, ["asr"]), *ask(balanced, rng, here, ["asr"])],
        2: [*ask(composed, rng, here), *ask(balanced, rng, here, repeat=repeat)],
        3: [*ask(composed, rng, here), *ask(balanced, rng, here, repeat=repeat)],
    }
    for stage, lines in stages.items():
        rng.shuffle(lines)
        print(f"{out}/stage{stage}.jsonl: {write_lines(lines, f'{out}/stage{stage}.jsonl')} lines")
    one = {"fsdd": "digit", "speech_commands": "word", "esc10": "sound"}
    lines = [entry(c, one[c.dataset], capital(c.transcript or c.label) + ".", rng, here) for c in test]
    lines += [entry(c, "asr", c.transcript, rng, here) for c in test_strings]
    print(f"{out}/test.jsonl: {write_lines(lines, f'{out}/test.jsonl')} lines")
    tokenizer = train_tokenizer([line for lines in stages.values() for line in lines])
    tokenizer.save(f"{out}/tokenizer.json")
    print(f"{out}/tokenizer.json: {tokenizer.get_vocab_size()} entries")


def make_folder(path):
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror})") from None


def demo(out):
    """The clips that come with the code: espeak-ng's speech in voices kept out of training, and synthesis."""
    for name, text, voice in DEMOS:
        speak(text, os.path.join(out, name + ".wav"), voice, speed=140)
    rng, n = np.random.default_rng(0), 5 * SAMPLE_RATE
    ticks = np.zeros(n)
    for i, start in enumerate(range(SAMPLE_RATE // 4, n - 400, SAMPLE_RATE // 2)):
        t = np.arange(400) / SAMPLE_RATE
        ticks[start : start + 400] += np.exp(-t * 400) * np.sin(2 * np.pi * (2400 if i % 2 else 1800) * t)
    ticks += 0.002 * rng.standard_normal(n)
    soundfile.write(os.path.join(out, "clock.wav"), 0.5 * ticks, SAMPLE_RATE)


DEMOS = [("seven", "seven", "en-us+m3"), ("digits", "four, nine, two", "en-us+f2")]


def show(path, n, tokenizer_folder):
    """Prints n examples as the model sees them: prompt, splice, answer and canvas."""
    tokenizer, config = load_tokenizer(tokenizer_folder), PRESETS["tiny"]
    config = config.with_tokenizer(tokenizer)
    for example in read_manifest(path)[:n]:
        item = encode_text(example, tokenizer, config)
        _, at = build_prompt(tokenizer, example.question)
        canvas = item["ids"][item["is_answer"].index(True) :]
        print(f"{example.where}  {example.audio}")
        print(f"  {tokenizer.decode(item['ids'][:at], skip_special_tokens=False)!r} + [audio] +")
        print(f"  {tokenizer.decode(item['ids'][at : -len(canvas)], skip_special_tokens=False)!r}")
        print(f"  canvas of {len(canvas)}: {tokenizer.decode([i for i in canvas if i != config.eos_id], skip_special_tokens=False)!r}")


def main(argv=None):
    parser = Parser(prog="prepare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    p = commands.add_parser("tour", help="all manifests of the small model")
    p.add_argument("--audio", required=True, help="folder that holds fsdd, speech_commands and esc10")
    p.add_argument("--out", default="data")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--strings", type=int, default=4000, help="composed digit strings; half as many word strings")
    p = commands.add_parser("show", help="examples as the model sees them")
    p.add_argument("manifest")
    p.add_argument("-n", type=int, default=5)
    p.add_argument("--tokenizer", default=None, help="folder of tokenizer.json (default: the manifest's)")
    p = commands.add_parser("demo", help="the clips of assets/demo (needs espeak-ng)")
    p.add_argument("--out", default="assets/demo")
    for name in CORPORA:
        p = commands.add_parser(name, help=f"a manifest of the {name} corpus ({CORPORA[name].licence})")
        p.add_argument("source")
        p.add_argument("--out", required=True)
        p.add_argument("--split", choices=("train", "test", "all"), default="all")
        p.add_argument("--seed", type=int, default=0)
    try:
        args = parser.parse_args(argv)
        if args.command == "tour":
            make_folder(args.out)
            tour(args.audio, args.out, args.seed, args.strings)
        elif args.command == "demo":
            make_folder(args.out)
            demo(args.out)
        elif args.command == "show":
            show(args.manifest, args.n, args.tokenizer or os.path.dirname(os.path.abspath(args.manifest)))
        else:
            rng = random.Random(args.seed)
            clips = [c for c in read_corpus(args.command, args.source) if args.split in ("all", "test" if c.is_test else "train")]
            print(f"{args.out}: {write_lines(list(ask(clips, rng, args.out)), args.out)} lines")
    except UserError as e:
        print(f"prepare.py: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
