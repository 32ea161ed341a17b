"""Small things that several test files need: a random model of the real classes, and its tokenizer."""

import contextlib
import dataclasses
import json
import os
import sys
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import soundfile
import torch
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from runner import SMALL

from runtime.fresh import build
from tools.prepare import main as prepare
from tools.tour import train_tokenizer
from weights import save

SHARED_AUDIO = os.path.join(os.path.dirname(__file__), "..", "..", "shared", "audio")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also the tests that take minutes")
    parser.addoption(
        "--screenshot", metavar="PNG", help="where the browser test leaves its picture of the page"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; runs with --slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes: --slow runs it"))


@pytest.fixture(scope="session")
def shared_audio():
    """Real recordings that do not come with the project; what needs them is skipped without."""
    if not os.path.isdir(SHARED_AUDIO):
        pytest.skip("no ../shared/audio here")
    return SHARED_AUDIO


@pytest.fixture(scope="session")
def tokenizer():
    words = (
        "zero one two three four five six seven rain dog "
        "what digit sound is this do you hear a speaker says the"
    )
    lines = [
        {"messages": [{"content": f"{a} {b}?"}, {"content": f"{b.capitalize()}."}], "task": "x", "facts": {}}
        for a in words.split()
        for b in words.split()
    ]
    return train_tokenizer(lines, vocab=320)


@pytest.fixture(scope="session")
def config(tokenizer):
    return SMALL.with_tokenizer(tokenizer)


def lively(model, scale=20.0, seed=1):
    """Fresh weights make all tokens equally likely; larger ones give a decoder something to rank."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.backbone.parameters():
            if p.dim() == 2:
                p.copy_(torch.randn(p.shape, generator=g) * 0.2)
        model.backbone.ff_out.weight.mul_(scale / 4)
    return model.eval()


@pytest.fixture
def small(config):
    """A DIFFA2 with a two-layer backbone and a 2 s window, random weights, fp32."""
    return lively(build(dataclasses.replace(config), seed=0))


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory, config, tokenizer):
    """The same, saved as a checkpoint of stage 2."""
    model = lively(build(config, seed=0))
    model.stage = 2
    folder = tmp_path_factory.mktemp("small")
    save(model, tokenizer, str(folder), dtype=torch.float32)
    return str(folder)


def whisper_encoder(width, layers, heads, n_mels, n_frames):
    """transformers' Whisper encoder of these sizes; it insists on a window of n_frames."""
    sizes = {"d_model": width, "encoder_ffn_dim": 4 * width, "num_mel_bins": n_mels}
    sizes |= {"encoder_layers": layers, "encoder_attention_heads": heads, "max_source_positions": n_frames}
    return WhisperEncoder(WhisperConfig(**sizes)).eval()


def read_lines(path):
    """The objects of a file of JSON lines."""
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def sound(path, seconds=0.2):
    """A short noise at `path`."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    rng = np.random.default_rng(zlib.crc32(os.path.basename(path).encode()))  # the same in any folder
    soundfile.write(path, rng.uniform(-0.3, 0.3, int(16000 * seconds)), 16000)


@pytest.fixture(scope="session")
def corpora(tmp_path_factory):
    """A few files of each corpus of the small model, named and laid out as published."""
    root = tmp_path_factory.mktemp("corpora")
    for digit in range(10):
        for index in (0, 1, 2, 3, 4):
            sound(f"{root}/fsdd/recordings/{digit}_jackson_{index}.wav")
    for word in ("bed", "cat", "seven"):
        for speaker in ("0ab12345", "1cd12345", "2ef12345", "9ff12345"):
            sound(f"{root}/speech_commands/{word}/{speaker}_nohash_0.wav")
    for n, label in ((1, "Dog bark"), (2, "Rain")):
        for fold in (1, 4, 5):
            sound(f"{root}/esc10/00{n} - {label}/{fold}-{1000 + fold}-A.ogg", 0.5)
    (root / "esc10" / "README.txt").write_text("not a clip")
    for actor in ("01", "02", "21"):
        for code in ("01-01-01-01", "05-02-02-01", "04-01-01-02"):
            sound(f"{root}/ravdess/Actor_{actor}/03-01-{code}-{actor}.wav", 0.4)
    for speaker in ("14", "16", "17", "20"):
        sound(f"{root}/librispeech/train-clean-100/{speaker}/100/{speaker}-100-0000.flac", 0.4)
    (root / "librispeech" / "SPEAKERS.TXT").write_text(
        "; a comment\n14   | F | train-clean-360  | 25.03 | A Reader\n"
        "16   | F | x | 1 | B\n17   | M | x | 1 | C\n20   | M | x | 1 | D\n"
    )
    for name in ("bell_1a", "bell3", "guitar_chord1", "malevoice_aa_A1", "glass_tone13"):
        sound(f"{root}/berklee/{name}.wav", 0.3)
    for name in ("bd_808", "hat_cab", "drum_snare_3", "tabla_ke1"):
        sound(f"{root}/sonicpi/{name}.flac", 0.3)
    return str(root)


@pytest.fixture(scope="session")
def toured(tmp_path_factory, corpora):
    """All manifests of the small model, made from `corpora`."""
    out = str(tmp_path_factory.mktemp("tour"))
    assert prepare(["tour", "--audio", corpora, "--out", out, "--strings", "20"]) == 0
    return out


def chat(text):
    """What a language model's server says, as bytes."""
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


@contextlib.contextmanager
def served(answer):
    """A local server -> its URL.  answer(path, key, body) -> status, bytes, perhaps a false length."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, data, *false = answer(self.path, self.headers.get("Authorization"), body)
            self.send_response(status)
            self.send_header("Content-Length", str(false[0] if false else len(data)))
            with contextlib.suppress(OSError):  # who asked may have given up waiting
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/v1"
    httpd.shutdown()
    httpd.server_close()
