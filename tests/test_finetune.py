"""Fine-tuning a model in the released format on 64 clips, by the command lines that a user would type."""

import json
import os

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from test_released import write_llada
from tokenizers import Tokenizer

import decode
import train
import weights
from adapters import merge_lora
from data import BatchBuilder, encode_question, read_manifest
from decode import ask
from diffusion import draw_counts, elbo
from model import PRESETS
from runtime.names import QFORMER_NAMES, SEMANTIC_NAMES
from runtime.start import start_from
from weights import load, trained_part

ANSWERS = ("Zero.", "One.", "Two.", "Three.")
PITCH = (200, 500, 1100, 2500)  # Hz: what the answer depends on


def read_shards(folder):
    """All tensors of a folder of shards."""
    found = {}
    for name in sorted(os.listdir(folder)):
        if name.endswith(".safetensors"):
            found |= load_file(os.path.join(folder, name))
    return found


def turned(names):
    return {ours: theirs for theirs, ours in names.items()}


def authors_name(key):
    """Our name of a trained tensor -> the authors'."""
    module, _, leaf = key.rpartition(".")
    if key == "soft_prompts":
        return "trainable_prompts.weight"
    if key.startswith("backbone."):
        return f"llm_model.base_model.model.model.transformer.{key.removeprefix('backbone.')}.default.weight"
    if key.startswith("semantic."):
        return f"semantic_connector.{turned(SEMANTIC_NAMES)[module.removeprefix('semantic.')]}.{leaf}"
    if key == "acoustic.tap_logits":
        return "acoustic_connector.layer_weights"
    if key.startswith("acoustic.layers."):
        n, part = module.removeprefix("acoustic.layers.").split(".", 1)
        return f"acoustic_connector.qformer.layer.{n}.{turned(QFORMER_NAMES)[part]}.{leaf}"
    return f"acoustic_connector.{ {'acoustic.norm': 'proj.0', 'acoustic.proj': 'proj.1'}[module] }.{leaf}"


@pytest.fixture
def released(tmp_path, monkeypatch):
    """The shipped small model in the authors' formats, as diffa2; what the command line needs to find it."""
    model, tokenizer = load("tiny", "cpu", torch.float32)
    folder = str(tmp_path / "released")
    state = model.state_dict()
    backbone = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    llada = {f"model.transformer.{k}": v for k, v in backbone.items() if "lora_" not in k}
    write_llada(f"{folder}/llada", llada, tokenizer)
    ear = f"{folder}/whisper.safetensors"
    save_file({k: v.contiguous() for k, v in state.items() if k.startswith("encoder.")}, ear)
    trained = {}
    for key in trained_part(model):
        if key == "acoustic.queries":
            for n, queries in enumerate(state[key]):
                trained[f"acoustic_connector.layer_prompts.{n}"] = queries[None].clone()
        else:
            trained[authors_name(key)] = state[key]
    torch.save(trained, f"{folder}/pytorch_model.bin")
    monkeypatch.setitem(PRESETS, "diffa2", model.config)
    return ["--llada", f"{folder}/llada", "--whisper", ear], ["--diffa", f"{folder}/pytorch_model.bin"]


@pytest.fixture
def manifest(tmp_path):
    """64 half-second tones under noise, the answer by their pitch; a rejected answer for stage 4."""
    rng, lines = np.random.default_rng(0), []
    for i in range(64):
        t = np.arange(8000) / 16000
        tone = 0.4 * np.sin(2 * np.pi * PITCH[i % 4] * rng.uniform(0.95, 1.05) * t)
        soundfile.write(str(tmp_path / f"{i}.wav"), tone + rng.uniform(-0.02, 0.02, 8000), 16000)
        question = {"role": "user", "content": "<audio>What do you hear?"}
        answer = {"role": "assistant", "content": ANSWERS[i % 4]}
        rejected = ANSWERS[(i + 1) % 4]
        lines.append({"messages": [question, answer], "audios": [f"{i}.wav"], "rejected_response": rejected})
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def measure(model, tokenizer, manifest):
    """Share of exact answers, and the mean ELBO of the right one (Eq. 3)."""
    merge_lora(model)
    examples = read_manifest(manifest)
    answers = ask(
        model, tokenizer, [e.audio for e in examples], "What do you hear?", answer_length=16, block=16
    )
    right = sum(a.text == e.answer for a, e in zip(answers, examples, strict=True)) / len(examples)
    batch = BatchBuilder(tokenizer, model.config, encode_question, 0)(examples, 0)["batch"]
    text = batch["text"]
    with torch.no_grad():
        audio = model.adapt(*model.encode(batch["mel"], batch["n_frames"]), batch["n_frames"], model.stage)
        masks = draw_counts(text["is_answer"], 4, torch.Generator().manual_seed(0))
        bound = elbo(model.predictor(text, *audio), text["ids"], *masks, model.config.mask_id)
    return right, bound.mean().item()


