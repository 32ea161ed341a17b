"""Manifests from miniature corpora in their published layout, and from the real ones where they are."""

import json
import os
import pathlib
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import soundfile

from data import load_audio, read_manifest
from tools.compose import compose, mix
from tools.corpora import DIGITS, Clip, read_corpus
from tools.prepare import main
from tools.prompts import mmau_prompt, mmsu_prompt
from tools.questions import (
    CHOICE_TASKS,
    TASKS,
    choice_line,
    choices_in,
    derived,
    description_of,
    distractors,
    draw_question,
    multiple_choice,
    preference_line,
    write_lines,
)
from tools.toy import TOY_INSTRUMENTS, TOY_SOUNDS, synthesize

SMALL_CORPORA = ("fsdd", "speech_commands", "esc10", "ravdess", "librispeech", "berklee", "sonicpi")


def test_names_tell_facts_and_split(corpora):
    clips = {name: read_corpus(name, os.path.join(corpora, name)) for name in SMALL_CORPORA}
    assert [len(clips[n]) for n in SMALL_CORPORA] == [50, 12, 6, 9, 4, 5, 4]
    digit = {os.path.basename(c.path): c for c in clips["fsdd"]}
    assert digit["7_jackson_3.wav"].facts == {"words": "seven", "speaker": "jackson"}
    assert [digit[f"7_jackson_{i}.wav"].is_test for i in range(5)] == [True, True, True, False, False]
    words = {c.path.split("speech_commands/")[1]: c for c in clips["speech_commands"]}
    assert words["cat/1cd12345_nohash_0.wav"].facts == {"words": "cat"}
    # the speaker's hash starts with 0, or the word's last clip by name
    assert sorted(k for k, c in words.items() if c.is_test and k.startswith("cat")) == [
        "cat/0ab12345_nohash_0.wav",
        "cat/9ff12345_nohash_0.wav",
    ]
    assert {(c.facts["sound"], c.is_test) for c in clips["esc10"]} == {
        ("dog bark", False),
        ("dog bark", True),
        ("rain", False),
        ("rain", True),
    }
    assert all("/4-" in c.path for c in clips["esc10"] if c.is_test)
    acted = {os.path.basename(c.path): c for c in clips["ravdess"]}
    assert acted["03-01-05-02-02-01-02.wav"].facts == {
        "emotion": "angry",
        "intensity": "strong",
        "words": "dogs are sitting by the door",
        "sex": "female",
        "speaker": "actor 02",
    }
    assert {c.facts["speaker"] for c in clips["ravdess"] if c.is_test} == {"actor 21"}
    assert {(c.facts["speaker"], c.facts["sex"], c.is_test) for c in clips["librispeech"]} == {
        ("14", "female", False),
        ("16", "female", False),
        ("17", "male", False),
        ("20", "male", True),
    }
    samples = {os.path.basename(c.path).split(".")[0]: c for c in clips["berklee"] + clips["sonicpi"]}
    assert samples["malevoice_aa_A1"].facts == {"instrument": "male voice"}
    assert samples["bd_808"].facts == {"instrument": "bass drum"}
    assert {k for k, c in samples.items() if c.is_test} == {"bell3", "glass_tone13", "drum_snare_3"}


def test_the_real_corpora(shared_audio):
    clips = {name: read_corpus(name, os.path.join(shared_audio, name)) for name in SMALL_CORPORA}
    assert [len(clips[n]) for n in SMALL_CORPORA] == [2880, 1010, 320, 1320, 301, 421, 110]
    assert sum(c.is_test for c in clips["fsdd"]) == 180 and sum(c.is_test for c in clips["esc10"]) == 80
    assert len({c.facts["words"] for c in clips["speech_commands"]}) == 30
    assert {c.facts["words"] for c in clips["speech_commands"] if c.is_test} == {
        c.facts["words"] for c in clips["speech_commands"]
    }
    assert (
        len({c.facts["sound"] for c in clips["esc10"]}) == 10
        and len({c.facts["emotion"] for c in clips["ravdess"]}) == 8
    )
    assert all("sex" in c.facts for c in clips["librispeech"])


