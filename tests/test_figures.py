"""Pictures by command."""

import json
import os

from tools.figures import main, smooth


def test_curves_are_drawn_from_the_logs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for run in "ab":
        os.makedirs(run)
        with open(f"{run}/log.jsonl", "w") as f:
            for step in range(1, 6):
                f.write(json.dumps({"step": step, "loss": 1 / step}) + "\n")
            f.write(json.dumps({"step": 5, "held_out": 0.3}) + "\n")
    assert main(["a", "b"]) == 0
    with open("curves.png", "rb") as f:
        assert f.read(4) == b"\x89PNG"
    assert sorted(os.listdir()) == ["a", "b", "curves.png"]
    assert main(["nowhere"]) == 2 and "no log.jsonl" in capsys.readouterr().err


def test_smoothing_is_a_running_mean():
    assert smooth([1.0, 0.0, 0.0], 0.5) == [1.0, 0.5, 0.25] and smooth([3.0, 1.0], 0.0) == [3.0, 1.0]
