"""Text to speech: engines, a real HTTP server among them, sentences and short questions."""

import hashlib
import io
import json
import os
import pathlib
import random
import shutil
import sys
from collections import Counter

import numpy as np
import pytest
import soundfile
from conftest import read_lines, served

from data import load_audio, read_manifest
from runtime.errors import UserError
from tools.corpora import read_corpus
from tools.prepare import main
from tools.speech import (
    Espeak,
    SpeechEndpoint,
    choose_engine,
    read_sentences,
    read_wav,
    spoken_jobs,
)
from tools.spoken_questions import INSTRUCTIONS, short_questions

BOOK = "“I see,” said he. The old dog went slowly home again.  No.\n"
BOOK += "It rained all day long! Was it cold there, in 1850?\n"


def wav(seconds=0.25, rate=24000, channels=1):
    """A tone as the bytes of a WAV."""
    t = np.arange(int(seconds * rate)) / rate
    tone = 0.3 * np.sin(2 * np.pi * 440 * t)
    data = io.BytesIO()
    soundfile.write(data, np.stack([tone] * channels, 1), rate, format="WAV")
    return data.getvalue()


@pytest.fixture
def server(monkeypatch):
    """A speech server -> its URL, the statuses or bodies it gives next (then WAVs), what it was asked."""
    replies, asked = [], []

    def answer(*request):
        asked.append(request)
        reply = replies.pop(0) if replies else 200
        return (200, reply) if isinstance(reply, bytes) else (reply, wav())

    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-123")
    monkeypatch.setattr("tools.endpoint.time.sleep", lambda seconds: None)
    with served(answer) as url:
        yield url, replies, asked


def test_the_endpoint_speaks(server, tmp_path):
    url, _, asked = server
    path = str(tmp_path / "a.wav")
    SpeechEndpoint(url, ("alloy",), "kokoro").say("Hello there.", path, "alloy", 1.1)
    audio, rate = soundfile.read(path)
    assert rate == 16000 and abs(len(audio) - 4000) < 20 and 0.2 < np.abs(audio).max() < 0.35
    body = {"model": "kokoro", "input": "Hello there.", "voice": "alloy", "speed": 1.1}
    body |= {"response_format": "wav"}
    assert asked == [("/v1/audio/speech", "Bearer sk-secret-123", body)]


@pytest.mark.parametrize("trouble", [[500], [429, 503], [b"not a wav"], [b""], [wav()[:30], 500]])
def test_the_endpoint_is_asked_again(server, tmp_path, trouble):
    url, replies, asked = server
    replies += trouble
    path = str(tmp_path / "a.wav")
    SpeechEndpoint(url, ("a",)).say("Hi.", path, "a", 1.0)
    assert len(asked) == len(trouble) + 1 and soundfile.info(path).frames


def test_the_endpoint_refuses(server, tmp_path, capsys):
    url, replies, asked = server
    (tmp_path / "book.txt").write_text(BOOK)
    out = str(tmp_path / "speech" / "lines.jsonl")
    argv = ["speak", "sentences", str(tmp_path / "book.txt"), "--out", out]
    argv += ["--tts", url, "--voices", "a", "--workers", "1"]
    replies += [401] * 9
    assert main(argv) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith(f"prepare: {url}: refuses (401") and not os.path.exists(out)
    assert "sk-secret" not in err
    replies[:] = [500] * 6
    with pytest.raises(UserError, match="no WAV that can be read, voice a, in 6 tries"):
        SpeechEndpoint(url, ("a",)).say("Hi.", str(tmp_path / "a.wav"), "a", 1.0)
    with pytest.raises(UserError, match="no answer after 6 tries"):
        SpeechEndpoint("http://127.0.0.1:9/v1", ("a",)).say("Hi.", str(tmp_path / "a.wav"), "a", 1.0)
    assert not os.path.exists(tmp_path / "a.wav")


def test_two_channels_become_one():
    audio = read_wav(wav(0.5, 48000, 2))
    assert audio.shape == (8000,) and audio.dtype == np.float32


