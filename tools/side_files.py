"""What stands beside the clips of single corpora: transcripts, lists of speakers, annotations -> dicts.

X_side(folder) reads the files of a corpus whose names tell the facts; rows_of_X(path) reads a corpus' table
where it is no plain one.
"""

import csv
import glob
import json
import os
import re

from runtime.errors import UserError

SEX = {"m": "male", "f": "female", "male": "male", "female": "female"}
IEMOCAP_EMOTION = {
    "ang": "angry",
    "hap": "happy",
    "exc": "excited",
    "sad": "sad",
    "neu": "neutral",
    "fru": "frustrated",
    "fea": "fearful",
    "sur": "surprised",
    "dis": "disgusted",
}
ADULT = 13  # years from which a speaker counts as one


def find(folder, *name):
    """Files of this name (a pattern, perhaps with the folders it stands in) at any depth, in order."""
    return sorted(glob.glob(os.path.join(glob.escape(folder), "**", *name), recursive=True))


def without_suffix(path):
    return os.path.splitext(path)[0]


def last_of(path):
    """A path's last part, without suffix."""
    return without_suffix(os.path.basename(str(path)))


def sex_of(text):
    return SEX.get(str(text).strip().lower(), "")


def spaced(text):
    return text.replace("_", " ")


def rows_of(path):
    """A CSV, TSV, JSON (list, {"data": list} or {id: row}) or JSONL table as dicts."""
    with open(path, encoding="utf-8-sig", newline="") as f:
        if path.endswith(".jsonl"):
            return [json.loads(line) for line in f if line.strip()]
        if path.endswith(".json"):
            found = json.load(f)
            if isinstance(found, dict):
                found = found.get("data", found.get("Data", found))
            if isinstance(found, dict):
                return [row | {"id": key} for key, row in found.items()]
            return found
        delimiter = "\t" if path.endswith((".tsv", ".txt")) else ","
        return list(csv.DictReader(f, delimiter=delimiter))


def librispeech_side(folder):
    """*.trans.txt and SPEAKERS.TXT -> {utterance: words}, {speaker: sex}."""
    words, sexes = {}, {}
    for path in find(folder, "*.trans.txt"):
        words |= {utterance: text.lower() for utterance, text in read_kaldi(path).items()}
    for path in find(folder, "SPEAKERS.TXT"):
        with open(path, encoding="utf-8") as f:
            for line in f:
                if not line.startswith(";") and "|" in line:
                    speaker, sex, *_ = line.split("|")
                    sexes[speaker.strip()] = sex_of(sex)
    return words, sexes


def vctk_side(folder):
    """txt/ and speaker-info.txt -> {utterance: words}, {speaker: {"sex", "accent"}}."""
    words, speakers = {}, {}
    for path in find(folder, "txt", "*", "*.txt"):
        with open(path, encoding="utf-8") as f:
            words[last_of(path)] = f.read().strip()
    for path in find(folder, "speaker-info.txt"):
        with open(path, encoding="utf-8") as f:
            for line in f:
                row = line.split()
                if len(row) > 3 and row[0] != "ID":
                    speaker, _, sex, accent, *_ = row
                    speakers["p" + speaker.removeprefix("p")] = {"sex": sex_of(sex), "accent": accent}
    return words, speakers


def voxceleb_side(folder):
    """vox1_meta.csv (tabs) -> {speaker: {"sex", "nationality"}}."""
    speakers = {}
    for path in find(folder, "vox1_meta.csv"):
        with open(path, encoding="utf-8", newline="") as f:
            for row in csv.DictReader(f, delimiter="\t"):
                speakers[row["VoxCeleb1 ID"]] = {
                    "sex": sex_of(row["Gender"]),
                    "nationality": row["Nationality"],
                }
    return speakers


def iemocap_side(folder):
    """EmoEvaluation's and transcriptions' lines -> {utterance: emotion}, {utterance: words}."""
    emotions, words = {}, {}
    for path in find(folder, "EmoEvaluation", "*.txt"):
        with open(path, encoding="utf-8") as f:
            for line in f:
                if match := re.match(r"\[[\d. -]+\]\s+(\S+)\s+([a-z]{3})\s", line):
                    emotions[match[1]] = IEMOCAP_EMOTION.get(match[2], "")
    for path in find(folder, "transcriptions", "*.txt"):
        with open(path, encoding="utf-8") as f:
            for line in f:
                if match := re.match(r"(\S+) \[[\d. -]+\]: (.+)", line):
                    words[match[1]] = match[2].strip()
    return emotions, words


def esc50_side(folder):
    """meta/esc50.csv -> {file name without suffix: sound}."""
    sounds = {}
    for path in find(folder, "esc50.csv"):
        for row in rows_of(path):
            sounds[last_of(row["filename"])] = spaced(row["category"])
    return sounds


def read_kaldi(path):
    """A Kaldi table: key, blank, value -> {key: value}."""
    found = {}
    with open(path, "rb") as f:
        for n, line in enumerate(f, 1):
            try:
                fields = line.decode().split(None, 1)
            except UnicodeDecodeError:
                raise UserError(f"{path}:{n}: not UTF-8") from None
            if fields:
                found[fields[0]] = "".join(fields[1:]).strip()
    return found


def rows_of_speechocean(path):
    """wav.scp and the tables beside it: text, utt2spk, spk2gender, spk2age."""
    folder = os.path.dirname(path)
    words, speakers, sexes, ages = (
        read_kaldi(os.path.join(folder, name)) for name in ("text", "utt2spk", "spk2gender", "spk2age")
    )
    for utterance, audio in read_kaldi(path).items():
        speaker = speakers[utterance]
        age = int(ages[speaker])
        yield {
            "audio": audio,
            "words": words[utterance].lower(),
            "speaker": speaker,
            "sex": sex_of(sexes[speaker]),
            "age": "child" if age < ADULT else "adult",
        }


def rows_of_gigaspeech(path):
    """GigaSpeech.json: recordings, each with its segments."""
    with open(path, encoding="utf-8") as f:
        for audio in json.load(f)["audios"]:
            for segment in audio["segments"]:
                yield segment | {"path": audio["path"]}


def rows_of_fma(path):
    """tracks.csv: a header of two lines, then the name of the index."""
    with open(path, encoding="utf-8", newline="") as f:
        table = csv.reader(f)
        header = ["/".join(pair) for pair in zip(next(table), next(table), strict=False)]
        next(table)
        return [dict(zip(["id", *header[1:]], row, strict=False)) for row in table]


def rows_of_tacos(path):
    """annotations_strong.csv, and beside it a list of the recordings that are for testing."""
    split = os.path.join(os.path.dirname(path), "test_split.csv")
    test = set()
    if os.path.exists(split):
        for row in rows_of(split):
            test.update(row.values())
    return [row | {"is_test": row["filename"] in test} for row in rows_of(path)]
