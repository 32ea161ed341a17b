"""Training: what trains and what must not, many processes against one, resuming, being killed.

And what bad data and bad numbers do.
"""

import contextlib
import dataclasses
import errno
import json
import math
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import soundfile
import torch
from conftest import read_lines
from runner import SMALL_STAGES, install

import train
from data import (
    BatchBuilder,
    Example,
    answer_text,
    audio_tokens,
    encode_question,
    generator_for,
    read_manifest,
)
from decode import ask
from model import DIFFA2, PRESETS
from runtime.checkpoints import list_states, read_state, write_state
from runtime.errors import UserError
from runtime.fresh import build
from runtime.loading import MicroBatches, cost_of, schedule_of, size_of
from runtime.optimizers import make_optimizers
from runtime.plan import memory_of, saved_bytes
from runtime.processes import StopSignal
from runtime.start import settings_of, start_from
from runtime.variations import augment, mask_mel
from train import STAGES, Stage, freeze_all_but, learning_rate, main, parse
from weights import load, save

RUNNER = os.path.join(os.path.dirname(__file__), "runner.py")


@pytest.fixture(scope="session", autouse=True)
def small_preset():
    threads = torch.get_num_threads()
    install()
    yield
    torch.set_num_threads(threads)


def builder_for(tokenizer, config, row, seed):
    """What `train` makes micro-batches of a row with."""
    return BatchBuilder(tokenizer, config, row.loss.encode, seed, row.is_imitated, row.augment)


def arguments(toured, out, stage, *extra):
    argv = ["--model", "small", "--stage", str(stage), "--data", f"{toured}/stage{stage}.jsonl"]
    argv += ["--out", f"{out}/stage{stage}", "--device", "cpu", "--precision", "fp32", "--no-dropout", *extra]
    return argv if stage == 0 or "--init" in extra else [*argv, "--init", f"{out}/stage{stage - 1}"]


def start(jobs, tmp_path, processes=1, phases=None, restarts=0, **kw):
    """runner.py on these jobs, in one process or under torchrun; a Popen."""
    path = tmp_path / "jobs.json"
    path.write_text(json.dumps(jobs))
    how = [sys.executable]
    if processes > 1:
        how += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        how += ["--max-restarts", str(restarts)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    env["TOKENIZERS_PARALLELISM"] = "false"
    # torchrun's store outlives its workers: those of a restart would find the addresses of the dead in it
    env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    return subprocess.Popen(
        [*how, RUNNER, str(path), *([phases] if phases else [])],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kw,
    )


def run(jobs, tmp_path, processes=1):
    process = start(jobs, tmp_path, processes)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return out


def losses(folder):
    return [e["loss"] for e in read_lines(f"{folder}/log.jsonl") if "loss" in e]


def weights(folder):
    return load(str(folder), "cpu", torch.float32)[0].state_dict()


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------------------------------
# all stages, one process and two


@pytest.fixture(scope="session")
def one(toured, tmp_path_factory):
    """Stages 0 to 4, 20 steps each, in this process."""
    out = str(tmp_path_factory.mktemp("one"))
    for stage in range(5):
        assert main(arguments(toured, out, stage)) == 0
    return out


SIXTY = ("--max-steps", "60", "--save-every", "3", "--resume")


@pytest.fixture(scope="session")
def two(one, toured, tmp_path_factory):
    """What two processes train that nothing disturbs, under one torchrun, for each start takes seconds.

    like_one: every stage as `one` has it; whole, halves: twenty steps, and ten and ten; seven: seven steps;
    held_out: four steps with a held-out loss; sixty: as test_torchrun_restarts_what_was_killed has them.
    """
    out, jobs = tmp_path_factory.mktemp("two"), []

    def job(kind, stage, *extra):
        before = ("--init", f"{one}/stage{stage - 1}") if stage else ()
        return arguments(toured, out / kind, stage, *before, *extra)

    jobs += [job("like_one", stage) for stage in range(5)]
    for stage in (1, 3, 4):
        for kind, extra in (("whole", ()), ("halves", ("--stop-after", "10")), ("halves", ("--resume",))):
            jobs.append(with_dropout(job(kind, stage, *extra)))
    jobs += [job("seven", 3, "--stop-after", "7"), job("held_out", 2, *held_out_options(toured))]
    jobs.append(with_dropout(job("sixty", 1, *SIXTY)))
    run(jobs, out, processes=2)
    return out


TRAINED = {
    1: ("semantic.", "soft_prompts"),
    2: ("semantic.", "acoustic."),
    3: ("semantic.", "acoustic.", "lora_"),
    4: ("semantic.", "acoustic.", "lora_"),
}


def test_stage_0_trains_the_backbone_alone(one):
    model, _ = load(f"{one}/stage0", "cpu", torch.float32)
    fresh = build(model.config, seed=42).state_dict()  # --seed's default
    for name, value in model.state_dict().items():
        if name.startswith("backbone."):
            assert not torch.equal(value, fresh[name]), f"{name} did not train"
        else:
            assert torch.equal(value, fresh[name]), f"{name} changed"


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_exactly_the_named_parts_change(one, stage):
    before, after = weights(f"{one}/stage{stage - 1}"), weights(f"{one}/stage{stage}")
    assert load(f"{one}/stage{stage}", "cpu")[0].stage == stage
    for name, value in after.items():
        trains = any(name.startswith(part) or (part == "lora_" and part in name) for part in TRAINED[stage])
        if name not in before:
            assert "lora_" in name and stage == 3
        elif not trains:
            assert torch.equal(before[name], value), f"{name} changed"
        elif not name.endswith("key.bias"):  # attention does not see its keys' bias
            assert not torch.equal(before[name], value), f"{name} did not train"
    if stage == 3:  # B starts at zero: it trained if it is not zero any more
        assert all(v.abs().max() > 0 for n, v in after.items() if "lora_B" in n)


def test_an_acoustic_adapter_of_zeros_is_drawn_anew(one, toured, tmp_path):
    """A released stage-1 file may lack it, and no gradient leads away from zeros.  Any other one is kept."""
    model, tokenizer = load(f"{one}/stage1", "cpu", torch.float32)
    for kind in ("whole", "zeros"):
        save(model, tokenizer, f"{tmp_path}/{kind}", dtype=torch.float32)
        args = parse(arguments(toured, tmp_path, 2, "--init", f"{tmp_path}/{kind}"))
        begun, _ = start_from(args, torch.device("cpu"))
        kept = torch.equal(begun.acoustic.proj.weight, model.acoustic.proj.weight)
        assert kept == (kind == "whole") and begun.acoustic.proj.weight.abs().max() > 0
        assert torch.equal(begun.semantic.fc1.weight, model.semantic.fc1.weight)
        with torch.no_grad():
            for p in model.acoustic.parameters():
                p.zero_()


def test_a_run_goes_on_with_the_frozen_parts_it_began_with(one, toured, tmp_path, capsys):
    """They are in no checkpoint: half-trained adapters beside another backbone would pass for a whole run."""
    argv = arguments(toured, tmp_path, 1, "--init", f"{one}/stage0", "--max-steps", "2", "--stop-after", "1")
    assert main(argv) == 0
    model, tokenizer = load(f"{one}/stage0", "cpu", torch.float32)
    with torch.no_grad():
        model.backbone.wte.weight[0, 0] += 1
    save(model, tokenizer, f"{tmp_path}/other", dtype=torch.float32)
    other = arguments(toured, tmp_path, 1, "--init", f"{tmp_path}/other", "--max-steps", "2", "--resume")
    assert main(other) == 2 and "--resume goes on with has backbone" in capsys.readouterr().err
    assert main([*argv[:-2], "--resume"]) == 0


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_gradients_and_optimizer_state_are_the_named_parts(one, toured, tmp_path, stage):
    """After two steps, what the saved optimizer holds, and which parameters have gradients."""
    out = str(tmp_path)
    assert main(arguments(toured, out, stage, "--init", f"{one}/stage{stage - 1}", "--stop-after", "2")) == 0
    (path,) = list_states(f"{out}/stage{stage}")
    state = read_state(path)
    model, _ = load(f"{one}/stage{stage}", "cpu")
    named = {
        n
        for n, _ in model.named_parameters()
        if any(n.startswith(part) or (part == "lora_" and part in n) for part in TRAINED[stage])
    }
    assert set(state["trained"]) == named == set(freeze_all_but(model, SMALL_STAGES[stage].trains))
    (optimizer,) = state["optimizers"]
    assert len(optimizer["state"]) == len(named)
    shapes = sorted(tuple(s["exp_avg"].shape) for s in optimizer["state"].values())
    assert shapes == sorted(tuple(state["trained"][n].shape) for n in named)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == named


UNEQUAL = """
import torch
from runtime.processes import process_group

with process_group("cpu") as group:
    parameter = torch.nn.Parameter(torch.full((3,), group.rank + 1.0))
    group.broadcast([parameter])
    assert parameter.tolist() == [1.0] * 3, parameter
"""


def test_processes_begin_with_the_weights_of_the_first(tmp_path):
    (tmp_path / "unequal.py").write_text(UNEQUAL)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root, "PYTHONDONTWRITEBYTECODE": "1"}
    command.append(str(tmp_path / "unequal.py"))
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]


