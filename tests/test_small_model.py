"""The shipped weights: what lies in assets, and scores on real recordings where they are."""

import os
import random

import numpy as np
import pytest
import torch
from tqdm import tqdm

from adapters import merge_lora
from data import load_audio
from decode import ask
from tools.benchmarks import normalise, word_errors
from tools.compose import strings
from tools.corpora import read_corpus
from tools.questions import askable, draw_question
from weights import load

ASSETS = os.path.join(os.path.dirname(__file__), "..", "assets")
# task -> corpus, least share right: some way below what was measured (docs/RESULTS.md), for forty clips
REAL = {
    "digit": ("fsdd", 0.9),
    "word": ("speech_commands", 0.5),
    "sound": ("esc10", 0.8),
    "sex": ("ravdess", 0.9),
    "emotion": ("ravdess", 0.4),
    "instrument": ("berklee", 0.2),
}
STRINGS = 0.2  # word error rate, at most


@pytest.fixture(scope="module")
def shipped():
    model, tokenizer = load("tiny", "cpu", torch.float32)
    merge_lora(model)
    return model, tokenizer


def test_it_is_what_the_card_says(shipped):
    """At most 30 MB with tokenizer and card, no pickle, Whisper's encoder once and for itself."""
    folder = os.path.join(ASSETS, "tiny")
    assert sorted(os.listdir(folder)) == ["README.md", "model.safetensors", "tokenizer.json"]
    assert sum(os.path.getsize(os.path.join(folder, f)) for f in os.listdir(folder)) <= 30_000_000
    whisper = os.path.join(ASSETS, "whisper-tiny.en")
    assert sorted(os.listdir(whisper)) == ["LICENSE", "README.md", "encoder.safetensors"]
    model, tokenizer = shipped
    assert model.stage == 4 and model.base == {"name": "tiny", "whisper": "whisper-tiny.en"}
    assert 2000 <= tokenizer.get_vocab_size() <= 4000


def test_the_demo_clip(shipped):
    """Made by espeak-ng, which was not in training."""
    clip = os.path.join(ASSETS, "demo", "seven.wav")
    assert ask(*shipped, clip, "Which digit is spoken?", answer_length=16, block=16).text == "Seven."


@pytest.mark.parametrize("task", sorted(REAL))
def test_real_recordings(shipped, shared_audio, task):
    """Forty clips of the test split, drawn by a fixed seed, factor 1."""
    rng, (corpus, least) = random.Random(0), REAL[task]
    clips = read_corpus(corpus, os.path.join(shared_audio, corpus))
    clips = [c for c in clips if c.is_test and askable(c, [task])]
    clips = rng.sample(clips, min(40, len(clips)))
    drawn = [draw_question(c, rng, [task], 0) for c in clips]
    questions, facts = [q for _, q, *_ in drawn], [fact for *_, fact, _ in drawn]
    answers = ask(*shipped, [c.path for c in clips], questions, answer_length=16, block=16)
    right = [normalise(a.text) == normalise(fact) for a, fact in zip(answers, facts, strict=True)]
    assert sum(right) / len(right) >= least


def test_strings_of_digits_short_and_long(shipped, shared_audio, tmp_path):
    """Forty strings of the test split; joined to clips of a minute they are read as well."""
    digits = [c for c in read_corpus("fsdd", os.path.join(shared_audio, "fsdd")) if c.is_test]
    made = list(strings(digits, 40, 5, random.Random(0), str(tmp_path), tqdm(disable=True)))
    audios, texts = [load_audio(c.path)[0] for c in made], [c.facts["words"] for c in made]
    options = {"answer_length": 32, "block": 32}
    answers = ask(*shipped, audios, "What is said?", **options)
    short = word_errors(texts, [a.text for a in answers], normalise)
    assert short["words"] > 100 and short["wer"] <= STRINGS, short
    silence = np.zeros(8000, np.float32)
    joined = [np.concatenate([x for a in audios[i : i + 20] for x in (a, silence)]) for i in (0, 20)]
    assert min(map(len, joined)) > 40 * 16000
    answers = ask(*shipped, joined, "What is said?", **options)
    long = word_errors([" ".join(texts[i : i + 20]) for i in (0, 20)], [a.text for a in answers], normalise)
    assert long["wer"] <= short["wer"] + 0.05, (short, long)
