"""Corpora on disk -> manifests that train.py reads.

    python prepare.py tour --audio DIR --out data     all manifests of the small model, and its tokenizer
    python prepare.py fsdd DIR --out fsdd.jsonl       one corpus, plain questions
    python prepare.py toy                             a synthetic corpus for people with no data, and its manifests
    python prepare.py join a.jsonl b.jsonl:0.05 --out data/stage2.jsonl     one shuffled manifest out of several
    python prepare.py check data/*.jsonl              what manifests hold, and what is wrong with them
    python prepare.py show data/stage2.jsonl -n 5     examples as the model sees them

A corpus is a row of CORPORA: what its files are called, which facts their names tell, which of
them are for testing.  A question is a row of TASKS: the fact it asks about, wordings, short and
full answers.  Everything else is shared: composed strings, mixtures, multiple choice, writing.
The same seed writes the same bytes.
"""

import argparse
import contextlib
import csv
import difflib
import functools
import glob
import hashlib
import http.client
import itertools
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from array import array
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Callable

import numpy as np
import soundfile
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from data import (
    ASR_QUESTION, BEFORE_AUDIO, LETTERS, SAMPLE_RATE, SYSTEM, build_prompt, capital, encode_text, lay_under, lettered, load_audio, loop, louder, loudest,
    mmau_prompt, mmsu_prompt, parse_example, prompt_text, read_entries, read_manifest,
)  # fmt: skip
from model import PRESETS, SPECIAL_TOKENS, Parser, UserError, load_tokenizer

DIGITS = "zero one two three four five six seven eight nine".split()


# ---------------------------------------------------------------------------------------------
# reading corpora


@dataclass(frozen=True)
class Clip:
    """One recording and what is known of it: facts, by kind.

    Kinds: words (what is said), sound (environmental), instrument (or object), emotion, intensity,
    sex, speaker, accent, nationality, genre, caption, speed, background (the sound under speech), music
    (under both), louder (voice or background), first_sound, last_sound, sound_count (of several in a row).
    """

    path: str
    dataset: str
    facts: dict = field(default_factory=dict)
    is_test: bool = False
    offset: float = 0.0  # seconds into the file
    duration: float | None = None  # seconds; None: to the end
    qa: tuple = ()  # (question, answer) pairs that the corpus itself asks


@dataclass(frozen=True)
class Corpus:
    """How to read a corpus: `name` matches a clip's path relative to the corpus' folder."""

    licence: str
    name: str  # regular expression; its groups go to `facts` and `is_test`
    facts: Callable  # (groups, side) -> {kind: value}
    is_test: Callable  # (groups, last) -> bool; last: the clip is its folder's last by name
    side: Callable = lambda folder: None  # folder -> what `facts` needs beside the name


def transcripts_and_sexes(folder):
    """LibriSpeech's side files -> ({utterance: words}, {speaker: sex}): *.trans.txt and SPEAKERS.TXT."""
    words, sexes = {}, {}
    for path in glob.glob(os.path.join(glob.escape(folder), "**", "*.trans.txt"), recursive=True):
        with open(path, encoding="utf-8") as f:
            words |= {key: text.strip().lower() for key, _, text in (line.partition(" ") for line in f)}
    for path in glob.glob(os.path.join(glob.escape(folder), "**", "SPEAKERS.TXT"), recursive=True):
        with open(path, encoding="utf-8") as f:
            rows = (line.split("|") for line in f if not line.startswith(";") and "|" in line)
            sexes |= {row[0].strip(): {"F": "female", "M": "male"}[row[1].strip()] for row in rows}
    return words, sexes


def vctk_side(folder):
    """VCTK's side files -> ({utterance: words}, {speaker: (sex, accent)})."""
    words = {}
    for path in glob.glob(os.path.join(glob.escape(folder), "**", "txt", "*", "*.txt"), recursive=True):
        with open(path, encoding="utf-8") as f:
            words[os.path.basename(path)[:-4]] = f.read().strip()
    speakers = {}
    for path in glob.glob(os.path.join(glob.escape(folder), "**", "speaker-info.txt"), recursive=True):
        with open(path, encoding="utf-8") as f:
            for _, (speaker, _, sex, accent, *_) in enumerate(row for row in map(str.split, f) if len(row) > 3 and row[0] != "ID"):
                speakers["p" + speaker.removeprefix("p")] = ({"F": "female", "M": "male"}[sex], accent)
    return words, speakers


def voxceleb_side(folder):
    """vox1_meta.csv (tabs) -> {speaker: row}."""
    found = {}
    for path in glob.glob(os.path.join(glob.escape(folder), "**", "vox1_meta.csv"), recursive=True):
        with open(path, encoding="utf-8", newline="") as f:
            found |= {row["VoxCeleb1 ID"]: row for row in csv.DictReader(f, delimiter="\t")}
    return found


def iemocap_side(folder):
    """EmoEvaluation's and transcriptions' lines -> ({utterance: emotion}, {utterance: words})."""
    emotions, words = {}, {}
    for path in glob.glob(os.path.join(glob.escape(folder), "**", "EmoEvaluation", "*.txt"), recursive=True):
        with open(path, encoding="utf-8") as f:
            emotions |= {m[1]: IEMOCAP[m[2]] for m in (re.match(r"\[[\d. -]+\]\s+(\S+)\s+([a-z]{3})\s", line) for line in f) if m and m[2] in IEMOCAP}
    for path in glob.glob(os.path.join(glob.escape(folder), "**", "transcriptions", "*.txt"), recursive=True):
        with open(path, encoding="utf-8") as f:
            words |= {m[1]: m[2].strip() for m in (re.match(r"(\S+) \[[\d. -]+\]: (.+)", line) for line in f) if m}
    return emotions, words


