"""Corpora on disk -> manifests that train.py reads.

    python prepare.py tour --audio DIR --out data     all manifests of the small model, and its tokenizer
    python prepare.py fsdd DIR --out fsdd.jsonl       one corpus, plain questions
    python prepare.py toy                             a synthetic corpus for people with no data, and its manifests
    python prepare.py check data/*.jsonl              what manifests hold, and what is wrong with them
    python prepare.py show data/stage2.jsonl -n 5     examples as the model sees them

A corpus is a row of CORPORA: what its files are called, which facts their names tell, which of
them are for testing.  A question is a row of TASKS: the fact it asks about, wordings, short and
full answers.  Everything else is shared: composed strings, mixtures, multiple choice, writing.
The same seed writes the same bytes.
"""

import argparse
import difflib
import functools
import glob
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Callable

import numpy as np
import soundfile
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from data import (
    ASR_QUESTION, SAMPLE_RATE, build_prompt, encode_text, lettered, load_audio, mmau_prompt, mmsu_prompt, parse_example, prompt_text,
    read_entries, read_manifest,
)  # fmt: skip
from model import PRESETS, SPECIAL_TOKENS, Parser, UserError, load_tokenizer

DIGITS = "zero one two three four five six seven eight nine".split()


# ---------------------------------------------------------------------------------------------
# reading corpora


@dataclass(frozen=True)
class Clip:
    """One recording and what is known of it: facts, by kind.

    Kinds: words (what is said), sound (environmental), instrument (or object), emotion, intensity,
    sex, speaker, accent, background (the sound under speech).
    """

    path: str
    dataset: str
    facts: dict = field(default_factory=dict)
    is_test: bool = False


@dataclass(frozen=True)
class Corpus:
    """How to read a corpus: `name` matches a clip's path relative to the corpus' folder."""

    licence: str
    name: str  # regular expression; its groups go to `facts` and `is_test`
    facts: Callable  # (groups, side) -> {kind: value}
    is_test: Callable  # (groups, last) -> bool; last: the clip is its folder's last by name
    side: Callable = lambda folder: None  # folder -> what `facts` needs beside the name


def sexes_of_librispeech(folder):
    """SPEAKERS.TXT -> {speaker id: male or female}."""
    found = {}
    for path in glob.glob(os.path.join(glob.escape(folder), "**", "SPEAKERS.TXT"), recursive=True):
        with open(path, encoding="utf-8") as f:
            for line in f:
                if not line.startswith(";"):
                    speaker, sex = (x.strip() for x in line.split("|")[:2])
                    found[speaker] = {"F": "female", "M": "male"}[sex]
    return found


def librispeech_facts(g, sexes):
    return {"speaker": g["speaker"]} | ({"sex": sexes[g["speaker"]]} if g["speaker"] in sexes else {})


RAVDESS = {  # codes of the file name's third, fourth and fifth field
    "emotion": dict(zip("12345678", "neutral calm happy sad angry fearful disgusted surprised".split())),
    "intensity": {"1": "normal", "2": "strong"},
    "words": {"1": "kids are talking by the door", "2": "dogs are sitting by the door"},
}
SAMPLES = {"bd": "bass drum", "elec": "electronic sound", "guit": "guitar", "hat": "hi-hat", "perc": "percussion", "sn": "snare drum",
           "femalevoice": "female voice", "femalevoices": "female voices", "malevoice": "male voice", "malevoices": "male voices",
           "synth": "synthesizer"}  # fmt: skip
ends_in_3 = lambda g, last: g["whole"].endswith("3")

CORPORA = {
    "fsdd": Corpus(
        "CC BY-SA 4.0",
        r"(recordings/)?(?P<digit>\d)_(?P<speaker>[a-z]+)_(?P<index>\d+)\.\w+$",
        lambda g, side: {"words": DIGITS[int(g["digit"])], "speaker": g["speaker"]},
        lambda g, last: int(g["index"]) <= 2,
    ),
    "speech_commands": Corpus(
        "CC BY 4.0",
        r"(?P<word>[a-z]+)/(?P<speaker>[0-9a-f]+)_nohash_\d+\.\w+$",
        lambda g, side: {"words": g["word"]},
        lambda g, last: g["speaker"].startswith("0") or last,
    ),
    "esc10": Corpus(
        "CC BY 3.0",
        r"\d+ - (?P<label>[A-Za-z ]+)/(?P<fold>\d)-\w+-\w+\.\w+$",
        lambda g, side: {"sound": g["label"].lower()},
        lambda g, last: g["fold"] == "4",
    ),
    "ravdess": Corpus(
        "CC BY-NC-SA 4.0",
        r"(.*/)?03-01-0(?P<emotion>\d)-0(?P<intensity>\d)-0(?P<words>\d)-0\d-(?P<actor>\d\d)\.\w+$",
        lambda g, side: {k: v[g[k]] for k, v in RAVDESS.items()} | {"sex": "male" if int(g["actor"]) % 2 else "female", "speaker": f"actor {g['actor']}"},
        lambda g, last: g["actor"] in ("21", "22"),
    ),
    "librispeech": Corpus(
        "CC BY 4.0",
        r"(.*/)?(?P<speaker>\d+)-\d+-\d+\.\w+$",
        librispeech_facts,
        lambda g, last: g["speaker"].endswith("0"),
        sexes_of_librispeech,
    ),
    "berklee": Corpus(
        "CC BY 3.0",
        r"(.*/)?(?P<whole>(?P<name>[a-z]+)[^/]*)\.\w+$",
        lambda g, side: {"instrument": SAMPLES.get(g["name"], g["name"])},
        ends_in_3,
    ),
    "sonicpi": Corpus(
        "CC0",
        r"(.*/)?(?P<whole>(?P<name>[a-z]+)_[^/]*)\.\w+$",
        lambda g, side: {"instrument": SAMPLES.get(g["name"], g["name"])},
        ends_in_3,
    ),
}
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".opus", ".m4a")


