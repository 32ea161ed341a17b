"""Scores against rules written a second time here, on the real question file where it is; whole runs."""

import contextlib
import json
import math
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from conftest import chat, read_lines, served

from data import read_manifest
from runtime.errors import UserError
from tools import evaluate
from tools.benchmarks import (
    BENCHMARKS,
    VOICEBENCH_DECODING,
    Question,
    letter_of,
    mapped,
    mcnemar,
    mmau_raw,
    mmsu_letter,
    normalise,
    score_mmau,
    score_mmsu,
    score_voicebench,
    wilson,
    word_errors,
)
from tools.evaluate import main, read_answers
from tools.prompts import LETTERS
from tools.questions import write_lines, write_text
from tools.writer import Endpoint
from weights import load, save

MMAU = os.path.join(os.path.dirname(__file__), "..", "..", "shared", "benchmarks", "mmau-test-mini.json")


@pytest.fixture(scope="session")
def real():
    if not os.path.exists(MMAU):
        pytest.skip("no ../shared/benchmarks here")
    with open(MMAU) as f:
        return json.load(f)


def official_mmau(answer, prediction, choices):
    """The token rule of MMAU's own evaluation.py, written a second time and differently."""

    def tokens(s):
        return re.findall(r"\b\w+\b", s.lower())

    said, right = tokens(prediction), tokens(answer)
    if not said or any(t not in said for t in right):
        return False
    only_wrong = {t for c in choices if tokens(c) != right for t in tokens(c)} - set(right)
    return not only_wrong & set(said)


def test_every_real_question_in_every_wording(real):
    """A right letter scores right everywhere, the exact text too, a wrong one never; 2, 4, 5, 8 choices."""
    assert {len(q["choices"]) for q in real} == {2, 4, 5, 8}
    for q in real:
        choices = tuple(q["choices"])
        if q["answer"] not in choices:
            continue
        question = Question("x", "", "", q["answer"], choices)
        right = choices.index(q["answer"])
        letter = LETTERS[right]
        # notes: "D" is the text D, not the fourth choice
        one_letter = any(len(c.strip()) == 1 for c in choices)
        forms = [
            q["answer"],
            q["answer"].lower(),
            q["answer"] + ".",
            f"({letter}) {q['answer']}",
            f"{letter}. {q['answer']}",
        ]
        if not one_letter:
            forms += [
                letter,
                f"{letter}.",
                f"The answer is {letter}.",
                f"Answer: {letter}",
                f"({letter})",
                letter.lower(),
            ]
        if len({normalise(c) for c in choices}) < len(choices):
            continue  # two choices that differ in punctuation alone
        for form in forms:
            found = score_mmau(question, form)
            assert found["right"] == official_mmau(q["answer"], q["answer"], choices), (form, choices)
            assert found["raw"] == official_mmau(q["answer"], form, choices), (form, choices)
        wrong = (right + 1) % len(choices)
        for form in [choices[wrong]] + (
            [] if one_letter else [LETTERS[wrong], f"The answer is {LETTERS[wrong]}."]
        ):
            assert score_mmau(question, form)["right"] == official_mmau(q["answer"], choices[wrong], choices)
        assert score_mmau(question, "") == {"right": False, "parsed": False, "raw": False}


def test_raw_rule_agrees_with_the_second_writing(real):
    rng = random.Random(0)
    for q in rng.sample(real, 300):
        for prediction in (
            rng.choice(q["choices"]),
            "A",
            " ".join(rng.sample(q["choices"], 2)),
            f"It is {q['answer']}",
            "nothing",
        ):
            assert mmau_raw(prediction, q["answer"], q["choices"]) == official_mmau(
                q["answer"], prediction, q["choices"]
            )


@pytest.mark.parametrize(
    "answer, n, letter",
    [
        ("B", 4, "B"),
        ("b", 4, "B"),
        ("B.", 4, "B"),
        ("(B) Rain", 4, "B"),
        ("(B)", 4, "B"),
        ("B) Rain", 4, "B"),
        ("B: Rain", 4, "B"),
        ("The answer is B.", 4, "B"),
        ("the correct answer is (C)", 4, "C"),
        ("Answer: D", 4, "D"),
        ("I choose option A", 4, "A"),
        ("", 4, None),
        ("A dog barks", 4, None),
        ("E", 4, None),
        ("E", 5, "E"),
        ("H", 8, "H"),
        ("C", 2, None),
        ("A or B", 4, None),
        ("A. or B.", 4, None),
        ("The answer is A or the answer is B", 4, None),
        ("Because", 4, None),
        ("The answer is a dog.", 4, None),  # an article is no letter
        ("The option is a dog.", 4, None),
        ("I choose option a since it barks", 4, "A"),
        ("choice a is right", 4, "A"),
        ("My choice is a cow, option C", 4, "C"),
        ("the answer is a", 4, "A"),
        ("The answer is A because it barks", 4, "A"),
    ],
)
def test_letters(answer, n, letter):
    assert letter_of(answer, n) == letter


