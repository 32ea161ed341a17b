"""Whisper's encoder from each format it is published in, and checkpoints that leave it out."""

import dataclasses
import json
import os
import pathlib
import random
import struct

import pytest
import torch
from conftest import SMALL, lively, whisper_encoder
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from whisper.model import AudioEncoder

import weights
from adapters import merge_lora
from model import DIFFA2, PRESETS, Encoder
from runtime.ctranslate2 import read_encoder
from runtime.errors import UserError
from runtime.fresh import build
from runtime.names import whisper_name
from tools.encoder import export_encoder, main, sha256
from weights import (
    TINY_ENCODER,
    load,
    load_tiny_encoder,
    load_whisper,
    save,
)

SHIPPED = os.path.join(os.path.dirname(weights.__file__), "assets", TINY_ENCODER)
CPU = torch.device("cpu")
ENCODER = {  # Config of tiny.en's encoder, every state tapped, whatever else the preset says
    "n_mels": 80,
    "audio_width": 384,
    "audio_heads": 6,
    "audio_layers": 4,
    "n_frames": 500,
    "pad_to": 0,
    "taps": (0, 1, 2, 3, 4),
}


# ---------------------------------------------------------------------------------------------
# files in CTranslate2's format, written a second time and from the description alone


def variable(name, value, dtype=None):
    """One variable: name, rank, sizes, type, bytes, data."""
    kinds = (torch.float32, torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16)
    data = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    out = string(name) + struct.pack("<B", value.dim()) + b"".join(struct.pack("<I", n) for n in value.shape)
    return out + struct.pack("<BI", kinds.index(value.dtype) if dtype is None else dtype, len(data)) + data


def string(text):
    return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"


def ctranslate2_variables(state, n_frames):
    """An encoder's state dict (openai-whisper's names) as CTranslate2 lays it out, and a decoder's crumbs."""
    width = state["encoder.ln_post.weight"].numel()
    found = {
        "decoder/embeddings/weight": torch.ones(5, 3),
        "decoder/num_heads": torch.tensor(2, dtype=torch.int16),
        "encoder/num_heads": torch.tensor(2, dtype=torch.int16),
        "encoder/position_encodings/encodings": torch.zeros(n_frames, width),
    }
    parts = {
        "attn_ln": "self_attention/layer_norm",
        "attn.out": "self_attention/linear_1",
        "mlp_ln": "ffn/layer_norm",
        "mlp.0": "ffn/linear_0",
        "mlp.2": "ffn/linear_1",
    }
    stacked = {}
    for key, value in state.items():
        module, leaf = key.removeprefix("encoder.").rsplit(".", 1)
        if module.endswith(("query", "key", "value")):
            block = module.split(".")[1]
            name = f"encoder/layer_{block}/self_attention/linear_0/{leaf}"
            stacked.setdefault(name, {})[module.split(".")[-1]] = value
            continue
        norm = {"weight": "gamma", "bias": "beta"}
        leaf = norm[leaf] if module.endswith(("_ln", "ln_post")) else leaf
        if module.startswith("blocks."):
            _, block, part = module.split(".", 2)
            module = f"layer_{block}/{parts[part]}"
        found[f"encoder/{module.replace('ln_post', 'layer_norm')}/{leaf}"] = value
    for name, parts in stacked.items():
        parts.setdefault("key", torch.zeros_like(parts["query"]))
        found[name] = torch.cat([parts["query"], parts["key"], parts["value"]])
    return found


def written(path, variables, version=6, kind="WhisperSpec", dtypes=None):
    """The whole file; dtypes: name -> a type that its header claims."""
    out = struct.pack("<I", version) + string(kind) + struct.pack("<II", 3, len(variables))
    for name, value in sorted(variables.items()):
        out += variable(name, value, (dtypes or {}).get(name))
    out += struct.pack("<I", 1) + string("decoder/projection/weight") + string("decoder/embeddings/weight")
    with open(path, "wb") as f:
        f.write(out)
    return str(path)


@pytest.fixture
def encoder():
    """A random encoder of the small preset, as {"encoder....": tensor}."""
    model = build(SMALL, seed=3)
    g = torch.Generator().manual_seed(0)
    state = {k: v for k, v in model.state_dict().items() if k.startswith("encoder.")}
    return {k: torch.randn(v.shape, generator=g) * 0.1 for k, v in state.items()}