def test_two_processes_train_like_one(one, two):
    """The same losses and weights after 20 steps of every stage, to 1e-5, under torchrun.

    But for single weights whose gradient is nearly zero, such as a rare token's embedding or an entry of
    LoRA while B is small: AdamW makes whole steps of its rounding, and that differs from run to run.
    """
    folder = two / "like_one"
    for stage in range(5):
        a, b = losses(f"{one}/stage{stage}"), losses(f"{folder}/stage{stage}")
        assert len(a) == 20
        assert np.allclose(a, b, rtol=1e-4, atol=1e-5), f"stage {stage}"
        theirs = weights(folder / f"stage{stage}")
        for name, value in weights(f"{one}/stage{stage}").items():
            if name.endswith("key.bias"):  # its true gradient is zero: Adam makes steps of the rounding
                continue
            apart = (value - theirs[name]).abs()
            share = 5e-3 if stage == 0 else 1e-2 if "lora_" in name else 0.0
            assert apart.max() < 1e-5 or (apart > 1e-5).double().mean() < share, (
                f"stage {stage}: {name} {apart.max()}"
            )


def test_muon_takes_the_matrices_of_the_blocks(config):
    """Each parameter has one optimizer; Muon's first step is the nearest orthogonal matrix.

    It is about as long as AdamW's.
    """
    model = build(config, seed=0)
    row = Stage(("acoustic.", "backbone."), 1e-3, 4, 2, muon=True)
    trained = freeze_all_but(model, row.trains)
    adamw, muon = make_optimizers(trained, row)
    held = {o: [id(p) for group in o.param_groups for p in group["params"]] for o in (adamw, muon)}
    assert sorted(held[adamw] + held[muon]) == sorted(map(id, trained.values()))
    assert set(held[muon]) == {
        id(p) for n, p in trained.items() if (".blocks." in n or "acoustic.layers." in n) and p.dim() == 2
    }
    assert all(p.dim() > 1 for group in adamw.param_groups if group["weight_decay"] for p in group["params"])
    (name, p), *_ = [(n, p) for n, p in trained.items() if id(p) in held[muon]]
    for q in trained.values():
        q.grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    before, (u, _, v) = p.detach().clone(), torch.linalg.svd(p.grad, full_matrices=False)
    muon.step()
    step = before * (1 - row.lr * row.weight_decay) - p.detach()
    # five Newton-Schulz steps
    assert torch.cosine_similarity(step.flatten(), (u @ v).flatten(), dim=0) > 0.95, name
    # 0.2 is what AdamW's updates are taken to have
    assert 0.1 * row.lr < step.pow(2).mean().sqrt() < 0.3 * row.lr
    # the second step follows the mean of both gradients, in which the second has the larger part (Nesterov)
    one, two = p.grad.clone(), torch.randn(p.shape, generator=torch.Generator().manual_seed(2))
    before, p.grad = p.detach().clone(), two
    muon.step()
    step = before * (1 - row.lr * row.weight_decay) - p.detach()
    ahead = 0.05 * two + 0.95 * (0.95 * 0.05 * one + 0.05 * two)
    u, _, v = torch.linalg.svd(ahead, full_matrices=False)
    assert torch.cosine_similarity(step.flatten(), (u @ v).flatten(), dim=0) > 0.95
    assert len(make_optimizers(trained, dataclasses.replace(row, muon=False))) == 1


def test_paper_values_are_the_defaults():
    """Table B.2."""
    rows = STAGES["diffa2"]
    assert [(rows[n].lr, rows[n].batch, rows[n].warmup, rows[n].epochs) for n in (1, 2, 3, 4)] == [
        (1e-4, 1280, 1000, 12),
        (5e-5, 196, 1000, 10),
        (5e-5, 196, 1000, 10),
        (5e-6, 4, 200, 1),
    ]
    with torch.device("meta"):
        from model import DIFFA2

        model = DIFFA2(PRESETS["diffa2"], lora=True)

    def count(n):
        return sum(p.numel() for p in freeze_all_but(model, rows[n].trains).values())

    assert [count(n) for n in (1, 2, 3, 4)] == [
        36_392_448 + 81_920,
        36_392_448 + 47_892_992,
        98_965_504,
        98_965_504,
    ]


def test_the_command_line_overrides_the_row(one, toured, tmp_path, capsys):
    """What is used is printed; a warm-up is at most a tenth of the run; epochs count the manifest."""
    given = ("--lr", "0.002", "--batch", "5", "--epochs", "0.2", "--weight-decay", "0.5", "--no-augment")
    args = parse(arguments(toured, tmp_path, 2, "--init", f"{one}/stage1", *given))
    row, steps = settings_of(STAGES["tiny"][2], args, types.SimpleNamespace(shares=[(100, 1.0)]))
    assert (row.lr, row.batch, row.weight_decay, row.augment) == (0.002, 5, 0.5, False)
    assert steps == 4 and row.warmup == 1
    assert main(arguments(toured, tmp_path, 2, "--init", f"{one}/stage1", *given)) == 0
    n = len(read_manifest(f"{toured}/stage2.jsonl", 2))
    steps = math.ceil(0.2 * math.ceil(n / 5))
    said = capsys.readouterr().out
    assert f"on {n} examples, {steps} steps of 5" in said
    assert (
        f"learning rate 0.002 after {max(1, min(2, steps // 10))} steps, weight decay 0.5, no dropout\n"
        in said
    )
    assert len(losses(f"{tmp_path}/stage2")) == steps


@pytest.mark.parametrize(
    "stage, n, given, warmup",
    [
        (4, 3000, [], 200),  # the paper's pairs: Table B.2's 200 of 750 steps
        (4, 3000, ["--init", "diffa2"], 75),
        (4, 1000, [], 25),
        (3, 5000, [], 26),
        (3, 5000, ["--init", "diffa2", "--warmup", "100"], 100),
        (2, 2_400_000, [], 1000),
    ],
)
def test_a_warm_up_fits_the_run(stage, n, given, warmup):
    args = parse(["--stage", str(stage), *given])
    assert (
        settings_of(STAGES["diffa2"][stage], args, types.SimpleNamespace(shares=[(n, 1.0)]))[0].warmup
        == warmup
    )


