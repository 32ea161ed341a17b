r"""Corpora on disk -> clips and what is known of them.

A corpus is a row of CORPORA: what its files are called (Corpus) or which table lists them (Table), the
facts that these tell, and which clips are for testing.  A new corpus is a row; this is a whole one:

    CORPORA["birds"] = Corpus(
        "CC0",  # licence
        r"(?P<species>[a-z ]+)/(?P<year>\d+)_\w+\.\w+$",  # path relative to the folder: robin/2021_04.wav
        lambda g, side: {"sound": g["species"]},  # the facts it tells; questions follow from their kind
        lambda g, last: g["year"] == "2023",  # for testing
    )
"""

import csv
import glob
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from runtime.errors import UserError
from tools.prompts import LETTERS, capital, format_choices
from tools.side_files import (
    esc50_side,
    iemocap_side,
    last_of,
    librispeech_side,
    rows_of,
    rows_of_fma,
    rows_of_gigaspeech,
    rows_of_speechocean,
    rows_of_tacos,
    sex_of,
    spaced,
    vctk_side,
    voxceleb_side,
    without_suffix,
)
from tools.spoken_questions import INSTRUCTIONS

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".opus", ".m4a")


@dataclass(frozen=True)
class Clip:
    """One recording and what is known of it: facts, by kind.

    Kinds: words (what is said), sound (environmental), instrument (or object), emotion, intensity, sex,
    age (child or adult), speaker, accent, nationality, genre, caption, speed, background (the sound under
    speech), louder (voice or background).
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
    """How to read a corpus whose file names tell the facts."""

    licence: str
    pattern: str  # regular expression for a clip's path relative to the corpus' folder
    facts: Callable  # (match, side) -> {kind: value}; empty values are dropped
    is_test: Callable  # (match, last) -> bool; last: the clip is its folder's last by name
    side: Callable = lambda folder: None  # folder -> what `facts` needs beside the name


@dataclass(frozen=True)
class Table:
    """How to read a corpus whose facts stand in tables (CSV, TSV, JSON, JSONL): a row there is a clip here.

    Clips that a table lists and the disk does not hold (many corpora are downloaded in part) are left
    out and counted.
    """

    licence: str
    files: str  # glob of the tables, relative to the corpus' folder
    stem: Callable  # row -> the clip's path without suffix, or its last part
    facts: Callable  # row -> {kind: value}; empty values are dropped
    is_test: Callable = lambda row, table: "test" in table or "eval" in table  # table: its path in the folder
    rows: Callable = None  # table's path -> dicts, where it is no plain table
    qa: Callable = lambda row: ()  # row -> (question, answer) pairs that the corpus itself asks
    span: Callable = lambda row: (0.0, None)  # row -> offset, duration in seconds


# ---------------------------------------------------------------------------------------------
# reading


def audio_files(folder):
    """Every recording in a folder and those below it, in order."""
    found = glob.glob(os.path.join(glob.escape(folder), "**", "*.*"), recursive=True)
    return sorted(path for path in found if path.lower().endswith(AUDIO_SUFFIXES))


def relative_path(path, folder):
    return os.path.relpath(path, folder).replace(os.sep, "/")


def known(facts):
    """The facts that have a value."""
    return {kind: value for kind, value in facts.items() if value}


def read_corpus(name, folder):
    """All clips of a corpus, in order of their paths or of its tables.  Raises UserError if there is none."""
    if name not in CORPORA:
        raise UserError(f"unknown corpus {name!r}; known: {', '.join(CORPORA)}")
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder")
    corpus = CORPORA[name]
    if isinstance(corpus, Table):
        return read_table(name, corpus, folder)
    return read_names(name, corpus, folder)


def read_names(name, corpus, folder):
    found = []
    for path in audio_files(folder):
        if match := re.match(corpus.pattern, relative_path(path, folder)):
            found.append((path, match))
    if not found:
        raise UserError(f"{folder}: no file here is named like {name}'s: {corpus.pattern}")
    try:
        side = corpus.side(folder)
    except (OSError, KeyError, ValueError, IndexError, csv.Error) as e:
        raise UserError(f"{folder}: {name}'s lists beside the clips cannot be read ({e})") from None
    last = {os.path.dirname(path): path for path, _ in found}
    clips = []
    for path, match in found:
        is_last = last[os.path.dirname(path)] == path
        clips.append(Clip(path, name, known(corpus.facts(match, side)), bool(corpus.is_test(match, is_last))))
    return clips


def in_split(paths, split, others, folder):
    """Of clips of one name that in the folder which is named like the split, none in another split's."""
    where = {path: relative_path(path, folder) for path in paths}
    own = [path for path in paths if split in where[path]]
    free = [path for path in paths if not any(other in where[path] for other in others)]
    return next(iter(own + free), None)