def says(call, *args):
    with pytest.raises(UserError) as e:
        call(*args)
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_ctranslate2_round_trip(encoder, tmp_path, dtype):
    state = {k: v.to(dtype) for k, v in encoder.items()}
    found = read_encoder(written(tmp_path / "model.bin", ctranslate2_variables(state, 100)))
    assert found.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(found[key], value) and found[key].dtype == dtype, key


def test_ctranslate2_cut_anywhere(tmp_path):
    variables = {"encoder/conv1/weight": torch.ones(2, 2), "decoder/x": torch.ones(3)}
    variables["encoder/num_heads"] = torch.tensor(2, dtype=torch.int16)
    path = written(tmp_path / "model.bin", variables)
    whole = pathlib.Path(path).read_bytes()
    assert torch.equal(read_encoder(path)["encoder.conv1.weight"], torch.ones(2, 2))
    for n in range(len(whole)):
        (tmp_path / "cut.bin").write_bytes(whole[:n])
        assert "cut short" in says(read_encoder, str(tmp_path / "cut.bin")), n
    (tmp_path / "cut.bin").write_bytes(whole + b"x")
    assert "1 bytes follow" in says(read_encoder, str(tmp_path / "cut.bin"))


def test_ctranslate2_other_files(tmp_path, encoder):
    one, path = {"encoder/conv1/weight": torch.ones(2, 2)}, tmp_path / "model.bin"
    assert "'TransformerSpec'" in says(read_encoder, written(path, one, kind="TransformerSpec"))
    assert "not version 6" in says(read_encoder, written(path, one, version=5))
    assert "type 9" in says(read_encoder, written(path, one, dtypes={"encoder/conv1/weight": 9}))
    assert "16 bytes" in says(read_encoder, written(path, one, dtypes={"encoder/conv1/weight": 4}))
    written(path, one | {"encoder/conv2/weight": torch.zeros(2, 2)})
    path.write_bytes(path.read_bytes().replace(b"conv2", b"conv1"))
    assert "there twice" in says(read_encoder, str(path))
    quantised = {"encoder/conv1/weight": torch.ones(2, 2, dtype=torch.int8)}
    assert "float16" in says(read_encoder, written(path, quantised))
    assert "cannot be read" in says(read_encoder, str(tmp_path / "none.bin"))
    torch.save({"a": torch.ones(1)}, path)
    assert "not version 6" in says(read_encoder, str(path))
    for name, changed in (("bias", torch.ones(48)), ("weight", torch.ones(47, 16))):
        variables = ctranslate2_variables(encoder, 100)
        variables[f"encoder/layer_0/self_attention/linear_0/{name}"] = changed
        wrong = "bias for the keys" if name == "bias" else "q, k and v"
        assert wrong in says(read_encoder, written(path, variables))
    # a name that no Whisper has is found by the strict loading that follows
    for extra in ("encoder/strange", "encoder/layer_0/ffn/linear_9/weight"):
        written(path, ctranslate2_variables(encoder, 100) | {extra: torch.ones(2)})
        assert "no place" in says(load_whisper, build(SMALL), str(path), CPU)
    variables = ctranslate2_variables(encoder, 100)
    del variables["encoder/layer_1/ffn/linear_1/bias"]
    message = says(load_whisper, build(SMALL), written(path, variables), CPU)
    assert "encoder.blocks.1.mlp.2.bias is missing" in message


# ---------------------------------------------------------------------------------------------
# the formats against each other


def transformers_names(state):
    """openai-whisper's names of encoder tensors -> transformers', by asking our table for each of theirs."""
    layers = 1 + max(int(k.split(".")[2]) for k in state if ".blocks." in k)
    width, n_mels = state["encoder.conv1.weight"].shape[:2]
    with torch.device("meta"):
        theirs = whisper_encoder(width, layers, 2, n_mels, 4).state_dict()
    return {key: state[whisper_name(key)] for key in theirs if whisper_name(key) is not None}


