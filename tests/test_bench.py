"""The rehearsal's files have the published names, and loading keeps no second copy of the weights."""

import copy
import functools
import json
import os
import pathlib
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace

import pytest
import torch

import train
from data import build_prompt
from decode import generate
from model import DIFFA2, PRESETS, SPECIAL_TOKENS
from runtime.fresh import build
from tools import bench, bench_decode, fullsize, measure
from tools.bench_train import naive_step, one_training_kind, random_questions
from tools.fullsize import full_tokenizer, random_tensor, released_keys
from tools.measure import in_a_process
from weights import trained_part


def test_counts_are_replayed():
    """Blocks of 8 that keep 1, 2 and 5 tokens, whatever the network says; then the rule is as before."""
    model = build(PRESETS["tiny"], seed=0).eval()
    with torch.no_grad():
        model.backbone.ff_out.weight[model.config.eos_id] = 0  # no end mark closes the row early
    left = []
    work = functools.partial(
        generate,
        model,
        [[5, 6, 7]],
        on_step=lambda response, *_: left.append(int((response == model.config.mask_id).sum())),
        answer_length=16,
        block=8,
    )
    _, calls = bench_decode.replay(work, [1, 2, 5])
    assert left == [15, 13, 8, 7, 5, 0] and calls.tolist() == [6]
    work(steps=16)
    assert left[6:] == list(range(15, -1, -1))


def test_released_keys_cover_what_is_trained():
    config = PRESETS["diffa2"]
    with torch.device("meta"):
        model = DIFFA2(config, lora=True)
    pairs = list(released_keys(config))
    assert {name for _, name in pairs} == set(trained_part(model))
    assert sum(name == "acoustic.queries" for _, name in pairs) == 8 and len(
        {key for key, _ in pairs}
    ) == len(pairs)


def test_tokenizer_has_the_exact_ids():
    config = PRESETS["diffa2"]
    tokenizer = full_tokenizer(config)
    for field, token in SPECIAL_TOKENS.items():
        assert tokenizer.token_to_id(token) == getattr(config, field)
    ids, _ = build_prompt(tokenizer, "What emotion?")
    assert ids[0] == 126080 and ids[-3] == 126347 and ids.count(126080) == 1


def test_random_tensor_has_the_asked_spread():
    import numpy as np

    pool = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 0.02
    x = random_tensor((70, 50), pool, np.random.default_rng(0))
    assert x.shape == (70, 50) and abs(x.std().item() - 0.02) < 0.002


def test_the_rehearsal_keeps_off_other_files(tmp_path, capsys, monkeypatch):
    """Real weights have the names of those that it writes and removes."""
    (tmp_path / "large-v3.pt").write_bytes(b"mine")
    seen = []

    def rehearse(folder, *_):
        seen.append(os.listdir(folder))
        pathlib.Path(folder, "large-v3.pt").write_bytes(b"random")

    monkeypatch.setattr(fullsize, "rehearse", rehearse)
    monkeypatch.setattr(fullsize.shutil, "disk_usage", lambda _: SimpleNamespace(free=30e9))
    assert bench.main(["fullsize", str(tmp_path)]) == 0 and seen == [[]]
    assert os.listdir(tmp_path) == ["large-v3.pt"] and (tmp_path / "large-v3.pt").read_bytes() == b"mine"
    monkeypatch.setattr(fullsize.shutil, "disk_usage", lambda _: SimpleNamespace(free=3e9))
    assert bench.main(["fullsize", str(tmp_path)]) == 2
    assert "3 GB free" in capsys.readouterr().err and os.listdir(tmp_path) == ["large-v3.pt"]
    taken = str(tmp_path / "large-v3.pt" / "x")  # below a file
    for argv in (
        ["fullsize", taken],
        ["decode", "--repeats", "0"],
        ["int8", "--device", "cuda:99"],
        ["train", "--stages", "9"],
    ):
        assert bench.main(argv) == 2 and capsys.readouterr().err.count("\n") == 1