def some(**facts):
    """The facts that are known."""
    return {k: v for k, v in facts.items() if v}


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
        r"(.*/)?(?P<utterance>(?P<speaker>\d+)-\d+-\d+)\.\w+$",
        lambda g, side: some(speaker=g["speaker"], words=side[0].get(g["utterance"]), sex=side[1].get(g["speaker"])),
        lambda g, last: g["speaker"].endswith("0"),
        transcripts_and_sexes,
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
CORPORA |= {  # read by their names as well, but never seen here: tested on miniature trees only
    "esc50": Corpus(
        "CC BY-NC 3.0",
        r"(.*/)?(?P<file>(?P<fold>\d)-\d+-[A-Z]-\d+)\.\w+$",
        lambda g, side: some(sound=side.get(g["file"])),
        lambda g, last: g["fold"] == "5",
        lambda folder: {last_of(r["filename"]): r["category"].replace("_", " ") for p in find(folder, "esc50.csv") for r in rows_of(p)},
    ),
    "vctk": Corpus(
        "CC BY 4.0",
        r"(.*/)?(?P<utterance>(?P<speaker>[ps]\d+)_\d+)(_mic\d)?\.\w+$",
        lambda g, side: some(speaker=g["speaker"], words=side[0].get(g["utterance"]), **dict(zip(("sex", "accent"), side[1].get(g["speaker"], ())))),
        lambda g, last: g["speaker"].endswith("0"),
        vctk_side,
    ),
    "voxceleb1": Corpus(
        "CC BY 4.0 (audio: YouTube's)",
        r"(.*/)?(?P<speaker>id1\d{4})/[^/]+/\d+\.\w+$",
        lambda g, side: some(speaker=g["speaker"], sex=sex_of(side.get(g["speaker"], {}).get("Gender")), nationality=side.get(g["speaker"], {}).get("Nationality")),
        lambda g, last: "id10270" <= g["speaker"] <= "id10309",
        voxceleb_side,
    ),
    "emov_db": Corpus(
        "research",
        r"(.*/)?(?P<speaker>bea|jenie|josh|sam)[_/](?P<emotion>[A-Za-z]+)/.+\.\w+$",
        lambda g, side: {"speaker": g["speaker"], "emotion": g["emotion"].lower(), "sex": "female" if g["speaker"] in ("bea", "jenie") else "male"},
        lambda g, last: last,
    ),
    "iemocap": Corpus(
        "IEMOCAP release form (research)",
        r"(.*/)?(?P<utterance>Ses0(?P<session>\d)\w+_(?P<sex>[FM])\d+)\.\w+$",
        lambda g, side: some(emotion=side[0].get(g["utterance"]), words=side[1].get(g["utterance"]), sex=sex_of(g["sex"]), speaker=f"session {g['session']} {g['sex']}"),
        lambda g, last: g["session"] == "5",
        iemocap_side,
    ),
    "accentdb": Corpus(
        "CC BY-NC 4.0",
        r"(.*/)?(?P<accent>[a-z_]+)/(?P<speaker>speaker_\d+)/.+\.\w+$",
        lambda g, side: {"accent": capital(g["accent"].replace("_", " ")), "speaker": f"{g['accent']} {g['speaker'][8:]}"},
        lambda g, last: last,
    ),
    "vocalsound": Corpus(
        "CC BY-SA 4.0",
        r"(.*/)?(?P<speaker>(?P<sex>[fm])\d{4})_\d_(?P<label>[a-z]+)\.\w+$",
        lambda g, side: {"sound": g["label"].replace("throatclearing", "throat clearing"), "sex": sex_of(g["sex"]), "speaker": g["speaker"]},
        lambda g, last: g["speaker"].endswith("0"),
    ),
}
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".opus", ".m4a")


def audio_files(folder):
    """Every recording in a folder and those below it, in order."""
    return sorted(p for p in glob.glob(os.path.join(glob.escape(folder), "**", "*.*"), recursive=True) if p.lower().endswith(AUDIO_SUFFIXES))


def find(folder, name):
    return sorted(glob.glob(os.path.join(glob.escape(folder), "**", name), recursive=True))


def read_corpus(name, folder):
    """All clips of a corpus in order of their paths.  Raises UserError when there is none."""
    if name not in CORPORA:
        raise UserError(f"unknown corpus {name!r}; known: {', '.join(CORPORA)}")
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder")
    if isinstance(CORPORA[name], Table):
        return read_table(name, folder)
    row, side = CORPORA[name], CORPORA[name].side(folder)
    found = [(p, m) for p in audio_files(folder) if (m := re.match(row.name, os.path.relpath(p, folder).replace(os.sep, "/")))]
    if not found:
        raise UserError(f"{folder}: no file here is named like {name}'s: {row.name}")
    last = {os.path.dirname(p): p for p, _ in found}
    return [Clip(p, name, row.facts(m, side), bool(row.is_test(m, last[os.path.dirname(p)] == p))) for p, m in found]


# ---------------------------------------------------------------------------------------------
# corpora that come with a table: CSV, TSV, JSON, JSONL


@dataclass(frozen=True)
class Table:
    """How to read a corpus whose facts stand in tables: a row there is a clip here.

    Clips that a table lists and the disk does not hold (many corpora are downloaded in part) are
    left out and counted.
    """

    licence: str
    files: str  # glob of the tables, relative to the corpus' folder
    stem: Callable  # row -> the clip's path without suffix, or its last part
    facts: Callable  # row -> {kind: value}; empty values are dropped
    is_test: Callable = lambda row, table: "test" in table or "eval" in table  # (row, table's file name)
    rows: Callable = None  # table's path -> dicts, where it is no plain table
    qa: Callable = lambda row: ()  # row -> (question, answer) pairs that the corpus itself asks
    span: Callable = lambda row: (0.0, None)  # row -> offset, duration in seconds


def rows_of(path):
    """A CSV, TSV, JSON (list, {"data": list} or {id: row}) or JSONL table as dicts."""
    with open(path, encoding="utf-8-sig", newline="") as f:
        if path.endswith(".jsonl"):
            return [json.loads(line) for line in f if line.strip()]
        if path.endswith(".json"):
            found = json.load(f)
            found = found.get("data", found.get("Data", found)) if isinstance(found, dict) else found
            return found if isinstance(found, list) else [row | {"id": key} for key, row in found.items()]
        return list(csv.DictReader(f, delimiter="\t" if path.endswith((".tsv", ".txt")) else ","))


def rows_of_gigaspeech(path):
    """GigaSpeech.json: recordings, each with its segments."""
    with open(path, encoding="utf-8") as f:
        for audio in json.load(f)["audios"]:
            for segment in audio["segments"]:
                yield segment | {"path": audio["path"]}


def without_tags(text):
    """GigaSpeech writes punctuation and noises as tags."""
    for tag, sign in (("COMMA", ","), ("PERIOD", "."), ("QUESTIONMARK", "?"), ("EXCLAMATIONPOINT", "!")):
        text = text.replace(f" <{tag}>", sign)
    return "" if re.search(r"<(SIL|MUSIC|NOISE|OTHER)>", text) else text.lower()