def test_bad_sources(tmp_path, corpora, capsys):
    for argv, says in (
        (["fsdd", str(tmp_path / "none"), "--out", str(tmp_path / "a.jsonl")], "no such folder"),
        (["fsdd", str(tmp_path), "--out", str(tmp_path / "a.jsonl")], "named like fsdd"),
        (["tour", "--audio", str(tmp_path)], "none of the folders"),
        (["nonesuch", "x"], "nonesuch"),
        (["fsdd", corpora + "/fsdd", "--out", "/proc/nothing/a.jsonl"], "cannot be written"),
        (["tour", "--audio", corpora, "--out", "/proc/nothing"], "cannot be written"),
        (["show", str(tmp_path / "none.jsonl")], "tokenizer"),
    ):
        assert main(argv) == 2
        out, err = capsys.readouterr()
        assert err.count("\n") == 1 and says in err and err.startswith("prepare: "), err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "argv, says",
    [
        (["tour", "--audio", "AUDIO", "--out", "OUT", "--strings", "-5"], "--strings: -5 must lie"),
        (["tour", "--audio", "AUDIO", "--out", "OUT", "--strings", "0"], "--strings: 0 must lie"),
        (["toy", "--out", "OUT", "--each", "0"], "--each: 0 must lie"),
        (["speak", "sentences", "x", "--out", "OUT", "--limit", "0"], "--limit: 0 must lie"),
        (["speak", "sentences", "x", "--out", "OUT", "--workers", "0"], "--workers: 0 must lie"),
        (["answers", "x", "--out", "OUT", "--llm", "u", "--model", "m", "--limit", "-1"], "--limit: -1 must"),
        (["answers", "x", "--out", "OUT", "--llm", "u", "--model", "m", "--timeout", "0"], "--timeout: 0"),
        (["answers", "x", "--out", "OUT", "--llm", "u", "--model", "m", "--workers", "0"], "--workers: 0"),
        (["check", "x", "--errors", "-1"], "--errors: -1 must lie"),
        (["show", "x", "-n", "-1"], "-n: -1 must lie"),
        (["fsdd", "AUDIO/fsdd", "--out", "FOLDER"], "no regular file"),
        (["speak", "sentences", "x", "--out", "FOLDER", "--tts", "u", "--voices", "a"], "no regular file"),
        (["answers", "x", "--out", "FOLDER", "--llm", "u", "--model", "m"], "no regular file"),
    ],
)
def test_bad_options(argv, says, tmp_path, corpora, capsys):
    (tmp_path / "folder").mkdir()
    for name, path in (("AUDIO", corpora), ("OUT", f"{tmp_path}/out"), ("FOLDER", f"{tmp_path}/folder")):
        argv = [word.replace(name, path) for word in argv]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and says in err and err.startswith("prepare: "), err
    assert os.listdir(tmp_path) == ["folder"]


def test_one_corpus_to_a_manifest(tmp_path, corpora):
    out = str(tmp_path / "m.jsonl")
    assert main(["esc10", corpora + "/esc10", "--out", out, "--split", "train"]) == 0
    examples = read_manifest(out)
    assert len(examples) == 4 and {e.facts["sound"] for e in examples} == {"dog bark", "rain"}
    assert all(e.duration == 0.5 for e in examples)
    assert main(["esc10", corpora + "/esc10", "--out", out, "--split", "test"]) == 0
    assert len(read_manifest(out)) == 2 and os.listdir(tmp_path) == ["m.jsonl"]


def all_answers(facts):
    """task -> the short answers that draw_question words for a clip of these facts."""
    rng, found = random.Random(0), {}
    for _ in range(400):
        task, question, fact, word = draw_question(Clip("a", "x", facts), rng, sentences=0)
        assert question in TASKS[task].questions
        found.setdefault(task, set()).add(word(fact))
    assert all(len(v) == 1 for v in found.values())
    return {task: answers.pop() for task, answers in found.items()}


