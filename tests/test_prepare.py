"""Manifests from miniature corpora in their published layout, and from the real ones where they are."""

import json
import os
import random

import numpy as np
import pytest
import soundfile

from data import load_audio, read_manifest
from prepare import CORPORA, DIGITS, QUESTIONS, Clip, compose, main, questions_about, read_corpus


def sound(path, seconds=0.2):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    rng = np.random.default_rng(len(path))
    soundfile.write(path, rng.uniform(-0.3, 0.3, int(16000 * seconds)), 16000)


@pytest.fixture(scope="session")
def corpora(tmp_path_factory):
    """A few files of each corpus, named and laid out as published."""
    root = tmp_path_factory.mktemp("corpora")
    for digit in range(10):
        for index in (0, 1, 2, 3, 4):
            sound(f"{root}/fsdd/recordings/{digit}_jackson_{index}.wav")
    for word in ("bed", "cat", "seven"):
        for speaker in ("0ab12345", "1cd12345", "2ef12345", "9ff12345"):
            sound(f"{root}/speech_commands/{word}/{speaker}_nohash_0.wav")
    for n, label in ((1, "Dog bark"), (2, "Rain")):
        for fold in (1, 4, 5):
            sound(f"{root}/esc10/00{n} - {label}/{fold}-{1000 + fold}-A.ogg", 0.5)
    (root / "esc10" / "README.txt").write_text("not a clip")
    return str(root)


def test_names_tell_words_labels_and_split(corpora):
    clips = {name: read_corpus(name, os.path.join(corpora, name)) for name in CORPORA}
    assert [len(clips[n]) for n in ("fsdd", "speech_commands", "esc10")] == [50, 12, 6]
    digit = {os.path.basename(c.path): c for c in clips["fsdd"]}
    assert digit["7_jackson_3.wav"].transcript == "seven"
    assert [digit[f"7_jackson_{i}.wav"].is_test for i in range(5)] == [True, True, True, False, False]
    words = {c.path.split("speech_commands/")[1]: c for c in clips["speech_commands"]}
    assert words["cat/1cd12345_nohash_0.wav"].transcript == "cat"
    # the speaker's hash starts with 0, or the word's last clip by name
    assert sorted(k for k, c in words.items() if c.is_test and k.startswith("cat")) == ["cat/0ab12345_nohash_0.wav", "cat/9ff12345_nohash_0.wav"]
    assert {(c.label, c.is_test) for c in clips["esc10"]} == {("dog bark", False), ("dog bark", True), ("rain", False), ("rain", True)}
    assert all("/4-" in c.path for c in clips["esc10"] if c.is_test)


def test_the_real_corpora(shared_audio):
    clips = {name: read_corpus(name, os.path.join(shared_audio, name)) for name in CORPORA}
    assert [len(clips[n]) for n in ("fsdd", "speech_commands", "esc10")] == [2880, 1010, 320]
    assert sum(c.is_test for c in clips["fsdd"]) == 180 and sum(c.is_test for c in clips["esc10"]) == 80
    assert len({c.transcript for c in clips["speech_commands"]}) == 30
    assert {c.transcript for c in clips["speech_commands"] if c.is_test} == {c.transcript for c in clips["speech_commands"]}
    assert len({c.label for c in clips["esc10"]}) == 10


def test_bad_sources(tmp_path, corpora, capsys):
    for argv, says in (
        (["fsdd", str(tmp_path / "none"), "--out", str(tmp_path / "a.jsonl")], "no such folder"),
        (["fsdd", str(tmp_path), "--out", str(tmp_path / "a.jsonl")], "named like fsdd"),
        (["tour", "--audio", str(tmp_path)], "no such folder"),
        (["nonesuch", "x"], "nonesuch"),
        (["fsdd", corpora + "/fsdd", "--out", "/proc/nothing/a.jsonl"], "cannot be written"),
        (["tour", "--audio", corpora, "--out", "/proc/nothing"], "cannot be written"),
        (["show", str(tmp_path / "none.jsonl")], "tokenizer"),
    ):
        assert main(argv) == 2
        out, err = capsys.readouterr()
        assert err.count("\n") == 1 and says in err and err.startswith("prepare.py: "), err
    assert os.listdir(tmp_path) == []