@pytest.mark.parametrize("stage", [None, 2, 3, 4])
def test_any_stage_but_the_first_is_read_from_the_last_file(released, stage):
    """Stages 2 to 4 read audio alike; the authors published the model after stage 1 and after the last."""
    frozen, trained = released
    llada, whisper, diffa = (*frozen[1::2], trained[1])
    model, _ = load("diffa2", "cpu", torch.float32, stage, llada, whisper, diffa)
    assert model.stage == 4 and any("lora_" in name for name, _ in model.named_parameters())


@pytest.mark.slow
def test_sixty_four_clips_are_learned_moved_and_preferred(released, manifest, tmp_path, capsys):
    frozen, trained = released
    on_cpu = ["--model", "diffa2", "--precision", "fp32", "--device", "cpu"]
    paths = dict(zip(("llada", "whisper"), frozen[1::2], strict=True))
    model, tokenizer = load("diffa2", "cpu", torch.float32, **paths, diffa=trained[1])
    right, bound = measure(model, tokenizer, manifest)
    assert right < 0.1
    numbers = ["--lr", "0.003", "--batch", "16", "--epochs", "12", "--no-dropout"]
    out = str(tmp_path / "mine")
    argv = ["--stage", "3", "--init", "diffa2", "--data", manifest, "--out", out, *frozen, *trained]
    assert train.main([*argv, *on_cpu, *numbers]) == 0
    assert "48 steps of 16" in capsys.readouterr().out
    # exported, and moved to another machine: other paths
    export = str(tmp_path / "export")
    assert decode.main(["--model", out, *frozen, "--export", export, "--device", "cpu"]) == 0
    os.rename(out, str(tmp_path / "elsewhere"))
    os.rename(str(tmp_path / "released"), str(tmp_path / "colleague"))
    frozen = [part.replace("/released/", "/colleague/") for part in frozen]
    paths = dict(zip(("llada", "whisper"), frozen[1::2], strict=True))
    model, tokenizer = load(export, "cpu", torch.float32, **paths)
    right, new_bound = measure(model, tokenizer, manifest)
    assert right >= 0.9 and new_bound > bound + 5, (right, bound, new_bound)
    # stage 4 goes on from there
    argv = ["--stage", "4", "--init", export, "--data", manifest, "--out", str(tmp_path / "four"), *frozen]
    assert train.main([*argv, *on_cpu, "--max-steps", "2"]) == 0
    assert load(str(tmp_path / "four"), "cpu", torch.float32, **paths)[0].stage == 4


def test_another_backbone_of_the_same_shapes(released, manifest, tmp_path, capsys):
    """LLaDA-1.5 is such a folder: stage 1 trains beside it, decoding needs the same one again."""
    (_, llada, *ear), _ = released
    state, other = read_shards(llada), str(tmp_path / "LLaDA-1.5")
    tokenizer = Tokenizer.from_file(f"{llada}/tokenizer.json")
    write_llada(other, {key: value * 1.5 for key, value in state.items()}, tokenizer)
    out, on_cpu = str(tmp_path / "out"), ["--precision", "fp32", "--device", "cpu", "--batch", "4"]
    argv = ["--stage", "1", "--model", "diffa2", "--data", manifest, "--out", out, "--llada", other, *ear]
    assert train.main([*argv, *on_cpu, "--max-steps", "2"]) == 0
    capsys.readouterr()
    argv = [str(tmp_path / "0.wav"), "What is said?", "--model", out, "--device", "cpu", *ear]
    assert decode.main([*argv, "--llada", other, "--answer-length", "8"]) == 0
    assert decode.main([*argv, "--llada", llada, "--answer-length", "8"]) == 2
    assert "not the weights that" in capsys.readouterr().err


def test_a_released_model_is_no_start_for_another(manifest, capsys):
    argv = ["--stage", "3", "--model", "tiny", "--init", "diffa2", "--data", manifest]
    assert train.main(argv) == 2 and "--init diffa2 does not go with --model tiny" in capsys.readouterr().err


def test_stage_1_of_the_released_model_goes_on_with_its_soft_prompts(released, manifest, tmp_path):
    frozen, trained = released
    state = {k: v for k, v in torch.load(trained[1], weights_only=True).items() if "lora_" not in k}
    torch.save(state, str(tmp_path / "stage1.bin"))
    argv = ["--stage", "1", "--init", "diffa2", *frozen, "--diffa", str(tmp_path / "stage1.bin")]
    model, _ = start_from(train.parse([*argv, "--precision", "fp32"]), torch.device("cpu"))
    assert torch.equal(model.soft_prompts, state["trainable_prompts.weight"]) and model.stage == 1


def test_a_checkpoint_of_another_model_is_no_start(manifest, tmp_path, capsys):
    argv = ["--stage", "3", "--init", weights.ASSETS["tiny"], "--data", manifest, "--device", "cpu"]
    assert train.main([*argv, "--out", str(tmp_path / "out")]) == 2
    assert "give --model tiny" in capsys.readouterr().err


def test_a_wrong_manifest_is_told_before_weights_are_looked_for(manifest, tmp_path, capsys):
    gone = str(tmp_path / "gone.jsonl")
    argv = ["--stage", "3", "--init", str(tmp_path / "none"), "--data", manifest, gone]
    assert train.main([*argv, "--out", str(tmp_path / "out")]) == 2
    assert f"{gone}: no such manifest" in capsys.readouterr().err