def test_answers_are_true_of_the_clip():
    string = all_answers({"words": "seven three zero"})
    assert string == {
        "asr": "seven three zero",
        "first": "Seven.",
        "last": "Zero.",
        "count": "Three.",
        "any": "Seven three zero.",
        "layer": "Speech.",
    }
    assert all_answers({"words": "nine"}) == {
        "asr": "nine",
        "digit": "Nine.",
        "word": "Nine.",
        "any": "Nine.",
        "layer": "Speech.",
    }
    assert all_answers({"sound": "sea waves"}) == {
        "sound": "Sea waves.",
        "any": "Sea waves.",
        "layer": "A sound.",
    }
    assert set(all_answers({"words": "bed cat"})) == {"asr", "any", "layer"}
    both = all_answers({"words": "cat", "background": "rain"})
    # "what do you hear?" would have two answers
    described = "Someone says 'cat', while rain falls."
    assert both == {"asr": "cat", "word": "Cat.", "background": "Rain.", "description": described}
    acted = all_answers({"emotion": "sad", "sex": "male", "intensity": "strong", "words": "a b"})
    assert (acted["emotion"], acted["sex"], acted["intensity"]) == ("Sad.", "Male.", "Strong.")
    everything = derived(
        {
            "words": "one two",
            "sound": "s",
            "instrument": "i",
            "emotion": "e",
            "intensity": "n",
            "sex": "x",
            "speaker": "y",
            "accent": "a",
        }
    ) | derived({"age": "child", "sex": "male"})
    assert set(TASKS) - {
        "word",
        "digit",
        "background",
        "genre",
        "nationality",
        "caption",
        "louder",
        "speed",
    } <= set(everything)


def test_descriptions_tell_all_that_is_known():
    for facts, says in (
        (
            {"words": "no more", "sex": "female", "emotion": "calm", "background": "rain"},
            "A woman says 'no more', calmly, while rain falls.",
        ),
        (
            {"sex": "female", "age": "child", "emotion": "angry", "intensity": "strong", "speed": "slow"},
            "A girl speaks slowly, angrily and with strong feeling.",
        ),
        (
            {"words": "x", "sex": "male", "accent": "American", "intensity": "normal"},
            "A man with an American accent says 'x'.",
        ),
        (
            {"words": "q", "background": "footsteps"},
            "Someone says 'q', with footsteps in the background.",
        ),
        (
            {"emotion": "bored", "sex": "male", "nationality": "Ireland"},
            "A man from Ireland speaks in a voice that is bored.",
        ),
        ({"sound": "laughter", "sex": "female", "speaker": "f1"}, "Laughter from a woman."),
        ({"words": "yes"}, None),
        ({"sound": "rain"}, None),
        ({"sex": "male", "speaker": "9"}, None),
        ({"words": "yes", "intensity": "normal"}, None),
        ({"sex": "male", "words": "a", "caption": "A man."}, None),
    ):
        assert description_of(facts) == says
    rng = random.Random(0)
    clip = Clip("a", "x", {"words": "cat", "sex": "male"})
    task, question, fact, word = draw_question(clip, rng, ["description"], sentences=1)
    assert question in TASKS["description"].questions and word(fact) == "A man says 'cat'."


def test_ages_are_asked_about():
    rng, clip = random.Random(0), Clip("a", "x", {"age": "child"})
    _, _, fact, word = draw_question(clip, rng, ["age"], sentences=0)
    assert (word(fact), word("adult")) == ("Child.", "Adult.")
    _, _, fact, word = draw_question(clip, rng, ["age"], sentences=1)
    assert (word(fact), word("adult")) == ("The speaker is a child.", "The speaker is an adult.")


def test_a_pair_needs_a_second_word(tmp_path):
    clip = Clip("a.wav", "x", {"words": "hello there"})
    assert preference_line(clip, random.Random(0), str(tmp_path / "m"), {"word": set()}) is None


