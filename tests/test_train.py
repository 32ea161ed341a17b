"""What trains and what must not, the noise of an example, and every stage run through on a handful of clips."""

import math
import os

import numpy as np
import pytest
import torch

from data import read_manifest
from model import PRESETS, load
from test_prepare import corpora, toured  # noqa: F401  (fixtures)
from train import STAGES, Pretraining, augment, example_stream, generator_for, learning_rate, main, make_batch, mask_mel, question_loss, trainable


def run(toured, out, stage, *extra):
    return main(["--model", "tiny", "--stage", str(stage), "--data", f"{toured}/stage{stage}.jsonl", "--out", f"{out}/stage{stage}",
                 "--device", "cpu", "--max-steps", "10", *extra])  # fmt: skip


@pytest.fixture(scope="session")
def stages(toured, tmp_path_factory):  # noqa: F811
    """Stages 0 to 3 of the real tiny preset, a few steps of four examples each."""
    out = str(tmp_path_factory.mktemp("out"))
    with pytest.MonkeyPatch.context() as patch:
        for n, row in list(STAGES["tiny"].items()):
            patch.setitem(STAGES["tiny"], n, row.__class__(row.trains, row.lr, batch=4, warmup=2, steps=10))
        for stage in range(4):
            assert run(toured, out, stage, *(["--init", f"{out}/stage{stage - 1}"] if stage else [])) == 0
    return out


TRAINED = {1: ("semantic.", "soft_prompts"), 2: ("semantic.", "acoustic."), 3: ("semantic.", "acoustic.", "lora_")}


@pytest.mark.parametrize("stage", TRAINED)
def test_exactly_the_named_parts_change(stages, stage):
    before, after = (load(f"{stages}/stage{n}", "cpu")[0] for n in (stage - 1, stage))
    assert after.stage == stage
    old, new = before.state_dict(), after.state_dict()
    for name, value in new.items():
        trains = any(name.startswith(part) or (part == "lora_" and part in name) for part in TRAINED[stage])
        if name not in old:
            assert "lora_" in name and stage == 3
        elif trains:
            assert not torch.equal(old[name], value), f"{name} did not train"
        else:
            assert torch.equal(old[name], value), f"{name} changed"
    if stage == 3:  # B starts at zero: it trained if it is not zero any more
        assert all(v.abs().max() > 0 for n, v in new.items() if "lora_B" in n)


@pytest.mark.parametrize("stage", TRAINED)
def test_gradients_reach_exactly_the_named_parts(stages, toured, stage):  # noqa: F811
    model, tokenizer = load(f"{stages}/stage{stage}", "cpu")
    chosen = trainable(model, STAGES["tiny"][stage].trains)
    examples = read_manifest(f"{toured}/stage{stage}.jsonl", stage)[:4]
    generators = [generator_for(0, 0, e.id) for e in examples]
    batch = make_batch(examples, tokenizer, model.config, generators)
    loss = question_loss(model, batch, generators, stage)
    assert loss.shape == (4,)
    loss.sum().backward()
    for name, p in model.named_parameters():
        named = any(name.startswith(part) or (part == "lora_" and part in name) for part in TRAINED[stage])
        assert (name in chosen) == p.requires_grad == named
        assert (p.grad is not None) == named, name


def test_paper_values_are_the_defaults():
    """Table B.2."""
    rows = STAGES["diffa2"]
    assert [(rows[n].lr, rows[n].batch, rows[n].warmup, rows[n].epochs) for n in (1, 2, 3)] == [
        (1e-4, 1280, 1000, 12), (5e-5, 196, 1000, 10), (5e-5, 196, 1000, 10),
    ]  # fmt: skip
    with torch.device("meta"):
        from model import DIFFA2

        model = DIFFA2(PRESETS["diffa2"], lora=True)
    count = lambda n: sum(p.numel() for p in trainable(model, rows[n].trains).values())
    assert [count(n) for n in (1, 2, 3)] == [36_392_448 + 81_920, 36_392_448 + 47_892_992, 98_965_504]