def read_table(name, corpus, folder):
    tables = sorted(glob.glob(os.path.join(glob.escape(folder), corpus.files), recursive=True))
    if not tables:
        raise UserError(f"{folder}: {name} has a table {corpus.files} there; none was found")
    by_stem, by_name = {}, defaultdict(list)
    for path in audio_files(folder):
        stem = without_suffix(relative_path(path, folder))
        by_stem[stem] = path
        by_name[last_of(path)].append(path)
    clips, missing = [], 0
    split_of = {table: relative_path(table, folder).split("_")[0].split("/")[0] for table in tables}
    for table in tables:
        relative, split = relative_path(table, folder), split_of[table]
        others = set(split_of.values()) - {split}
        read_rows = corpus.rows or rows_of
        try:
            for row in read_rows(table):
                stem = corpus.stem(row)
                path = by_stem.get(stem) or in_split(
                    by_name.get(stem.rsplit("/", 1)[-1], ()), split, others, folder
                )
                if path is None:
                    missing += 1
                    continue
                is_test = bool(corpus.is_test(row, relative))
                offset, duration = corpus.span(row)
                clips.append(
                    Clip(
                        path, name, known(corpus.facts(row)), is_test, offset, duration, tuple(corpus.qa(row))
                    )
                )
        except OSError as e:
            raise UserError(f"{e.filename}: cannot be read ({e.strerror})") from None
        except (KeyError, ValueError, TypeError, AttributeError, IndexError, csv.Error) as e:
            raise UserError(
                f"{table}: not one of {name}'s tables as published ({type(e).__name__}: {e})"
            ) from None
    if missing:
        print(f"{name}: {missing} clips that its tables list are not there", file=sys.stderr)
    if not clips:
        raise UserError(f"{folder}: none of the clips that {name}'s tables list is there")
    return clips


# ---------------------------------------------------------------------------------------------
# words that corpora use


RAVDESS_EMOTION = {
    "1": "neutral",
    "2": "calm",
    "3": "happy",
    "4": "sad",
    "5": "angry",
    "6": "fearful",
    "7": "disgusted",
    "8": "surprised",
}
RAVDESS_INTENSITY = {"1": "normal", "2": "strong"}
RAVDESS_WORDS = {"1": "kids are talking by the door", "2": "dogs are sitting by the door"}
MELD_EMOTION = {
    "anger": "angry",
    "disgust": "disgusted",
    "fear": "fearful",
    "joy": "happy",
    "neutral": "neutral",
    "sadness": "sad",
    "surprise": "surprised",
}
SOUND_NAMES = {  # how Berklee's and Sonic Pi's names begin, where that is no plain word
    "bd": "bass drum",
    "elec": "electronic sound",
    "guit": "guitar",
    "hat": "hi-hat",
    "perc": "percussion",
    "sn": "snare drum",
    "femalevoice": "female voice",
    "femalevoices": "female voices",
    "malevoice": "male voice",
    "malevoices": "male voices",
    "synth": "synthesizer",
    "bassdrum": "bass drum",
}
VOICE_ACCENT = {"a": "American", "b": "British"}  # first letter of a neural voice's name


def read_paragraphs(source):
    """The lines of a .txt or of all *.txt in a folder, in order: books, a paragraph a line."""
    is_folder = os.path.isdir(source)
    for path in sorted(glob.glob(os.path.join(glob.escape(source), "*.txt"))) if is_folder else [source]:
        try:
            with open(path, encoding="utf-8") as f:
                yield from f.read().splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"{path}: cannot be read as text ({e})") from None