def read_corpus(name, folder):
    """All clips of a corpus in order of their paths.  Raises UserError when there is none."""
    if name not in CORPORA:
        raise UserError(f"unknown corpus {name!r}; known: {', '.join(CORPORA)}")
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder")
    row, side = CORPORA[name], CORPORA[name].side(folder)
    paths = sorted(p for p in glob.glob(os.path.join(glob.escape(folder), "**", "*.*"), recursive=True) if p.lower().endswith(AUDIO_SUFFIXES))
    found = [(p, m) for p in paths if (m := re.match(row.name, os.path.relpath(p, folder).replace(os.sep, "/")))]
    if not found:
        raise UserError(f"{folder}: no file here is named like {name}'s: {row.name}")
    last = {os.path.dirname(p): p for p, _ in found}
    return [Clip(p, name, row.facts(m, side), bool(row.is_test(m, last[os.path.dirname(p)] == p))) for p, m in found]


# ---------------------------------------------------------------------------------------------
# questions.  {} is the fact, with its capital where it begins the answer.


@dataclass(frozen=True)
class Task:
    kind: str  # the fact it asks about
    questions: tuple
    long: tuple = ()  # full-sentence answers; the short one is the fact itself
    labels: bool = True  # the answers form a set that multiple choice can draw from


TASKS = {
    "asr": Task("words", (
        ASR_QUESTION, "Write down what is said.", "What is being said in this recording?", "Turn the speech into text.",
        "Give the exact words of the speaker.", "Which words can be heard?", "Write out the spoken words.", "What does the speaker say?",
        "What is said?", "Type what you hear being said.", "Transcribe the recording.", "Speech to text, please.",
        "Put the spoken words into writing.", "Note down every word you hear.", "What are the words in this clip?",
        "Please write a transcript.", "Listen and write what is spoken.", "Provide the transcription of the speech.",
        "Tell me word for word what was said.", "What did the person say?", "Render the speech as text.",
        "Take dictation from this recording.", "Spell out the words that are spoken.", "Give a transcript of the audio.",
        "What text does the voice speak?",
    ), labels=False),
    "digit": Task("digit", (
        "Which digit is spoken?", "What digit is spoken?", "What number is said?", "Which number do you hear?", "What digit do you hear?",
        "Name the digit.", "Which digit is it?", "What number does the speaker say?",
    ), ("The speaker says {}.", "The digit is {}.")),
    "word": Task("word", (
        "Which word is spoken?", "What word is said?", "What word do you hear?", "Which word does the speaker say?",
        "What is the spoken word?", "Name the word.", "What single word is this?",
    ), ("The speaker says {}.", "The word is {}.")),
    "sound": Task("sound", (
        "What sound is this?", "Which sound do you hear?", "What makes this sound?", "What can be heard in the recording?",
        "What is the source of the sound?", "Name the sound.", "Which environmental sound is it?", "What is making the noise?",
        "What kind of sound is this?", "Identify the sound.",
    ), ("This is the sound of {}.", "I hear {}.")),
    "instrument": Task("instrument", (
        "Which instrument or object is it?", "What instrument or object do you hear?", "What is being played or struck?",
        "Name the instrument or object.", "Which instrument do you hear?", "What object makes this sound?", "What makes this sound?",
        "What is the source of the sound?",
    ), ("This is the sound of {}.", "I hear {}.")),
    "emotion": Task("emotion", (
        "What emotion?", "How does the speaker feel?", "Which emotion does the voice express?", "What is the speaker's emotion?",
        "How does the voice sound?", "What mood is the speaker in?", "Describe the speaker's emotion.", "What feeling do you hear?",
        "In what emotional state is the speaker?",
    ), ("The speaker sounds {}.", "The voice is {}.")),
    "intensity": Task("intensity", (
        "How strong is the emotion?", "Is the emotion normal or strong?", "What is the emotional intensity?", "How intense is the feeling?",
    ), ("The emotion is {}.",)),
    "sex": Task("sex", (
        "Is the speaker male or female?", "Is this a man or a woman?", "What is the speaker's sex?", "Who speaks, a man or a woman?",
        "Is the voice male or female?", "What is the gender of the speaker?",
    ), ("The speaker is {}.", "The voice is {}.")),
    "speaker": Task("speaker", ("Who is speaking?", "Which speaker is it?", "Name the speaker."), ("The speaker is {}.",)),
    "accent": Task("accent", ("What accent does the speaker have?", "Which accent do you hear?", "Where is the speaker's accent from?"), ("The accent is {}.",)),
    "background": Task("background", (
        "What sound is in the background?", "What do you hear behind the speech?", "Which sound is under the voice?",
        "What is the background noise?", "Beside the voice, what can be heard?",
    ), ("In the background there is {}.",)),
    "any": Task("any", (
        "What do you hear?", "What is in this recording?", "What is this?", "What can you hear?", "Describe what you hear.",
        "What is happening in the audio?", "Listen and answer: what is it?",
    ), labels=False),
    "first": Task("first", ("Which digit comes first?", "What is the first digit?", "Name the first digit you hear."), ("The first digit is {}.",)),
    "last": Task("last", ("Which digit comes last?", "What is the last digit?", "Name the last digit you hear."), ("The last digit is {}.",)),
    "count": Task("count", ("How many digits are spoken?", "How many digits do you hear?", "Count the digits."), ("There are {} digits.",)),
    "layer": Task("layer", ("Is this speech or a sound?", "Do you hear speech or a sound?", "Speech or sound?")),
}  # fmt: skip
IN_A_SENTENCE = (" Answer in a full sentence.", " Answer in a sentence.", " Say it in a full sentence.")