def test_sentences_carry_the_fact():
    rng = random.Random(0)
    for _ in range(50):
        task, question, fact, word = draw_question(
            Clip("a", "x", {"sound": "rain"}), rng, ["sound"], sentences=1
        )
        assert (
            "sentence" in question
            and "rain" in word(fact)
            and word("wind") == word(fact).replace("rain", "wind")
            and word(fact).endswith(".")
        )


def test_distractors_are_wrong_and_near_ones_come_first():
    pool, rng = DIGITS, random.Random(0)
    for _ in range(50):
        wrong = distractors("five", pool, 3, rng)
        assert (
            len(set(wrong)) == 3
            and "five" not in wrong
            and set(wrong[:2]) <= {"four", "nine", "one", "two", "three"}
        )
    assert distractors("rain", ["rain"], 3, rng) == []
    assert distractors("rain", ["rain", "dog"], 3, rng) == ["dog"]


def test_the_right_choice_stands_everywhere_equally_often():
    rng, n = random.Random(0), 4000
    at = Counter()
    for _ in range(n):
        question, choices, right = multiple_choice("digit", "six", DIGITS, 4, rng)
        assert len(set(choices)) == 4 and choices[right] == "Six"
        at[right] += 1
    # chi-square with 3 degrees of freedom: 16.3 is passed once in a thousand
    assert sum((v - n / 4) ** 2 / (n / 4) for v in at.values()) < 16.3


def test_choice_lines_in_every_style(tmp_path):
    rng, seen = random.Random(1), Counter()
    pools = {t: DIGITS if t == "digit" else ["a"] for t in CHOICE_TASKS}
    for _ in range(200):
        line = choice_line(Clip("a.wav", "x", {"words": "four"}), rng, str(tmp_path / "m"), pools)
        (_, question), (_, answer) = (m.values() for m in line["messages"])
        letters = {
            text: letter
            for letter, text in (row.split(". ", 1) for row in question.split("\n") if row[1:3] == ". ")
        }
        assert (
            answer in (letters["Four"] + ".", letters["Four"] + ". Four.", "Four.")
            and line["task"] == "digit_choice"
        )
        seen[len(letters)] += 1
        if "**" in question:
            assert len(letters) == 4 and answer == letters["Four"] + ". Four."
    assert set(seen) == {2, 3, 4, 5, 6, 8}
    clip, empty = Clip("a.wav", "x", {"words": "one two three four"}), {t: [] for t in CHOICE_TASKS}
    assert choice_line(clip, rng, str(tmp_path), empty) is None


def test_benchmark_prompts():
    assert mmsu_prompt("Q?", ["x", "y", "z", "w"]).endswith(
        "or content.\n\nQuestion: Q?\n\nA. x\nB. y\nC. z\nD. w"
    )
    assert mmau_prompt("Q?", ["x", "y"]).endswith(
        "content and style.\n\nQuestion: Q?\n\nChoices:\nA. x\nB. y\nAnswer:"
    )


def test_preference_pairs_differ_in_one_fact(tmp_path):
    rng = random.Random(2)
    pools = {t: set() for t in CHOICE_TASKS} | {
        "digit": DIGITS,
        "word": ["cat", "bed"],
        "sound": ["rain", "dog bark"],
        "emotion": ["sad", "happy"],
        "first": DIGITS,
        "last": DIGITS,
        "count": DIGITS,
        "background": ["rain", "dog bark"],
    }
    for facts in (
        {"words": "one two"},
        {"sound": "rain"},
        {"words": "cat"},
        {"emotion": "sad"},
        {"words": "cat", "background": "rain"},
    ):
        for _ in range(30):
            line = preference_line(Clip("a.wav", "x", facts), rng, str(tmp_path / "m"), pools)
            right = line["messages"][1]["content"].lower().split()
            wrong = line["rejected_response"].lower().split()
            assert right != wrong
            if line["task"] == "asr":
                assert sum(a != b for a, b in zip(right, wrong, strict=True)) == 1


