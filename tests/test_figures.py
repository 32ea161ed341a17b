"""Pictures by command."""

import io
import json
import os
import xml.etree.ElementTree as ElementTree

import soundfile
from conftest import sound

from decode import ask
from tools.figures import Frames, draw_heatmap, main, smooth
from train import STAGES
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
    with open("a/log.jsonl", "a") as f:
        f.write("{{\n")
    assert main(["curves", "a"]) == 2 and "a line is not JSON" in capsys.readouterr().err


def test_smoothing_is_a_running_mean():
    assert smooth([1.0, 0.0, 0.0], 0.5) == [1.0, 0.5, 0.25] and smooth([3.0, 1.0], 0.0) == [3.0, 1.0]


def words_of(path):
    """All text in an SVG, which must be well-formed."""
    return [e.text for e in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]


ASSETS = os.path.join(os.path.dirname(__file__), "..", "assets")


def test_the_shipped_picture_is_what_the_command_draws(tmp_path):
    out, shipped = str(tmp_path / "a.svg"), os.path.join(ASSETS, "stages.svg")
    assert main(["stages", "--out", out]) == 0
    assert {"acoustic adapter", "semantic adapter"} <= set(words_of(out))
    assert {"acoustic adapter", "semantic adapter"} <= set(words_of(os.path.join(ASSETS, "architecture.svg")))
    with open(out) as new, open(shipped) as old:
        assert new.read() == old.read()


def test_the_stages_show_what_the_table_trains(tmp_path):
    out = str(tmp_path / "stages.svg")
    assert main(["stages", "--out", out]) == 0
    words = words_of(out)
    assert words.count("trains") == sum(len(row.trains) for row in STAGES["tiny"].values())
    assert words.count("VRPO, Eq. 3 to 5") == 1 and words.count("frozen") == 4 + 4  # encoder, backbone


def test_a_heat_map_has_a_row_a_call_and_is_blank_where_masked():
    frames = [[("four", 0.9), (None, 0.0)], [("four", 0.9), ("$x_", 0.25)]]
    axis = draw_heatmap(frames, "what is $ said?").axes[0]
    (image,) = axis.images
    shown = image.get_array()
    assert shown.mask.tolist() == [[False, True], [False, False]] and shown[1].tolist() == [0.9, 0.25]
    draw_heatmap(frames, "what is $ said?").savefig(io.BytesIO())  # $ begins no formula


def test_accuracy_is_drawn_from_what_evaluate_has_logged(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, calls in (("a", 1.7), ("b", 16)):
        with open(f"{name}.json.summary.json", "w") as f:
            json.dump({"n": 300, "calls": calls, "rtf": 0.1, "right": 0.76}, f)
    assert main(["accuracy", "a.json", "b.json"]) == 0
    with open("accuracy.png", "rb") as f:
        assert f.read(4) == b"\x89PNG"
    assert main(["accuracy", "a.json", "c.json"]) == 2 and "c.json: no summary" in capsys.readouterr().err


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
    assert main(["answer", clip, "Hm?", "--model", small_folder, "--out", out, "--steps", "32"]) == 0
    assert "network call 1 of 32" in words_of(out)
    assert main(["answer", str(tmp_path / "gone.wav"), "Hm?", "--model", small_folder]) == 2
    assert "no such file" in capsys.readouterr().err