def capital(text):
    return text[:1].upper() + text[1:]


def derived(facts):
    """A clip's facts and what follows from them: digit, word, first, last, count, layer, any."""
    facts = dict(facts)
    words = facts.get("words", "").split()
    facts["layer"] = "speech" if words or "speaker" in facts else "a sound"
    if len(words) == 1:
        facts["word"] = words[0]
    if words and all(w in DIGITS for w in words):
        if len(words) > 1:
            facts |= {"first": words[0], "last": words[-1], "count": DIGITS[len(words)] if len(words) < 10 else str(len(words))}
        else:
            facts["digit"] = words[0]
    heard = facts.get("words") or facts.get("sound") or facts.get("instrument")
    if heard:
        facts["any"] = heard
    if facts.get("background"):
        facts.pop("layer", None)
        facts.pop("any", None)
    return facts


SELDOM = {"layer": 0.3, "speaker": 0.5, "any": 0.7}  # how often a task is asked, beside 1 for the others


def askable(clip, tasks=None):
    """[(task, fact)] of all questions that a clip allows."""
    facts = derived(clip.facts)
    return [(task, facts[row.kind if task != "asr" else "words"]) for task, row in TASKS.items() if row.kind in facts and (tasks is None or task in tasks)]


def draw_question(clip, rng, tasks=None, sentences=0.12):
    """A question that the clip allows, worded at random; None if there is none.

    Returns task, question, fact and a function that words any fact of its kind as the answer.
    """
    allowed = askable(clip, tasks)
    if not allowed:
        return None
    task, fact = rng.choices(allowed, [SELDOM.get(t, 1) for t, _ in allowed])[0]
    question, long = rng.choice(TASKS[task].questions), TASKS[task].long
    if task == "asr":
        return task, question, fact, str
    if long and rng.random() < sentences:
        return task, question + rng.choice(IN_A_SENTENCE), fact, rng.choice(long).format
    return task, question, fact, lambda other: capital(other) + "."


def question_line(clip, rng, out, tasks=None, sentences=0.12):
    """A manifest line that asks about the clip; None if none of `tasks` can."""
    drawn = draw_question(clip, rng, tasks, sentences)
    if drawn is None:
        return None
    task, question, fact, word = drawn
    return line_of(clip, task, question, word(fact), out)


def preference_line(clip, rng, out, pools):
    """A stage-4 line: the right answer, and the same answer with one fact wrong that is easily confused with it."""
    drawn = draw_question(clip, rng, [t for t in TASKS if t in pools or t in ("asr", "any")], sentences=0.4)
    if drawn is None:
        return None
    task, question, fact, word = drawn
    words = fact.split()
    if task in ("asr", "any") and "words" in clip.facts:  # one word of them
        i = rng.randrange(len(words))
        words[i] = distractors(words[i], DIGITS if words[i] in DIGITS else pools["word"], 1, rng)[0]
        wrong = " ".join(words)
    else:
        pool = pools["sound" if task == "any" and "sound" in clip.facts else "instrument" if task == "any" else task]
        wrong = (distractors(fact, pool, 1, rng) or [None])[0]
    if wrong is None:
        return None
    return line_of(clip, task, question, word(fact), out) | {"rejected_response": word(wrong)}


# ---------------------------------------------------------------------------------------------
# multiple choice


CONFUSABLE = [  # sounds, feelings and words that are easily taken for each other
    "rain|sea waves|fire crackling|water", "helicopter|chainsaw", "dog bark|rooster|baby cry|person sneeze", "clock tick|camera|shaker|hi-hat",
    "happy|surprised|angry|fearful", "neutral|calm|sad", "disgusted|angry|fearful", "five|nine|four", "one|nine", "six|seven|eight", "two|three|zero",
    "three|tree", "bed|bird|dog", "no|go", "on|off", "up|off", "house|down|wow", "yes|left", "guitar|bass|piano", "bell|gong|glass|metal",
    "bass drum|drum|snare drum|tabla|percussion", "female voice|female voices|male voice|male voices", "synthesizer|theremin|electronic sound",
    "plastic|squeak|balloon|door", "one|two|three|four|five",
]  # fmt: skip