def plain(text):
    """A sentence as a transcript has it: lower case, no punctuation but apostrophes within words."""
    return " ".join(re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower().replace("’", "'")))


def gigaspeech_words(row):
    """GigaSpeech writes punctuation and noises as tags."""
    text = row["text_tn"]
    for tag, sign in (("COMMA", ","), ("PERIOD", "."), ("QUESTIONMARK", "?"), ("EXCLAMATIONPOINT", "!")):
        text = text.replace(f" <{tag}>", sign)
    return "" if re.search(r"<(SIL|MUSIC|NOISE|OTHER)>", text) else text.lower()


# ---------------------------------------------------------------------------------------------
# facts that take more than a line


def ravdess_facts(match, side):
    actor = match["actor"]
    return {
        "emotion": RAVDESS_EMOTION[match["emotion"]],
        "intensity": RAVDESS_INTENSITY[match["intensity"]],
        "words": RAVDESS_WORDS[match["words"]],
        "sex": "male" if int(actor) % 2 else "female",
        "speaker": f"actor {actor}",
    }


def librispeech_facts(match, side):
    words, sexes = side
    speaker = match["speaker"]
    return {"speaker": speaker, "words": words.get(match["utterance"]), "sex": sexes.get(speaker)}


def vctk_facts(match, side):
    words, speakers = side
    speaker = match["speaker"]
    return {"speaker": speaker, "words": words.get(match["utterance"])} | speakers.get(speaker, {})


def emov_facts(match, side):
    sex = "female" if match["speaker"] in ("bea", "jenie") else "male"
    return {"speaker": match["speaker"], "emotion": match["emotion"].lower(), "sex": sex}


def iemocap_facts(match, side):
    emotions, words = side
    utterance = match["utterance"]
    return {
        "emotion": emotions.get(utterance),
        "words": words.get(utterance),
        "sex": sex_of(match["sex"]),
        "speaker": f"session {match['session']} {match['sex']}",
    }


def accentdb_facts(match, side):
    accent = match["accent"]
    return {
        "accent": capital(spaced(accent)),
        "speaker": f"{accent} {match['speaker'].removeprefix('speaker_')}",
    }


def vocalsound_facts(match, side):
    sound = match["label"].replace("throatclearing", "throat clearing")
    return {"sound": sound, "sex": sex_of(match["sex"]), "speaker": match["speaker"]}


def meld_facts(row):
    emotion = MELD_EMOTION.get(row["Emotion"])
    return {"words": row["Utterance"], "emotion": emotion, "speaker": row["Speaker"]}


def paraspeechcaps_facts(row):
    caption = row["text_description"]
    return {
        "words": row.get("transcription"),
        "sex": sex_of(row.get("gender")),
        "accent": row.get("accent"),
        "caption": caption if isinstance(caption, str) else caption[0],
    }


def neural_facts(row):
    voice = row["voice"]
    facts = {"words": plain(row["text"]), "speaker": voice}
    if match := re.match(r"([ab])([fm])_", voice):  # such as af_sky; other names tell nothing
        facts |= {"accent": VOICE_ACCENT[match[1]], "sex": sex_of(match[2])}
    return facts


def neural_qa(row):
    if row["answer"] is None:
        return ()
    instructions = INSTRUCTIONS["simple"]
    return ((instructions[sum(row["file"].encode()) % len(instructions)], row["answer"]),)


def audiomcq_qa(row):
    letter = LETTERS[row["choices"].index(row["answer"])]
    return ((f"{row['question']}\n{format_choices(row['choices'])}", f"{letter}. {row['answer']}"),)


def caption_of(*columns):
    """-> row -> the caption in the first of the columns that has one."""

    def facts(row):
        return {"caption": next((row[c] for c in columns if row.get(c)), "")}

    return facts


def span_of(start, end):
    """-> row -> offset and duration, from the columns that hold a segment's start and end."""

    def span(row):
        return float(row[start]), float(row[end]) - float(row[start])

    return span