def test_learning_rate_warms_up_and_falls():
    row = STAGES["tiny"][1]
    rates = [learning_rate(s, row, 500) for s in range(500)]
    assert rates[0] == row.lr / row.warmup and rates[row.warmup] == row.lr == max(rates)
    assert rates[row.warmup :] == sorted(rates[row.warmup :], reverse=True) and rates[-1] < row.lr * 1e-4
    assert math.isclose(rates[(500 + row.warmup) // 2], row.lr / 2, rel_tol=0.02)


# ---------------------------------------------------------------------------------------------
# batches


@pytest.mark.parametrize("world, batch", [(8, 196), (8, 4), (3, 7), (1, 5)])
def test_ranks_share_out_the_global_batch(world, batch):
    """Every example once an epoch, whatever the number of ranks; every rank ends every step."""
    config = PRESETS["tiny"]
    examples = [Example(i, "clip.wav", "Hm?", "a" * (i % 37), duration=2.0) for i in range(200)]
    costs = [cost_of(size_of(e), config) for e in examples]
    mixture = types.SimpleNamespace(shares=[(200, 1.0)], size=lambda i: size_of(examples[i]))
    builder = BatchBuilder(None, config, None, 0)
    steps = -(-len(costs) // batch)
    plans = []
    for rank in range(world):
        plans.append(list(MicroBatches(mixture, builder, batch, rank, world, 500, 3, 0, steps).plan()))
    for step in range(steps):
        ids = [i for plan in plans for s, _, micro, _ in plan if s == step for i in micro]
        assert len(ids) == len(set(ids)) == min(batch, len(costs) - step * batch)
        assert all(sum(last for s, _, _, last in plan if s == step) == 1 for plan in plans)
    seen = sorted(i for plan in plans for _, _, micro, _ in plan for i in micro)
    assert seen == list(range(200))
    assert all(
        sum(max(costs[i][kind] for i in micro) for kind in (0, 1)) * len(micro) <= 500
        for plan in plans
        for _, _, micro, _ in plan
        if len(micro) > 1
    )


def test_schedule_goes_on_where_it_was():
    from itertools import islice

    whole = list(islice(schedule_of([(30, 1.0)], 7, 1), 14))
    assert list(islice(schedule_of([(30, 1.0)], 7, 1, start=6), 8)) == whole[6:]
    assert whole[4][1] == 0 and whole[5][1] == 1 and whole[0][2] != whole[5][2]
    assert sorted(i for _, epoch, ids in whole for i in ids if epoch == 1) == list(range(30))


def test_an_example_is_made_by_its_own_seed(toured, config, tokenizer):
    """The same noise in any batch; other noise in another epoch."""
    examples = read_manifest(f"{toured}/stage2.jsonl", 2)[:3]
    builder = builder_for(tokenizer, config, SMALL_STAGES[2], 0)
    together, alone = builder(examples, 0)["batch"], builder(examples[1:2], 0)["batch"]
    assert (
        torch.equal(together["mel"][1], alone["mel"][0]) and together["n_frames"][1] == alone["n_frames"][0]
    )
    n = alone["text"]["ids"].size(1)
    assert torch.equal(together["text"]["ids"][1, :n], alone["text"]["ids"][0]) and torch.equal(
        together["text"]["is_answer"][1, :n], alone["text"]["is_answer"][0]
    )
    assert not torch.equal(builder(examples[1:2], 1)["batch"]["mel"], alone["mel"])
    draws = {
        tuple(torch.rand(2, generator=generator_for(*key)).tolist())
        for key in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 0, 1))
    }
    assert len(draws) == 5


def test_augment_and_mask_stay_in_bounds():
    rng = np.random.default_rng(0)
    clip = rng.uniform(-0.5, 0.5, 158000).astype(np.float32)
    for seed in range(30):
        g = torch.Generator().manual_seed(seed)
        out = augment(clip, g, {"sound": "rain"}, 160000)
        assert out.dtype == np.float32 and 0 < len(out) <= 160000 and np.isfinite(out).all()
        mel = torch.randn(80, 1000, generator=g)
        masked = mask_mel(mel, g)
        # of what is not blanked out a ramp from bass to treble, one and the same at all times
        tilts = masked - mel
        tilt = tilts[-1].median()
        kept = (tilts - tilt * torch.linspace(-1, 1, 80)[:, None]).abs() < 1e-5
        assert masked.shape == mel.shape and kept.float().mean() > 0.4 and 0 < tilt.abs() <= 0.15
        assert torch.allclose(
            masked[~kept], (mel + tilt * torch.linspace(-1, 1, 80)[:, None]).mean(), atol=1e-4
        )


def test_an_augmented_clip_fits_the_window(tmp_path, tokenizer):
    c = PRESETS["tiny"].with_tokenizer(tokenizer)
    soundfile.write(str(tmp_path / "a.wav"), np.random.default_rng(0).uniform(-0.5, 0.5, 158000), 16000)
    example = Example(0, str(tmp_path / "a.wav"), "Hm?", "Rain.", facts={"sound": "rain"})
    builder = BatchBuilder(tokenizer, c, encode_question, 0, is_augmented=True)
    seconds = [builder.item(example, epoch)["seconds"] for epoch in range(30)]
    assert max(seconds) == 10 and min(seconds) < 9.875  # never beyond the window; some are played faster


def test_an_augmented_clip_keeps_its_last_word():
    """A clip that fills the window is not played slower, or begun later, than the window has room for."""
    clip = np.zeros(160000, np.float32)
    clip[-8000:] = 1.0
    for seed in range(100):
        made = augment(clip, torch.Generator().manual_seed(seed), {"words": "one"}, 160000)
        assert len(made) <= 160000 and (made > made.max() / 2).sum() > 7100  # played at most a tenth faster


def test_sounds_are_played_faster_than_voices():
    """Speed by the length of what comes out: 0.9 to 1.1 of a voice, 0.75 to 1.25 of a sound."""
    clip = np.ones(16000, np.float32)
    kinds = [({"words": "one"}, 0.9, 1.1), ({"sound": "rain"}, 0.75, 1.25)]
    # VocalSound's: the pitch tells the sex
    kinds.append(({"sound": "cough", "sex": "male", "speaker": "7"}, 0.9, 1.1))
    for facts, least, most in kinds:
        lengths = []
        for seed in range(200):
            u = torch.rand(6, generator=(g := torch.Generator().manual_seed(seed)))
            lengths.append(
                len(augment(clip, g.manual_seed(seed), facts, 160000))
                - (int(u[3] * 0.6 * 16000) if u[3] < 0.5 else 0)
            )
        speeds = np.array(lengths) / 16000
        assert (
            least - 1e-3 < speeds.min() < least + 0.03
            and most - 0.03 < speeds.max() < most + 1e-3
            and (speeds == 1).mean() > 0.4
        )


def test_augmented_levels_and_noise():
    """Of a constant clip: 8 dB up or down; noise, in about half of all cases, 80 to 40 dB below the peak."""
    levels, noises = [], []
    for seed in range(400):
        clip, g = np.full(16000, 0.5, np.float32), torch.Generator().manual_seed(seed)
        made = augment(clip, g, {"words": "one"}, 160000)
        rest = made[6000:-1000]  # behind the silence in front
        levels.append(20 * np.log10(rest.mean() / 0.5))
        noises.append(20 * np.log10(max(rest.std() / rest.mean(), 1e-7)))
    assert -8.1 < min(levels) < -7.5 and 7.5 < max(levels) < 8.1
    heard = [noise for noise in noises if noise > -100]
    assert -81 < min(heard) < -78 and -42 < max(heard) < -39 and 160 < len(heard) < 240


# ---------------------------------------------------------------------------------------------
# never lose work


def with_dropout(argv):
    return [a for a in argv if a != "--no-dropout"]


@pytest.mark.parametrize("stage, processes", [(1, 1), (3, 1), (4, 1)])
def test_ten_and_ten_steps_are_twenty(one, toured, tmp_path, stage, processes):
    """Bit-exact, dropout on: random states are part of a checkpoint."""

    def make(out, *extra):
        return with_dropout(arguments(toured, out, stage, "--init", f"{one}/stage{stage - 1}", *extra))

    whole, halves = str(tmp_path / "whole"), str(tmp_path / "halves")
    assert main(make(whole)) == 0
    assert main(make(halves, "--stop-after", "10")) == 0
    assert main(make(halves)) == 2  # an unfinished run is not overwritten unasked
    assert main(make(halves, "--resume")) == 0
    assert losses(f"{whole}/stage{stage}") == losses(f"{halves}/stage{stage}")
    assert same_weights(f"{whole}/stage{stage}", f"{halves}/stage{stage}")
    assert main(make(halves, "--resume")) == 0  # finished already: nothing happens
    assert losses(f"{halves}/stage{stage}") == losses(f"{whole}/stage{stage}")


@pytest.mark.parametrize("stage", [1, 3, 4])
def test_ten_and_ten_steps_are_twenty_with_two_processes(two, stage):
    assert losses(two / f"whole/stage{stage}") == losses(two / f"halves/stage{stage}")
    assert same_weights(two / f"whole/stage{stage}", two / f"halves/stage{stage}")


def test_two_processes_go_on_as_one(one, two, toured):
    """Seven steps of two processes and thirteen of one are the twenty of one, up to rounding."""
    argv = arguments(toured, two / "seven", 3, "--init", f"{one}/stage2")
    assert len(losses(two / "seven/stage3")) == 7
    assert main([*argv, "--resume"]) == 0
    halves, whole = losses(two / "seven/stage3"), losses(f"{one}/stage3")
    assert len(halves) == 20 and np.allclose(halves, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "number, processes",
    [(signal.SIGTERM, 1), (signal.SIGTERM, 2), (signal.SIGHUP, 2)],  # SIGINT: below
)
def test_signals_save_and_leave(one, toured, tmp_path, number, processes):
    out = str(tmp_path)
    argv = arguments(toured, out, 1, "--init", f"{one}/stage0", "--max-steps", "100000", "--workers", "1")
    process = start([argv], tmp_path, processes)
    log = pathlib.Path(f"{out}/stage1/log.jsonl")
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) >= 3, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    if processes == 1:  # torchrun's own status after a signal is its own affair
        assert process.returncode == 0, err[-2000:]
    (path,) = list_states(f"{out}/stage1")
    state = read_state(path)
    assert state["step"] >= 3 and len(losses(f"{out}/stage1")) == state["step"]
    own = {tuple(numbers.tolist()) for numbers in state["random"]}
    assert len(own) == processes  # each draws its own dropout
    assert main([*argv[:-4], "--max-steps", str(state["step"] + 1), "--resume"]) == 0


