"""Speech from text by real engines, and answers from a language model behind a real, misbehaving server."""

import hashlib
import json
import math
import os
import pathlib
import shutil
import sys
import threading
import time
from collections import Counter

import pytest
import soundfile
from conftest import chat, served

from data import read_manifest
from tools import endpoint
from tools.prepare import main
from tools.questions import seconds_of
from tools.spoken_questions import INSTRUCTIONS, TEXTS
from tools.writer import strict_object

TROUBLE = ("garbage", "429", "500", "hang", "half", "fields")  # of a server that misbehaves
FILES = {  # a few entries of each text corpus in its published form
    "alpaca": (
        "a.json",
        [
            {"instruction": "Name three primary colours.", "input": "", "output": "Red, blue and yellow."},
            {"instruction": "Explain", "input": "why it rains.", "output": " ".join(["word"] * 20)},
            {"instruction": " ".join(["x"] * 90), "input": "", "output": "y"},
        ],
    ),
    "natural_questions": ("nq.jsonl", [{"question": "where is the sun", "answer": ["in the sky", "above"]}]),
    "trivia_qa": (
        "t.json",
        {"Data": [{"Question": "Who wrote Hamlet?", "Answer": {"Value": "Shakespeare", "Aliases": []}}]},
    ),
    "web_questions": (
        "w.json",
        [
            {
                "utterance": "what is the capital of france?",
                "targetValue": "(list (description Paris))",
                "url": "x",
            },
            {"utterance": "who was king?", "targetValue": '(list (description "King John") (description x))'},
        ],
    ),
}
COPY = "import sys, shutil; shutil.copy(sys.argv[3], sys.argv[2])"
ENGINE = f'{sys.executable} -c "{COPY}" {{text}} {{out}} {{speaker_wav}}'


def write_file(corpus, folder):
    name, rows = FILES[corpus]
    path = folder / name
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) if name.endswith("l") else json.dumps(rows))
    return str(path)


@pytest.mark.parametrize("corpus", TEXTS)
def test_questions_of_every_text_corpus(corpus, tmp_path, corpora):
    out = str(tmp_path / "q.jsonl")
    argv = ["speak", corpus, write_file(corpus, tmp_path), "--out", out]
    argv += ["--tts-command", ENGINE, "--speakers", f"{corpora}/fsdd"]
    assert main(argv) == 0
    examples = read_manifest(out)
    expected = {
        "alpaca": ["Red, blue and yellow.", " ".join(["word"] * 20)],
        "natural_questions": ["in the sky"],
        "trivia_qa": ["Shakespeare"],
        "web_questions": ["Paris", "King John"],
    }
    assert [e.answer for e in examples] == expected[corpus]
    for e in examples:
        kind = "simple" if len(e.answer.split()) <= 12 else "complex"
        assert e.task == f"{kind}_qa" and e.question in INSTRUCTIONS[kind] and e.duration == 0.2
    before = {f: os.stat(f"{tmp_path}/q_clips/{f}").st_mtime_ns for f in os.listdir(tmp_path / "q_clips")}
    assert main(argv) == 0  # nothing is spoken twice
    assert before == {
        f: os.stat(f"{tmp_path}/q_clips/{f}").st_mtime_ns for f in os.listdir(tmp_path / "q_clips")
    }


def test_espeak_reads_questions(tmp_path):
    if not shutil.which("espeak-ng"):
        pytest.skip("espeak-ng is not installed")
    out = str(tmp_path / "q.jsonl")
    assert main(["speak", "trivia_qa", write_file("trivia_qa", tmp_path), "--out", out, "--empathetic"]) == 0
    (e,) = read_manifest(out)
    assert e.question in INSTRUCTIONS["empathetic"] and 0.5 < soundfile.info(e.audio).duration < 4


def test_bad_speech(tmp_path, capsys, corpora):
    source, out = write_file("trivia_qa", tmp_path), str(tmp_path / "q.jsonl")
    (tmp_path / "odd.json").write_text('[{"a": 1}]')
    for argv, says in (
        (["--tts-command", "no-such-engine {text} {out}"], "cannot be run"),
        (["--tts-command", f"{sys.executable} -c pass {{text}} {{out}}"], "failed"),
        (["--tts-command", "touch {out}"], "the file is empty"),
        (["--tts-command", ENGINE], "--speakers"),
    ):
        assert main(["speak", "trivia_qa", source, "--out", out, *argv]) == 2
        assert says in capsys.readouterr().err.splitlines()[-1]
    assert main(["speak", "alpaca", str(tmp_path / "odd.json"), "--out", out]) == 2
    assert "not one of alpaca's files" in capsys.readouterr().err and not os.path.exists(out)
    assert os.listdir(tmp_path / "q_clips") == []


# ---------------------------------------------------------------------------------------------
# a language model


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """A language model's URL and the file of what it was asked; retries without long pauses.

    Every question is answered rightly at its fourth asking at the latest; before that it gets garbage, 429,
    500, a hang or half a line, in turns.
    """
    log, asked, lock = tmp_path / "asked.jsonl", Counter(), threading.Lock()

    def answer(path, key, body):
        system, user = (message["content"] for message in body["messages"])
        with lock, open(log, "a") as f:
            asked[user] += 1
            n = asked[user]
            f.write(json.dumps({"user": user, "system": system, "model": body["model"], "key": key}) + "\n")
        start = int(hashlib.sha256(user.encode()).hexdigest(), 16)
        trouble = TROUBLE[(start + n) % len(TROUBLE)] if n <= start % 4 else None
        worse = f"A wrong one ({len(user)})."
        good = {"bad_answer": worse, "explanation": "one fact", "usable": "unusable" not in user}
        if '"answer"' in system:
            good = {"answer": "It is so."}
        if trouble == "garbage":
            return 200, chat("Sure! Here is your answer: bad")
        if trouble == "hang":
            time.sleep(3)
        if trouble == "half":
            return 200, b'{"choices": [{"mess', 500
        if trouble in ("429", "500"):
            return int(trouble), b""
        return 200, chat(json.dumps(good | {"more": 1} if trouble == "fields" else good))

    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-123")
    monkeypatch.setattr(endpoint, "PAUSE", 0.02)
    with served(answer) as url:
        yield url, log