def test_three_formats_give_equal_tensors(encoder, tmp_path):
    positions = {"encoder.positional_embedding": torch.zeros(1500, 16), "decoder.ln.weight": torch.ones(3)}
    torch.save({"dims": {}, "model_state_dict": encoder | positions}, tmp_path / "small.pt")
    os.makedirs(tmp_path / "hub")
    renamed = {f"model.encoder.{k}": v for k, v in transformers_names(encoder).items()}
    renamed["model.encoder.embed_positions.weight"] = torch.zeros(1500, 16)
    renamed["model.decoder.x"] = torch.ones(3)
    save_file(renamed, tmp_path / "hub" / "model.safetensors")
    os.makedirs(tmp_path / "faster")
    written(tmp_path / "faster" / "model.bin", ctranslate2_variables(encoder, 100))
    os.makedirs(tmp_path / "ours")
    save_file(encoder, tmp_path / "ours" / "encoder.safetensors")
    for path in ("small.pt", "hub", "hub/model.safetensors", "faster", "faster/model.bin", "ours"):
        model = build(SMALL, seed=1)
        before = model.encoder.positional_embedding
        load_whisper(model, str(tmp_path / path), CPU)
        for key, value in encoder.items():
            assert torch.equal(model.state_dict()[key], value), (path, key)
        assert torch.equal(model.encoder.positional_embedding, before)
    os.makedirs(tmp_path / "empty")
    assert "model.bin" in says(load_whisper, model, str(tmp_path / "empty"), CPU)
    assert "no such file" in says(load_whisper, model, str(tmp_path / "none.pt"), CPU)


def test_a_damaged_pickle_is_one_line(encoder, tmp_path):
    """One byte of the pickle is changed: the unpickler then raises many kinds of error."""
    model, path = build(SMALL, seed=1), tmp_path / "damaged.pt"
    torch.save({"dims": {}, "model_state_dict": encoder}, path)
    whole = path.read_bytes()
    begin = whole.index(b"data.pkl") + 64
    rng, refused = random.Random(0), 0
    for _ in range(150):
        at, other = rng.randrange(begin, begin + 3000), rng.randrange(256)
        path.write_bytes(whole[:at] + bytes([other]) + whole[at + 1 :])
        try:
            load_whisper(model, str(path), CPU)
        except UserError:
            refused += 1
    assert refused > 100


# ---------------------------------------------------------------------------------------------
# the shipped encoder