def test_sentences_become_a_corpus(server, tmp_path, capsys):
    url, _, asked = server
    words = ("ant", "bee", "cow", "dog", "elk", "fox", "gnu", "hen")
    text = " ".join(f"The {a} saw the {b} again." for a in words for b in words)
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "one.txt").write_text(text)
    folder = tmp_path / "speech"
    out = str(folder / "lines.jsonl")
    argv = ["speak", "sentences", str(tmp_path / "books"), "--out", out, "--tts", url, "--tts-model", "m"]
    argv += ["--voices", "af_a,am_b,bf_c", "--test-voices", "bf_c", "--limit", "24"]
    assert main(argv) == 0
    assert "24 clips, 0.00 hours" in capsys.readouterr().out and len(asked) == 24
    rows = read_lines(out)
    assert [row["answer"] is not None for row in rows] == [False, False, False, True] * 6
    for row in rows:
        assert row.keys() == {"file", "text", "voice", "answer", "split"}
        named = hashlib.sha1(f"{row['voice']}|{row['text']}".encode()).hexdigest()
        assert row["file"] == named[:16] + ".flac"
        assert row["split"] == ("test" if row["voice"] == "bf_c" else "train")
        assert soundfile.info(folder / row["file"]).samplerate == 16000
    assert set(Counter(row["voice"] for row in rows).values()) == {8}
    assert len({(row["voice"], row["text"]) for row in rows}) == 24
    assert sorted(os.listdir(folder)) == sorted(["lines.jsonl"] + [row["file"] for row in rows])
    clips = read_corpus("neural", str(folder))
    assert len(clips) == 24 and sum(bool(c.qa) for c in clips) == 6 and sum(c.is_test for c in clips) == 8
    before = pathlib.Path(out).read_text()
    assert main(argv) == 0 and len(asked) == 24  # nothing is spoken twice
    assert pathlib.Path(out).read_text() == before
    os.remove(folder / rows[5]["file"])
    assert main(argv) == 0 and len(asked) == 25 and pathlib.Path(out).read_text() == before
    assert main([*argv[:-2], "--limit", "2"]) == 0 and read_lines(out) == rows[:2]


def test_questions_read_by_the_endpoint(server, tmp_path):
    url, _, asked = server
    source = tmp_path / "nq.jsonl"
    source.write_text(json.dumps({"question": "where is the sun", "answer": ["in the sky"]}) + "\n")
    out = str(tmp_path / "q.jsonl")
    argv = ["speak", "natural_questions", str(source), "--out", out, "--tts", url, "--voices", "a,b"]
    assert main(argv) == 0 and main(argv) == 0 and len(asked) == 1
    (e,) = read_manifest(out)
    # another question under the same --out is spoken, not given the clip that is there
    source.write_text(json.dumps({"question": "where is the moon", "answer": ["far away"]}) + "\n")
    assert main(argv) == 0 and [body["input"] for *_, body in asked[1:]] == ["where is the moon"]
    assert (
        e.answer == "in the sky"
        and e.question in INSTRUCTIONS["simple"]
        and len(load_audio(e.audio)[0]) == 4000
    )


def test_bad_requests(tmp_path, capsys):
    book = tmp_path / "book.txt"
    book.write_text(BOOK)
    (tmp_path / "empty.txt").write_text("One.\n")
    speak = ["speak", "sentences", str(book), "--out", str(tmp_path / "s" / "lines.jsonl")]
    tts = ["--tts", "http://127.0.0.1:9/v1"]
    for argv, says in (
        (speak + tts, "--voices"),
        ([*speak, *tts, "--voices", "a", "--tts-command", "x {text} {out}"], "name one"),
        ([*speak, *tts, "--voices", "a,b", "--test-voices", "c"], "c is none of the voices"),
        ([*speak, "--tts-command", "x {text} {out} {voice}"], "--voices"),
        ([*speak[:-1], str(tmp_path / "all.jsonl"), *tts, "--voices", "a"], "lines.jsonl"),
        (
            ["speak", "sentences", str(tmp_path / "empty.txt"), *speak[3:], *tts, "--voices", "a"],
            "no sentence",
        ),
        (
            ["speak", "sentences", str(tmp_path / "none.txt"), *speak[3:], *tts, "--voices", "a"],
            "cannot be read",
        ),
        (
            ["speak", "alpaca", str(tmp_path / "none.json"), *speak[3:], *tts, "--voices", "a"],
            "cannot be read",
        ),
    ):
        assert main(argv) == 2, argv
        err = capsys.readouterr().err
        assert says in err and err.startswith("prepare: ") and err.count("\n") == 1, err
    assert sorted(os.listdir(tmp_path)) == ["book.txt", "empty.txt"]