LEAN = """
import json, sys, torch
sys.path.insert(0, {root!r})
from tools.measure import Peak, anonymous_bytes
from model import DIFFA2, Config
from runtime.int8 import quantise
from weights import assemble
with torch.device("meta"):
    DIFFA2(Config())  # what torch imports at the first use of this device is no part of the weights
before = anonymous_bytes()
with Peak() as peak:
    config = Config(**json.loads({config!r}))
    model, _ = assemble(config, {llada!r}, {encoder!r}, {diffa!r}, torch.device("cpu"), torch.{dtype}, 4)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if {int8}:
        quantise(model, torch.device("cpu"))
print(json.dumps([peak.bytes - before, weights]))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
@pytest.mark.parametrize(
    "dtype, int8, most", [("bfloat16", False, 1.1), ("float32", False, 1.1), ("bfloat16", True, 0.75)]
)
def test_loading_is_lean(tmp_path, tokenizer, dtype, int8, most):
    """Peak anonymous memory while loading: at most 1.1 times the weights, converted or not.

    In int8 at most three quarters of what they are in bf16: no second copy exists on the way.
    """
    from test_released import EIGHT, SIZES, Authors, write_llada, write_whisper

    from model import Config

    size = {**SIZES, "width": 512, "ffn": 2048, "layers": 12, "heads": 8, "vocab": 20000}
    c = Config(**size, **EIGHT, lora_rank=4).with_tokenizer(tokenizer)
    c = type(c)(**{**vars(c), "vocab": 20000})
    authors = Authors(c, True)
    write_llada(f"{tmp_path}/llada", {k: v.to(torch.bfloat16) for k, v in authors.llada().items()}, tokenizer)
    torch.save(authors.trained(), f"{tmp_path}/pytorch_model.bin")
    encoder = write_whisper(str(tmp_path), authors.whisper_model, c, "pt")
    script = LEAN.format(
        root=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
        config=json.dumps(vars(c)),
        llada=f"{tmp_path}/llada",
        encoder=encoder,
        diffa=f"{tmp_path}/pytorch_model.bin",
        dtype=dtype,
        int8=int8,
    )
    # glibc gives what is freed back at once: it would keep blocks of this size, and they would count
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", script]
    out = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    grown, weights = json.loads(out.splitlines()[-1])
    assert weights > 100e6  # large beside what a process allocates anyway
    assert 0 < grown <= most * weights, (grown, weights)


# ---------------------------------------------------------------------------------------------
# training steps


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_the_naive_step_computes_the_same(config, stage):
    """What `tools.bench train` compares is one computation done two ways: loss and gradients in fp32."""
    model = build(config, seed=0)
    if stage >= 3:
        model.add_lora()
    row = train.STAGES["diffa2"][stage]
    trained = train.freeze_all_but(model, row.trains)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in trained.values():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    model.eval(), other.eval()
    micro = random_questions(
        config, 3, ("chosen", "rejected") if stage == 4 else ("text",), prompt=30, response=6
    )
    reference = (
        tuple(p.detach().clone() for n, p in other.named_parameters() if n in trained) if stage == 4 else ()
    )
    context = train.LossContext(
        model,
        stage,
        0,
        row,
        functools.partial(torch.autocast, "cpu", enabled=False),
        tuple(trained.values()),
        reference,
    )
    ours = row.loss.backward(context, micro)
    gradients = {n: p.grad.clone() for n, p in trained.items() if p.grad is not None}
    model.zero_grad()
    naive = naive_step(model, other, micro, stage)
    assert torch.allclose(ours, naive, rtol=1e-4), (ours, naive)
    naive.sum().backward()
    for n, g in gradients.items():
        assert torch.allclose(g, trained[n].grad, atol=1e-4 * max(1, g.abs().max())), n


def test_one_kind_is_timed(config, monkeypatch):
    monkeypatch.setitem(measure.SIZES, "small", config)
    how = {"size": "small", "batch": 2, "repeats": 2, "device": None, "precision": None, "recompute": False}
    for naive in (False, True):
        seconds, memory = one_training_kind(SimpleNamespace(**how), 3, naive)
        assert len(seconds) == 2 and min(seconds) > 0 and memory > 0


def test_a_new_process_returns_or_fails_alone():
    assert in_a_process(os.getpid) != os.getpid() and in_a_process(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        in_a_process(divmod, 7, 0)
    with pytest.raises(BrokenProcessPool):  # as one that the kernel kills for its memory
        in_a_process(os._exit, 1)


def test_decode_table(capsys, toured, monkeypatch):
    monkeypatch.setattr(bench_decode, "bandwidth", lambda device: 1e10)
    args = [
        "decode",
        "--size",
        "tiny",
        "--repeats",
        "1",
        "--dtypes",
        "float32",
        "--limit",
        "3",
        "--data",
        f"{toured}/test.jsonl",
    ]
    assert bench.main(args) == 0
    out = capsys.readouterr().out
    speed = (
        "naive, 16 steps",
        "naive, 128 steps",
        "exact, 16 steps",
        "prefix cache, 16 steps",
        "autoregressive baseline",
    )
    for row in speed:
        assert row in out


def test_the_data_path(capsys):
    """All of its lines come out, at a small size; what is opened in another process holds every line."""
    assert bench.main(["data", "--lines", "3000", "--clips", "16"]) == 0
    out = capsys.readouterr().out
    assert "3,000 synthetic lines" in out and "1000 lines parsed" in out and "8,500,000" in out
    assert [line for line in out.splitlines() if line.startswith("--workers 2: ")]


def test_int8_table(capsys):
    """A row for each number of rows; int8 loses more than bf16, and little."""
    assert bench.main(["int8", "--size", "256", "--repeats", "3"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [int(row[0]) for row in rows] == [1, 16, 128, 480]
    for *_, half, rounded in rows:
        assert 0 < float(half.rstrip("%")) < float(rounded.rstrip("%")) < 2.5
    assert bench.main(["int8", "--size", "0"]) == 2
    assert "--size" in capsys.readouterr().err