def rows_of_fma(path):
    """tracks.csv: a header of two lines, then the name of the index."""
    with open(path, encoding="utf-8", newline="") as f:
        table = csv.reader(f)
        header = ["/".join(pair) for pair in zip(next(table), next(table))]
        next(table)
        return [dict(zip(["id", *header[1:]], row)) for row in table]


def rows_of_tacos(path):
    """annotations_strong.csv, and beside it a list of the recordings that are for testing."""
    split = os.path.join(os.path.dirname(path), "test_split.csv")
    test = {value for row in (rows_of(split) if os.path.exists(split) else ()) for value in row.values()}
    return [row | {"is_test": row["filename"] in test} for row in rows_of(path)]


CAPTION = lambda *columns: lambda row: {"caption": next((row[c] for c in columns if row.get(c)), "")}
SEX = {"m": "male", "f": "female", "male": "male", "female": "female"}
sex_of = lambda text: SEX.get(str(text).strip().lower(), "")
last_of = lambda path: os.path.splitext(os.path.basename(str(path)))[0]
IEMOCAP = dict(zip("ang hap exc sad neu fru fea sur dis".split(), "angry happy excited sad neutral frustrated fearful surprised disgusted".split()))
MELD = dict(zip("anger disgust fear joy neutral sadness surprise".split(), "angry disgusted fearful happy neutral sad surprised".split()))

CORPORA |= {
    "gigaspeech": Table(
        "Apache-2.0 (audio: its owners')", "GigaSpeech.json", lambda r: os.path.splitext(r["path"])[0], lambda r: {"words": without_tags(r["text_tn"])},
        lambda r, t: bool({"{DEV}", "{TEST}"} & set(r.get("subsets", ()))), rows_of_gigaspeech,
        span=lambda r: (float(r["begin_time"]), float(r["end_time"]) - float(r["begin_time"])),
    ),
    "meld": Table(
        "GPL-3.0", "*_sent_emo.csv", lambda r: f"dia{r['Dialogue_ID']}_utt{r['Utterance_ID']}",
        lambda r: {"words": r["Utterance"], "emotion": MELD.get(r["Emotion"], ""), "speaker": r["Speaker"]}, lambda r, t: t.startswith(("test", "dev")),
    ),
    "meta_fair_asr": Table(
        "Fair-speech licence (research)", "*.tsv", lambda r: r["hash_name"], lambda r: {"words": r["transcription"].lower(), "sex": sex_of(r["gender"])}, lambda r, t: False,
    ),
    "paraspeechcaps": Table(
        "CC BY-NC-SA 4.0", "*.jsonl", lambda r: os.path.splitext(r["relative_audio_path"])[0],
        lambda r: {"words": r.get("transcription", ""), "sex": sex_of(r.get("gender")), "accent": r.get("accent") or "",
                   "caption": (r["text_description"] if isinstance(r["text_description"], str) else r["text_description"][0])},
        lambda r, t: t.startswith(("holdout", "dev")),
    ),
    "speechcraft": Table("research", "*.jsonl", lambda r: os.path.splitext(r["audio_path"])[0], CAPTION("caption", "description")),
    "compa_r": Table("CC BY-NC 4.0", "*.json", lambda r: last_of(r["audio_id"]), lambda r: {}, qa=lambda r: [(r["instruction"], r["output"])]),
    "opens2s": Table("Apache-2.0", "*.jsonl", lambda r: last_of(r["audio"]), lambda r: {"emotion": r.get("emotion") or ""}, qa=lambda r: [(IN_KIND["empathetic"][0], r["response"])]),
    "nsynth": Table("CC BY 4.0", "**/examples.json", lambda r: r["id"], lambda r: {"instrument": r["instrument_family_str"].replace("_", " ")}, lambda r, t: "test" in t or "valid" in t),
    "fma_medium": Table(
        "CC BY 4.0 (audio: each track's)", "**/tracks.csv", lambda r: f"{int(r['id']):06}", lambda r: {"genre": r["track/genre_top"].lower()}, lambda r, t: r["set/split"] != "training", rows_of_fma,
    ),
    "lp_musiccaps_mtt": Table("MIT", "*.jsonl", lambda r: last_of(r["path"]), CAPTION("caption_writing", "caption_summary")),
    "musiccaps": Table("CC BY-SA 4.0", "*.csv", lambda r: r["ytid"], CAPTION("caption"), lambda r, t: r.get("is_audioset_eval") == "True"),
    "audiocaps": Table("MIT (audio: YouTube's)", "*.csv", lambda r: r["youtube_id"], CAPTION("caption"), lambda r, t: t.startswith(("test", "val"))),
    "clotho": Table("non-commercial", "clotho_captions_*.csv", lambda r: last_of(r["file_name"]), CAPTION("caption_1"), lambda r, t: "development" not in t),
    "wavcaps": Table("CC BY 4.0 (academic)", "**/*.json", lambda r: last_of(r["id"]) if str(r["id"]).endswith((".wav", ".flac")) else str(r["id"]), CAPTION("caption")),
    "tacos": Table(
        "CC BY 4.0", "annotations_strong.csv", lambda r: last_of(r["filename"]), CAPTION("text"), lambda r, t: r["is_test"], rows_of_tacos, span=lambda r: (float(r["onset"]), float(r["offset"]) - float(r["onset"])),
    ),
    "audiomcq": Table(
        "Apache-2.0", "*.jsonl", lambda r: os.path.splitext(r["audio_path"])[0], lambda r: {},
        qa=lambda r: [(f"{r['question']}\n{lettered(r['choices'])}", f"{LETTERS[r['choices'].index(r['answer'])]}. {r['answer']}")],
    ),
}  # fmt: skip