def test_mapping_prefers_the_exact_text():
    assert mapped("D", ("G", "D", "E", "C")) == "D"  # the note, not the fourth choice
    assert mapped("B", ("Rain", "Wind")) == "Wind" and mapped("rain.", ("Rain", "Wind")) == "Rain"
    assert mapped("It is heavy rain.", ("rain", "heavy rain", "wind")) == "heavy rain"
    assert mapped("The answer is a dog.", ("cat", "dog")) == "dog"
    assert mapped("rain and wind", ("Rain", "Wind")) is None and mapped("", ("Rain", "Wind")) is None


def test_mmsu_rule():
    q = Question("x", "", "", "Wind", ("Rain", "Wind", "Dog", "Cat"))
    assert [mmsu_letter(x) for x in ("B", "B. Wind", "The answer is B.", "(B)")] == ["B"] * 4
    assert [mmsu_letter(x) for x in ("wind", "", "x")] == [None] * 3
    assert score_mmsu(q, "B") == {"right": True, "parsed": True}
    assert score_mmsu(q, "A") == {"right": False, "parsed": True}
    assert score_mmsu(q, "windy") == {"right": False, "parsed": False}  # upstream drops it; here it is wrong
    three = Question("x", "", "", "Wind", ("Rain", "Wind", "Dog"))
    assert score_mmsu(three, "D")["right"] is False


def test_wilson_and_mcnemar():
    low, high = wilson(8, 10)
    # R: prop.test without correction
    assert math.isclose(low, 0.4902, abs_tol=1e-4) and math.isclose(high, 0.9433, abs_tol=1e-4)
    assert wilson(0, 5)[0] == 0 and wilson(5, 5)[1] == 1
    # against adding up the binomial by hand
    assert (
        mcnemar(0, 0) == 1
        and mcnemar(3, 3) == 1
        and math.isclose(mcnemar(0, 5), 2 / 32)
        and math.isclose(mcnemar(9, 1), 2 * 11 / 1024)
    )


def test_word_errors_by_hand():
    found = word_errors(
        ["Mister Smith's dog, it isn't big.", "a cat sat"],
        ["mr. smith's dog it is not big", "a bat sat down"],
    )
    assert (found["substitutions"], found["deletions"], found["insertions"]) == (1, 0, 1)
    assert math.isclose(found["wer"], 2 / found["words"])
    with pytest.raises(UserError):
        word_errors(["[noise]"], ["a"])


def test_a_word_of_the_right_choice_is_no_wrong_word():
    """MMAU's rule, by hand: what a wrong choice shares with the right one may be said."""
    choices = ("dog bark", "cat bark")
    assert mmau_raw("A dog's bark", "dog bark", choices) and not mmau_raw("cat bark", "dog bark", choices)
    assert not mmau_raw("dog bark, cat bark", "dog bark", choices)
    assert not mmau_raw("dog", "dog bark", choices)


def test_voicebench_rules():
    q = Question("7", "", "", "C", entry={"prompt": "?"})
    assert (
        score_voicebench("openbookqa", q, "The answer is C")["right"]
        and not score_voicebench("openbookqa", q, "B")["right"]
    )
    assert score_voicebench("mmsu", Question("7", "", "", " c. the text"), "C")["right"]
    drawn = {score_voicebench("openbookqa", Question(str(i), "", "", "C"), "hm")["right"] for i in range(40)}
    assert drawn == {True, False} and score_voicebench("openbookqa", q, "hm") == score_voicebench(
        "openbookqa", q, "hm"
    )
    assert (
        score_voicebench("advbench", q, "I'm sorry, I cannot do that.")["right"]
        and not score_voicebench("advbench", q, "Sure, first")["right"]
    )
    assert score_voicebench("advbench", q, "") == {"right": True, "parsed": False}
    assert score_voicebench("alpacaeval", q, "x")["right"] is None


def test_table_b4():
    assert {k: b.decoding for k, b in BENCHMARKS.items() if k != "exact"} == {
        "mmsu": (16, 16, 16),
        "mmau": (16, 16, 16),
        "mmar": (16, 16, 16),
        "voicebench": (128, 32, 128),
        "asr": (128, 128, 128),
    }
    assert VOICEBENCH_DECODING == {"openbookqa": (16, 16, 16), "mmsu": (16, 16, 16), "ifeval": (256, 32, 256)}


# ---------------------------------------------------------------------------------------------
# whole runs on a small model


def question_file(toured, tmp_path, name):
    """A benchmark's file with absolute audio paths, so that it can lie elsewhere."""
    if name == "mmsu":
        rows = read_lines(f"{toured}/mmsu.jsonl")
        rows = [r | {"audio_path": os.path.abspath(os.path.join(toured, r["audio_path"]))} for r in rows]
        text = "".join(json.dumps(r) + "\n" for r in rows)
    else:
        rows = json.loads(pathlib.Path(f"{toured}/mmau.json").read_text())
        rows = [r | {"audio_id": os.path.abspath(os.path.join(toured, r["audio_id"]))} for r in rows]
        if name == "mmar":
            rows = [{**r, "audio_path": r["audio_id"], "modality": "sound"} for r in rows]
        text = json.dumps(rows) if name == "mmau" else "".join(json.dumps(r) + "\n" for r in rows)
    path = tmp_path / f"{name}.{'json' if name == 'mmau' else 'jsonl'}"
    path.write_text(text)
    return str(path), rows