def test_one_corpus_to_a_manifest(tmp_path, corpora):
    out = str(tmp_path / "m.jsonl")
    assert main(["esc10", corpora + "/esc10", "--out", out, "--split", "train"]) == 0
    examples = read_manifest(out)
    assert len(examples) == 4 and {e.label for e in examples} == {"dog bark", "rain"}
    assert main(["esc10", corpora + "/esc10", "--out", out, "--split", "test"]) == 0
    assert len(read_manifest(out)) == 2 and os.listdir(tmp_path) == ["m.jsonl"]


def test_answers_are_true_of_the_clip():
    string = Clip("a", "fsdd_strings", "seven three zero")
    answers = {}
    for task, answer in questions_about(string):
        answers[task] = answer
    assert answers["asr"] == "seven three zero" and answers["first"] == "Seven." and answers["last"] == "Zero."
    assert answers["count"] == "Three." and answers["any"] == "Seven three zero." and answers["kind"] == "Speech."
    assert "digit" not in answers and "sound" not in answers
    single = dict(questions_about(Clip("a", "fsdd", "nine")))
    assert single["digit"] == single["word"] == "Nine." and "count" not in single
    rain = dict(questions_about(Clip("a", "esc10", label="sea waves")))
    assert rain["sound"] == "Sea waves." and rain["kind"] == "A sound." and "asr" not in rain
    assert "first" not in dict(questions_about(Clip("a", "speech_commands", "bed cat")))
    assert set(answers) | set(single) | set(rain) == set(QUESTIONS)


def test_composing_keeps_every_clip(tmp_path, corpora):
    clips = [c for c in read_corpus("fsdd", corpora + "/fsdd")][:3]
    made = compose(clips, random.Random(0), str(tmp_path / "s.flac"))
    audio, _ = load_audio(made.path)
    assert made.transcript == " ".join(c.transcript for c in clips)
    loud = np.abs(audio) > 0.05 * np.abs(audio).max()
    assert 0.3 * 9600 < loud.sum() <= 9600 and len(audio) > 9600  # three clips of 0.2 s and gaps
    assert np.abs(audio).max() <= 1


@pytest.fixture(scope="session")
def toured(tmp_path_factory, corpora):
    out = str(tmp_path_factory.mktemp("tour"))
    assert main(["tour", "--audio", corpora, "--out", out, "--strings", "20"]) == 0
    return out


def test_tour_never_trains_on_the_test_split(toured, corpora):
    test_clips = {os.path.abspath(c.path) for name in CORPORA for c in read_corpus(name, os.path.join(corpora, name)) if c.is_test}
    for stage in range(4):
        examples = read_manifest(f"{toured}/stage{stage}.jsonl", stage)
        assert examples and not {os.path.abspath(e.audio) for e in examples} & test_clips
        assert not any("test_digits" in e.audio for e in examples)
    examples = read_manifest(f"{toured}/test.jsonl")
    assert test_clips <= {os.path.abspath(e.audio) for e in examples}
    assert all(e.answer for e in read_manifest(f"{toured}/stage1.jsonl", 1))


def test_tour_is_the_same_for_a_seed(toured, corpora, tmp_path):
    again = str(tmp_path / "again")
    assert main(["tour", "--audio", corpora, "--out", again, "--strings", "20"]) == 0
    for name in ("stage0.jsonl", "stage3.jsonl", "test.jsonl", "tokenizer.json", "clips/digits/00003.flac"):
        same = [open(os.path.join(folder, name), "rb").read() for folder in (toured, again)]
        if name.endswith(".jsonl"):  # the clips lie elsewhere, all else is equal
            strip = lambda data: [(e["messages"], e["task"], os.path.basename(e["audios"][0])) for e in map(json.loads, data.splitlines())]
            same = list(map(strip, same))
        assert same[0] == same[1], name


def test_tokenizer_speaks_the_prompt(toured, tokenizer):
    from model import load_tokenizer

    t = load_tokenizer(toured)
    for text in ("Rain.", "seven three", "What do you hear? é ß 漢", "\n\n"):
        assert t.decode(t.encode(text, add_special_tokens=False).ids) == text
    assert len(t.encode("You are a helpful voice assistant.", add_special_tokens=False).ids) < 12
    assert t.get_vocab_size() <= 640 and len(DIGITS) == 10


def test_show_prints_what_the_model_sees(toured, capsys):
    assert main(["show", f"{toured}/stage2.jsonl", "-n", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("canvas of") == 2 and "This is the audio:'" in out and "' <audio>. " in out