def test_learning_rate_warms_up_and_falls():
    row = STAGES["tiny"][1]
    rates = [learning_rate(s, row, 500) for s in range(500)]
    assert rates[0] == row.lr / row.warmup and rates[row.warmup] == row.lr == max(rates)
    assert rates[row.warmup :] == sorted(rates[row.warmup :], reverse=True) and rates[-1] < row.lr * 1e-4
    assert math.isclose(rates[(500 + row.warmup) // 2], row.lr / 2, rel_tol=0.02)


def test_an_example_is_augmented_by_its_own_seed(stages, toured):  # noqa: F811
    """The same noise in any batch; other noise in another epoch."""
    model, tokenizer = load(f"{stages}/stage2", "cpu")
    examples = read_manifest(f"{toured}/stage2.jsonl", 2)[:3]
    batch = lambda chosen, epoch: make_batch(chosen, tokenizer, model.config, [generator_for(0, epoch, e.id) for e in chosen])
    together, alone = batch(examples, 0), batch(examples[1:2], 0)
    assert torch.equal(together["mel"][1], alone["mel"][0]) and together["n_frames"][1] == alone["n_frames"][0]
    n = alone["ids"].size(1)
    assert torch.equal(together["ids"][1, :n], alone["ids"][0]) and torch.equal(together["is_answer"][1, :n], alone["is_answer"][0])
    assert not torch.equal(batch(examples[1:2], 1)["mel"], alone["mel"])


def test_augment_and_mask_stay_in_bounds():
    c, rng = PRESETS["tiny"], np.random.default_rng(0)
    clip = rng.uniform(-0.5, 0.5, 158000).astype(np.float32)
    for seed in range(30):
        g = torch.Generator().manual_seed(seed)
        out = augment(clip, c, g)
        assert out.dtype == np.float32 and 0 < len(out) <= 160000 and np.isfinite(out).all()
        mel = torch.randn(80, 1000, generator=g)
        masked = mask_mel(mel, g)
        changed = (masked != mel).float().mean().item()
        assert masked.shape == mel.shape and changed < 0.6 and torch.equal(masked[masked != mel].unique(), mel.mean()[None]) == (changed > 0)


def test_packs_hold_what_they_say(toured):  # noqa: F811
    """A window's words and labels are those of its clips, in order, each over frames of its own."""
    import random

    examples = read_manifest(f"{toured}/stage0.jsonl", 0)
    heads = Pretraining(examples, PRESETS["tiny"])
    rng, counts = random.Random(0), []
    for seed in range(40):
        mel, words, labels = heads.pack(rng, torch.Generator().manual_seed(seed))
        assert mel.shape == (80, 1000) and labels
        spoken = [heads.labels[k] for k, _, _ in labels if heads.labels[k] in heads.words]
        assert [heads.words[w - 1] for w in words] == spoken
        edges = [x for _, i, j in labels for x in (i, j)]
        assert edges == sorted(edges) and edges[-1] <= 500 and all(i < j for _, i, j in labels)
        counts.append(len(labels))
    assert min(counts) == 1 and max(counts) > 4


def test_stream_shows_every_example_once_an_epoch():
    examples = list(range(10))
    stream = example_stream(examples, 4, [1] * 10, seed=0)
    first = [next(stream) for _ in range(3)]
    assert {epoch for epoch, _ in first} == {0} and sorted(i for _, b in first for i in b) == examples
    assert next(stream)[0] == 1


def test_loss_falls(stages, toured, tmp_path):  # noqa: F811
    """One fixed batch with its fixed noise, adapters and backbone both free: four answers are learned by heart."""
    model, tokenizer = load(f"{stages}/stage2", "cpu")
    chosen = trainable(model, ("semantic.", "acoustic.", "backbone."))
    examples = read_manifest(f"{toured}/stage2.jsonl", 2)[:4]
    make = lambda: [generator_for(0, 0, e.id) for e in examples]
    batch = make_batch(examples, tokenizer, model.config, make())
    optimizer = torch.optim.AdamW(chosen.values(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = question_loss(model, batch, make(), 2).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--stage", "1", "--model", "tiny", "--data", "none.jsonl"], "prepare.py tour"),
        (["--stage", "7"], "invalid choice"),
        (["--stage", "0"], "no stage 0 for diffa2"),
        (["--stage", "1", "--model", "tiny", "--init", "nowhere"], "no checkpoint to start from"),
        (["--stage", "1", "--model", "tiny", "--device", "warp9"], "warp9"),
    ],
)
def test_one_line_for_what_is_wrong(argv, says, toured, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    if "--data" not in argv:
        argv = [*argv, "--data", f"{toured}/stage1.jsonl"]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("train.py: ") and says in err
    assert os.listdir(tmp_path) == []