def test_nobody_reads_what_a_run_prints(one, toured, tmp_path):
    """Ctrl-C ends `| tee` too: what writes to it fails, and the run still goes on to its checkpoint."""
    argv = arguments(toured, tmp_path, 1, "--init", f"{one}/stage0", "--max-steps", "100000")
    process = start([argv], tmp_path)
    log = tmp_path / "stage1" / "log.jsonl"

    def n_steps():
        return log.read_text().count("\n") if log.exists() else 0

    wait_for(lambda: n_steps() >= 3, process)
    process.stdout.close()
    process.stderr.close()
    before = log.stat().st_mtime
    # the progress bar is drawn once a second: now it has failed more than once
    wait_for(lambda: log.stat().st_mtime > before + 2.5, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    (path,) = list_states(tmp_path / "stage1")
    step = read_state(path)["step"]
    assert step == n_steps() and len(losses(f"{tmp_path}/stage1")) == step
    assert main([*argv[:-2], "--max-steps", str(step + 1), "--resume"]) == 0


def test_a_parent_that_died_before_the_loop_began(monkeypatch):
    """torchrun may die while its workers still read their weights: they must not train on alone."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with StopSignal() as signals:
        assert not signals.received
    monkeypatch.setattr("runtime.processes.PARENT", os.getppid() + 1)  # what it was at the program's start
    with StopSignal() as signals:
        assert signals.received


def test_signals_that_were_switched_off():
    """SIGHUP by nohup: the run goes on.  SIGINT by a shell, for background jobs: it stops the run."""
    before = {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGHUP, signal.SIGINT)}
    try:
        with StopSignal() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not signals.received
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.received
        assert signal.getsignal(signal.SIGHUP) == signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < end
        time.sleep(0.02)


def kill_while_saving(one, toured, tmp_path, kills, seed):
    """SIGKILLs a run that saves every step, at random moments of its saves.

    After each a whole checkpoint resumes.
    """
    rng, landed = random.Random(seed), []
    argv = arguments(
        toured, tmp_path, 1, "--init", f"{one}/stage0", "--max-steps", "100000", "--save-every", "1"
    )
    assert main([*argv[:-4], "--max-steps", "100000", "--stop-after", "1"]) == 0
    pipe = str(tmp_path / "phases")
    os.mkfifo(pipe)
    last = 1
    for n in range(kills):
        process = start([[*argv, "--resume"]], tmp_path, phases=pipe)
        with open(pipe) as phases:  # opens when the runner does
            wanted = ("write", "sync", "rename")[n % 3]
            skip = rng.randrange(3, 9)  # not the same save each time
            for phase in phases:
                skip -= phase.strip() == wanted
                if skip <= 0:
                    time.sleep(rng.uniform(0, 0.02))  # inside the 30 ms that the phase takes
                    process.kill()
                    landed.append(wanted)
                    break
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        states = list_states(tmp_path / "stage1")
        assert states, "no checkpoint is left"
        found = [read_state(path) for path in states]  # all of them whole
        assert found[-1]["step"] >= last and math.isfinite(
            sum(t.double().sum() for t in found[-1]["trained"].values())
        )
        last = found[-1]["step"]
    assert last >= kills and set(landed) == {"write", "sync", "rename"}
    # what half-written files are left does not disturb a run that ends in peace
    assert main([*argv[:-4], "--max-steps", str(last + 1), "--resume"]) == 0
    return landed


def test_killed_at_any_moment_of_a_save(one, toured, tmp_path):
    kill_while_saving(one, toured, tmp_path, 3, seed=0)  # once in each phase


@pytest.mark.slow
def test_killed_twenty_times(one, toured, tmp_path):
    kill_while_saving(one, toured, tmp_path, 20, seed=1)


def test_a_folder_belongs_to_one_run(one, toured, tmp_path, capsys):
    """A second run is told who holds the folder; the lock goes with its holder, however that ends."""
    argv = arguments(toured, tmp_path, 1, "--init", f"{one}/stage0", "--max-steps", "100000")
    process = start([argv], tmp_path)
    log = tmp_path / "stage1" / "log.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") >= 2, process)
    assert main([*argv, "--resume"]) == 2
    assert f"process {process.pid} of" in capsys.readouterr().err
    waiting = start([[*argv, "--resume", "--stop-after", "1", "--wait"]], tmp_path)
    time.sleep(1)
    assert waiting.poll() is None
    process.kill()
    process.communicate()
    _, err = waiting.communicate(timeout=60)
    assert waiting.returncode == 0, err[-2000:]


@pytest.mark.parametrize("line", ["x", "{}", "null", "5", "[1]", '{"step": "x"}', "\udcff"])
def test_a_broken_log_does_not_end_a_run(one, toured, tmp_path, line):
    argv = arguments(toured, tmp_path, 1, "--init", f"{one}/stage0", "--max-steps", "3")
    assert main([*argv, "--stop-after", "2"]) == 0
    with open(tmp_path / "stage1/log.jsonl", "a", encoding="utf-8", errors="surrogateescape") as f:
        f.write(line + "\n")
    assert main([*argv, "--resume"]) == 0
    assert [e["step"] for e in read_lines(tmp_path / "stage1/log.jsonl") if "loss" in e] == [1, 2, 3]


@pytest.mark.parametrize("state", [[1], 5, None, {}, {"step": 1}, torch.ones(2)])
def test_a_checkpoint_of_something_else(tmp_path, state):
    torch.save(state, tmp_path / "state-0000001.pt")
    with pytest.raises(UserError, match="not a checkpoint of a running stage"):
        read_state(str(tmp_path / "state-0000001.pt"))


def test_a_damaged_checkpoint_leaves_the_one_before(one, toured, tmp_path, capsys):
    """The run goes on from it, to the weights that it would have reached anyway."""
    argv = arguments(toured, tmp_path, 1, "--init", f"{one}/stage0", "--save-every", "8")
    assert main([*argv, "--stop-after", "16"]) == 0
    first, last = list_states(tmp_path / "stage1")
    with open(last, "r+b") as f:
        f.truncate(1000)
    assert main([*argv, "--resume"]) == 0
    out, err = capsys.readouterr()
    assert f"{last}: not a checkpoint" in err and "began with another plan" not in out
    assert same_weights(f"{one}/stage1", tmp_path / "stage1")
    assert os.path.exists(f"{last}.bad")  # it is not the newest any more


def test_torchrun_begins_nothing_anew(one, toured, tmp_path, capsys, monkeypatch):
    """It repeats the command line after every failure: with --restart each would lose all before it."""
    argv = arguments(toured, tmp_path, 1, "--init", f"{one}/stage0", "--stop-after", "2")
    assert main(argv) == 0
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert main([*argv, "--restart"]) == 2 and "--max-restarts" in capsys.readouterr().err
    assert len(list_states(tmp_path / "stage1")) == 1


@pytest.mark.parametrize(
    "stage, more, says",
    [
        (1, ("--seed", "7"), "has seed 42, not 7"),
        (1, ("--batch", "3"), "has batch "),
        (1, ("--data", "{toured}/stage2.jsonl"), "has data [["),
        (2, (), "has stage 1, not 2"),
    ],
)
def test_another_run_is_not_gone_on_with(one, toured, tmp_path, capsys, stage, more, says):
    """Its order and its masks would be others: no run that was not interrupted would end there."""
    argv = arguments(toured, tmp_path, 1, "--init", f"{one}/stage0", "--max-steps", "9")
    assert main([*argv, "--stop-after", "1"]) == 0
    other = arguments(toured, tmp_path, stage, "--init", f"{one}/stage1", "--max-steps", "9", "--resume")
    other[other.index("--out") + 1] = f"{tmp_path}/stage1"
    assert main([*other, *(word.format(toured=toured) for word in more)]) == 2
    assert says in capsys.readouterr().err
    # another rate is allowed, and told of, as is a forgotten option
    for more in (("--no-augment", "--stop-after", "1"), ("--lr", "0.002")):
        assert main([*argv, "--resume", *more]) == 0
        assert "began with another plan: " in capsys.readouterr().out


def test_restart_removes_the_old_run_when_the_new_one_can_begin(one, toured, tmp_path):
    argv = arguments(toured, tmp_path, 1, "--init", f"{one}/stage0", "--stop-after", "2")
    assert main(argv) == 0
    before = list_states(tmp_path / "stage1")
    assert len(before) == 1 and main(argv) == 2
    for wrong in (["--init", "nowhere"], ["--data", "none.jsonl"]):
        assert main([*argv, "--restart", *wrong]) == 2
        assert list_states(tmp_path / "stage1") == before
    assert main([*argv, "--restart", "--stop-after", "1"]) == 0
    (path,) = list_states(tmp_path / "stage1")
    assert read_state(path)["step"] == 1 and len(losses(tmp_path / "stage1")) == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_train_alike(one, toured, tmp_path):
    runs = []
    for kind in ("plain", "compiled"):
        more = ("--init", f"{one}/stage1", "--max-steps", "4") + ("--compile",) * (kind == "compiled")
        assert main(arguments(toured, tmp_path / kind, 2, *more)) == 0
        runs.append(losses(tmp_path / kind / "stage2"))
    assert len(runs[0]) == 4 and np.allclose(*runs, rtol=1e-4)


def test_workers_leave_when_torchrun_is_killed(one, toured, tmp_path):
    """SIGKILL to torchrun alone: its two workers save, leave, and the run goes on from there."""
    argv = arguments(toured, tmp_path, 1, "--init", f"{one}/stage0", "--max-steps", "100000")
    process = start([argv], tmp_path, processes=2)
    log = tmp_path / "stage1" / "log.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") >= 2, process)
    holder = int((tmp_path / "stage1" / ".lock").read_text().split()[1])
    process.kill()
    process.wait()
    end = time.monotonic() + 60
    while os.path.exists(f"/proc/{holder}") and time.monotonic() < end:
        time.sleep(0.1)
    (path,) = list_states(tmp_path / "stage1")
    step = read_state(path)["step"]
    assert step >= 2 and len(losses(tmp_path / "stage1")) == step
    assert main([*argv[:-2], "--resume", "--max-steps", str(step + 2)]) == 0
    process.communicate()


def workers_of(torchrun):
    """Process ids of the workers that torchrun has now."""
    with open(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children") as f:
        return [int(pid) for pid in f.read().split()]


def test_torchrun_restarts_what_was_killed(one, two, toured, tmp_path):
    """From an empty folder with --resume, a worker killed twice: it goes on by itself to the same weights."""
    argv = with_dropout(arguments(toured, tmp_path, 1, "--init", f"{one}/stage0", *SIXTY))
    process = start([argv], tmp_path, processes=2, restarts=3)
    log, old = tmp_path / "stage1" / "log.jsonl", set()
    for wanted in (5, 12):
        wait_for(lambda n=wanted: log.exists() and log.read_text().count("\n") >= n, process)
        wait_for(lambda gone=old: len(set(workers_of(process)) - gone) == 2, process)
        some = sorted(set(workers_of(process)) - old)
        os.kill(some[wanted % 2], signal.SIGKILL)
        old = old | set(some)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0, err[-3000:]
    assert same_weights(two / "sixty/stage1", tmp_path / "stage1")
    assert losses(two / "sixty/stage1") == losses(tmp_path / "stage1")


@pytest.mark.slow
@pytest.mark.parametrize("whole_group, kills", [(False, 10), (True, 20)])
def test_torchrun_killed_many_times(one, toured, tmp_path, whole_group, kills):
    """SIGKILL at random moments, to torchrun alone or to its workers too: the weights are the same."""
    rng = random.Random(2)
    more = ("--init", f"{one}/stage0", "--max-steps", "300", "--save-every", "3", "--resume", "--wait")
    argvs = [with_dropout(arguments(toured, tmp_path / kind, 1, *more)) for kind in ("whole", "killed")]
    run(argvs[:1], tmp_path, processes=2)
    log = tmp_path / "killed" / "stage1" / "log.jsonl"
    for _ in range(kills):
        before = log.read_text().count("\n") if log.exists() else 0
        process = start(argvs[1:], tmp_path, processes=2)
        wait_for(lambda n=before: log.exists() and log.read_text().count("\n") > n, process)
        time.sleep(rng.uniform(0, 0.3))
        doomed = [process.pid, *(workers_of(process) if whole_group else ())]
        for pid in doomed:
            os.kill(pid, signal.SIGKILL)
        process.communicate()
    run(argvs[1:], tmp_path, processes=2)
    assert same_weights(tmp_path / "whole/stage1", tmp_path / "killed/stage1")
    assert losses(tmp_path / "whole/stage1") == losses(tmp_path / "killed/stage1")


def test_training_goes_on_while_a_checkpoint_is_written(one, toured, tmp_path, monkeypatch):
    """The writing of step 2's checkpoint ends when step 4 is in the log: it would never come otherwise."""
    log, real, waited = tmp_path / "stage1" / "log.jsonl", write_state, []

    def slow(state, out, step):
        if step == 2:
            before = {name: t.clone() for name, t in state["trained"].items()}
            end = time.monotonic() + 60
            while len(losses(tmp_path / "stage1")) < 4 and time.monotonic() < end:
                time.sleep(0.01)
            waited.append(len(losses(tmp_path / "stage1")))
            # what is written is the state of step 2, whatever training did meanwhile
            assert all(torch.equal(before[name], t) for name, t in state["trained"].items())
        real(state, out, step)

    monkeypatch.setattr("runtime.checkpoints.write_state", slow)
    more = ("--init", f"{one}/stage0", "--max-steps", "5", "--save-every", "2")
    assert main(arguments(toured, tmp_path, 1, *more)) == 0
    assert log.exists() and waited and waited[0] >= 4


def test_a_disk_that_fills_up_ends_the_run_in_one_line(one, toured, tmp_path, capsys, monkeypatch):
    """Found by the thread that writes, told of by the run."""
    real = write_state

    def full(state, out, step):
        if step >= 4:
            raise train.UserError(f"{out}: cannot be written (No space left on device)")
        real(state, out, step)

    monkeypatch.setattr("runtime.checkpoints.write_state", full)
    more = ("--init", f"{one}/stage0", "--max-steps", "100", "--save-every", "2")
    assert main(arguments(toured, tmp_path, 1, *more)) == 2
    assert "No space left" in capsys.readouterr().err.splitlines()[-1]
    assert [read_state(path)["step"] for path in list_states(tmp_path / "stage1")] == [2]


@pytest.mark.parametrize("full_at, left", [(4, [4, 6]), (6, [4, 6])])
def test_a_disk_that_is_full_for_a_moment_stops_no_run(
    one, toured, tmp_path, capsys, monkeypatch, full_at, left
):
    """The checkpoint that found no room is written at the next chance; of the last one, before the end."""
    real, failed = write_state, []

    def full_once(state, out, step):
        if step == full_at and not failed:
            failed.append(step)
            raise train.UserError(f"{out}: cannot be written (No space left on device)")
        real(state, out, step)

    monkeypatch.setattr("runtime.checkpoints.write_state", full_once)
    more = ("--init", f"{one}/stage0", "--max-steps", "100", "--save-every", "2", "--stop-after", "6")
    assert main(arguments(toured, tmp_path, 1, *more)) == 0
    assert "No space left on device); trying again" in capsys.readouterr().err
    assert [read_state(path)["step"] for path in list_states(tmp_path / "stage1")] == left


def test_a_manifest_that_disappears_ends_the_run_in_one_line(one, toured, tmp_path, capsys, monkeypatch):
    data, real = manifest_with(toured, tmp_path, 40, bad=()), write_state

    def then_remove(state, out, step):
        real(state, out, step)
        if step == 4:
            os.remove(data)

    monkeypatch.setattr("runtime.checkpoints.write_state", then_remove)
    more = ("--init", f"{one}/stage0", "--data", data, "--max-steps", "1000", "--save-every", "2")
    assert main(arguments(toured, tmp_path, 1, *more)) == 2
    assert "examples cannot be used" in capsys.readouterr().err.splitlines()[-1]
    assert "no such manifest" in read_lines(tmp_path / "stage1" / "skipped.jsonl")[0]["why"]
    assert [read_state(path)["step"] for path in list_states(tmp_path / "stage1")][-1] >= 4


WHOLE = {"trained": {}, "optimizers": [], "random": []}  # what a checkpoint has beside its step


def test_a_full_disk_keeps_the_older_checkpoint(tmp_path):
    out = str(tmp_path)
    write_state(WHOLE | {"step": 1}, out, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # EFBIG; a full disk says ENOSPC through the same OSError
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with pytest.raises(train.UserError, match="cannot be written .*older checkpoints are kept"):
            write_state(WHOLE | {"step": 2, "x": torch.zeros(10**6)}, out, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)
    assert os.listdir(out) == ["state-0000001.pt"] and read_state(list_states(out)[0])["step"] == 1


def test_what_a_kill_left_half_written_goes(tmp_path):
    for name in (".state-0000003.pt.tmp", ".lock"):
        (tmp_path / name).write_bytes(b"half")
    write_state({"step": 5}, str(tmp_path), 5)
    assert sorted(os.listdir(tmp_path)) == [".lock", "state-0000005.pt"]


def test_the_last_two_are_kept(tmp_path):
    for step in (5, 10, 15, 100):
        write_state(WHOLE | {"step": step}, str(tmp_path), step)
    assert [read_state(p)["step"] for p in list_states(str(tmp_path))] == [15, 100]


# ---------------------------------------------------------------------------------------------
# bad data, bad numbers


def manifest_with(toured, tmp_path, n, bad):
    """The first n lines of stage 1, some of them pointing to files that cannot be read."""
    lines = read_lines(f"{toured}/stage1.jsonl")[:n]
    (tmp_path / "broken.wav").write_bytes(b"RIFF nothing")
    for i, line in enumerate(lines):
        line["audios"] = [os.path.abspath(os.path.join(toured, line["audios"][0]))]
        if i in bad:
            line["audios"] = [str(tmp_path / ("broken.wav" if i % 2 else "gone.wav"))]
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_unreadable_clips_are_skipped_counted_and_listed(one, toured, tmp_path):
    data = manifest_with(toured, tmp_path, 40, bad=(3, 8))
    options = ("--data", data, "--skip-limit", "0.1", "--max-steps", "14")
    argv = arguments(toured, tmp_path, 1, "--init", f"{one}/stage0", *options)
    assert main(argv) == 0
    skipped = read_lines(tmp_path / "stage1/skipped.jsonl")
    assert sorted(s["id"] for s in skipped) == [3, 8] and all(
        s["why"] and s["where"] == f"{data}:{s['id'] + 1}" for s in skipped
    )
    entries = read_lines(tmp_path / "stage1/log.jsonl")
    # two epochs and more: 40 examples in 6 steps, 38 of them usable
    assert sum(e["n"] for e in entries[:6]) == 38 and entries[-1]["skipped"] == 2


def test_a_full_disk_and_an_unreadable_clip(one, toured, tmp_path, capsys):
    """skipped.jsonl cannot be written: told, and no reason to lose the run."""
    data, out = manifest_with(toured, tmp_path, 40, bad=(3,)), tmp_path / "stage1"
    out.mkdir()
    (out / "skipped.jsonl").symlink_to("/dev/full")
    argv = arguments(toured, tmp_path, 1, "--init", f"{one}/stage0", "--epochs", "2")
    assert main([*argv, "--data", data]) == 0
    assert "skipped.jsonl: cannot be written (No space left" in capsys.readouterr().err
    assert (out / "model.safetensors").exists()


def test_too_many_bad_clips_stop_the_run(one, toured, tmp_path, capsys):
    data = manifest_with(toured, tmp_path, 40, bad=range(5))
    assert main(arguments(toured, tmp_path, 1, "--init", f"{one}/stage0", "--data", data)) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert "examples cannot be used" in err and "skipped.jsonl" in err


def test_a_limit_of_0_lets_no_bad_clip_pass(one, toured, tmp_path, capsys):
    data = manifest_with(toured, tmp_path, 8, bad=(3,))
    options = ("--data", data, "--skip-limit", "0", "--max-steps", "14")
    assert main(arguments(toured, tmp_path, 1, "--init", f"{one}/stage0", *options)) == 2
    assert "1 of 8 examples cannot be used" in capsys.readouterr().err


def test_a_single_bad_clip_of_few_stops_no_run(one, toured, tmp_path):
    given = ("--data", manifest_with(toured, tmp_path, 8, bad=(3,)), "--skip-limit", "0.01")
    assert main(arguments(toured, tmp_path, 1, "--init", f"{one}/stage0", *given, "--max-steps", "4")) == 0


def test_loader_processes_read_every_clip_once(one, toured, tmp_path):
    """Two of them, and micro-batches of one example: the losses are those of a run that reads by itself."""
    curves = []
    for workers in ("0", "2"):
        given = ("--workers", workers, "--tokens", "1", "--max-steps", "4")
        assert main(arguments(toured, tmp_path / workers, 2, "--init", f"{one}/stage1", *given)) == 0
        curves.append(losses(tmp_path / workers / "stage2"))
    assert len(curves[0]) == 4 and curves[0] == curves[1]


def test_a_disk_without_locks_is_said_and_used(one, toured, tmp_path, capsys, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOTSUP, "not supported here")

    monkeypatch.setattr("fcntl.flock", flock)
    argv = arguments(toured, tmp_path, 1, "--init", f"{one}/stage0", "--max-steps", "1")
    assert main(argv) == 0
    assert "no locks (not supported here): let no other run" in capsys.readouterr().err


def test_held_out_examples_are_read_as_the_stage_reads_its_own(one, toured, tmp_path):
    """The authors' files have the transcript and the answer to a question in one entry."""
    line = read_lines(f"{toured}/stage1.jsonl")[0]
    clip = os.path.abspath(os.path.join(toured, line["audios"][0]))
    entry = {"audio_id": 1, "audio_filepath": clip, "transcription": line["messages"][1]["content"]}
    held = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    held[0].write_text(json.dumps(entry) + "\n")
    held[1].write_text(json.dumps(line | {"audios": [clip]}) + "\n")
    found = []
    for path in held:
        options = ("--held-out", str(path), "--held-out-every", "1", "--max-steps", "1")
        out = tmp_path / path.stem
        assert main(arguments(toured, out, 1, "--init", f"{one}/stage0", *options)) == 0
        found += [e["held_out"] for e in read_lines(f"{out}/stage1/log.jsonl") if "held_out" in e]
    assert found[0] == found[1]


def test_not_finite_on_one_rank_stops_all(one, toured, tmp_path):
    """A weight that is NaN for one example's audio.

    Only the rank that has it sees NaN, all skip, none hangs.
    """
    lines = read_lines(f"{toured}/stage1.jsonl")[:8]

    # samples that are finite in the file and overflow in the mel: the clip passes every check of the reader
    signs = np.sign(np.random.default_rng(0).standard_normal(8000)).astype(np.float32)
    loud = np.full(8000, 3e38, np.float32) * signs
    soundfile.write(str(tmp_path / "loud.wav"), loud, 16000, subtype="FLOAT")
    for line in lines:
        line["audios"] = [os.path.abspath(os.path.join(toured, line["audios"][0]))]
    lines[2]["audios"] = [str(tmp_path / "loud.wav")]
    lines[2].pop("duration")
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ("--data", str(tmp_path / "m.jsonl"), "--max-steps", "4")
    argv = arguments(toured, tmp_path, 1, "--init", f"{one}/stage0", *options)
    run([argv], tmp_path, processes=2)  # 8 examples, batch 7: one of two steps of an epoch has it
    entries = read_lines(tmp_path / "stage1/log.jsonl")
    assert len(entries) == 4 and {e["bad"] for e in entries} == {0, 1}
    assert all(v.isfinite().all() for v in weights(tmp_path / "stage1").values())


def test_no_step_is_taken_on_the_rest_of_a_batch(one, toured, tmp_path):
    """Five of seven clips are gone: the two that are left would move the weights as far as all of them."""
    data = manifest_with(toured, tmp_path, 7, bad=range(5))
    argv = arguments(toured, tmp_path, 1, "--init", f"{one}/stage0", "--data", data, "--skip-limit", "1")
    assert main([*argv, "--max-steps", "3"]) == 0
    entries = [e for e in read_lines(tmp_path / "stage1/log.jsonl") if "loss" in e]
    assert [(e["n"], e["bad"]) for e in entries] == [(2, 1)] * 3
    begun, _ = start_from(parse(argv), torch.device("cpu"))
    begun, found = begun.state_dict(), weights(tmp_path / "stage1")
    assert all(torch.equal(value, found[name]) for name, value in begun.items())


def test_preferences_are_compared_without_dropout(one, toured, tmp_path):
    """Policy and reference are one model at first: with the same masks the margin is 0, the loss log 2."""
    argv = arguments(toured, tmp_path, 4, "--init", f"{one}/stage3", "--max-steps", "1")
    assert main(with_dropout(argv)) == 0
    assert losses(tmp_path / "stage4") == [pytest.approx(math.log(2), abs=1e-6)]


def test_the_gradient_is_the_mean_over_what_was_used(one, toured, tmp_path):
    """As of a whole batch of five.  AdamW's first moment, a tenth of it, says that it is clipped to 1."""
    norms = []
    for n, bad, batch in ((5, (), 5), (5, (), 9), (7, (5, 6), 7)):
        folder = tmp_path / f"{n} {batch}"
        folder.mkdir()
        given = ("--data", manifest_with(toured, folder, n, bad), "--batch", str(batch))
        given += ("--skip-limit", "1", "--max-steps", "2", "--stop-after", "1")
        assert main(arguments(toured, folder, 1, "--init", f"{one}/stage0", *given)) == 0
        norms += [e["norm"] for e in read_lines(folder / "stage1/log.jsonl") if "norm" in e]
        (path,) = list_states(folder / "stage1")
        moments = [p["exp_avg"].norm() for p in read_state(path)["optimizers"][0]["state"].values()]
        assert norms[-1] > 1 and math.isclose(torch.stack(moments).norm(), 0.1, rel_tol=1e-4)
    assert len(norms) == 3 and np.allclose(norms, norms[0], rtol=1e-4, atol=0)


def test_ten_bad_steps_in_a_row_stop_the_run(one, toured, tmp_path, capsys):
    model, tokenizer = load(f"{one}/stage0", "cpu")
    model.backbone.ln_f.weight.data[0] = float("nan")
    from weights import save

    save(model, tokenizer, str(tmp_path / "nan"), dtype=torch.float32)
    assert main(arguments(toured, tmp_path, 1, "--init", str(tmp_path / "nan"))) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert "not finite 10 steps in a row" in err and "stage1.jsonl:" in err
    assert [e["bad"] for e in read_lines(tmp_path / "stage1/log.jsonl")] == [1] * 10


def test_twelve_bad_steps_that_are_not_in_a_row(one, toured, tmp_path):
    """Of two examples one cannot be read: every other step is bad, and the run goes on."""
    given = ("--data", manifest_with(toured, tmp_path, 2, (1,)), "--batch", "1", "--skip-limit", "1")
    argv = arguments(toured, tmp_path, 1, "--init", f"{one}/stage0", *given, "--max-steps", "24")
    assert main(argv) == 0
    assert sum(e["bad"] for e in read_lines(tmp_path / "stage1/log.jsonl") if "bad" in e) == 12


# ---------------------------------------------------------------------------------------------
# what one sees


def held_out_options(toured):
    return "--held-out", f"{toured}/test.jsonl", "--held-out-every", "2", "--max-steps", "4"


def test_held_out_loss_is_fixed_and_shared_out(one, two, toured, tmp_path):
    assert main(arguments(toured, tmp_path, 2, "--init", f"{one}/stage1", *held_out_options(toured))) == 0
    curves = []
    for folder in (tmp_path / "stage2", two / "held_out/stage2"):
        curves.append([e for e in read_lines(folder / "log.jsonl") if "held_out" in e])
    assert [e["step"] for e in curves[0]] == [2, 4]
    for a, b in zip(*curves, strict=True):
        assert math.isclose(a["held_out"], b["held_out"], rel_tol=1e-5)
        assert list(a["held_out_t"]) == ["0.1", "0.3", "0.5", "0.7", "0.9"]
        assert math.isclose(a["held_out"], np.mean(list(a["held_out_t"].values())), rel_tol=1e-6)


def test_the_held_out_loss_leaves_training_as_it_was(one, toured, tmp_path):
    """Dropout is off in it and on again after it; none of training's random numbers are used up."""
    curves = []
    for every in ("1", "100"):
        given = ("--held-out", f"{toured}/test.jsonl", "--held-out-every", every, "--max-steps", "4")
        argv = arguments(toured, tmp_path / every, 2, "--init", f"{one}/stage1", *given)
        assert main(with_dropout(argv)) == 0
        curves.append(losses(tmp_path / every / "stage2"))
    assert len(curves[0]) == 4 and curves[0] == curves[1]


def test_tensorboard_is_optional(one, toured, tmp_path, capsys):
    import importlib.util

    code = main(
        arguments(toured, tmp_path, 1, "--init", f"{one}/stage0", "--max-steps", "2", "--tensorboard")
    )
    if importlib.util.find_spec("tensorboard"):
        assert code == 0 and any(f.startswith("events") for f in os.listdir(tmp_path / "stage1"))
    else:
        assert (
            code == 2 and "pip install tensorboard" in capsys.readouterr().err and os.listdir(tmp_path) == []
        )


def test_recompute_changes_memory_not_results(one, toured, tmp_path):
    options = ("--init", f"{one}/stage2", "--max-steps", "3")
    assert main(arguments(toured, tmp_path / "a", 3, *options)) == 0
    assert main(arguments(toured, tmp_path / "b", 3, *options, "--recompute")) == 0
    a, b = weights(tmp_path / "a/stage3"), weights(tmp_path / "b/stage3")
    assert all(torch.allclose(a[n], b[n], atol=1e-6) for n in a)


def test_a_micro_batch_with_nothing_hidden_is_no_error(one, toured, monkeypatch):
    """One row in a micro-batch, as diffa2 has, and a small t: about one in L + 1 hides no token at all."""
    model, tokenizer = load(f"{one}/stage2", "cpu", torch.float32)
    example = read_manifest(f"{toured}/stage2.jsonl", 2)[0]
    row = SMALL_STAGES[2]
    trained = freeze_all_but(model, row.trains)
    context = train.LossContext(model, 2, 0, row, contextlib.nullcontext, tuple(trained.values()))
    builder = builder_for(tokenizer, model.config, row, 0)
    monkeypatch.setattr(train, "draw_t", lambda n, generators, least_t: torch.full((n,), 1e-9))
    assert train.sft(context, builder([example], 0)).tolist() == [0.0]
    assert all(p.grad is None for p in trained.values())
    monkeypatch.setattr(train, "draw_t", lambda n, generators, least_t: torch.ones(n))
    assert train.sft(context, builder([example], 0)).item() > 0 and any(
        p.grad is not None for p in trained.values()
    )


@pytest.mark.parametrize("stage", [1, 2])
def test_ctc_is_torchs_on_similarities_to_words(config, tokenizer, stage):
    """Values against torch's CTC on one row at a time, without padding.

    No transcript, no loss; gradient to the tokens alone.
    """
    model, generator = build(config, seed=0), torch.Generator().manual_seed(0)
    n_first = config.n_soft_prompts if stage == 1 else config.n_queries  # these carry no words
    audio = torch.randn(3, n_first + 9, config.width, generator=generator, requires_grad=True)
    lengths, pieces = (9, 6, 9), [[20, 21, 21], [30], []]
    is_audio = torch.arange(n_first + 9)[None] < torch.tensor(lengths)[:, None] + n_first
    batch = {"transcript": torch.tensor([20, 21, 21, 30]), "transcript_length": torch.tensor([3, 1, 0])}
    losses = train.ctc_loss(model, batch, audio, is_audio, stage)
    for row in (0, 1):
        tokens = audio[row, n_first : n_first + lengths[row]]
        log_p = (tokens @ model.backbone.wte.weight.T / config.width**0.5).log_softmax(-1)
        one = torch.nn.functional.ctc_loss(
            log_p[:, None],
            torch.tensor([pieces[row]]),
            (lengths[row],),
            (len(pieces[row]),),
            config.eos_id,
            "sum",
        )
        assert torch.allclose(losses[row], one / len(pieces[row]), rtol=1e-4)
    assert losses[2] == 0
    losses.sum().backward()
    assert audio.grad[:2, n_first:].abs().sum() > 0 and audio.grad[:, :n_first].abs().sum() == 0
    assert audio.grad[1, n_first + 6 :].abs().sum() == 0 and audio.grad[2].abs().sum() == 0


def test_the_table_weighs_ctc(one, toured):
    """The gradient with a weight of 0.5 is the one without, and half of CTC's."""
    model, tokenizer = load(f"{one}/stage1", "cpu", torch.float32)
    trained = freeze_all_but(model, SMALL_STAGES[1].trains)
    examples, gradients = read_manifest(f"{toured}/stage1.jsonl", 1)[:4], []
    for weight in (0.0, 0.5):
        row = dataclasses.replace(SMALL_STAGES[1], ctc=weight, augment=False)
        context = train.LossContext(model, 1, 0, row, contextlib.nullcontext, tuple(trained.values()))
        micro = builder_for(tokenizer, model.config, row, 0)(examples, 0)
        train.sft(context, micro)
        gradients.append(trained["semantic.fc1.weight"].grad.clone())
        model.zero_grad()
    loss = train.ctc_loss(model, micro["batch"], *audio_tokens(model, micro["batch"], 1), 1).sum()
    (by_ctc,) = torch.autograd.grad(loss, trained["semantic.fc1.weight"])
    assert by_ctc.norm() > 0
    torch.testing.assert_close(gradients[1], gradients[0] + 0.5 * by_ctc, rtol=1e-3, atol=1e-5)


def test_stage_0_reads_imitated_audio(toured, config, tokenizer):
    """The audio tokens of stage 0 are the weighted embeddings plus noise in the embeddings' loudness.

    No encoder runs.
    """
    model = build(config, seed=0)
    model.encoder = None
    examples = read_manifest(f"{toured}/stage0.jsonl", 0)[:4]
    assert all(e.audio is None for e in examples)
    micro = builder_for(tokenizer, config, SMALL_STAGES[0], 0)(examples, 0)
    audio, is_audio = audio_tokens(model, micro["batch"], 0)
    w, ids, wte = (
        micro["batch"]["imitated"]["weights"],
        micro["batch"]["imitated"]["ids"],
        model.backbone.wte.weight,
    )
    mixed = wte[ids[..., 0]] * w[..., :1] + wte[ids[..., 1]] * w[..., 1:]
    assert torch.allclose(
        audio, mixed + wte.pow(2).mean().sqrt() * micro["batch"]["imitated"]["noise"], atol=1e-5
    )
    alone = builder_for(tokenizer, config, SMALL_STAGES[0], 0)(examples[2:3], 0)
    n = int(is_audio[2].sum())
    assert is_audio[2, :n].all() and torch.equal(alone["batch"]["imitated"]["ids"][0], ids[2, :n])


def test_the_facts_beside_a_transcript_are_hidden_now_and_then(config, tokenizer):
    """Stage 1 has no acoustic tokens: a quarter of the transcripts do without, and no other question."""
    rain = set(tokenizer.encode(" rain", add_special_tokens=False).ids)
    builder = builder_for(tokenizer, config, SMALL_STAGES[0], 0)
    for answer, share in (("dog", 0.25), ("Rain.", 0.0)):
        example = Example(0, None, "Hm?", answer, facts={"words": "dog", "sound": "rain"})
        shown = [
            rain & set(builder.item(example, n)["imitated"]["ids"].flatten().tolist()) for n in range(400)
        ]
        hidden = [not tokens for tokens in shown]
        assert abs(np.mean(hidden) - share) <= 4 * (share * (1 - share) / 400) ** 0.5


def test_training_by_eq_1_memorises_an_answer(toured, config, tokenizer):
    """400 steps on four questions: the loss falls to a tenth, and decoding gives the four answers."""
    from decode import generate

    model = build(config, seed=0)
    examples = [
        e for e in read_manifest(f"{toured}/stage0.jsonl", 0) if e.task == "sex" and len(e.answer) < 10
    ][:4]
    row = dataclasses.replace(SMALL_STAGES[0], trains=("backbone.",))
    trained = freeze_all_but(model, row.trains)
    context = train.LossContext(model, 0, 0, row, contextlib.nullcontext, tuple(trained.values()))
    optimizer = torch.optim.AdamW(trained.values(), lr=5e-3)
    builder, curve = builder_for(tokenizer, config, row, 0), []
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 400)
        curve.append(train.sft(context, builder(examples, step)).mean().item())
        optimizer.step()
        optimizer.zero_grad()
    assert np.mean(curve[-10:]) < 0.1 * np.mean(curve[:3])
    batch = builder(examples, 0)["batch"]
    with torch.no_grad():
        audio, is_audio = audio_tokens(model, batch, 0)
        text = batch["text"]
        for n, e in enumerate(examples):
            prompt = text["ids"][n][text["valid"][n] & ~text["is_answer"][n]].tolist()
            ids, _ = generate(
                model,
                [prompt],
                audio[n : n + 1],
                is_audio[n : n + 1],
                [int(text["audio_at"][n])],
                answer_length=32,
                steps=32,
            )
            assert answer_text(tokenizer, ids[0].tolist(), config) == e.answer


def test_the_autoregressive_baseline_learns_its_own_way(one, toured, tmp_path, capsys):
    """Causal from its first word on, decoded one token a call; the two kinds of checkpoint are told apart."""
    for stage in (0, 1, 2, 3):
        args = arguments(toured, tmp_path, stage, "--objective", "ar", "--max-steps", "3")
        assert main(args) == 0
    model, tokenizer = load(f"{tmp_path}/stage3", "cpu", torch.float32)
    assert model.config.causal and any("lora_" in n for n, _ in model.named_parameters())
    (answer,) = ask(model, tokenizer, [np.zeros(8000, np.float32)], ["What is said?"], answer_length=8)
    assert 1 <= answer.calls <= 8
    logged = read_lines(f"{tmp_path}/stage3/log.jsonl")
    held_out = [e["held_out_t"] for e in logged if "held_out_t" in e]
    assert held_out and len(set(held_out[-1].values())) == 1  # one loss, there is no t
    for objective, init in (("ar", f"{one}/stage2"), ("diffusion", f"{tmp_path}/stage2")):
        capsys.readouterr()
        args = arguments(toured, f"{tmp_path}/other", 3, "--objective", objective, "--init", init)
        assert main(args) == 2
        assert "other kind" in capsys.readouterr().err


def test_cost_counts_what_a_row_holds(toured, config):
    """Positions by cost_of are about those of the row, so that a budget in them means something."""
    from weights import load_tokenizer

    tokenizer = load_tokenizer(toured)
    for e in read_manifest(f"{toured}/stage2.jsonl", 2)[:40]:
        builder = builder_for(tokenizer, config.with_tokenizer(tokenizer), SMALL_STAGES[3], 0)
        row = builder([e], 0)["batch"]["text"]["ids"].size(1) + config.n_queries
        assert 0.7 * row < sum(cost_of(size_of(e), config)) < 2.5 * row
    assert parse(["--stage", "1"]).tokens == 6144


def test_dry_run_trains_nothing(one, toured, tmp_path, capsys):
    argv = arguments(
        toured, tmp_path / "out", 2, "--init", f"{one}/stage1", "--dry-run", "3", "--epochs", "2"
    )
    at = argv.index("--data") + 2
    argv[at:at] = [f"{toured}/stage1.jsonl:0.5"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    n = [len(read_manifest(f"{toured}/stage{stage}.jsonl", stage)) for stage in (2, 1)]
    drawn = n[0] + round(n[1] / 2)
    assert f"{sum(n):,} in 2 manifests" in out and f"examples an epoch   {drawn:,}\n" in out
    assert f"{2 * -(-drawn // SMALL_STAGES[2].batch)} of {SMALL_STAGES[2].batch}" in out
    assert "3 processes" in out and "read 3 examples" in out and "text.ids" in out
    assert not os.path.exists(tmp_path / "out")


def test_dry_run_says_what_is_missing(toured, tmp_path, capsys, monkeypatch):
    """The stage before may not have been trained yet; a wrong --init is an error for both."""
    monkeypatch.chdir(tmp_path)
    argv = ["--model", "tiny", "--stage", "2", "--data", f"{toured}/stage2.jsonl"]
    assert main(argv) == 2
    missing = "out/tiny/stage1: no checkpoint to start from"
    assert missing in capsys.readouterr().err
    assert main([*argv, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert f"cannot start yet: {missing}" in out and "850 of 32" in out and "text.ids" in out
    assert main([*argv, "--dry-run", "--init", "nowhere"]) == 2


def test_memory_grows_with_the_length_even_past_the_width(config):
    """Where a micro-batch is as long as the model is wide, hidden states are no scores of attention."""
    counted = []
    for length in (config.width - 1, config.width, config.width + 1):
        with torch.device("meta"):
            model = DIFFA2(config)
        freeze_all_but(model, train.ADAPTERS)
        args = parse(["--stage", "2", "--tokens", str(length)])
        counted.append(memory_of(model, STAGES["diffa2"][2], args, 1, 1)["activations of the backbone"])
    assert counted[0] < counted[1] <= counted[2] < 1.2 * counted[0]


@pytest.mark.parametrize("n_rows, length", [(1, 50), (4, 30)])
def test_saved_bytes_are_what_autograd_keeps(config, n_rows, length):
    """Counted on the meta device, and by hand for a layer whose needs are known."""
    x = torch.empty(n_rows, length, config.width, device="meta", requires_grad=True)
    frozen = torch.nn.Linear(config.width, config.width, device="meta").requires_grad_(False)
    trained = torch.nn.Linear(config.width, config.width, device="meta")
    # a frozen layer needs its weights alone to go back, a trained one its input, relu its output
    assert saved_bytes(lambda: frozen(x), list(frozen.parameters()), 0) == 0
    assert saved_bytes(lambda: trained(x), list(trained.parameters()), 0) == x.nbytes
    both = [*frozen.parameters(), *trained.parameters()]
    assert saved_bytes(lambda: trained(frozen(x).relu()), both, 0) == x.nbytes
    # of a whole backbone as much as on the CPU, scores of attention apart
    counted = []
    for device in ("meta", "cpu"):
        with torch.device(device):
            model = DIFFA2(config)
            x = torch.zeros(n_rows, length, config.width, requires_grad=True)
        freeze_all_but(model, train.ADAPTERS)
        counted.append(saved_bytes(lambda m=model, x=x: m.backbone(x, None), model.parameters(), length))
    assert 0.8 * counted[1] < counted[0] < 1.25 * counted[1]


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--stage", "1", "--model", "tiny", "--dry-run", "-1"], "must lie between"),
        (["--stage", "1", "--model", "tiny", "--data", "none.jsonl"], "docs/DATA.md"),
        (["--stage", "7"], "invalid choice"),
        (["--stage", "0"], "no stage 0 for diffa2"),
        (["--stage", "1", "--model", "tiny", "--init", "nowhere"], "nowhere: no checkpoint to start from\n"),
        (
            ["--stage", "1", "--model", "tiny", "--objective", "ar"],
            "`python train.py --stage 0 --model tiny --objective ar` makes it",
        ),
        (["--stage", "1", "--init", "diffa1"], "--init diffa1 does not go with --model diffa2"),
        (["--stage", "1", "--diffa", "file.bin"], "--diffa goes with --init diffa2"),
        (["--stage", "0", "--model", "tiny", "--init", "nowhere"], "nowhere: no checkpoint to start from\n"),
        (["--stage", "1", "--model", "tiny", "--device", "warp9"], "warp9"),
        (["--stage", "1", "--max-steps", "0"], "must lie between"),
        (["--model", "tiny"], "give a stage"),
        (["--stage", "4", "--model", "tiny", "--objective", "ar"], "stages 0 to 3"),
        (["--stage", "1", "--objective", "ar"], "small model"),
        (["--stage", "1", "--lr", "0"], "must lie between"),
        (["--stage", "1", "--lr", "nan"], "must lie between"),
        (["--stage", "1", "--skip-limit", "2"], "between 0 and 1"),
        (["--stage", "1", "--batch", "0"], "must lie between"),
        (["--stage", "1", "--epochs", "-1"], "must lie between"),
        (["--stage", "1", "--seed", str(10**30)], "must lie between"),
        (["--stage", "1", "--tokens", str(10**30)], "must lie between"),
        (["--stage", "1", "--epochs", "1", "--max-steps", "5"], "not allowed with"),
        (["--stage", "1", "--model", "diffa1"], "invalid choice"),
        (["--stage", "1", "--warmup", "0"], "must lie between"),
        (["--stage", "1", "--resume", "--restart"], "not allowed with"),
        (["--stage", "1", "--weight-decay", "-0.1"], "must lie between"),
    ],
)
def test_one_line_for_what_is_wrong(argv, says, toured, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "--data" not in argv:
        argv = [*argv, "--data", f"{toured}/stage1.jsonl"]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("train.py: ") and says in err
    assert not [f for d in os.walk(tmp_path) for f in d[2]]