def test_composing_keeps_every_clip(tmp_path, corpora):
    clips = read_corpus("fsdd", corpora + "/fsdd")[:3]
    made = compose(clips, random.Random(0), str(tmp_path / "s.flac"))
    audio, _ = load_audio(made.path)
    assert made.facts == {"words": " ".join(c.facts["words"] for c in clips)}
    loud = np.abs(audio) > 0.05 * np.abs(audio).max()
    assert 0.3 * 9600 < loud.sum() <= 9600 and len(audio) > 9600  # three clips of 0.2 s and gaps
    assert np.abs(audio).max() <= 1


def test_a_cut_voice_loses_its_words(tmp_path):
    """Of a recording that the mixture cuts, the words are not all there; its speaker is the same."""
    for name, seconds in (("short", 1), ("long", 3), ("sound", 1)):
        samples = np.random.default_rng(0).uniform(-0.1, 0.1, seconds * 16000)
        soundfile.write(tmp_path / f"{name}.wav", samples, 16000)
    sound = Clip(str(tmp_path / "sound.wav"), "x", {"sound": "rain"})
    for name, has_words in (("short", True), ("long", False)):
        voice = Clip(str(tmp_path / f"{name}.wav"), "x", {"words": "one two", "sex": "female"})
        made = mix(voice, sound, random.Random(0), str(tmp_path / "mixed.flac"), seconds=2.0)
        assert ("words" in made.facts) == has_words and made.facts["sex"] == "female"


def test_paths_through_symbolic_links(corpora, tmp_path):
    """data -> big/disk/data: the system follows ".." from where the folder really lies."""
    (tmp_path / "big/disk/data").mkdir(parents=True)
    (tmp_path / "data").symlink_to(tmp_path / "big/disk/data")
    (tmp_path / "corpus").symlink_to(os.path.join(corpora, "fsdd"))
    out = str(tmp_path / "data" / "m.jsonl")
    assert main(["fsdd", str(tmp_path / "corpus"), "--out", out]) == 0
    assert all(os.path.isfile(e.audio) for e in read_manifest(out, check=False))


def test_a_linked_folder_of_clips_keeps_its_name(corpora, tmp_path):
    """Where the link leads may differ between machines; beside the manifest it is found on all of them."""
    (tmp_path / "audio").symlink_to(os.path.join(corpora, "fsdd"))
    out = str(tmp_path / "m.jsonl")
    assert main(["fsdd", str(tmp_path / "audio"), "--out", out]) == 0
    with open(out, encoding="utf-8") as f:
        assert all(json.loads(line)["audios"][0].startswith("audio/") for line in f)


def test_mixing_keeps_the_ratio(tmp_path, corpora):
    """At a fixed ratio the sound under the speech has the power it should, as measured without the voice."""
    speech, noise = read_corpus("fsdd", corpora + "/fsdd")[0], read_corpus("esc10", corpora + "/esc10")[0]
    made = mix(speech, noise, random.Random(0), str(tmp_path / "m.flac"), low=6.0, high=6.0)
    assert made.facts == speech.facts | {"background": noise.facts["sound"], "louder": "the voice"}
    for ratio, louder in ((-6.0, "the background"), (1.0, None)):
        other = mix(speech, noise, random.Random(0), str(tmp_path / "n.flac"), low=ratio, high=ratio)
        assert other.facts.get("louder") == louder
    audio, _ = load_audio(made.path)
    voice, _ = load_audio(speech.path)
    power = np.convolve(audio**2, np.ones(len(voice)) / len(voice), "valid")
    # both clips are white noise of one level: with the voice (1 + 1/4) of it, without it 1/4
    assert 4.0 < power.max() / power.min() < 6.5


# ---------------------------------------------------------------------------------------------
# checking