def read_table(name, folder):
    """All clips of a corpus that comes with tables, in the tables' order."""
    row_of, clips, missing = CORPORA[name], [], 0
    tables = sorted(glob.glob(os.path.join(glob.escape(folder), row_of.files), recursive=True))
    if not tables:
        raise UserError(f"{folder}: {name} has a table {row_of.files} there; none was found")
    by_path, by_name = {}, defaultdict(list)
    for path in audio_files(folder):
        stem = os.path.splitext(os.path.relpath(path, folder).replace(os.sep, "/"))[0]
        by_path[stem] = path
        by_name[stem.rsplit("/", 1)[-1]].append(path)
    for table in tables:
        relative = os.path.relpath(table, folder).replace(os.sep, "/")
        try:
            for row in (row_of.rows or rows_of)(table):
                stem = row_of.stem(row)
                # one name in several splits: the one in the folder that is named like the table
                same = sorted(by_name[stem.rsplit("/", 1)[-1]], key=lambda p: relative.split("_")[0].split("/")[0] not in os.path.relpath(p, folder))
                path = by_path.get(stem) or next(iter(same), None)
                if path is None:
                    missing += 1
                    continue
                facts = {k: v for k, v in row_of.facts(row).items() if v}
                clips.append(Clip(path, name, facts, bool(row_of.is_test(row, relative)), *row_of.span(row), tuple(row_of.qa(row))))
        except (KeyError, ValueError, TypeError, AttributeError, IndexError) as e:
            raise UserError(f"{table}: not one of {name}'s tables as published ({type(e).__name__}: {e})") from None
    if missing:
        print(f"{name}: {missing} clips that its tables list are not there", file=sys.stderr)
    if not clips:
        raise UserError(f"{folder}: none of the clips that {name}'s tables list is there")
    return clips


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
    "nationality": Task("nationality", ("Which nationality is the speaker likely to have?", "Where does the speaker come from?"), ("The speaker comes from {}.",)),
    "genre": Task("genre", ("What genre of music is this?", "Which genre is the music?", "Name the musical genre."), ("The music is {}.",)),
    "caption": Task("caption", ("Describe the recording.", "Describe the audio in a sentence.", "What is going on in this clip?", "Summarise what can be heard."), labels=False),
    "background": Task("background", (
        "What sound is in the background?", "What do you hear behind the speech?", "Which sound is under the voice?",
        "What is the background noise?", "Beside the voice, what can be heard?",
    ), ("In the background there is {}.",)),
    "music": Task("music", ("Which instrument or object plays under it?", "What music is behind the voice?", "What else is played in the background?"), ("Behind it there is {}.",)),
    "louder": Task("louder", ("Which is louder, the voice or the background?", "Is the voice or the background louder?", "What is louder, speech or background?")),
    "speed": Task("speed", ("Does the speaker talk slowly or fast?", "How fast is the speech?", "Is the speech slow or fast?"), ("The speech is {}.",)),
    "first_sound": Task("first_sound", ("Which sound comes first?", "What is heard first?", "What is the first sound?"), ("First there is {}.",)),
    "last_sound": Task("last_sound", ("Which sound comes last?", "What is heard last?", "What is the last sound?"), ("At the end there is {}.",)),
    "sound_count": Task("sound_count", ("How many sounds follow each other?", "How many different sounds are there?", "Count the sounds."), ("There are {} sounds.",)),
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


def derived(facts):
    """A clip's facts and what follows from them: digit, word, first, last, count, layer, any."""
    facts = dict(facts)
    words = facts.get("words", "").split()
    if facts.keys() & {"sound", "instrument", "first_sound"}:
        facts["layer"] = "a sound"
    elif words or "speaker" in facts:
        facts["layer"] = "speech"
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
    if task in ("asr", "caption"):
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
    style, n = rng.choice(("mmsu", "mmsu", "mmau", "mmau", "letter", "both", "both", "text", "text")), rng.choice((2, 3, 4, 4, 4, 4, 5, 6, 8))
    question, choices, right = multiple_choice(task, fact, pools[task], 4 if style == "mmsu" else n, rng)
    letter, text, listed = LETTERS[right] + ".", choices[right] + ".", lettered(choices)
    # letter and text where the question leaves it open: a masked-diffusion model can fill in the text first and its letter after it
    if style == "mmsu":
        question, answer = mmsu_prompt(question, choices), f"{letter} {text}"
    elif style == "mmau":
        question, answer = mmau_prompt(question, choices), f"{letter} {text}"
    elif style == "letter":
        question, answer = f"{question}\n{listed}\nAnswer with the letter.", letter
    elif style == "both":
        question, answer = f"{question}\n{listed}\nAnswer with the letter and its text.", f"{letter} {text}"
    else:
        question, answer = f"{question}\n{listed}", text
    return line_of(clip, task + "_choice", question, answer, out)


# ---------------------------------------------------------------------------------------------
# writing


def ask(clips, rng, out, tasks=None, repeat=1):
    """`repeat` manifest lines for each clip, their tasks drawn from those in `tasks` that the clip allows."""
    for clip in clips:
        for question, answer in clip.qa:
            yield line_of(clip, "qa", question, answer, out)
        for _ in range(repeat):
            if line := question_line(clip, rng, out, tasks):
                yield line


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
        "duration": clip.duration or seconds_of(clip.path),
        "dataset": clip.dataset,
        "task": task,
        "facts": clip.facts,
    }
    return line | ({"offset": clip.offset} if clip.offset else {})


def write_lines(lines, out, rng=None):
    """Writes a manifest under a temporary name and renames it.  Returns the number of lines.

    rng: shuffles the lines on the disk; only their places are held in memory.
    """
    temporary, shuffled, starts = out + ".tmp", out + ".shuffled.tmp", array("Q")
    try:
        make_folder(os.path.dirname(os.path.abspath(out)))
        with open(temporary, "wb") as f:
            for line in lines:
                starts.append(f.tell())
                f.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        if rng is not None:
            rng.shuffle(starts)
            with open(temporary, "rb") as source, open(shuffled, "wb") as f:
                for start in starts:
                    source.seek(start)
                    f.write(source.readline())
            os.replace(shuffled, temporary)
        os.replace(temporary, out)
    except OSError as e:
        raise UserError(f"{out}: cannot be written ({e.strerror})") from None
    finally:
        for path in (temporary, shuffled):
            if os.path.exists(path):
                os.remove(path)
    return len(starts)


def join(parts, out, seed=0):
    """One shuffled manifest out of several, audio paths rewritten.  parts: "FILE" or "FILE:SHARE", the share of its lines to draw.

    A stage's manifest from what the corpora, speak and a language model gave; `asr.jsonl:0.05` is the
    paper's twentieth of stage 1 in stages 2 and 3.  Returns the number of lines.
    """
    rng, folder, wanted = random.Random(seed), os.path.dirname(os.path.abspath(out)), []
    for part in parts:
        path, _, share = part.rpartition(":") if re.search(r":[0-9.]+$", part) else (part, "", "1")
        if not 0 < float(share) <= 1:
            raise UserError(f"{part}: the share must lie between 0 and 1")
        if not os.path.exists(path):
            raise UserError(f"{path}: no such manifest")
        wanted.append((path, float(share)))

    def lines():
        for path, share in wanted:
            for where, entry in read_entries(path):
                if "messages" not in entry:
                    raise UserError(f"{where}: no 'messages': join takes manifests that this program has written")
                if rng.random() < share:
                    own = [a if os.path.isabs(a) else os.path.relpath(os.path.join(os.path.dirname(os.path.abspath(path)), a), folder) for a in entry.get("audios", ())]
                    yield entry | {"audios": own}

    return write_lines(lines(), out, rng)


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