def audio_path_stem(row):
    return without_suffix(row["audio_path"])


def wavcaps_stem(row):
    name = str(row["id"])
    return last_of(name) if name.endswith((".wav", ".flac")) else name


# ---------------------------------------------------------------------------------------------
# the corpora

CORPORA = {  # read from real files
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
        ravdess_facts,
        lambda g, last: g["actor"] in ("21", "22"),
    ),
    "librispeech": Corpus(
        "CC BY 4.0",
        r"(.*/)?(?P<utterance>(?P<speaker>\d+)-\d+-\d+)\.\w+$",
        librispeech_facts,
        lambda g, last: g["speaker"].endswith("0"),
        librispeech_side,
    ),
    "berklee": Corpus(
        "CC BY 3.0",
        r"(.*/)?(?P<whole>(?P<name>[a-z]+)[^/]*)\.\w+$",
        lambda g, side: {"instrument": SOUND_NAMES.get(g["name"], g["name"])},
        lambda g, last: g["whole"].endswith("3"),
    ),
    "sonicpi": Corpus(
        "CC0",
        r"(.*/)?(?P<whole>(?P<name>[a-z]+)_[^/]*)\.\w+$",
        lambda g, side: {"instrument": SOUND_NAMES.get(g["name"], g["name"])},
        lambda g, last: g["whole"].endswith("3"),
    ),
    "speechocean762": Table(
        "CC BY 4.0",
        "*/wav.scp",
        lambda row: without_suffix(row["audio"]),
        lambda row: {kind: row[kind] for kind in ("words", "sex", "age", "speaker")},
        lambda row, table: table.startswith("test/"),
        rows_of_speechocean,
    ),
    "neural": Table(  # what `prepare speak sentences` writes
        "the voices' and the texts'",
        "lines*.jsonl",
        lambda row: without_suffix(row["file"]),
        neural_facts,
        lambda row, table: row["split"] == "test",
        qa=neural_qa,
    ),
}
CORPORA |= {  # tested on miniature trees in their published layout only
    "esc50": Corpus(
        "CC BY-NC 3.0",
        r"(.*/)?(?P<file>(?P<fold>\d)-\d+-[A-Z]-\d+)\.\w+$",
        lambda g, side: {"sound": side.get(g["file"])},
        lambda g, last: g["fold"] == "5",
        esc50_side,
    ),
    "vctk": Corpus(
        "CC BY 4.0",
        r"(.*/)?(?P<utterance>(?P<speaker>[ps]\d+)_\d+)(_mic\d)?\.\w+$",
        vctk_facts,
        lambda g, last: g["speaker"].endswith("0"),
        vctk_side,
    ),
    "voxceleb1": Corpus(
        "CC BY 4.0 (audio: YouTube's)",
        r"(.*/)?(?P<speaker>id1\d{4})/[^/]+/\d+\.\w+$",
        lambda g, side: {"speaker": g["speaker"]} | side.get(g["speaker"], {}),
        lambda g, last: "id10270" <= g["speaker"] <= "id10309",
        voxceleb_side,
    ),
    "emov_db": Corpus(
        "research",
        r"(.*/)?(?P<speaker>bea|jenie|josh|sam)[_/](?P<emotion>[A-Za-z]+)/.+\.\w+$",
        emov_facts,
        lambda g, last: last,
    ),
    "iemocap": Corpus(
        "IEMOCAP release form (research)",
        r"(.*/)?(?P<utterance>Ses0(?P<session>\d)\w+_(?P<sex>[FM])\d+)\.\w+$",
        iemocap_facts,
        lambda g, last: g["session"] == "5",
        iemocap_side,
    ),
    "accentdb": Corpus(
        "CC BY-NC 4.0",
        r"(.*/)?(?P<accent>[a-z_]+)/(?P<speaker>speaker_\d+)/.+\.\w+$",
        accentdb_facts,
        lambda g, last: last,
    ),
    "vocalsound": Corpus(
        "CC BY-SA 4.0",
        r"(.*/)?(?P<speaker>(?P<sex>[fm])\d{4})_\d_(?P<label>[a-z]+)\.\w+$",
        vocalsound_facts,
        lambda g, last: g["speaker"].endswith("0"),
    ),
    "gigaspeech": Table(
        "Apache-2.0 (audio: its owners')",
        "GigaSpeech.json",
        lambda row: without_suffix(row["path"]),
        lambda row: {"words": gigaspeech_words(row)},
        lambda row, table: bool({"{DEV}", "{TEST}"} & set(row.get("subsets", ()))),
        rows_of_gigaspeech,
        span=span_of("begin_time", "end_time"),
    ),
    "meld": Table(
        "GPL-3.0",
        "*_sent_emo.csv",
        lambda row: f"dia{row['Dialogue_ID']}_utt{row['Utterance_ID']}",
        meld_facts,
        lambda row, table: table.startswith(("test", "dev")),
    ),
    "meta_fair_asr": Table(
        "Fair-speech licence (research)",
        "*.tsv",
        lambda row: row["hash_name"],
        lambda row: {"words": row["transcription"].lower(), "sex": sex_of(row["gender"])},
        lambda row, table: False,
    ),
    "paraspeechcaps": Table(
        "CC BY-NC-SA 4.0",
        "*.jsonl",
        lambda row: without_suffix(row["relative_audio_path"]),
        paraspeechcaps_facts,
        lambda row, table: table.startswith(("holdout", "dev")),
    ),
    "speechcraft": Table("research", "*.jsonl", audio_path_stem, caption_of("caption", "description")),
    "compa_r": Table(
        "CC BY-NC 4.0",
        "*.json",
        lambda row: last_of(row["audio_id"]),
        lambda row: {},
        qa=lambda row: ((row["instruction"], row["output"]),),
    ),
    "opens2s": Table(
        "Apache-2.0",
        "*.jsonl",
        lambda row: last_of(row["audio"]),
        lambda row: {"emotion": row.get("emotion")},
        qa=lambda row: ((INSTRUCTIONS["empathetic"][0], row["response"]),),
    ),
    "nsynth": Table(
        "CC BY 4.0",
        "**/examples.json",
        lambda row: row["id"],
        lambda row: {"instrument": spaced(row["instrument_family_str"])},
        lambda row, table: "test" in table or "valid" in table,
    ),
    "fma_medium": Table(
        "CC BY 4.0 (audio: each track's)",
        "**/tracks.csv",
        lambda row: f"{int(row['id']):06}",
        lambda row: {"genre": row["track/genre_top"].lower()},
        lambda row, table: row["set/split"] != "training",
        rows_of_fma,
    ),
    "lp_musiccaps_mtt": Table(
        "MIT",
        "*.jsonl",
        lambda row: last_of(row["path"]),
        caption_of("caption_writing", "caption_summary"),
    ),
    "musiccaps": Table(
        "CC BY-SA 4.0",
        "*.csv",
        lambda row: row["ytid"],
        caption_of("caption"),
        lambda row, table: row.get("is_audioset_eval") == "True",
    ),
    "audiocaps": Table(
        "MIT (audio: YouTube's)",
        "*.csv",
        lambda row: row["youtube_id"],
        caption_of("caption"),
        lambda row, table: table.startswith(("test", "val")),
    ),
    "clotho": Table(
        "non-commercial",
        "clotho_captions_*.csv",
        lambda row: last_of(row["file_name"]),
        caption_of("caption_1"),
        lambda row, table: "development" not in table,
    ),
    "wavcaps": Table("CC BY 4.0 (academic)", "**/*_final.json", wavcaps_stem, caption_of("caption")),
    "tacos": Table(
        "CC BY 4.0",
        "annotations_strong.csv",
        lambda row: last_of(row["filename"]),
        caption_of("text"),
        lambda row, table: row["is_test"],
        rows_of_tacos,
        span=span_of("onset", "offset"),
    ),
    "audiomcq": Table("Apache-2.0", "*.jsonl", audio_path_stem, lambda row: {}, qa=audiomcq_qa),
}