@pytest.fixture(scope="module")
def tiny():
    """Our encoder with the shipped weights and a window of 10 s; a random mel, its taps and final states."""
    config = dataclasses.replace(PRESETS["tiny"], **ENCODER)
    with torch.device("meta"):
        model = DIFFA2(config)
    load_whisper(model, SHIPPED, CPU)
    mel = torch.randn(2, 80, 1000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        taps, final = model.encoder(mel, config.taps)
    return model.encoder, mel, taps, final


def test_shipped_encoder_is_openai_whispers(tiny):
    ours, mel, taps, final = tiny
    theirs = AudioEncoder(80, 500, 384, 6, 4)
    theirs.load_state_dict(ours.state_dict() | {"positional_embedding": theirs.positional_embedding})
    states = []
    for block in theirs.blocks:
        block.register_forward_hook(lambda module, args, out: states.append(out))
    theirs.blocks[0].register_forward_pre_hook(lambda module, args: states.append(args[0]))
    with torch.no_grad():
        reference = theirs(mel)
    torch.testing.assert_close(taps, torch.stack(states, 1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(final, reference, atol=1e-4, rtol=1e-4)


def test_shipped_encoder_is_transformers(tiny):
    """With openai/whisper-tiny.en's sizes, but for the window; its sinusoids are a fixed parameter."""
    ours, mel, taps, final = tiny
    theirs = whisper_encoder(384, 4, 6, 80, 500)
    state = transformers_names({f"encoder.{k}": v for k, v in ours.state_dict().items()})
    missing, extra = theirs.load_state_dict(state, strict=False)
    assert missing == ["embed_positions.weight"] and not extra
    with torch.no_grad():
        reference = theirs(mel, output_hidden_states=True)
    for k in range(4):
        torch.testing.assert_close(taps[:, k], reference.hidden_states[k], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(final, reference.last_hidden_state, atol=1e-4, rtol=1e-4)


def test_shipped_encoder_is_small_and_says_where_it_is_from():
    path = os.path.join(SHIPPED, "encoder.safetensors")
    assert sorted(os.listdir(SHIPPED)) == ["LICENSE", "README.md", "encoder.safetensors"]
    with safe_open(path, "pt") as f:
        source = f.metadata()
        assert {f.get_slice(k).get_dtype() for k in f.keys()} == {"F16"}
        assert not any("positional" in k for k in f.keys())
    card = pathlib.Path(SHIPPED, "README.md").read_text(encoding="utf-8")
    assert source["source_sha256"] in card and sha256(path) in card


def test_export_gives_the_same_bytes(tmp_path, capsys):
    assert main(["--whisper", SHIPPED, "--out", str(tmp_path / "a")]) == 0
    assert export_encoder(SHIPPED, str(tmp_path / "b"))[1] == sha256(tmp_path / "a" / "encoder.safetensors")
    shipped = load_file(os.path.join(SHIPPED, "encoder.safetensors"))
    again = load_file(tmp_path / "b" / "encoder.safetensors")
    assert all(torch.equal(again[k], v) for k, v in shipped.items()) and again.keys() == shipped.keys()
    out = capsys.readouterr().out
    assert sha256(os.path.join(SHIPPED, "encoder.safetensors")) in out
    assert main(["--whisper", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    assert main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 2


# ---------------------------------------------------------------------------------------------
# checkpoints


def test_save_and_load_round_trip(tmp_path, tokenizer, config):
    model = lively(build(config, seed=0))
    model.add_lora()
    model.stage = 3
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.normal_()
    save(model, tokenizer, tmp_path / "m", dtype=torch.float32)
    again, again_tokenizer = load(str(tmp_path / "m"), "cpu")
    assert again.config == config and again.stage == 3 and not again.training
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert torch.equal(again.encoder.positional_embedding, model.encoder.positional_embedding)
    assert again_tokenizer.to_str() == tokenizer.to_str()
    # nothing temporary is left
    assert sorted(os.listdir(tmp_path / "m")) == ["model.safetensors", "tokenizer.json"]
    ids = torch.randint(6, config.vocab, (1, 9))
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    before = again(ids, everywhere, everywhere)
    torch.testing.assert_close(merge_lora(again)(ids, everywhere, everywhere), before, atol=1e-4, rtol=1e-4)


def test_unusable_checkpoints_are_named(tmp_path, small_folder):
    def broken(change):
        folder = tmp_path / "broken"
        os.makedirs(folder, exist_ok=True)
        with safe_open(os.path.join(small_folder, "model.safetensors"), "pt") as f:
            header = f.metadata()
        weights = load_file(os.path.join(small_folder, "model.safetensors"))
        change(weights, header)
        save_file(weights, folder / "model.safetensors", metadata=header or None)
        text = pathlib.Path(small_folder, "tokenizer.json").read_text()
        (folder / "tokenizer.json").write_text(text)
        with pytest.raises(UserError) as e:
            load(str(folder), "cpu")
        assert "\n" not in str(e.value)
        return str(e.value)

    key = "backbone.blocks.1.q_proj.weight"
    assert key in broken(lambda w, h: w.pop(key)) and "missing" in broken(lambda w, h: w.pop(key))
    assert "shape (3, 3), not (32, 32)" in broken(lambda w, h: w.update({key: torch.zeros(3, 3)}))
    assert "extra.weight has no place" in broken(lambda w, h: w.update({"extra.weight": torch.zeros(1)}))
    assert "no Config" in broken(lambda w, h: h.clear())
    config = json.loads(safe_open(os.path.join(small_folder, "model.safetensors"), "pt").metadata()["config"])
    for change in (
        {"heads": 0},
        {"audio_heads": -1},
        {"vocab": "many"},
        {"n_frames": 0},
        {"n_queries": None},
        {"taps": [-1]},
        {"taps": []},
        {"width": True},
        {"new": 1},
    ):
        text = json.dumps(config | change)
        assert "no Config of this code" in broken(lambda w, h, text=text: h.update(config=text)), change
    for base in ("5", '"x"', '{"foo": 1}', '{"llada": 1}', '{"name": "zzz"}', "["):
        assert "no Config of this code" in broken(lambda w, h, base=base: h.update(base=base)), base
    other = json.dumps(config | {"mask_id": config["mask_id"] + 1})
    assert "the tokenizer has <|mdm_mask|> at" in broken(lambda w, h: h.update(config=other))
    whole = pathlib.Path(small_folder, "model.safetensors").read_bytes()
    for cut in (len(whole) // 2, 20, 0):
        (tmp_path / "broken" / "model.safetensors").write_bytes(whole[:cut])
        with pytest.raises(UserError, match="cut short"):
            load(str(tmp_path / "broken"), "cpu")
    (tmp_path / "broken" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer"):
        load(str(tmp_path / "broken"), "cpu")
    with pytest.raises(UserError, match="no model 'nonesuch'"):
        load("nonesuch")
    with pytest.raises(UserError, match="device"):
        load(small_folder, "warp9")


# ---------------------------------------------------------------------------------------------
# checkpoints without the encoder


@pytest.fixture
def without_encoder(config, tokenizer, tmp_path):
    """A small model with tiny.en's encoder, saved; its checkpoint's folder."""
    model = build(dataclasses.replace(config, **ENCODER), seed=0)
    load_tiny_encoder(model)
    model.stage = 3
    model.add_lora()
    save(model, tokenizer, str(tmp_path / "m"), dtype=torch.float32)
    return model, str(tmp_path / "m")


def test_checkpoint_leaves_the_shipped_encoder_out(without_encoder, tokenizer, tmp_path, monkeypatch):
    model, folder = without_encoder
    with safe_open(os.path.join(folder, "model.safetensors"), "pt") as f:
        assert not any(k.startswith("encoder.") for k in f.keys())
        assert json.loads(f.metadata()["base"]) == {"name": "tiny", "whisper": TINY_ENCODER}
    again, _ = load(folder, "cpu")
    assert again.stage == 3 and again.base == model.base and not again.training
    assert again.state_dict().keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    assert torch.equal(again.encoder.positional_embedding, model.encoder.positional_embedding)
    for name, p in load(folder, "cpu", torch.bfloat16)[0].named_parameters():
        assert p.dtype == (torch.float32 if name.startswith("encoder.") else torch.bfloat16), name
    # what was loaded is saved the same way, to the byte, whatever folder one stands in
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        save(load("m", "cpu")[0], tokenizer, "again", dtype=torch.float32)
        assert sha256("again/model.safetensors") == sha256("m/model.safetensors")


def test_the_same_encoder_from_another_file_or_none_other(without_encoder, tokenizer, small_folder, tmp_path):
    """A checkpoint knows its encoder by fingerprint: any file of those weights fits, no other does."""
    model, folder = without_encoder
    shipped = load_file(os.path.join(SHIPPED, "encoder.safetensors"))
    torch.save({"model_state_dict": shipped}, tmp_path / "same.pt")
    again, _ = load(folder, "cpu", whisper=str(tmp_path / "same.pt"))
    assert again.base == model.base
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    other = {k: torch.randn(v.shape, generator=torch.Generator().manual_seed(0)) for k, v in shipped.items()}
    torch.save({"model_state_dict": other}, tmp_path / "other.pt")
    why = says(lambda: load(folder, "cpu", whisper=str(tmp_path / "other.pt")))
    assert "other.pt: not the weights" in why and f"wanted {TINY_ENCODER}" in why
    # a model trained on another encoder: found beside the checkpoint or given, wherever that lies
    load_tiny_encoder(model, str(tmp_path / "other.pt"))
    save(model, tokenizer, str(tmp_path / "n"), dtype=torch.float32)
    assert str(tmp_path).encode() not in (tmp_path / "n" / "model.safetensors").read_bytes()
    assert "not the weights" in says(load, str(tmp_path / "n"), "cpu")
    os.makedirs(tmp_path / "n" / "whisper")
    save_file(other, tmp_path / "n" / "whisper" / "encoder.safetensors")
    os.rename(tmp_path / "n", tmp_path / "moved")
    saved, _ = load(str(tmp_path / "moved"), "cpu")
    assert torch.equal(saved.encoder.conv1.weight, other["encoder.conv1.weight"])
    # a checkpoint that holds its encoder takes no other
    assert "--whisper" in says(lambda: load(small_folder, "cpu", whisper=SHIPPED))
    assert "--llada" in says(lambda: load(folder, "cpu", llada=SHIPPED))
    assert "encoder.conv1.weight has shape" in says(load_tiny_encoder, build(SMALL))


def test_encoder_in_both_files_or_in_neither(without_encoder, tmp_path):
    model, folder = without_encoder
    path = os.path.join(folder, "model.safetensors")
    with safe_open(path, "pt") as f:
        header = f.metadata()
    state = load_file(path)
    save_file(state | {"encoder.conv1.bias": model.encoder.conv1.bias.detach()}, path, metadata=header)
    assert "encoder.conv1.bias has no place" in says(load, folder, "cpu")
    save_file(state, path, metadata={k: v for k, v in header.items() if k != "base"})
    assert "encoder." in says(load, folder, "cpu") and "is missing" in says(load, folder, "cpu")


def test_loaded_encoder_can_be_trained_on(without_encoder):
    """The places are parameters as before: an optimiser made later finds them."""
    model, _ = without_encoder
    assert isinstance(model.encoder, Encoder)
    assert all(isinstance(p, torch.nn.Parameter) and p.requires_grad for p in model.encoder.parameters())