def sequence(sounds, rng, path):
    """Sounds one after the other, a second or two of each; writes a FLAC at `path`."""
    parts = []
    for clip in sounds:
        part = loudest(load_audio(clip.path)[0], int(rng.uniform(1.0, 2.5) * SAMPLE_RATE))
        parts += [level(part, rng), np.zeros(int(rng.uniform(0.05, 0.4) * SAMPLE_RATE), np.float32)]
    write_clip(np.concatenate(parts), path)
    names = [c.facts["sound"] for c in sounds]
    return Clip(path, "sequences", {"first_sound": names[0], "last_sound": names[-1], "sound_count": DIGITS[len(names)]})


def mix(speech, sound, rng, path, music=None, low=-6.0, high=9.0, seconds=8.0):
    """Speech over a sound, over music if given: speech low..high dB above the sound, music 0-6 dB below that; writes a FLAC at `path`."""
    voice, under = load_audio(speech.path, limit=seconds)[0], load_audio(sound.path, limit=seconds)[0]
    mixed, start, ratio = lay_under(voice, under, rng, low, high)
    facts = speech.facts | {"background": sound.facts["sound"]} | louder(ratio)
    if music is not None:
        mixed = mixed + loop(load_audio(music.path, limit=seconds)[0], len(mixed), voice, ratio + rng.uniform(0, 6))
        facts["music"] = music.facts["instrument"]
    mixed[start : start + len(voice)] += voice
    write_clip(level(mixed, rng), path)
    return Clip(path, "mixtures", facts)


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
            voice = draw_voice(rng)
            path = os.path.join(folder, f"{word}_{i}.wav")
            speed = rng.randint(100, 200)  # words a minute
            speak(word, path, voice, speed=speed, pitch=rng.randint(25, 75))
            clips.append(Clip(path, "espeak", some(words=word, speed="slow" if speed < 130 else "fast" if speed > 170 else "")))
    return clips


ESPEAK_VOICES = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp")
ESPEAK_VARIANTS = ("m1", "m2", "m4", "m5", "m6", "f1", "f3", "f4")


def draw_voice(rng):
    return rng.choice(ESPEAK_VOICES) + "+" + rng.choice(ESPEAK_VARIANTS)