def asking(audio, question, answer, **more):
    """A manifest's line about a clip."""
    messages = [{"role": "user", "content": "<audio>" + question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "audios": [audio], **more}


def test_a_corpus_as_transcripts_alone(corpora, tmp_path, capsys):
    """What stage 1 needs of a corpus whose clips can also be asked about their speakers."""
    out, fsdd = str(tmp_path / "m.jsonl"), f"{corpora}/fsdd"
    assert main(["fsdd", fsdd, "--out", out, "--split", "train", "--tasks", "digit"]) == 0
    clips = [clip for clip in read_corpus("fsdd", fsdd) if not clip.is_test]
    found = read_manifest(out)
    assert [os.path.realpath(e.audio) for e in found] == [os.path.realpath(clip.path) for clip in clips]
    assert {e.task for e in found} == {"digit"}
    for tasks, says in (("emotion", "no clip of this split can be"), ("tempo", "--tasks tempo: choose")):
        assert main(["fsdd", fsdd, "--out", out, "--tasks", tasks]) == 2
        assert says in capsys.readouterr().err


def test_a_corpus_as_choices_and_as_pairs(corpora, tmp_path):
    """Multiple choice for stage 3, whose right option is there; for stage 4 pairs of different answers."""
    out, ravdess = str(tmp_path / "m.jsonl"), f"{corpora}/ravdess"
    assert main(["ravdess", ravdess, "--out", out, "--kind", "choices", "--tasks", "emotion"]) == 0
    emotions = {c.facts["emotion"] for c in read_corpus("ravdess", ravdess)}
    examples = read_manifest(out, 3)
    assert len(examples) == len(read_corpus("ravdess", ravdess))  # every clip is asked what --tasks says
    assert examples and {e.task for e in examples} == {"emotion_choice"}
    assert main(["check", out]) == 0  # the answer is one of the options
    assert {choice.lower() for e in examples for choice in choices_in(e.question).values()} <= emotions
    assert main(["ravdess", ravdess, "--out", out, "--kind", "pairs", "--split", "train"]) == 0
    pairs = read_manifest(out, 4)
    assert pairs and all(e.rejected and e.rejected != e.answer for e in pairs)


def test_check_counts_transcripts_that_training_cuts(tmp_path, corpora, capsys):
    clip = os.path.join(corpora, "fsdd/recordings/1_jackson_3.wav")
    lines = [{"audio_filepath": clip, "text": "one", "duration": n} for n in (5, 12, 31)]
    messages = [{"role": "user", "content": "<audio>Hm?"}, {"role": "assistant", "content": "Rain."}]
    lines.append({"messages": messages, "audios": [clip], "duration": 40})
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["check", str(tmp_path / "m.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "window of 10 s, which training cuts: 2\n" in out
    assert "window of 30 s, which training cuts: 1\n" in out


def test_check_finds_what_is_wrong(tmp_path, corpora, capsys):
    a, b = (os.path.join(corpora, f"fsdd/recordings/{n}_jackson_3.wav") for n in (1, 2))
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"RIFFxxxx")
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "clip.raw").write_bytes(bytes(2000))
    cut = tmp_path / "cut.wav"
    cut.write_bytes(pathlib.Path(a).read_bytes()[:3000])

    def one(audio, **more):
        return asking(audio, "Which digit?", "One.", **more)

    acted = {"dataset": "ravdess", "facts": {"speaker": "x"}}
    options = "Which?\nA. One\nB. Two"
    cases = [
        ([one(str(broken))], [], "not readable"),
        ([one(str(tmp_path / "gone.wav"))], [], "missing"),
        ([one(str(tmp_path / "pipe.wav"))], [], "missing"),  # and not waited for
        ([one(str(tmp_path / "clip.raw"))], [], "not readable"),
        ([one("\ud800.wav")], [], "half a character"),
        ([one("a\0.wav")], [], "missing"),
        ([one(a)], [asking(a, "What?", "One.")], "test manifest"),
        ([asking(a, options, "C.")], [], "option C"),
        ([asking(a, options, "A. Two.")], [], "option A"),
        ([asking(a, options, "B. Two. A. Two.")], [], "option A"),
        ([asking(a, options, "Three.")], [], "none of the options"),
        ([asking(a, "Which?\nA. One\nB. One", "A.")], [], "the same"),
        ([one(a, rejected_response="One.")], [], "rejected"),
        ([{"audios": [a]}], [], "messages"),
        ([one(a, **acted)], [one(b, **acted)], "speaks in a test"),
        ([asking(a, "Which?\nA. He left.\nB. She left.", "B. He left.")], [], "option B"),
    ]
    for train, test, says in cases:
        for name, lines in (("train", train), ("test", test)):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
        manifests = [str(tmp_path / "train.jsonl"), str(tmp_path / "test.jsonl")]
        assert main(["check", *manifests[: 2 if test else 1]]) == 2, says
        assert says in capsys.readouterr().err
    (tmp_path / "cut.jsonl").write_text(json.dumps(one(str(cut))) + "\n")
    assert main(["check", str(tmp_path / "cut.jsonl"), "--decode"]) == 2
    assert "cut short" in capsys.readouterr().err
    right = ("A.", "B", "A. One.", "Two.", "two", "B. Two. A. One.", "A.")
    good = [asking(a, options, answer) for answer in right]
    good.append(asking(a, "Which?\nA. He left.\nB. She left.", "B. She left."))
    (tmp_path / "good.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in good))
    assert main(["check", str(tmp_path / "good.jsonl")]) == 0
    assert "duplicate lines: 1" in capsys.readouterr().out
    # held-out clips, whose speakers are trained on, in any order among the manifests
    for name, clip in (("held_out", a), ("train", b)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(one(clip, **acted)) + "\n")
    for order in (("held_out", "train"), ("train", "held_out")):
        assert main(["check", *(f"{tmp_path}/{name}.jsonl" for name in order)]) == 0
    assert main(["check", str(tmp_path / "none.jsonl")]) == 2


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="reads /proc")
def test_a_disk_that_cannot_be_read_is_no_success():
    """Linux answers whoever reads its first page as it does for a bad sector: EIO."""
    command = [sys.executable, "-m", "tools.prepare", "check", "/proc/self/mem"]
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 2 and "input/output error" in done.stderr.splitlines()[-1]


def test_synthetic_sounds_differ_by_kind_and_by_draw():
    rng = random.Random(0)
    for kind in TOY_SOUNDS + TOY_INSTRUMENTS:
        a, b = synthesize(kind, rng), synthesize(kind, rng)
        assert np.isfinite(a).all() and np.abs(a).max() > 1e-3 and (len(a) != len(b) or not np.allclose(a, b))


SHUFFLE = """
import json, random, resource, sys
sys.path.insert(0, {root!r})
from tools.questions import write_lines
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
n = write_lines(({{"n": i, "text": "x" * 200}} for i in range(100_000)), {out!r}, random.Random(0))
print(n, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_an_error_of_the_lines_is_not_the_disk_s(tmp_path):
    """A mistake while lines are made stays what it is; the old file stays, and nothing is left over."""
    out = tmp_path / "m.jsonl"
    write_lines([{"n": 1}], str(out))

    def broken():
        yield {"n": 2}
        raise ValueError("a bad table")

    with pytest.raises(ValueError, match="a bad table"):
        write_lines(broken(), str(out), random.Random(0))
    with pytest.raises(UnicodeEncodeError):
        write_lines([{"name": "\udcff"}], str(out))
    assert out.read_text() == '{"n": 1}\n' and os.listdir(tmp_path) == ["m.jsonl"]


def test_shuffling_keeps_places_not_lines_in_memory(tmp_path):
    """100,000 lines, 22 MB: memory grows by their eight-byte places (a list of the dicts took 50 MB)."""
    out = f"{tmp_path}/big.jsonl"
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    printed = subprocess.run(
        [sys.executable, "-c", SHUFFLE.format(root=root, out=out)], capture_output=True, text=True, check=True
    ).stdout
    n, grown = printed.split()
    assert n == "100000" and float(grown) < 8
    with open(out) as f:
        order = [json.loads(line)["n"] for line in f]
    assert sorted(order) == list(range(100_000)) and order[:5] != [0, 1, 2, 3, 4]