def distractors(label, pool, n, rng):
    """n wrong labels out of `pool`, those most like the right one first."""
    near = {w for group in CONFUSABLE if label in group.split("|") for w in group.split("|")}
    others = sorted(set(pool) - {label})
    rng.shuffle(others)
    others.sort(key=lambda w: (w not in near, -round(difflib.SequenceMatcher(None, w, label).ratio(), 1)))
    take = min(n, len(others))
    hard = others[: (take + 1) // 2]
    return hard + rng.sample(others[len(hard) :], take - len(hard))


LETTERS = "ABCDEFGH"
CHOICE_TASKS = [t for t, row in TASKS.items() if row.labels and t not in ("speaker", "layer")]


def multiple_choice(task, fact, pool, n, rng):
    """-> question without its prompt, choices (capitalised), index of the right one.  The position is drawn evenly."""
    choices = distractors(fact, pool, n - 1, rng)
    right = rng.randrange(len(choices) + 1)
    choices.insert(right, fact)
    return rng.choice(TASKS[task].questions), [capital(c) for c in choices], right


def choice_line(clip, rng, out, pools):
    """A manifest line that asks by multiple choice, in our own wording or a benchmark's; None if the clip allows none."""
    allowed = [(t, f) for t, f in askable(clip, CHOICE_TASKS) if len(pools[t]) > 1]
    if not allowed:
        return None
    task, fact = rng.choice(allowed)
    style, n = rng.choice(("mmsu", "mmau", "letter", "text")), rng.choice((2, 3, 4, 4, 4, 4, 5, 6, 8))
    question, choices, right = multiple_choice(task, fact, pools[task], 4 if style == "mmsu" else n, rng)
    letter, listed = LETTERS[right] + ".", lettered(choices)
    if style == "mmsu":
        question, answer = mmsu_prompt(question, choices), letter
    elif style == "mmau":
        question, answer = mmau_prompt(question, choices), choices[right] + "."
    elif style == "letter":
        question, answer = f"{question}\n{listed}\nAnswer with the letter.", letter
    else:
        question, answer = f"{question}\n{listed}", choices[right] + "."
    return line_of(clip, task + "_choice", question, answer, out)


# ---------------------------------------------------------------------------------------------
# writing


def ask(clips, rng, out, tasks=None, repeat=1):
    """`repeat` manifest lines for each clip, their tasks drawn from those in `tasks` that the clip allows."""
    return [line for clip in clips for _ in range(repeat) if (line := question_line(clip, rng, out, tasks))]


@functools.lru_cache(maxsize=100_000)
def seconds_of(path):
    """Length by the file's header; None where there is none that can be read (check tells of it)."""
    try:
        info = soundfile.info(path)
        return round(info.frames / info.samplerate, 4)
    except (soundfile.LibsndfileError, OSError):
        return None


def line_of(clip, task, question, answer, out):
    """A manifest line (a dict) in the canonical form of FACTS; audio paths relative to the manifest."""
    line = {
        "messages": [{"role": "user", "content": "<audio>" + question}, {"role": "assistant", "content": answer}],
        "audios": [os.path.relpath(clip.path, os.path.dirname(os.path.abspath(out)))],
        "duration": seconds_of(clip.path),
        "dataset": clip.dataset,
        "task": task,
        "facts": clip.facts,
    }
    return line


def write_lines(lines, out):
    """Writes a manifest under a temporary name and renames it.  Returns the number of lines."""
    temporary, n = out + ".tmp", 0
    try:
        make_folder(os.path.dirname(os.path.abspath(out)))
        with open(temporary, "w", encoding="utf-8") as f:
            for n, line in enumerate(lines, 1):
                f.write(json.dumps(line, ensure_ascii=False) + "\n")
        os.replace(temporary, out)
    except OSError as e:
        raise UserError(f"{out}: cannot be written ({e.strerror})") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    return n


def write_text(text, out):
    """One file under a temporary name, renamed."""
    try:
        with open(out + ".tmp", "w", encoding="utf-8") as f:
            f.write(text)
        os.replace(out + ".tmp", out)
    except OSError as e:
        raise UserError(f"{out}: cannot be written ({e.strerror})") from None


def make_folder(path):
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror})") from None


# ---------------------------------------------------------------------------------------------
# composing


def level(audio, rng, low=-0.8, high=-0.1):
    """The clip at a peak drawn between 10^low and 10^high."""
    return audio / max(np.abs(audio).max(), 1e-3) * 10 ** rng.uniform(low, high)


def write_clip(audio, path):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    soundfile.write(path, audio.clip(-1, 1), SAMPLE_RATE)


def compose(clips, rng, path):
    """Joins the clips with random gaps and levels under a little noise; writes a FLAC at `path`."""
    noise = 10 ** rng.uniform(-4, -2.5)
    silence = lambda low, high: np.zeros(int(rng.uniform(low, high) * SAMPLE_RATE), np.float32)
    parts = [silence(0.0, 0.3)]
    for clip in clips:
        parts += [level(load_audio(clip.path)[0], rng), silence(0.02, 0.4)]
    audio = np.concatenate(parts)
    audio += noise * np.random.default_rng(rng.getrandbits(32)).standard_normal(len(audio), dtype=np.float32)
    write_clip(audio, path)
    return Clip(path, clips[0].dataset + "_strings", {"words": " ".join(c.facts["words"] for c in clips)})