def speak(text, path, voice="en-us", speed=150, pitch=50):
    """text -> WAV by espeak-ng."""
    if not shutil.which("espeak-ng"):
        raise UserError("espeak-ng is not installed: apt install espeak-ng")
    subprocess.run(["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "-w", path, text], check=True)


def by_fact(clips, kind):
    """fact -> clips of which it is known or follows, so that rare classes can be drawn as often as common ones."""
    groups = defaultdict(list)
    for clip in clips:
        facts = derived(clip.facts)
        if kind in facts:
            groups[facts[kind]].append(clip)
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
# spoken questions: text -> speech


def first_text(*values):
    """The first of the values that is a text that says something."""
    return next((v.strip() for v in values if isinstance(v, str) and v.strip()), "")


TEXTS = {  # corpora of text questions: the licence, and row -> (question, answer)
    "alpaca": ("CC BY-NC 4.0", lambda r: (first_text(r["instruction"]) + (" " + r["input"].strip() if r.get("input") else ""), first_text(r["output"]))),
    "natural_questions": ("CC BY-SA 3.0", lambda r: (first_text(r["question"]), first_text(*(r["answer"] if isinstance(r["answer"], list) else [r["answer"]])))),
    "trivia_qa": ("Apache-2.0", lambda r: (first_text(r.get("Question"), r.get("question")), first_text((r.get("Answer") or {}).get("Value"), (r.get("answer") or {}).get("value")))),
    "web_questions": ("CC BY 4.0", lambda r: (first_text(r.get("utterance"), r.get("question")),
                                              first_text(*r.get("answers", ()), *re.findall(r'\(description "?(.*?)"?\)', r.get("targetValue", ""))))),
}  # fmt: skip
IN_KIND = {  # what a spoken question is to be answered like
    "simple": ("Answer the spoken question in a few words.", "Listen to the question and give the bare answer.", "Someone asks something: answer briefly.",
               "Give a short, exact answer to what is asked.", "Reply to the question in the audio with the fact alone."),
    "complex": ("Listen to the question and answer it at length.", "Explain thoroughly what the speaker asks about.", "Give a complete and detailed answer to the spoken request.",
                "Do what the speaker asks, step by step where that helps.", "Answer the question in the audio with reasons and background."),
    "empathetic": ("Respond to the speaker warmly, as a friend would.", "Listen to how the speaker feels and answer with understanding.",
                   "Reply in a natural, kind tone to what is said.", "Answer as in a caring conversation."),
}  # fmt: skip
SIMPLE_WORDS, SPOKEN_WORDS = 12, 60  # answers up to so many words are simple; longer questions are not spoken


def run_tts(command, text, out, speaker):
    """One reading by an engine of the user's: {text}, {out} and {speaker_wav} in `command` are replaced."""
    filled = [part.replace("{text}", text).replace("{out}", out).replace("{speaker_wav}", speaker or "") for part in shlex.split(command)]
    try:
        done = subprocess.run(filled, capture_output=True, text=True)
    except OSError as e:
        raise UserError(f"--tts-command {filled[0]}: cannot be run ({e.strerror})") from None
    if done.returncode or not os.path.exists(out):
        why = (done.stderr.strip().splitlines() or [f"status {done.returncode}, no file"])[-1]
        raise UserError(f"--tts-command {filled[0]} failed: {why}")


def speak_questions(corpus, source, out, command=None, speakers=None, empathetic=False, limit=None, seed=0, workers=2):
    """A manifest of questions read aloud and answered in text (the paper's second part of stages 2 and 3).

    Clips already there are not spoken again, so a stopped run goes on where it was.
    """
    rng, rows = random.Random(seed), rows_of(source)
    voices = audio_files(speakers) if speakers else []
    if command and "{speaker_wav}" in command and not voices:
        raise UserError("--tts-command wants {speaker_wav}: give a folder of recordings with --speakers")
    try:
        pairs = [TEXTS[corpus][1](row) for row in rows]
    except (KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{source}: not one of {corpus}'s files as published ({type(e).__name__}: {e})") from None
    pairs = [(q, a) for q, a in pairs if q and a and len(q.split()) <= SPOKEN_WORDS][:limit]
    if not pairs:
        raise UserError(f"{source}: holds no question with an answer that can be spoken")
    folder, jobs = os.path.splitext(out)[0] + "_clips", []
    make_folder(folder)
    for i, (question, answer) in enumerate(pairs):
        kind = "empathetic" if empathetic else "simple" if len(answer.split()) <= SIMPLE_WORDS else "complex"
        voice = draw_voice(rng)
        jobs.append((os.path.join(folder, f"{i:06}.wav"), question, answer, kind, rng.choice(IN_KIND[kind]), voice, rng.randint(120, 180), rng.choice(voices) if voices else None))

    def make(job):
        path, question, *_, voice, speed, speaker = job
        if not os.path.exists(path):
            temporary = path + ".part.wav"
            if command:
                run_tts(command, question, temporary, speaker)
            else:
                speak(question, temporary, voice, speed)
            os.replace(temporary, path)

    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(jobs), desc="speaking", unit=" clips") as progress:
        for _ in pool.map(make, jobs):
            progress.update()
    lines = (line_of(Clip(path, corpus, {}), f"{kind}_qa", instruction, answer, out) for path, _, answer, kind, instruction, *_ in jobs)
    return write_lines(lines, out)


# ---------------------------------------------------------------------------------------------
# a language model as a writer of answers, right and wrong


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible chat endpoint.  The key comes from OPENAI_API_KEY and is written nowhere."""

    url: str
    model: str
    timeout: float = 60.0  # seconds
    tries: int = 6
    pause: float = 1.0  # seconds before the second try; doubled each time

    def ask(self, system, user, read):
        """One completion, `read` (text -> value, or ValueError); None when no try gave anything that can be read.

        Tried again, after longer and longer pauses: a busy or broken server, a hang, half a line, an
        answer that breaks the rules.  Raises UserError when the endpoint refuses for good.
        """
        body = json.dumps({"model": self.model, "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}]}).encode()
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        url, down = self.url.rstrip("/") + "/chat/completions", None
        for n in range(self.tries):
            if n:
                time.sleep(self.pause * 2 ** (n - 1) * (0.5 + random.random()))
            try:
                with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=self.timeout) as reply:
                    text = json.load(reply)["choices"][0]["message"]["content"]
                    down = None
                    return read(text)
            except urllib.error.HTTPError as e:
                if e.code not in (408, 409, 429) and e.code < 500:
                    raise UserError(f"{self.url}: refuses ({e.code} {e.reason})") from None
            except urllib.error.URLError as e:
                down = str(e.reason)
            except (ValueError, KeyError, IndexError, TypeError, OSError, http.client.HTTPException):
                pass  # half an answer, or one that breaks the rules
        if down:
            raise UserError(f"{self.url}: no answer after {self.tries} tries ({down})")
        return None


def strict_object(text, **fields):
    """A JSON object with exactly these fields and types; ValueError for anything else."""
    found = json.loads(text)
    if not isinstance(found, dict) or found.keys() != fields.keys() or not all(type(found[k]) is kind for k, kind in fields.items()):
        raise ValueError(f"not an object with the fields {', '.join(fields)}")
    return found


def describe(facts):
    """What is known of a clip, in words, for a model that cannot hear it."""
    names = {"words": "words spoken", "sound": "sound", "background": "sound in the background", "instrument": "instrument or object"}
    return "; ".join(f"{names.get(k, k)}: {v}" for k, v in facts.items()) or "nothing is known"


WRITER = (  # meets what the paper's Figure A.2 does: the description stands for the audio
    "You answer questions about a recording as if you had heard it. All you know of it is the description that stands where the recording would. "
    "Answer the question itself, truthfully to the description, in at most two sentences; never mention the description. "
    'Reply with one JSON object and nothing else: {"answer": "..."}'
)
SPOILER = (  # meets the requirements of the paper's Figure A.4
    "You write training data for a model that answers questions about recordings. You get what is known of a recording, a question about it and a good answer. "
    "Write one bad answer to the same question. It reads as fluently and sounds as plausible as the good one, and it answers the question directly; "
    "but one thing that could be heard is wrong in it or missing: another sound, feeling, voice, order, number or tempo. A matter of style or length is no error, "
    "nonsense and refusals are useless. Then judge the pair: is the good answer clearly the better one? If they are close, or you are in doubt, the pair is not usable. "
    'Reply with one JSON object and nothing else, with exactly these fields: {"bad_answer": "...", "explanation": "...", "usable": true or false}'
)


def write_with_llm(manifest, out, endpoint, kind, workers=8, limit=None):
    """Has a language model write answers ("answers") or worse ones ("preferences") for a manifest's lines.

    Every reply goes to OUT.replies.jsonl at once: a stopped run goes on where it was, and nothing is
    asked twice.  Returns lines written, lines found unusable, lines without a usable reply.
    """
    folder, entries = os.path.dirname(os.path.abspath(manifest)), []
    for i, (where, entry) in enumerate(itertools.islice(read_entries(manifest), limit)):
        entries.append((entry, parse_example(entry, i, where, folder, None, check=False)))
    if not any(e.facts for _, e in entries):
        raise UserError(f"{manifest}: no line has facts to describe its clip by")

    def prompt(e):
        if kind == "answers":
            return WRITER, f"Recording: {describe(e.facts)}\n\nQuestion: {e.question}", lambda text: strict_object(text, answer=str)
        user = f"Recording: {describe(e.facts)}\n\nQuestion: {e.question}\n\nGood answer: {e.answer}"
        return SPOILER, user, lambda text: strict_object(text, bad_answer=str, explanation=str, usable=bool)

    journal, replies = out + ".replies.jsonl", {}
    make_folder(os.path.dirname(os.path.abspath(out)))
    if os.path.exists(journal):
        with open(journal, encoding="utf-8") as f:
            for line in f:
                with contextlib.suppress(ValueError, KeyError):  # half a line, where a run was killed
                    found = json.loads(line)
                    replies[found["key"]] = found["reply"]
    keys = [hashlib.sha256("\0".join((endpoint.model, *prompt(e)[:2])).encode()).hexdigest() for _, e in entries]
    todo = {k: e for k, (_, e) in zip(keys, entries) if k not in replies}
    try:
        log = open(journal, "a+", encoding="utf-8")
    except OSError as e:
        raise UserError(f"{journal}: cannot be written ({e.strerror})") from None
    with log, ThreadPoolExecutor(workers) as pool, tqdm(total=len(todo), desc="asking", unit=" lines") as progress:
        log.write("\n" if replies and log.tell() else "")  # a half-written line ends here
        jobs = {pool.submit(endpoint.ask, *prompt(e)): k for k, e in todo.items()}
        try:
            for job in as_completed(jobs):
                reply = job.result()
                if reply is not None:
                    replies[jobs[job]] = reply
                    log.write(json.dumps({"key": jobs[job], "reply": reply}, ensure_ascii=False) + "\n")
                    log.flush()
                progress.update()
        except UserError:
            pool.shutdown(cancel_futures=True)
            raise
    lines, unusable, silent = [], 0, 0
    for key, (entry, e) in zip(keys, entries):
        reply = replies.get(key)
        audio = [os.path.relpath(e.audio, os.path.dirname(os.path.abspath(out)))] if e.audio else []
        if reply is None:
            silent += 1
        elif kind == "answers":
            messages = [entry["messages"][0], {"role": "assistant", "content": reply["answer"]}]
            lines.append(entry | {"messages": messages, "audios": audio})
        elif not reply["usable"] or not reply["bad_answer"].strip() or reply["bad_answer"].strip() == e.answer.strip():
            unusable += 1
        else:
            lines.append(entry | {"audios": audio, "rejected_response": reply["bad_answer"].strip()})
    return write_lines(lines, out), unusable, silent


# ---------------------------------------------------------------------------------------------
# checking manifests


DOMAINS = {  # task -> domain; all else is speech
    "sound": "sound", "first_sound": "sound", "last_sound": "sound", "sound_count": "sound", "instrument": "music",
    "background": "mixture", "louder": "mixture", "music": "mixture",
}  # fmt: skip


def domain_of(entry):
    facts = entry.get("facts") or {}
    return "mixture" if "background" in facts else "sound" if facts.keys() & {"sound", "first_sound"} else "music" if "instrument" in facts else "speech"


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
                voice = draw_voice(rng)
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


def train_tokenizer(lines, vocab=1000):
    """Byte-level BPE on the prompts and answers of `lines`, with LLaDA's special tokens.

    Answers count tenfold, and so do choices, so that a label is one token, within a sentence too: tokens decoded together are
    drawn independently, and a choice is found in its list by what it begins with.
    What every prompt says in the same words is one token too: a small model has no positions to waste; so is a choice's
    letter with its dot, which stands beside the choice then.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def texts():
        for line in lines:
            question, answer = (message["content"].replace("<audio>", "") for message in line["messages"][:2])
            choices = [f" {choice}" for choice in choices_in(question).values()]
            yield from (prompt_text(question), *[answer] * 10, *[text for choice in choices for text in (choice, choice.lower())] * 10)

    tokenizer.train_from_iterator(texts(), trainer)
    fixed = [asks("", []).split("Question:")[0] + "Question:" for asks in (mmsu_prompt, mmau_prompt)]
    tokenizer.add_tokens([AddedToken(text) for text in (SYSTEM, BEFORE_AUDIO, " <audio>.", "\n\n", *fixed, *(f"{letter}." for letter in LETTERS))])
    return tokenizer


TOUR = ("fsdd", "speech_commands", "esc10", "ravdess", "librispeech", "berklee", "sonicpi")
BALANCE = {  # fact -> lines a manifest of 24,000 asks about it: every value of it equally often
    "digit": 3000, "word": 4500, "sound": 4000, "instrument": 5000, "emotion": 6000, "sex": 1500,
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
    make_folder(out)
    clips = [clip for name in have for clip in read_corpus(name, os.path.join(audio, name))]
    held_out = {c.path for c in rng.sample([c for c in clips if not c.is_test], max(1, sum(not c.is_test for c in clips) // 50))}
    folder, here = os.path.join(out, "clips"), os.path.join(out, "manifest")  # audio paths are relative to the manifests' folder
    pools = {}
    words = sorted({c.facts["words"] for c in clips if "words" in c.facts and " " not in c.facts["words"]})
    with tqdm(total=int(n_strings * 2.4), desc="composing", unit=" clips") as progress:
        for split in ("train", "test"):
            part = [c for c in clips if c.is_test == (split == "test") and c.path not in held_out]
            digits, spoken = [c for c in part if c.dataset == "fsdd"], [c for c in part if c.dataset == "speech_commands"]
            noises, played = [c for c in part if "sound" in c.facts], [c for c in part if "instrument" in c.facts]
            voices = espeak(words, max(1, int(12 * scale)), rng, f"{folder}/espeak") if split == "train" else []
            n = n_strings if split == "train" else int(200 * scale) + 1
            made = {"digits": [], "words": [], "mixtures": [], "sequences": []}
            if digits:
                made["digits"] = list(strings(digits, n, 5, rng, f"{folder}/{split}_digits", progress))
            if spoken + voices:
                made["words"] = list(strings(spoken + voices, n // 2 + 1, 3, rng, f"{folder}/{split}_words", progress, 2))
            if noises and (talk := digits + spoken + [c for c in part if c.dataset in ("ravdess", "librispeech")]):
                for i, sound in enumerate(draw_balanced(noises, "sound", n // 2 + 1 if split == "train" else n, rng)):
                    under = rng.choice(played) if played and rng.random() < 0.3 else None
                    made["mixtures"].append(mix(rng.choice(talk), sound, rng, f"{folder}/{split}_mixtures/{i:05}.flac", under))
                    progress.update()
                groups = by_fact(noises, "sound")
                for i in range(n // 4 + 1):
                    several = [rng.choice(groups[name]) for name in rng.sample(sorted(groups), min(rng.randint(2, 3), len(groups)))]
                    made["sequences"].append(sequence(several, rng, f"{folder}/{split}_sequences/{i:05}.flac"))
                    progress.update()
            pools[split] = (part + voices, made)

    train, made = pools["train"]
    labels = defaultdict(set)  # task -> what may stand among its choices
    for clip in [*train, *(c for some_made in made.values() for c in some_made)]:
        for task, fact in askable(clip, CHOICE_TASKS):
            labels[task].add(fact)

    def singles(share, rng):
        """Single clips, the value of every fact equally often, each with the kind of fact it was drawn for."""
        for kind, n in BALANCE.items():
            for clip in draw_balanced(train, kind, int(n * share * scale), rng):
                yield clip, kind

    def about(pairs, rng, tasks=None):
        """A question that turns on the fact the clip was drawn for, half the time; else any it allows."""
        for clip, kind in pairs:
            chosen = [t for t, row in TASKS.items() if row.kind == kind]
            line = question_line(clip, rng, here, chosen if tasks is None and rng.random() < 0.5 else tasks)
            if line:
                yield line

    everything = [c for some_made in made.values() for c in some_made]
    paired = [(c, None) for c in everything]
    choices = lambda pairs, rng: filter(None, (choice_line(clip, rng, here, labels) for clip, _ in pairs))
    chain = itertools.chain

    def twentieth(rng):
        """Of stage 1, in stages 2 and 3: as in the paper."""
        return (entry for _, entry in read_entries(f"{out}/stage1.jsonl") if rng.random() < 0.05)

    stages = {
        1: lambda r: chain(ask(everything, r, here, ["asr"]), about(singles(0.4, r), r, ["asr"])),
        0: lambda r: chain(ask(train, r, here), ask(everything, r, here), ask(everything, r, here, ["asr"], repeat=3), ask(everything, r, here, ["background"], repeat=2),
                           about(singles(1, r), r), choices(singles(0.6, r), r), choices(paired[::3], r)),
        2: lambda r: chain(ask(everything, r, here, repeat=2), about(singles(1, r), r), twentieth(r)),
        3: lambda r: chain(ask(everything, r, here), about(singles(0.6, r), r), choices(singles(1, r), r), choices(paired, r), twentieth(r)),
        4: lambda r: filter(None, (preference_line(clip, r, here, labels) for clip, _ in chain(singles(0.12, r), r.sample(paired, len(paired) // 8)))),
    }  # fmt: skip
    for stage, lines in stages.items():
        r = random.Random(f"{seed} stage {stage}")
        print(f"{out}/stage{stage}.jsonl: {write_lines(lines(r), f'{out}/stage{stage}.jsonl', r)} lines")
    lines = [question_line(c, rng, here, sentences=0) for c in clips if c.path in held_out]
    print(f"{out}/held_out.jsonl: {write_lines(filter(None, lines), f'{out}/held_out.jsonl')} lines")
    test, composed = pools["test"]
    one = {"fsdd": ["digit"], "speech_commands": ["word"], "esc10": ["sound"], "ravdess": ["emotion", "sex"], "librispeech": ["sex"],
           "berklee": ["instrument"], "sonicpi": ["instrument"]}  # fmt: skip
    lines = [question_line(c, rng, here, [task], 0) for c in test for task in one[c.dataset] if askable(c, [task])]
    lines += [question_line(c, rng, here, [task], 0) for task, kind in (("asr", "digits"), ("asr", "words"), ("background", "mixtures")) for c in composed[kind]]
    print(f"{out}/test.jsonl: {write_lines(lines, f'{out}/test.jsonl')} lines")
    found = benchmark([*test, *composed["digits"], *composed["mixtures"], *composed["sequences"]], labels, max(40, int(720 * scale)), rng, out)
    print(f"{out}/mmsu.jsonl: {found[0]} questions; {out}/mmau.json: {found[1]} questions")
    tokenizer = train_tokenizer(entry for stage in sorted(stages) for _, entry in read_entries(f"{out}/stage{stage}.jsonl"))
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
    soundfile.write(os.path.join(out, "clock.wav"), 0.2 * ticks, SAMPLE_RATE)


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
    p = commands.add_parser("speak", help="text questions read aloud, answered in text")
    p.add_argument("corpus", choices=sorted(TEXTS))
    p.add_argument("source", help="its JSON, JSONL, CSV or TSV file")
    p.add_argument("--out", required=True)
    p.add_argument("--tts-command", help='an engine other than espeak-ng, with {text}, {out} and, if it wants one, {speaker_wav}')
    p.add_argument("--speakers", help="folder of recordings from which {speaker_wav} is drawn")
    p.add_argument("--empathetic", action="store_true", help="ask for warm answers")
    p.add_argument("--limit", type=int)
    p.add_argument("--seed", type=int, default=0)
    for command, what in (("answers", "a language model writes the answers of a manifest"), ("preferences", "a language model writes worse answers: stage 4")):
        p = commands.add_parser(command, help=what)
        p.add_argument("manifest", help="lines with facts, as this program writes them")
        p.add_argument("--out", required=True)
        p.add_argument("--llm", required=True, metavar="URL", help="OpenAI-compatible endpoint, e.g. http://localhost:8000/v1 (key: OPENAI_API_KEY)")
        p.add_argument("--model", required=True)
        p.add_argument("--workers", type=int, default=8, help="questions in flight (default 8)")
        p.add_argument("--timeout", type=float, default=60.0, help="seconds (default 60)")
        p.add_argument("--limit", type=int)
    p = commands.add_parser("join", help="one shuffled manifest out of several")
    p.add_argument("parts", nargs="+", metavar="FILE[:SHARE]", help="a manifest, and the share of its lines to draw")
    p.add_argument("--out", required=True)
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
            tour(args.audio, args.out, args.seed, args.strings)
        elif args.command == "toy":
            make_folder(args.out)
            toy(os.path.join(args.out, "audio"), args.each, args.seed)
            tour(os.path.join(args.out, "audio"), args.out, args.seed, n_strings=20 * args.each)
        elif args.command == "speak":
            n = speak_questions(args.corpus, args.source, args.out, args.tts_command, args.speakers, args.empathetic, args.limit, args.seed)
            print(f"{args.out}: {n} lines")
        elif args.command in ("answers", "preferences"):
            endpoint = Endpoint(args.llm, args.model, args.timeout)
            n, unusable, silent = write_with_llm(args.manifest, args.out, endpoint, args.command, args.workers, args.limit)
            print(f"{args.out}: {n} lines; {unusable} pairs found unusable, {silent} without a reply that keeps to the rules")
        elif args.command == "join":
            print(f"{args.out}: {join(args.parts, args.out, args.seed)} lines")
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
            print(f"{args.out}: {write_lines(ask(clips, rng, args.out), args.out)} lines")
    except UserError as e:
        print(f"prepare.py: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