def test_a_command_speaks_sentences(tmp_path):
    """The text and the voice go to the program as they are, quotes, braces and all."""
    (tmp_path / "a.wav").write_bytes(wav())
    (tmp_path / "book.txt").write_text("The {out} of it.\nThe dog isn't at home today.\n")
    log, clip = str(tmp_path / "log"), str(tmp_path / "a.wav")
    script = f"import sys, shutil; open({log!r}, 'a').write(repr(sys.argv[1:])); "
    script += f"shutil.copy({clip!r}, sys.argv[2])"
    command = f'{sys.executable} -c "{script}" {{text}} {{out}} {{voice}}'
    out = str(tmp_path / "s" / "lines.jsonl")
    argv = ["speak", "sentences", str(tmp_path / "book.txt"), "--out", out]
    assert main([*argv, "--tts-command", command, "--voices", "af_x"]) == 0
    (row,) = read_lines(out)
    assert row["text"] == "The dog isn't at home today." and "isn't" in (tmp_path / "log").read_text()
    assert "'af_x'" in (tmp_path / "log").read_text()


def test_sentences_of_a_book(tmp_path):
    (tmp_path / "a.txt").write_text(BOOK + BOOK)
    found = read_sentences(str(tmp_path / "a.txt"))
    assert found == ["I see, said he.", "The old dog went slowly home again.", "It rained all day long!"]
    assert read_sentences(str(tmp_path)) == found


def test_every_fourth_is_a_question_and_nothing_is_said_twice():
    voices = ("a", "b", "c", "d")  # of an even number the rounds must not meet again
    asked = len(short_questions()) * len(voices)
    n = 3 * asked
    jobs = list(spoken_jobs([f"sentence {i}" for i in range(n)], voices, random.Random(0)))
    assert len({job[:2] for job in jobs}) == len(jobs) == n + asked
    assert all((answer is not None) == (i % 4 == 3) for i, (_, _, answer) in enumerate(jobs))
    assert {v for _, v, answer in jobs if answer} == set(voices)


def test_short_questions_are_answered_rightly():
    pairs = short_questions()
    answers = dict(pairs)
    assert len(answers) == len(pairs) > 500  # no question has two answers
    for question, answer in (
        ("What is seven plus five?", "Twelve."),
        ("What is twenty minus nineteen?", "One."),
        ("Which day comes after Sunday?", "Monday."),
        ("Which day comes before Monday?", "Sunday."),
        ("What is the opposite of cold?", "Hot."),
        ("Tell me the opposite of heavy.", "Light."),
        ("What is the opposite of light?", "Dark."),
        ("What colour is a carrot?", "Orange."),
        ("Which animal has a trunk?", "An elephant."),
        ("What animal meows?", "A cat."),
    ):
        assert answers[question] == answer


def test_espeak_is_the_engine_of_last_resort(tmp_path):
    assert choose_engine() == Espeak() and choose_engine(voices=["en-us"]).voices == ("en-us",)
    if not shutil.which("espeak-ng"):
        pytest.skip("espeak-ng is not installed")
    Espeak().say("Hello.", str(tmp_path / "a.wav"), Espeak.voices[0], 1.0)
    assert soundfile.info(tmp_path / "a.wav").duration > 0.2