def facts_manifest(folder, n, corpora):
    clip = os.path.join(corpora, "fsdd/recordings/1_jackson_3.wav")
    rows = []
    for i in range(n):
        question = {"role": "user", "content": f"<audio>What is it, number {i}?"}
        messages = [question, {"role": "assistant", "content": "Rain."}]
        facts = {"sound": "rain" if i % 5 else "unusable rain"}
        rows.append({"messages": messages, "audios": [clip], "facts": facts, "task": "sound"})
    path = folder / "m.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_pairs_in_spite_of_everything(stub, tmp_path, corpora, capsys):
    (url, log), n = stub, 15
    manifest, out = facts_manifest(tmp_path, n, corpora), str(tmp_path / "p.jsonl")
    argv = ["preferences", manifest, "--out", out, "--llm", url, "--model", "writer", "--timeout", "1"]
    assert main(argv) == 0
    pairs = read_manifest(out, 4)
    assert len(pairs) == 12 and all(
        e.rejected.startswith("A wrong one") and e.answer == "Rain." for e in pairs
    )
    assert "3 pairs found unusable, 0 without" in capsys.readouterr().out
    asked = [json.loads(line) for line in log.read_text().splitlines()]
    assert n < len(asked) <= 4 * n and all(
        a["model"] == "writer" and a["key"] == "Bearer sk-secret-123" for a in asked
    )
    assert any("Recording: sound: rain" in a["user"] for a in asked) and all(
        "Good answer: Rain." in a["user"] and "bad_answer" in a["system"] for a in asked
    )
    # again: nothing is asked twice, the result is the same
    first = pathlib.Path(out).read_text()
    assert main(argv) == 0 and pathlib.Path(out).read_text() == first
    assert len(log.read_text().splitlines()) == len(asked)
    # a run that was killed in the middle of a line: the rest alone is asked again
    journal = pathlib.Path(out + ".replies.jsonl")
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:9]) + lines[9][:20])
    assert main(argv) == 0 and len(read_manifest(out, 4)) == 12
    again = Counter(json.loads(line)["user"] for line in log.read_text().splitlines()[len(asked) :])
    assert len(again) == n - 9
    for folder, _, names in os.walk(tmp_path):
        for name in names:
            if name != "asked.jsonl":
                assert "secret" not in pathlib.Path(folder, name).read_text(errors="ignore"), name


def test_grounded_answers(stub, tmp_path, corpora):
    url, log = stub
    out = str(tmp_path / "sub" / "a.jsonl")
    argv = ["answers", facts_manifest(tmp_path, 4, corpora), "--out", out, "--llm", url]
    assert main([*argv, "--model", "writer", "--timeout", "1"]) == 0
    assert [e.answer for e in read_manifest(out)] == ["It is so."] * 4


def test_the_other_formats_are_written_as_messages(stub, tmp_path, corpora):
    """NeMo's and the authors' lines, whose transcript is a fact; a line without facts is not asked about."""
    url, log = stub
    nemo = {"audio_filepath": f"{corpora}/fsdd/recordings/1_jackson_3.wav", "text": "one", "offset": 0.01}
    plain = {"messages": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A"}]}
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (nemo, plain)))
    for command, stage in (("answers", 2), ("preferences", 4)):
        out = str(tmp_path / "sub" / f"{command}.jsonl")
        argv = [command, str(tmp_path / "m.jsonl"), "--out", out, "--llm", url, "--model", "w"]
        assert main([*argv, "--timeout", "1"]) == 0
        (e,) = read_manifest(out, stage)
        assert (e.facts, e.offset) == ({"words": "one"}, 0.01)
        assert math.isclose(e.duration + 0.01, seconds_of(e.audio), abs_tol=1e-4)
        assert e.answer == ("It is so." if stage == 2 else "one") and bool(e.rejected) == (stage == 4)
    # a kill within a letter: the journal is read all the same
    with open(out + ".replies.jsonl", "ab") as f:
        f.write('{"key": "é'.encode()[:-1])
    assert main([*argv, "--timeout", "1"]) == 0


def test_endpoint_down_or_refusing(tmp_path, corpora, capsys, monkeypatch):
    monkeypatch.setattr(endpoint, "TRIES", 2)
    monkeypatch.setattr(endpoint, "PAUSE", 0.01)
    manifest, out = facts_manifest(tmp_path, 3, corpora), str(tmp_path / "p.jsonl")
    down = ["--out", out, "--llm", "http://127.0.0.1:9/v1", "--model", "m"]
    assert main(["preferences", manifest, *down]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("prepare: http://127.0.0.1:9/v1: no answer after 2 tries")
    assert not os.path.exists(out)
    messages = [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A"}]
    (tmp_path / "plain.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    assert main(["answers", str(tmp_path / "plain.jsonl"), *down]) == 2
    assert "no line has facts" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        '{"a": "x", "b": 1}',
        '{"a": "x", "b": true, "c": 0}',
        '["a"]',
        '{"a": "x", "b": tr',
        '```json\n{"a": "x", "b": true}\n```',
    ],
)
def test_strict_object_refuses(text):
    with pytest.raises(ValueError):
        strict_object(text, a=str, b=bool)
    assert strict_object('{"b": false, "a": ""}', a=str, b=bool) == {"a": "", "b": False}
