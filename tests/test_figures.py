"""Pictures by command."""

import json
import os
import xml.etree.ElementTree as ElementTree

import soundfile
from conftest import sound

from decode import ask
from tools.figures import Frames, main, smooth
from weights import load


def test_curves_are_drawn_from_the_logs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for run in "ab":
        os.makedirs(run)
        with open(f"{run}/log.jsonl", "w") as f:
            for step in range(1, 6):
                f.write(json.dumps({"step": step, "loss": 1 / step}) + "\n")
            f.write(json.dumps({"step": 5, "held_out": 0.3}) + "\n")
    assert main(["curves", "a", "b"]) == 0
    with open("curves.png", "rb") as f:
        assert f.read(4) == b"\x89PNG"
    assert sorted(os.listdir()) == ["a", "b", "curves.png"]
    assert main(["curves", "nowhere"]) == 2 and "no log.jsonl" in capsys.readouterr().err


def test_smoothing_is_a_running_mean():
    assert smooth([1.0, 0.0, 0.0], 0.5) == [1.0, 0.5, 0.25] and smooth([3.0, 1.0], 0.0) == [3.0, 1.0]


def words_of(path):
    """All text in an SVG, which must be well-formed."""
    return [e.text for e in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]


def test_the_shipped_architecture_is_what_the_command_draws(tmp_path):
    out = str(tmp_path / "a.svg")
    assert main(["architecture", "--out", out]) == 0
    assert {"acoustic adapter", "semantic adapter", "audio tokens"} <= set(words_of(out))
    shipped = os.path.join(os.path.dirname(__file__), "..", "assets", "architecture.svg")
    with open(out) as new, open(shipped) as old:
        assert new.read() == old.read()


def test_an_answer_is_drawn_call_by_call(tmp_path, small_folder, capsys):
    """A frame a call, the last one the answer itself; masks only ever become fewer."""
    clip = str(tmp_path / "clips" / "c.wav")
    sound(clip)
    model, tokenizer = load(small_folder, "cpu")
    frames = Frames(tokenizer, model.config)
    audio = soundfile.read(clip, dtype="float32")[0]
    (answer,) = ask(model, tokenizer, [audio], ["What <is> this?"], on_step=frames)
    assert len(frames.frames) == answer.calls
    masks = [sum(word is None for word, _ in frame) for frame in frames.frames]
    assert masks[-1] == 0 and masks == sorted(masks, reverse=True)
    out = str(tmp_path / "answer.svg")
    assert main(["answer", clip, "What <is> this?", "--model", small_folder, "--out", out]) == 0
    assert "c.wav: What <is> this?" in words_of(out) and os.path.getsize(out) < 1_000_000
    assert f"network call {answer.calls} of {answer.calls}" in words_of(out)
    assert main(["answer", str(tmp_path / "gone.wav"), "Hm?", "--model", small_folder]) == 2
    assert "no such file" in capsys.readouterr().err