def mix(speech, sound, rng, path, low=-3.0, high=9.0, seconds=8.0):
    """Speech over a sound or an instrument, the speech louder by low..high dB; writes a FLAC at `path`."""
    voice, under = load_audio(speech.path, limit=seconds)[0], load_audio(sound.path, limit=seconds)[0]
    n = max(len(voice) + int(rng.uniform(0.2, 1.5) * SAMPLE_RATE), min(len(under), int(3.5 * SAMPLE_RATE)))
    start = rng.randint(0, n - len(voice))
    under = np.tile(under, -(-n // len(under)))[:n]
    rms = lambda x: float(np.sqrt(np.mean(x**2)) + 1e-5)
    mixed = under * (rms(voice) / rms(under) * 10 ** (-rng.uniform(low, high) / 20))
    mixed[start : start + len(voice)] += voice
    write_clip(level(mixed, rng), path)
    return Clip(path, "mixtures", speech.facts | {"background": sound.facts.get("sound") or sound.facts["instrument"]})


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
            clips.append(Clip(path, "espeak", {"words": word}))
    return clips


ESPEAK_VOICES = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp")
ESPEAK_VARIANTS = ("m1", "m2", "m4", "m5", "m6", "f1", "f3", "f4")


def speak(text, path, voice="en-us", speed=150, pitch=50):
    """text -> WAV by espeak-ng."""
    if not shutil.which("espeak-ng"):
        raise UserError("espeak-ng is not installed: apt install espeak-ng")
    subprocess.run(["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "-w", path, text], check=True)


def by_fact(clips, kind):
    """fact -> clips, so that rare classes can be drawn as often as common ones."""
    groups = defaultdict(list)
    for clip in clips:
        groups[clip.facts[kind]].append(clip)
    return groups


def draw_balanced(clips, kind, n, rng):
    """n clips, every value of the fact equally often (one short of that where n does not divide)."""
    groups = by_fact(clips, kind)
    names = sorted(groups)
    return [rng.choice(groups[names[i % len(names)]]) for i in range(n)] if names else []


def strings(clips, n, most, rng, folder, progress, least=1):
    """n strings of least..most clips, their words drawn uniformly."""
    groups = by_fact(clips, "words")
    names = sorted(groups)
    for i in range(n):
        chosen = [rng.choice(groups[rng.choice(names)]) for _ in range(rng.randint(least, most))]
        yield compose(chosen, rng, os.path.join(folder, f"{i:05}.flac"))
        progress.update()


# ---------------------------------------------------------------------------------------------
# checking manifests


DOMAINS = {"sound": "sound", "instrument": "music", "background": "mixture"}  # task -> domain; all else is speech


def domain_of(entry):
    facts = entry.get("facts") or {}
    return "mixture" if "background" in facts else "sound" if "sound" in facts else "music" if "instrument" in facts else "speech"


def choices_in(question):
    """The options that a question lists, letter -> text; {} when it lists none."""
    found = re.findall(r"^([A-H])\. (.+)$", question, re.MULTILINE)
    return dict(found) if [letter for letter, _ in found] == list(LETTERS[: len(found)]) and len(found) > 1 else {}


def wrong_option(question, answer):
    """What is wrong with a multiple-choice answer, or None: a letter must be listed and stand for its text."""
    choices = choices_in(question)
    if not choices:
        return None
    if len(set(choices.values())) < len(choices):
        return "two options are the same"
    m = re.fullmatch(r"([A-H])[.):]?(?:\s+(.+?))?\.?", answer.strip())
    if m and (m[1] not in choices or (m[2] and m[2].lower() != choices[m[1]].lower())):
        return f"option {m[1]} is not what the answer says"
    if not m and answer.strip().rstrip(".").lower() not in {c.lower() for c in choices.values()}:
        return "the answer is none of the options"
    return None


SPEAKER_MATTERS = ("ravdess", "librispeech", "iemocap", "vctk", "voxceleb1", "vocalsound")  # test speakers must be unheard


def check(paths, decode=False, show=5):
    """Prints what manifests hold, as Table A.1 does, and what is wrong with them.  Returns the number of errors.

    A manifest whose name has "test" or "held_out" in it is for testing: its clips, and its speakers
    where that matters, must be in no other.  Audio is looked at by its header, with decode=True read.
    """
    errors, n_errors = [], 0
    counts, hours, answers, clips = Counter(), Counter(), [], {}
    heard = {True: set(), False: set()}  # for testing or not -> clips
    speakers = {True: set(), False: set()}
    seen, n = set(), 0

    def wrong(where, what):
        nonlocal n_errors
        n_errors += 1
        if len(errors) < show:
            errors.append(f"{where}: {what}")

    for path in paths:
        is_test, folder = any(w in os.path.basename(path) for w in ("test", "held_out")), os.path.dirname(os.path.abspath(path))
        for where, entry in tqdm(read_entries(path), desc=os.path.basename(path), unit=" lines", mininterval=1):
            n += 1
            try:
                e = parse_example(entry, n, where, folder, None, check=False)
            except UserError as error:
                wrong(where, str(error).removeprefix(where + ": "))
                continue
            key = hash((e.audio, e.question, e.answer, e.rejected))
            if key in seen:
                counts["duplicate lines"] += 1
            seen.add(key)
            domain, task = domain_of(entry), e.task or "-"
            counts[domain, e.dataset or "-"] += 1
            counts["task", task] += 1
            if len(answers) < 1_000_000:
                answers.append(len(e.answer.split()))
            if problem := wrong_option(e.question, e.answer):
                wrong(where, problem)
            if e.rejected is not None and e.rejected.strip() == e.answer.strip():
                wrong(where, "the rejected answer is the chosen one")
            if e.audio is not None:
                clip = hash(os.path.realpath(e.audio))
                if clip not in clips:
                    clips[clip] = seconds_of(e.audio)
                    if clips[clip] is None:
                        wrong(where, f"{e.audio}: missing, or not readable as audio")
                    elif decode:
                        try:
                            load_audio(e.audio)
                        except UserError as error:
                            wrong(where, str(error))
                    hours[domain, e.dataset or "-"] += (clips[clip] or 0) / 3600
                heard[is_test].add(clip)
                if clip in heard[not is_test]:
                    wrong(where, f"{e.audio}: is in a test manifest and in another one")
                if e.dataset in SPEAKER_MATTERS and "speaker" in e.facts:
                    speaker = (e.dataset, e.facts["speaker"])
                    speakers[is_test].add(speaker)
                    if speaker in speakers[not is_test] and "held_out" not in path:
                        wrong(where, f"{e.dataset}'s {e.facts['speaker']} speaks in a test manifest and in another one")
    print(f"{'domain':10}{'corpus':26}{'lines':>10}{'hours of clips':>16}")
    for domain in ("sound", "music", "speech", "mixture"):
        rows = sorted(k for k in counts if isinstance(k, tuple) and k[0] == domain)
        for k in rows:
            print(f"{domain:10}{k[1]:26}{counts[k]:>10,}{hours[k]:>16.2f}")
    print(f"{'total':36}{n:>10,}{sum(hours.values()):>16.2f}   {len(clips):,} clips")
    print("tasks: " + ", ".join(f"{k[1]} {v:,}" for k, v in counts.most_common() if k[0] == "task"))
    if answers:
        answers.sort()
        print(f"words in an answer: median {answers[len(answers) // 2]}, 95 % up to {answers[int(len(answers) * 0.95)]}, most {answers[-1]}")
    print(f"duplicate lines: {counts['duplicate lines']:,}")
    for line in errors:
        print(line, file=sys.stderr)
    if n_errors:
        print(f"prepare.py: {n_errors} error{'s' * (n_errors > 1)} in {n} lines" + (f", the first {show} above" if n_errors > show else ""), file=sys.stderr)
    return n_errors


# ---------------------------------------------------------------------------------------------
# a corpus for people with no data at hand


def synthesize(kind, rng):
    """Two seconds or so of a sound or an instrument, different each time -> samples at 16 kHz."""
    n, g = int(rng.uniform(1.5, 2.5) * SAMPLE_RATE), np.random.default_rng(rng.getrandbits(32))
    t, noise = np.arange(n) / SAMPLE_RATE, g.standard_normal(n)
    smooth = lambda x, width: np.convolve(x, np.ones(width) / width, "same")
    hits = lambda every, decay: sum((t >= s) * np.exp(-np.clip(t - s, 0, None) * decay) for s in np.arange(rng.uniform(0, 0.2), t[-1], every))
    f = rng.uniform(0.8, 1.25)
    if kind == "rain":
        return noise - smooth(noise, 3)
    if kind == "sea waves":
        return smooth(noise, 12) * (1 + 0.9 * np.sin(2 * np.pi * 0.5 * f * t + rng.uniform(0, 6)))
    if kind == "clock tick":
        return hits(0.5, 300) * np.sin(2 * np.pi * 2000 * f * t) + 0.005 * noise
    if kind == "helicopter":
        return hits(0.08 * f, 40) * smooth(noise, 20)
    if kind == "siren":
        return np.sin(2 * np.pi * np.cumsum(700 * f + 300 * np.sin(2 * np.pi * 1.2 * t)) / SAMPLE_RATE)
    if kind == "bell":
        return sum(np.exp(-t * d) * np.sin(2 * np.pi * 440 * f * r * t) for r, d in ((1, 1.5), (2.76, 3), (5.4, 5)))
    if kind == "guitar":  # Karplus-Strong
        period = int(SAMPLE_RATE / (130 * f))
        string, out = list(g.uniform(-1, 1, period)), np.zeros(n)
        for i in range(n):
            out[i] = string[i % period]
            string[i % period] = 0.498 * (string[i % period] + string[(i + 1) % period])
        return out
    if kind == "bass drum":
        return hits(0.45, 12) * np.sin(2 * np.pi * 60 * f * t)
    if kind == "theremin":
        return np.sin(2 * np.pi * np.cumsum(500 * f * (1 + 0.03 * np.sin(2 * np.pi * 6 * t))) / SAMPLE_RATE)
    raise ValueError(kind)


TOY_SOUNDS, TOY_INSTRUMENTS = ("clock tick", "helicopter", "rain", "sea waves", "siren"), ("bass drum", "bell", "guitar", "theremin")
TOY_WORDS = "bird cat dog happy house left right stop tree yes".split()


def toy(out, each, seed=0):
    """A small corpus of espeak-ng's speech and synthesised sound, named as the real ones: OUT/fsdd, speech_commands, esc10, berklee."""
    rng = random.Random(seed)
    shapes = [("fsdd", f"recordings/{d}_{{voice}}_{{i}}.wav", word) for d, word in enumerate(DIGITS)]
    shapes += [("speech_commands", f"{word}/{{hash}}_nohash_{{i}}.wav", word) for word in TOY_WORDS]
    total = each * (len(shapes) + len(TOY_SOUNDS) + len(TOY_INSTRUMENTS))
    with tqdm(total=total, desc="toy", unit=" clips") as progress:
        for corpus, name, word in shapes:
            for i in range(each):
                voice = rng.choice(ESPEAK_VOICES) + "+" + rng.choice(ESPEAK_VARIANTS)
                spoken = name.format(voice=re.sub(r"[^a-z]", "", voice), i=i, hash=f"{rng.getrandbits(32):08x}")
                path = os.path.join(out, corpus, spoken)
                make_folder(os.path.dirname(path))
                speak(word, path, voice, speed=rng.randint(110, 190), pitch=rng.randint(25, 75))
                progress.update()
        for n, kind in enumerate(TOY_SOUNDS + TOY_INSTRUMENTS, 1):
            for i in range(each):
                folder = f"esc10/{n:03} - {capital(kind)}/{i % 5 + 1}-{n}{i:03}-A.wav" if kind in TOY_SOUNDS else f"berklee/{kind.replace(' ', '')}_{i}.wav"
                write_clip(level(synthesize(kind, rng), rng).astype(np.float32), os.path.join(out, folder))
                progress.update()


# ---------------------------------------------------------------------------------------------
# a held-out benchmark in the benchmarks' own formats


def benchmark(clips, pools, n, rng, out):
    """Multiple-choice questions about held-out clips, written as MMSU's and MMAU's question files.

    Speech with four options goes to OUT/mmsu.jsonl, semantic (digit, word, count, order) and
    paralinguistic (emotion); sound, music, mixtures and questions with two options (sex, intensity) to
    OUT/mmau.json; every task equally often.  Audio paths are relative to OUT.
    """
    by_task = defaultdict(list)
    for clip in clips:
        for task, fact in askable(clip, CHOICE_TASKS):
            if len(pools[task]) > 1:
                by_task[task].append((clip, fact))
    mmsu, mmau, tasks = [], [], sorted(by_task)
    for i in range(n if tasks else 0):
        task = tasks[i % len(tasks)]
        clip, fact = rng.choice(by_task[task])
        question, choices, right = multiple_choice(task, fact, pools[task], 4, rng)
        path = os.path.relpath(clip.path, out)
        if task in DOMAINS or len(choices) != 4:  # MMSU always has four
            domain = DOMAINS.get(task, "speech")
            mmau.append({"id": f"q{i:04}", "audio_id": path, "question": question, "choices": choices, "answer": choices[right],
                         "task": domain, "difficulty": "medium", "sub-category": task, "dataset": clip.dataset})  # fmt: skip
        else:
            paralinguistic = task in ("emotion", "intensity", "sex")
            mmsu.append({"id": f"q{i:04}", "audio_path": path, "question": question, **dict(zip(("choice_a", "choice_b", "choice_c", "choice_d"), choices)),
                         "answer_gt": choices[right], "task_name": task, "category": "Reasoning" if task == "count" else "Perception",
                         "sub-category": "Paralinguistics" if paralinguistic else "Linguistics", "sub-sub-category": "Paralinguistics" if paralinguistic else "Semantics"})  # fmt: skip
    write_lines(mmsu, os.path.join(out, "mmsu.jsonl"))
    write_text(json.dumps(mmau, indent=1, ensure_ascii=False), os.path.join(out, "mmau.json"))
    return len(mmsu), len(mmau)


# ---------------------------------------------------------------------------------------------
# the small model's tokenizer and manifests


def train_tokenizer(lines, vocab=768):
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
    texts = [text for line in lines for text in (prompt_text(line["messages"][0]["content"].replace("<audio>", "")), line["messages"][1]["content"])]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


TOUR = ("fsdd", "speech_commands", "esc10", "ravdess", "librispeech", "berklee", "sonicpi")
BALANCE = {  # fact -> lines a manifest of 24,000 asks about it: every value of it equally often
    "digit": 3500, "word": 4500, "sound": 3500, "instrument": 2500, "emotion": 3000, "sex": 1500,
}  # fmt: skip


def tour(audio, out, seed=0, n_strings=4000):
    """All manifests of the small model from a folder that holds the corpora of TOUR, or some of them.

    Stage 1 reads what is said, stages 2 and 3 ask about it, stage 3 by multiple choice too, stage 4 has
    preference pairs; stage 0 has something of all, for it stands in for a language model that has read
    everything.  held_out.jsonl asks about one clip in fifty of the training split, for the loss curves;
    test.jsonl holds the test split, a question a clip.  No clip of these two is in any other manifest,
    string or mixture.
    """
    rng, scale = random.Random(seed), n_strings / 4000
    have = [name for name in TOUR if os.path.isdir(os.path.join(audio, name))]
    if not have:
        raise UserError(f"{audio}: holds none of the folders {', '.join(TOUR)}")
    clips = [clip for name in have for clip in read_corpus(name, os.path.join(audio, name))]
    held_out = {c.path for c in rng.sample([c for c in clips if not c.is_test], max(1, sum(not c.is_test for c in clips) // 50))}
    folder, here = os.path.join(out, "clips"), os.path.join(out, "manifest")  # audio paths are relative to the manifests' folder
    pools, test = {}, []
    words = sorted({c.facts["words"] for c in clips if "words" in c.facts and " " not in c.facts["words"]})
    with tqdm(total=int(n_strings * 2.125), desc="composing", unit=" clips") as progress:
        for split in ("train", "test"):
            part = [c for c in clips if c.is_test == (split == "test") and c.path not in held_out]
            digits, spoken = [c for c in part if c.dataset == "fsdd"], [c for c in part if c.dataset == "speech_commands"]
            noises = [c for c in part if "sound" in c.facts]
            voices = espeak(words, max(1, int(12 * scale)), rng, f"{folder}/espeak") if split == "train" else []
            n = n_strings if split == "train" else int(200 * scale) + 1
            made = {"digits": [], "words": [], "mixtures": []}
            if digits:
                made["digits"] = list(strings(digits, n, 5, rng, f"{folder}/{split}_digits", progress))
            if spoken + voices:
                made["words"] = list(strings(spoken + voices, n // 2 + 1, 3, rng, f"{folder}/{split}_words", progress, 2))
            if noises and (talk := digits + spoken + [c for c in part if c.dataset in ("ravdess", "librispeech")]):
                for i, sound in enumerate(draw_balanced(noises, "sound", n // 2 + 1 if split == "train" else n, rng)):
                    made["mixtures"].append(mix(rng.choice(talk), sound, rng, f"{folder}/{split}_mixtures/{i:05}.flac"))
                    progress.update()
            pools[split] = (part + voices, made)

    train, made = pools["train"]
    known = defaultdict(list)
    for clip in train:
        for kind, fact in derived(clip.facts).items():
            known[kind].append(Clip(clip.path, clip.dataset, clip.facts | {kind: fact}))
    labels = defaultdict(set)  # task -> what may stand among its choices
    for clip in [*train, *made["digits"], *made["mixtures"]]:
        for task, fact in askable(clip, CHOICE_TASKS):
            labels[task].add(fact)
    originals = {c.path: c for c in train}

    def singles(share):
        """Lines about single clips, the value of every fact equally often."""
        for kind, n in BALANCE.items():
            for clip in draw_balanced(known[kind], kind, int(n * share * scale), rng):
                yield originals[clip.path], kind

    def about(pairs, tasks=None):
        """A question that turns on the fact the clip was drawn for, half the time; else any it allows."""
        for clip, kind in pairs:
            chosen = [t for t, row in TASKS.items() if row.kind == kind]
            line = question_line(clip, rng, here, chosen if tasks is None and rng.random() < 0.5 else tasks)
            if line:
                yield line

    everything = [*made["digits"], *made["words"], *made["mixtures"]]
    choices = lambda pairs: filter(None, (choice_line(clip, rng, here, labels) for clip, _ in pairs))
    paired = [(c, None) for c in everything]
    stages = {
        0: [*ask(train, rng, here), *ask(everything, rng, here), *about(singles(1)), *choices(singles(0.4)), *choices(paired[::3])],
        1: [*ask(everything, rng, here, ["asr"]), *about(singles(0.4), ["asr"])],
        2: [*ask(everything, rng, here, repeat=2), *about(singles(1))],
        3: [*ask(everything, rng, here), *about(singles(0.6)), *choices(singles(1)), *choices(paired)],
        4: list(filter(None, (preference_line(clip, rng, here, labels) for clip, _ in [*singles(0.12), *rng.sample(paired, len(paired) // 8)]))),
    }
    for stage, lines in stages.items():
        rng.shuffle(lines)
        print(f"{out}/stage{stage}.jsonl: {write_lines(lines, f'{out}/stage{stage}.jsonl')} lines")
    lines = [question_line(c, rng, here, sentences=0) for c in clips if c.path in held_out]
    print(f"{out}/held_out.jsonl: {write_lines(filter(None, lines), f'{out}/held_out.jsonl')} lines")
    test, composed = pools["test"]
    one = {"fsdd": ["digit"], "speech_commands": ["word"], "esc10": ["sound"], "ravdess": ["emotion", "sex"], "librispeech": ["sex"],
           "berklee": ["instrument"], "sonicpi": ["instrument"]}  # fmt: skip
    lines = [question_line(c, rng, here, [task], 0) for c in test for task in one[c.dataset] if askable(c, [task])]
    lines += [question_line(c, rng, here, [task], 0) for task, kind in (("asr", "digits"), ("asr", "words"), ("background", "mixtures")) for c in composed[kind]]
    print(f"{out}/test.jsonl: {write_lines(lines, f'{out}/test.jsonl')} lines")
    found = benchmark([*test, *composed["digits"], *composed["mixtures"]], labels, max(40, int(720 * scale)), rng, out)
    print(f"{out}/mmsu.jsonl: {found[0]} questions; {out}/mmau.json: {found[1]} questions")
    tokenizer = train_tokenizer([line for lines in stages.values() for line in lines])
    tokenizer.save(f"{out}/tokenizer.json")
    print(f"{out}/tokenizer.json: {tokenizer.get_vocab_size()} entries")


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
    p.add_argument("--strings", type=int, default=4000, help="composed digit strings; all else in proportion (default 4000)")
    p = commands.add_parser("toy", help="a small corpus of synthetic speech and sound, and all manifests from it (needs espeak-ng)")
    p.add_argument("--out", default="toy", help="clips go to OUT/audio, manifests to OUT (default toy)")
    p.add_argument("--each", type=int, default=24, help="clips of every word and sound (default 24)")
    p.add_argument("--seed", type=int, default=0)
    p = commands.add_parser("check", help="what manifests hold, and what is wrong with them")
    p.add_argument("manifests", nargs="+")
    p.add_argument("--decode", action="store_true", help="read every clip, not its header alone")
    p.add_argument("--errors", type=int, default=5, help="how many errors to print (default 5)")
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
        elif args.command == "toy":
            make_folder(args.out)
            toy(os.path.join(args.out, "audio"), args.each, args.seed)
            tour(os.path.join(args.out, "audio"), args.out, args.seed, n_strings=20 * args.each)
        elif args.command == "check":
            return 2 if check(args.manifests, args.decode, args.errors) else 0
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
