"""The peer: openai-whisper's own decoder on the transcripts of a manifest."""

import dataclasses
import json
import os

import numpy as np
import pytest
import soundfile
import torch
import whisper

from data import load_audio
from tools import peer

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture
def small_whisper(tmp_path):
    """An English Whisper of 16 channels in openai-whisper's format; its path."""
    dims = whisper.model.ModelDimensions(80, 1500, 16, 2, 1, 51864, 448, 16, 2, 1)
    torch.manual_seed(0)
    model = whisper.model.Whisper(dims)
    torch.save({"dims": dataclasses.asdict(dims), "model_state_dict": model.state_dict()}, tmp_path / "w.pt")
    return str(tmp_path / "w.pt")


@pytest.fixture
def manifest(tmp_path):
    lines = []
    for name, text in (("seven", "seven"), ("digits", "four nine two")):
        asked = {"role": "user", "content": "<audio>What is said?"}
        messages = [asked, {"role": "assistant", "content": text}]
        clip = os.path.join(ROOT, "assets/demo", f"{name}.wav")
        lines.append({"messages": messages, "audios": [clip], "task": "asr"})
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(tmp_path / "m.jsonl")


def test_transcribe_is_openai_whispers_own(small_whisper, manifest):
    """The same text as the library's one call, and as many decoder calls as it makes."""
    model = whisper.load_model(small_whisper, "cpu")
    path = os.path.join(ROOT, "assets/demo/seven.wav")
    calls = []
    model.decoder.register_forward_hook(lambda *_: calls.append(1))
    text, n = peer.transcribe(model, path)
    assert n == len(calls)
    mel = whisper.log_mel_spectrogram(whisper.pad_or_trim(load_audio(path)[0]))
    expected = whisper.decode(model, mel, language="en", without_timestamps=True, fp16=False)
    assert text == expected.text


def test_digits_are_spelled():
    assert peer.spelled("4, 92 dogs").split() == ["four", ",", "nine", "two", "dogs"]


def test_command(small_whisper, manifest, capsys):
    assert peer.main([manifest, "--whisper", small_whisper]) == 0
    line = capsys.readouterr().out
    assert "2 clips" in line and "0.0% exact" in line  # random weights


@pytest.mark.parametrize("wrong", ["no-such-model", "m.jsonl"])
def test_wrong_model(tmp_path, manifest, capsys, wrong):
    name = str(tmp_path / wrong) if wrong == "m.jsonl" else wrong
    assert peer.main([manifest, "--whisper", name]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_other_formats(tmp_path, small_whisper, capsys):
    """NeMo's lines are transcripts; of a clip beyond Whisper's window it is said that it is cut."""
    soundfile.write(tmp_path / "long.wav", np.random.default_rng(0).uniform(-0.1, 0.1, 31 * 16000), 16000)
    line = {"audio_filepath": "long.wav", "text": "one two", "duration": 31.0}
    (tmp_path / "m.jsonl").write_text(json.dumps(line) + "\n")
    assert peer.main([str(tmp_path / "m.jsonl"), "--whisper", small_whisper]) == 0
    out, err = capsys.readouterr()
    assert "1 clips" in out and "the first 30 s are used" in err
    text = {"messages": [{"role": "user", "content": "Say."}, {"role": "assistant", "content": "one"}]}
    (tmp_path / "m.jsonl").write_text(json.dumps(text | {"task": "asr"}) + "\n")
    assert peer.main([str(tmp_path / "m.jsonl"), "--whisper", small_whisper]) == 2
    assert "no audio" in capsys.readouterr().err


def test_no_transcripts(tmp_path, small_whisper, capsys):
    path = tmp_path / "none.jsonl"
    asked = [{"role": "user", "content": "<audio>What?"}, {"role": "assistant", "content": "Rain."}]
    path.write_text(json.dumps({"messages": asked, "audios": ["a.wav"], "task": "sound"}) + "\n")
    assert peer.main([str(path), "--whisper", small_whisper]) == 2
    assert "no transcripts" in capsys.readouterr().err