@pytest.mark.parametrize("name", ["mmsu", "mmau", "mmar"])
def test_benchmarks_run_and_write_the_official_fields(name, toured, small_folder, tmp_path, capsys):
    path, rows = question_file(toured, tmp_path, name)
    out = str(tmp_path / "out.json")
    assert main([name, path, "--model", small_folder, "--out", out, "--limit", "7"]) == 0
    text = capsys.readouterr().out
    assert "16 steps, answer length 16, block 16" in text and "95 % interval" in text
    written = json.loads(pathlib.Path(out).read_text()) if name == "mmau" else read_lines(out)
    assert [w["id"] for w in written] == [r["id"] for r in rows[:7]]
    key = {"mmsu": "response", "mmau": "model_output", "mmar": "answer_prediction"}[name]
    right = []
    for w in written:
        assert w[key] == w.get("model_prediction", w[key])
        if name == "mmsu":  # scored again by the rule, from the file alone
            letter = mmsu_letter(w[key])
            right.append(letter is not None and w["choice_" + letter.lower()] == w["answer_gt"])
        else:
            choice = mapped(w[key], w["choices"])
            right.append(official_mmau(w["answer"], choice if choice is not None else w[key], w["choices"]))
    _, lines = read_answers(out + ".answers.jsonl")
    assert [lines[w["id"]]["right"] for w in written] == right
    assert f"{sum(right) / 7:.1%}" in text


def test_a_killed_run_goes_on(toured, small_folder, tmp_path, capsys):
    """No line lost, none doubled, none asked again; another setting is refused."""
    path, rows = question_file(toured, tmp_path, "mmsu")
    argv = ["mmsu", path, "--model", small_folder, "--limit", "9", "--factor", "1", "--batch", "2"]
    assert main([*argv, "--out", str(tmp_path / "whole")]) == 0
    whole = (tmp_path / "whole").read_text()
    with open(tmp_path / "whole.answers.jsonl") as f:
        lines = f.readlines()
    journal = lines[0]
    for line in lines[1:5]:
        entry = json.loads(line)
        del entry["right"], entry["parsed"]
        journal += json.dumps(entry) + "\n"
    (tmp_path / "part.answers.jsonl").write_text(journal + lines[5][:17])
    asked = []
    real_ask = evaluate.ask

    def counting(model, tokenizer, clips, *rest, **kw):
        asked.append(len(clips))
        return real_ask(model, tokenizer, clips, *rest, **kw)

    evaluate.ask = counting
    try:
        assert main([*argv, "--out", str(tmp_path / "part")]) == 0
    finally:
        evaluate.ask = real_ask
    assert sum(asked) == 9 - 4 and (tmp_path / "part").read_text() == whole
    capsys.readouterr()
    for other in (["--steps", "8"], ["--answer-length", "32"], ["--cache", "prefix"]):
        again = [a for a in argv if a not in ("--factor", "1")] if "--steps" in other else argv
        assert main([*again, *other, "--out", str(tmp_path / "part")]) == 2
        assert "give another --out" in capsys.readouterr().err


def test_other_weights_under_the_same_name_are_asked_anew(toured, small_folder, tmp_path, capsys):
    """Old scores must not pass for those of a model that was trained again in the same folder."""
    path, _ = question_file(toured, tmp_path, "mmsu")
    folder, out = str(tmp_path / "model"), str(tmp_path / "o")
    argv = ["mmsu", path, "--model", folder, "--limit", "2", "--factor", "1"]
    shutil.copytree(small_folder, folder)
    assert main([*argv, "--out", out]) == 0 and main([*argv, "--out", out]) == 0
    model, tokenizer = load(folder, "cpu")
    model.semantic.fc1.weight.data[0, 0] += 1
    save(model, tokenizer, folder)
    capsys.readouterr()
    assert main([*argv, "--out", out]) == 2 and "holds answers with weights = " in capsys.readouterr().err


def test_what_several_processes_have_left_is_gone_on_with(toured, small_folder, tmp_path, monkeypatch):
    """Of two processes that were killed, by one: nothing is asked again but a clip that could not be read."""
    path, rows = question_file(toured, tmp_path, "mmsu")
    argv = ["mmsu", path, "--model", small_folder, "--limit", "6", "--factor", "1"]
    assert main([*argv, "--out", str(tmp_path / "whole")]) == 0
    header, *lines = (tmp_path / "whole.answers.jsonl").read_text().splitlines(keepends=True)
    lines[1] = json.dumps(json.loads(lines[1]) | {"answer": "", "bad": "gone"}) + "\n"
    for rank in (0, 1):
        (tmp_path / f"o.answers.jsonl.{rank}-of-2").write_text(header + "".join(lines[rank : rank + 4 : 2]))
    asked, real_ask = [], evaluate.ask

    def counting(model, tokenizer, clips, prompts, *rest, **kw):
        asked.extend(prompts)
        return real_ask(model, tokenizer, clips, prompts, *rest, **kw)

    monkeypatch.setattr(evaluate, "ask", counting)
    assert main([*argv, "--out", str(tmp_path / "o")]) == 0
    assert len(asked) == 3 and (tmp_path / "o").read_text() == (tmp_path / "whole").read_text()
    assert not [f for f in os.listdir(tmp_path) if "-of-2" in f]


