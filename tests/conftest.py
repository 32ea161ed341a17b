"""Small things that several test files need: a random model of the real classes, and its tokenizer."""

import dataclasses
import os
import sys

import pytest
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from model import Config, build, save
from prepare import train_tokenizer

SHARED_AUDIO = os.path.join(os.path.dirname(__file__), "..", "..", "shared", "audio")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a few seconds; left out with -m 'not slow'")


@pytest.fixture(scope="session")
def shared_audio():
    """Real recordings that do not come with the project; what needs them is skipped without."""
    if not os.path.isdir(SHARED_AUDIO):
        pytest.skip("no ../shared/audio here")
    return SHARED_AUDIO


@pytest.fixture(scope="session")
def tokenizer():
    words = "zero one two three four five six seven rain dog what digit sound is this do you hear a speaker says the"
    lines = [{"messages": [{"content": f"{a} {b}? {b.capitalize()}."}]} for a in words.split() for b in words.split()]
    return train_tokenizer(lines, vocab=320)


SMALL = Config(
    n_mels=80, n_frames=100, audio_width=16, audio_heads=2, audio_layers=3, taps=(0, 2, 3), qformer_ffn=24,
    n_queries=5, n_soft_prompts=4, vocab=320, width=32, layers=2, heads=2, ffn=48, rope_theta=10000.0, context=512,
    lora_rank=4,
)  # fmt: skip


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
