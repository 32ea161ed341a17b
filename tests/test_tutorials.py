"""What each file of the root prints when it is run alone: the figures it prints are right, not only there."""

import os
import re
import runpy
import subprocess
import sys

import pytest

from runtime.tutorials import count
from train import STAGES
from weights import load

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture
def printed(monkeypatch, capsys):
    """NAME -> what `python NAME.py` prints."""

    def run(name):
        path = os.path.join(ROOT, f"{name}.py")
        monkeypatch.setattr(sys, "argv", [path])
        with pytest.raises(SystemExit) as e:
            runpy.run_path(path, run_name="__main__")
        assert not e.value.code
        return capsys.readouterr().out

    return run


def estimates(text):
    """Every "mean +- error ... figure" of a text."""
    found = re.findall(r"(-?[\d.]+) \+- ([\d.]+)\D+([\d.]+)", text)
    return [tuple(map(float, numbers)) for numbers in found]


def test_diffusion(printed):
    out = printed("diffusion")
    exact = float(re.search(r"exact +log p = (\S+)", out)[1])
    (loss, loss_error, loss_spread), (elbo, elbo_error, elbo_spread) = estimates(out)
    assert abs(loss - exact) < 4 * loss_error and abs(elbo - exact) < 4 * elbo_error
    assert elbo_spread < 0.5 * loss_spread  # at the same number of draws
    hidden = [line.count("_") for line in re.findall(r"t = .*", out)]
    assert hidden == sorted(hidden) and hidden[0] < hidden[-1]


def test_vrpo(printed):
    out = printed("vrpo")
    exact = float(re.search(r"exact value (\S+)", out)[1])
    found = estimates(out)
    assert len(found) == 4 and all(abs(mean - exact) < 4 * error for mean, error, _ in found)
    neither, counts, masks, both = (variance for *_, variance in found)
    assert both < masks < counts < neither


def test_adapters(printed):
    rows = re.findall(r"([\d.]+)M +([\d,]+)\n", printed("adapters"))
    assert len(rows) == 4
    for paper, ours in rows:
        assert paper == f"{int(ours.replace(',', '')) / 1e6:.1f}"


def test_model(printed):
    out = printed("model")
    assert "This  is:  a1  a2  a3  <audio>.  [M]  [M]" in out
    blocks = re.findall(r"(\w+): ([\d,]+) parameters\n((?:  .+\n)+)", out)
    assert [name for name, *_ in blocks] == ["diffa2", "diffa1", "tiny"]
    for _, total, parts in blocks:
        sizes = [int(n.replace(",", "")) for n in re.findall(r"[\d,]+$", parts, re.MULTILINE)]
        assert sum(sizes) == int(total.replace(",", ""))
    assert "8,015,581,184" in blocks[0][2]  # LLaDA-8B


def test_decode(printed):
    out = printed("decode")
    # Eq. 8 by hand: (n + 1)(1 - c_n) of the six is 0.02, 0.09, 0.28, 0.75, 1.8, 4.9
    assert [int(n) for n in re.findall(r"keeps (\d)", out)] == [2, 3, 4, 5, 3]
    assert out.rstrip().endswith("four nine two")


def test_train(printed):
    rows = re.findall(r"stage (\d) .* (\w+)$", printed("train"), re.MULTILINE)
    wanted = [
        (str(n), row.loss.backward.__name__) for name in ("diffa2", "tiny") for n, row in STAGES[name].items()
    ]
    assert rows == wanted


def test_weights_and_data(printed):
    out = printed("weights")
    parts = re.findall(r"^(\w+) +\d+ +([\d,]+) ", out, re.MULTILINE)
    assert dict(parts)["backbone"] == f"{count(load('tiny', 'cpu')[0].backbone):,}"
    assert "encoder" not in dict(parts)  # Whisper's lies in a file of its own
    assert "-> encoder.blocks.0.mlp.0.weight" in out
    out = printed("data")
    assert "-> 16 acoustic + " in out and "[ audio ]" in out and "<audio>" in out.split("[ audio ]")[1]


def test_a_pipe_that_closes_early():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        command = [sys.executable, os.path.join(ROOT, "adapters.py")]
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