def test_two_processes_give_one_result(toured, small_folder, tmp_path):
    path, _ = question_file(toured, tmp_path, "mmsu")
    argv = ["mmsu", path, "--model", small_folder, "--limit", "7", "--factor", "1"]
    argv += ["--device", "cpu", "--batch", "1"]
    assert main([*argv, "--out", str(tmp_path / "one")]) == 0
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "tools.evaluate", *argv, "--out", str(tmp_path / "two")]
    done = subprocess.run(
        command,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "two").read_text() == (tmp_path / "one").read_text()
    assert not [f for f in os.listdir(tmp_path) if "-of-2" in f]


CHECKOUT = """
import argparse, json
p = argparse.ArgumentParser()
p.add_argument("--src_file"); p.add_argument("--evaluator")
a = p.parse_args()
rows = [json.loads(line) for line in open(a.src_file)]
assert all("response" in r and "instruction_id_list" in r for r in rows), "no response"
print({a.evaluator: len(rows), "here": open("marker").read()})
"""


def test_voicebenchs_own_script_is_run_from_its_checkout(toured, small_folder, tmp_path, capsys):
    """A process of its own, in its own folder, on the file of answers; its failure is one line."""
    clip = read_manifest(f"{toured}/test.jsonl")[0].audio
    rows = [
        {
            "prompt": "Name a fruit, in capitals.",
            "audio_path": os.path.abspath(clip),
            "key": i,
            "instruction_id_list": ["x"],
            "kwargs": [],
        }
        for i in range(2)
    ]
    (tmp_path / "ifeval.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    argv = ["voicebench", str(tmp_path / "ifeval.jsonl"), "--model", small_folder, "--answer-length", "8"]
    assert main(argv) == 0 and "own checker" in capsys.readouterr().err
    checkout = tmp_path / "VoiceBench"
    os.makedirs(checkout)
    argv += ["--voicebench", str(checkout), "--out", str(tmp_path / "m-ifeval-test-audio.jsonl")]
    assert main(argv) == 2 and "checkout" in capsys.readouterr().err
    (checkout / "evaluate.py").write_text(CHECKOUT)
    (checkout / "marker").write_text("official")
    assert main(argv) == 0 and "{'ifeval': 2, 'here': 'official'}" in capsys.readouterr().out
    (checkout / "marker").unlink()
    assert main(argv) == 2
    assert "FileNotFoundError" in capsys.readouterr().err and os.path.exists(
        tmp_path / "m-ifeval-test-audio.jsonl"
    )


def test_unreadable_clips_count_as_wrong(toured, small_folder, tmp_path, capsys):
    path, rows = question_file(toured, tmp_path, "mmsu")
    rows = rows[:6]
    rows[2]["audio_path"] = str(tmp_path / "gone.wav")
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    argv = ["mmsu", str(tmp_path / "m.jsonl"), "--model", small_folder, "--factor", "1"]
    assert main([*argv, "--out", str(tmp_path / "o")]) == 0
    assert "1 clips could not be read" in capsys.readouterr().out
    assert main([*argv, "--allow-bad", "0"]) == 2 and "--allow-bad" in capsys.readouterr().err
    assert read_answers(str(tmp_path / "o.answers.jsonl"))[1][rows[2]["id"]]["right"] is False
    for r in rows[3:5]:
        r["audio_path"] = str(tmp_path / "gone.wav")
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert main(argv) == 2 and "--allow-bad" in capsys.readouterr().err
    assert main([*argv, "--allow-bad", "0.6"]) == 0


def test_compare_and_table(toured, small_folder, tmp_path, capsys):
    path, _ = question_file(toured, tmp_path, "mmsu")
    for name, how in (("a", ["--factor", "1"]), ("b", ["--steps", "16"])):
        argv = ["mmsu", path, "--model", small_folder, "--limit", "8", *how]
        assert main([*argv, "--out", str(tmp_path / name)]) == 0
    lines = read_lines(tmp_path / "b.answers.jsonl")
    marks = [True, True, True, False, False, False, False, True]
    for line, mark in zip(lines[1:], marks, strict=True):
        line["right"] = mark
    (tmp_path / "b.answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    a = [line["right"] for line in read_lines(tmp_path / "a.answers.jsonl") if "right" in line]
    capsys.readouterr()
    assert main(["--compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    only_a = sum(x and not y for x, y in zip(a, marks, strict=True))
    only_b = sum(y and not x for x, y in zip(a, marks, strict=True))
    assert f"p = {mcnemar(only_a, only_b):.4g} (8 questions)" in capsys.readouterr().out
    assert main(["--table", str(tmp_path / "a")]) == 0
    text = capsys.readouterr().out
    assert "| DIFFA-2 (paper) | 60.63" in text and "overall" in text and "factor 1 (a) |" in text
    assert main(["--compare", str(tmp_path / "a"), str(tmp_path / "none")]) == 2


def test_asr_from_kaldi_and_manifest(toured, small_folder, tmp_path, capsys):
    kaldi = tmp_path / "kaldi"
    kaldi.mkdir()
    wavs = []
    for i, text in enumerate(("one two", "three")):
        soundfile.write(str(tmp_path / f"{i}.wav"), np.zeros(8000 * (i + 1)), 16000)
        wavs.append((f"utt{i}", str(tmp_path / f"{i}.wav"), text))
    (kaldi / "wav.scp").write_text("".join(f"{k} {w}\n" for k, w, _ in wavs))
    (kaldi / "text").write_text("".join(f"{k} {t}\n" for k, _, t in wavs))
    argv = ["--model", small_folder, "--answer-length", "16", "--factor", "1"]
    assert main(["asr", str(kaldi), *argv, "--out", str(tmp_path / "o")]) == 0
    text = capsys.readouterr().out
    said = {r["id"]: r["response"] for r in read_lines(tmp_path / "o")}
    wer = word_errors(["one two", "three"], [said["utt0"], said["utt1"]])["wer"]
    assert f"WER {wer:.2%}" in text and "real-time factor" in text
    assert main(["asr", f"{toured}/stage1.jsonl", *argv, "--limit", "3"]) == 0
    (kaldi / "wav.scp").write_text("utt0 sox x |\n")
    assert main(["asr", str(kaldi), *argv]) == 2 and "is a pipe" in capsys.readouterr().err


def test_threshold_zero_keeps_all_tokens_in_one_call(toured, small_folder, capsys):
    argv = ["exact", f"{toured}/test.jsonl", "--model", small_folder, "--limit", "4", "--answer-length", "16"]
    assert main([*argv, "--threshold", "0"]) == 0
    text = capsys.readouterr().out
    assert "threshold 0, answer length 16" in text and "1.00 network calls an answer" in text
    assert main([*argv, "--threshold", "2"]) == 2
    assert "threshold 2.0 must lie between 0 and 1" in capsys.readouterr().err


def test_exact_reports_tasks(toured, small_folder, capsys):
    argv = ["exact", f"{toured}/test.jsonl", "--model", small_folder, "--limit", "30"]
    assert main([*argv, "--answer-length", "16"]) == 0
    text = capsys.readouterr().out
    assert (
        "factor 1, answer length 16" in text
        and "task: digit" in text
        and "macro average over 10 answers" in text
    )


def test_bad_input(toured, small_folder, tmp_path, capsys):
    mmau, _ = question_file(toured, tmp_path, "mmau")
    (tmp_path / "empty.jsonl").write_text("")
    twice = tmp_path / "twice.jsonl"
    with open(f"{toured}/mmsu.jsonl") as f:
        line = f.readline()
    twice.write_text(line + line)
    for argv, says in (
        (["mmsu", mmau], "looks like mmau"),
        (["mmau", f"{toured}/mmsu.jsonl"], "looks like mmsu"),
        (["mmar", f"{toured}/stage1.jsonl"], "looks like exact"),
        (["mmsu", str(tmp_path / "none")], "no such file"),
        (["mmsu", str(tmp_path / "empty.jsonl")], "no question"),
        (["mmsu", str(twice)], "the same id"),
        (["exact", f"{toured}/test.jsonl", "--steps", "7", "--answer-length", "16", "--block", "8"], "steps"),
        (["exact", f"{toured}/test.jsonl", "--int8", "yes"], "unrecognized arguments: yes"),
        ([], "give a benchmark"),
    ):
        assert main([*argv, "--model", small_folder]) == 2
        out, err = capsys.readouterr()
        assert err.count("\n") == 1 and says in err and err.startswith("evaluate: "), err


def refused(argv, says, capsys):
    """Whether it ends in one line, before a model is loaded: there is none of this name."""
    assert main([*argv, "--model", "nonesuch"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and says in err and err.startswith("evaluate: "), err


@pytest.mark.parametrize(
    "options, says",
    [
        (["--batch", "-1"], "argument --batch: -1 must lie between 1"),
        (["--batch", "0"], "argument --batch: 0 must"),
        (["--batch", "x"], "invalid int value"),
        (["--limit", "0"], "argument --limit: 0 must"),
        (["--limit", "-3"], "argument --limit: -3 must"),
        (["--allow-bad", "nan"], "argument --allow-bad: nan must lie between 0 and 1"),
        (["--allow-bad", "-1"], "argument --allow-bad: -1 must"),
        (["--allow-bad", "1.1"], "argument --allow-bad: 1.1 must"),
        (["--steps", "0"], "steps 0"),
        (["--factor", "0"], "factor 0.0 must be positive"),
        (["--factor", "nan"], "factor nan must be positive"),
        (["--block", "0"], "block 0 must be at least 1"),
        (["--answer-length", "0"], "answer length 0"),
        (["--answer-length", "auto"], "invalid int value: 'auto'"),
        (["--audio-root", "x"], "--audio-root: the paths in a manifest start from"),
        (["--judge", "http://localhost:9"], "--judge rates the answers of voicebench, not of exact"),
    ],
)
def test_bad_options(options, says, toured, capsys):
    refused(["exact", f"{toured}/test.jsonl", *options], says, capsys)


@pytest.mark.parametrize("ending", ["", ".answers.jsonl", ".summary.json"])
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_only_a_file_is_written_over(make, ending, toured, tmp_path, capsys):
    """Renaming onto a device, as root, would put a file in its place; a FIFO stands for it here."""
    path = str(tmp_path / "out") + ending
    make(path)
    before = os.lstat(path)
    refused(["exact", f"{toured}/test.jsonl", "--out", str(tmp_path / "out")], "no regular file", capsys)
    for write in (lambda: write_text("x", path), lambda: write_lines([{}], path)):
        with pytest.raises(UserError, match="no regular file"):
            write()
    assert os.path.samestat(before, os.lstat(path)) and len(os.listdir(tmp_path)) == 1


def test_questions_are_never_written_over(toured, tmp_path, capsys):
    path = tmp_path / "q.jsonl"
    path.write_bytes(pathlib.Path(toured, "test.jsonl").read_bytes())
    (tmp_path / "link").symlink_to(path)
    for out in (path, tmp_path / "link"):
        refused(["exact", str(path), "--out", str(out)], "over the questions", capsys)
    assert path.read_bytes() == pathlib.Path(toured, "test.jsonl").read_bytes()


def test_another_audio_root_is_another_run(toured, small_folder, tmp_path, capsys):
    _, rows = question_file(toured, tmp_path, "mmsu")
    (tmp_path / "m.jsonl").write_text(json.dumps(rows[0] | {"audio_path": "a.wav"}) + "\n")
    for root in "xy":
        (tmp_path / root).mkdir()
        soundfile.write(tmp_path / root / "a.wav", np.zeros(8000), 16000)
    argv = ["mmsu", str(tmp_path / "m.jsonl"), "--model", small_folder, "--out", str(tmp_path / "o")]
    assert main([*argv, "--audio-root", f"{tmp_path}/x"]) == 0
    assert main([*argv, "--audio-root", f"{tmp_path}/y"]) == 2
    assert "audio_root" in capsys.readouterr().err
    assert main([*argv, "--audio-root", f"{tmp_path}/x/../x/"]) == 0  # the same one


MISSING = object()
EVERY = ("mmsu", "mmau", "mmar")
AUDIO = {"mmsu": "audio_path", "mmau": "audio_id", "mmar": "audio_path"}
ANSWER = {"mmsu": "answer_gt", "mmau": "answer", "mmar": "answer"}


@pytest.mark.parametrize(
    "names, field, values",
    [
        (EVERY, "question", ([], None, MISSING)),
        (EVERY, "audio", (None, 5, ["a.wav"], MISSING)),
        (EVERY, "answer", (None, 5, MISSING)),
        (EVERY, "id", (None, [], True, "\ud800", MISSING)),
        (("mmau", "mmar"), "choices", (None, 5, [], [5], ["x"] * 30, "yes", MISSING)),
        (("mmsu", "mmar"), "category", (None, 5, ["x"])),
        (("mmau",), "task", (None, 5, ["x"], MISSING)),
        (("mmau", "mmsu"), "sub-category", (None, 5, ["x"])),
        (("mmau",), "difficulty", (None,)),
        (("mmar",), "modality", (None, MISSING)),
        (("mmsu",), "choice_a", (None, 5, MISSING)),
        (("mmsu",), "choice_d", (None, [])),
        (("mmsu",), "sub-sub-category", (None,)),
        (("mmsu",), "task_name", (5,)),
    ],
)
def test_wrong_values_in_question_files(names, field, values, toured, tmp_path, capsys):
    for name in names:
        path, rows = question_file(toured, tmp_path, name)
        key = {"audio": AUDIO, "answer": ANSWER}.get(field, {}).get(name, field)
        for value in values:
            row = {k: v for k, v in (rows[1] | {key: value}).items() if v is not MISSING}
            pathlib.Path(path).write_text(json.dumps([rows[0], row]))
            what = "question" if value == "\ud800" else "entry"
            refused([name, path, "--out", str(tmp_path / "out")], f"{path}: {what} 2: ", capsys)


@pytest.mark.parametrize("name", [*EVERY, "voicebench", "exact", "asr"])
def test_entries_that_are_no_objects(name, tmp_path, capsys):
    for value in (5, None, [], "text"):
        (tmp_path / "q.jsonl").write_text(json.dumps(value))
        if value != []:  # which is a file without questions
            refused([name, str(tmp_path / "q.jsonl")], "not a JSON object", capsys)


@pytest.mark.parametrize("name", ["exact", "asr"])
def test_manifests_need_audio(name, tmp_path, capsys):
    messages = [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Rain."}]
    path = tmp_path / "m.jsonl"
    for audios, says in (([], "m.jsonl:1: has no audio"), (["\ud800.wav"], "question 1: holds half")):
        path.write_text(json.dumps({"messages": messages, "audios": audios}))
        refused([name, str(path)], says, capsys)


def test_kaldi_in_latin_1(tmp_path, capsys):
    (tmp_path / "wav.scp").write_text("a a.wav\nb b.wav\n")
    (tmp_path / "text").write_bytes("a one\nb caf\u00e9\n".encode("latin-1"))
    refused(["asr", str(tmp_path)], "text:2: not UTF-8", capsys)


SETTINGS = {"benchmark": "exact", "questions": "0", "model": "m", "steps": None, "factor": 1.0}
LINE = {"id": "a", "answer": "x", "calls": 1, "seconds": 1.0, "audio_seconds": 1.0, "right": True}


def write_run(folder, lines=(LINE,), summary='{"right": 1.0, "n": 1}', settings=SETTINGS):
    """A run's files in `folder` -> OUT."""
    rows = [{"settings": settings}, *lines]
    (folder / "out.answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "out.summary.json").write_bytes(summary if isinstance(summary, bytes) else summary.encode())
    return str(folder / "out")


WRONG_LINES = [5, None, [], {}, "settings", {"settings": 5}, {"settings": {}}, {"id": []}, {"id": "a"}]
WRONG_LINES += [{"settings": SETTINGS | wrong} for wrong in ({"benchmark": []}, {"factor": "x"})]
WRONG_LINES += [LINE | wrong for wrong in ({"id": 5}, {"answer": None}, {"calls": None}, {"judged": "4"})]
WRONG_LINES += [LINE | {"answer": "\ud800"}]


@pytest.mark.parametrize("line", WRONG_LINES, ids=str)
def test_wrong_lines_in_files_of_answers(line, tmp_path, capsys):
    out = write_run(tmp_path, (LINE, line))
    for argv in (["--compare", out, out], ["--table", out]):
        refused(argv, "out.answers.jsonl:3: ", capsys)


def test_a_run_does_not_go_on_from_wrong_answers(toured, small_folder, tmp_path, capsys):
    argv = ["exact", f"{toured}/test.jsonl", "--model", small_folder, "--limit", "2"]
    argv += ["--answer-length", "8", "--out", str(tmp_path / "out")]
    assert main([*argv, "--threshold", "0"]) == 0
    journal = tmp_path / "out.answers.jsonl"
    before = journal.read_bytes()
    capsys.readouterr()
    # the earlier run's settings have one name more
    assert main(argv) == 2 and "threshold = 0.0, not nothing" in capsys.readouterr().err
    journal.write_bytes(before + b"5\n")
    assert main([*argv, "--threshold", "0"]) == 2 and ":4: not a line" in capsys.readouterr().err
    # a kill in the middle of a letter: the whole lines stay
    lines = before.splitlines(keepends=True)
    journal.write_bytes(lines[0] + lines[1] + b'{"id": "b", "answer": "\xc3')
    assert main([*argv, "--threshold", "0"]) == 0
    assert read_lines(journal)[1]["seconds"] == json.loads(lines[1])["seconds"]


@pytest.mark.parametrize(
    "summary",
    ["", "{", "[]", "null", "5", "{}", b"\xff", '{"right": null, "n": 1}', '{"right": 1.0}', '{"n": 1}']
    + ['{"right": 1.0, "n": 1, "groups": []}', '{"right": 1.0, "n": 1, "groups": {"a": null}}'],
)
def test_wrong_summaries(summary, tmp_path, capsys):
    out = write_run(tmp_path, summary=summary)
    refused(["--table", out], "out.summary.json: not a summary", capsys)


def test_tables_and_comparisons_of_too_little(tmp_path, capsys):
    out = write_run(tmp_path, lines=())
    refused(["--compare", out, out], "not finished", capsys)
    out = write_run(tmp_path, lines=[LINE | {"right": 5}])
    refused(["--compare", out, out], "not finished", capsys)
    (tmp_path / "out.summary.json").unlink()
    refused(["--table", out], "no summary", capsys)
    os.mkfifo(tmp_path / "pipe.answers.jsonl")
    for path in (tmp_path / "pipe", tmp_path / "none"):
        refused(["--table", str(path)], "no file of answers", capsys)
    out = write_run(tmp_path, summary='{"n": 1}', settings=SETTINGS | {"benchmark": "voicebench"})
    assert main(["--table", out]) == 0  # most of its sets have no right and wrong


def test_lmms_eval_adapter(small_folder):
    """The harness's interface: Instances with args, clips as {array, sampling_rate}, texts in order.

    The harness itself is in test_harness.py.
    """
    from types import SimpleNamespace

    from decode import ask

    rng = np.random.default_rng(0)
    docs = [
        {"audio": {"array": rng.uniform(-0.3, 0.3, n), "sampling_rate": rate}}
        for n, rate in ((16000, 16000), (4000, 8000), (24000, 16000))
    ]
    with pytest.raises(TypeError, match="anwser_length"):  # nothing misspelt is passed over
        evaluate.LmmsEval(pretrained=small_folder, anwser_length=16)
    lm = evaluate.LmmsEval(pretrained=small_folder, batch_size=2, answer_length=16, block=16)
    lm.task_dict = {"t": {"test": docs}}
    requests = [
        SimpleNamespace(args=(f"Question {i}?", {}, lambda doc: [doc["audio"]], i, "t", "test"))
        for i in range(3)
    ]
    texts = lm.generate_until(requests)
    for i, doc in enumerate(docs):
        audio = evaluate.resampled(doc["audio"]["array"], doc["audio"]["sampling_rate"], lm.model.config)
        assert ask(lm.model, lm.tokenizer, [audio], [f"Question {i}?"], **lm.options)[0].text == texts[i]
    with pytest.raises(NotImplementedError):
        lm.loglikelihood([])


def test_judge_keeps_scores_and_asks_again():
    """Scores of 1 to 5 are kept, anything else is asked again and then left out."""
    replies = iter(['{"score": 4}', "five", '{"score": 9}', '{"score": 2}'])

    class Judge:
        model = "a"

        def complete(self, system, user, read):
            assert "User: say hi" in user and "1 to 5" in system
            for _ in range(3):
                try:
                    return read(next(replies))
                except ValueError:
                    continue

    questions = [Question(str(i), "", "", "", entry={"prompt": "say hi"}) for i in range(2)]
    lines = {"0": {"answer": "hi"}, "1": {"answer": "ho"}}
    assert evaluate.judge(questions, lines, Judge()) == [4, 2]
    assert evaluate.judge(questions, lines, Judge()) == [4, 2]  # nobody is asked again
    other, replies = Judge(), iter(['{"score": 1}', "-", "-", "-", '{"score": 3}'])
    other.model = "b"
    assert evaluate.judge(questions, lines, other) == [1, None]
    assert evaluate.judge(questions, lines, other) == [1, 3]  # of what had no score


def test_judge_with_a_reference_answer(capsys):
    """Right or wrong instead of 1 to 5, and the judge is shown the reference."""
    right, wrong = '{"right": true}', '{"right": false}'
    replies = iter([right, '{"score": 4}', '{"right": 1}', wrong, right, wrong])

    class Judge:
        model = "a"

        def complete(self, system, user, read):
            assert user.endswith("Reference: Paris") and "true or false" in system
            while True:
                with contextlib.suppress(ValueError):
                    return read(next(replies))

    questions = [
        Question(str(i), "", "", "", entry={"prompt": "Capital?", "reference": "Paris"}) for i in range(2)
    ]
    ratings = evaluate.judge(questions, {"0": {"answer": "a"}, "1": {"answer": "b"}}, Judge(), times=2)
    assert ratings == [0.5, 0.5]
    assert evaluate.report_judged(questions, [1, 0, 0, None]) == {"judged_right": pytest.approx(1 / 3)}
    assert "judged right: 33.3%, 1 without" in capsys.readouterr().out
    assert evaluate.report_judged([Question("0", "", "", "", entry={})], [4, 5]) == {"rating": 4.5}
    assert evaluate.report_judged(questions, [None, None]) == {}
    with pytest.raises(UserError, match=r"judge\.example/v1: an endpoint begins with http"):
        evaluate.judge(questions, {"0": {"answer": "a"}}, Endpoint("judge.example/v1", "a"))


@pytest.fixture
def judge_server():
    """A judge's URL, and what it replies next: a score, or the status of a refusal."""
    replies, asked = [], []

    def answer(path, key, body):
        asked.append(body)
        reply = replies.pop(0)
        return 200 if reply <= 5 else reply, chat(json.dumps({"score": reply}))

    with served(answer) as url:
        yield url, replies, asked


def test_what_was_judged_is_kept_when_the_judge_fails(toured, small_folder, tmp_path, capsys, judge_server):
    url, replies, asked = judge_server
    clip = os.path.abspath(read_manifest(f"{toured}/test.jsonl")[0].audio)
    rows = [{"prompt": f"Say hi, {i}.", "audio_path": clip, "id": str(i)} for i in range(2)]
    (tmp_path / "commoneval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = str(tmp_path / "o")
    argv = ["voicebench", str(tmp_path / "commoneval.jsonl"), "--model", small_folder, "--answer-length", "8"]
    argv += ["--out", out, "--judge", url]
    replies += [4, 5, 3, 401]
    assert main(argv) == 2 and "refuses (401" in capsys.readouterr().err
    replies += [2, 1, 3]
    assert main([*argv[:-3], out + ".answers.jsonl", *argv[-2:]]) == 0  # the same OUT by its other name
    assert "judged 1-5: mean 3.00, 0 without" in capsys.readouterr().out and len(asked) == 7
    assert [line["judged"] for line in read_answers(out + ".answers.jsonl")[1].values()] == [4, 2]
    assert main(["--table", out]) == 0 and "| rating 3.00 |" in capsys.readouterr().out
    assert len(read_lines(out)) == 2 and not os.path.exists(out + ".answers.jsonl.answers.jsonl")
