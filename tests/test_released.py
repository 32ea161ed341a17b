"""The authors' pipeline put together from transformers' parts, saved in their format, loaded by ours.

The real files cannot come with a test; these have the same names, wrappings and formats at small sizes.
"""

import copy
import dataclasses
import errno
import json
import os
import pathlib
import pickle
import resource
import signal

import numpy as np
import pytest
import soundfile
import torch
import torch.nn as nn
import whisper.audio
from conftest import whisper_encoder
from safetensors.torch import load_file, save_file
from test_adapters import bert_config
from test_decode import reference
from test_model import LLAMA
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.bert.modeling_bert import BertLayer

from adapters import merge_lora
from data import build_prompt, log_mel
from decode import ask, generate, main
from diffusion import sft_loss
from model import PRESETS, Config
from runtime.errors import UserError
from runtime.names import released_name
from weights import assemble, load, load_released, save

SIZES = {
    "qformer_ffn": 24,
    "n_queries": 6,
    "n_soft_prompts": 4,
    "width": 32,
    "layers": 2,
    "heads": 2,
    "ffn": 48,
    "audio_width": 16,
    "audio_heads": 2,
    "vocab": 320,
}
EIGHT = {"n_mels": 128, "audio_layers": 32, "taps": PRESETS["diffa2"].taps}  # large-v3's taps
FOUR = {"n_mels": 80, "audio_layers": 12, "taps": PRESETS["diffa1"].taps}  # whisper-small's
LORA = ("q_proj", "k_proj", "v_proj", "ff_proj", "up_proj")


class QFormer(nn.Module):
    def __init__(self, c):
        super().__init__()
        bert = bert_config(c.audio_width, c.audio_heads, c.qformer_ffn)
        self.layer = nn.ModuleList(BertLayer(bert) for _ in range(2))


class Authors(nn.Module):
    """The paper's model (arXiv 2601.23161, Section 3.1), from parts that others wrote.

    Attribute names are those of the released files.
    """

    def __init__(self, c, lora):
        super().__init__()
        d, D = c.audio_width, c.width
        self.c = c
        self.whisper_model = whisper_encoder(d, c.audio_layers, c.audio_heads, c.n_mels, 1500)
        self.semantic_connector = nn.Module()
        self.semantic_connector.conv = nn.Sequential(
            nn.Conv1d(d, d, 3, padding=1), nn.GELU(), nn.Conv1d(d, 4 * d, 3, 4, padding=1)
        )
        self.semantic_connector.linear_connector = nn.Sequential(
            nn.Linear(4 * d, d), nn.ReLU(), nn.Linear(d, D), nn.ReLU()
        )
        self.semantic_connector.layernorm = nn.LayerNorm(D)
        self.acoustic_connector = nn.Module()
        self.acoustic_connector.layer_prompts = nn.ParameterList(
            nn.Parameter(torch.randn(1, c.n_queries, d)) for _ in c.taps
        )
        self.acoustic_connector.layer_weights = nn.Parameter(torch.randn(c.n_queries, len(c.taps)))
        self.acoustic_connector.qformer = QFormer(c)
        self.acoustic_connector.proj = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, D))
        self.trainable_prompts = nn.Embedding(c.n_soft_prompts, D)
        llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=c.vocab,
                hidden_size=D,
                intermediate_size=c.ffn,
                num_hidden_layers=c.layers,
                num_attention_heads=c.heads,
                rms_norm_eps=c.norm_eps,
                max_position_embeddings=c.context,
                tie_word_embeddings=False,
                attn_implementation="eager",
                rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
            )
        )
        with torch.no_grad():
            for p in llama.parameters():
                p.normal_(std=0.25) if p.dim() == 2 else p.uniform_(0.5, 1.5)
        object.__setattr__(self, "llama", llama)  # saved by hand, under LLaDA's names
        shape = {part: (D, c.ffn if part in ("ff_proj", "up_proj") else D) for part in LORA}
        self.lora = nn.ParameterDict()
        for n in range(c.layers if lora else 0):
            for part, (i, o) in shape.items():
                self.lora[f"{n}/{part}/A"] = nn.Parameter(torch.randn(c.lora_rank, i) * 0.2)
                self.lora[f"{n}/{part}/B"] = nn.Parameter(torch.randn(o, c.lora_rank) * 0.2)

    def encode(self, audio, stage):
        """One clip -> the audio embeddings (A, D)."""
        c = self.c
        mel = whisper.audio.log_mel_spectrogram(
            whisper.audio.pad_or_trim(torch.from_numpy(audio)), n_mels=c.n_mels
        )
        out = self.whisper_model(mel[None], output_hidden_states=True)
        frames = (-(-len(audio) // 160) - 1) // 2 + 1
        x = out.last_hidden_state[:, : frames // 4 * 4].transpose(1, 2)
        x = self.semantic_connector.conv(x).transpose(1, 2)
        semantic = self.semantic_connector.layernorm(self.semantic_connector.linear_connector(x))[0]
        if stage == 1:
            return torch.cat([self.trainable_prompts.weight, semantic])
        taps = []
        for queries, k in zip(self.acoustic_connector.layer_prompts, c.taps, strict=True):
            y = queries
            for layer in self.acoustic_connector.qformer.layer:
                y = layer(y, encoder_hidden_states=out.hidden_states[k])
            taps.append(y[0])
        mixed = (torch.stack(taps, -1) * self.acoustic_connector.layer_weights.softmax(-1)[:, None]).sum(-1)
        return torch.cat([self.acoustic_connector.proj(mixed), semantic])

    def logits(self, ids, audio, at):
        """ids (list), embeddings (A, D) -> logits of the text positions (len(ids), vocab); no causal mask."""
        weights = dict(self.llama.named_parameters())
        for n in range(self.c.layers):
            for part in LORA if len(self.lora) else ():
                key = f"model.layers.{n}.{LLAMA[part]}.weight"
                weights[key] = weights[key] + 2 * self.lora[f"{n}/{part}/B"] @ self.lora[f"{n}/{part}/A"]
        text = self.llama.model.embed_tokens.weight[torch.tensor(ids)]
        x = torch.cat([text[:at], audio, text[at:]])[None]
        zeros = torch.zeros(1, 1, x.size(1), x.size(1))
        given = {"inputs_embeds": x, "attention_mask": zeros}
        out = torch.func.functional_call(self.llama, weights, (), given).logits[0]
        return torch.cat([out[:at], out[at + len(audio) :]])

    def trained(self, peft=True, stage=4):
        """The released pytorch_model.bin."""
        state = {
            k: v.detach().clone()
            for k, v in self.state_dict().items()
            if not k.startswith(("whisper_model.", "lora."))
        }
        prefix, leaf = ("base_model.model.", ".default.weight") if peft else ("", ".weight")
        for key, value in self.lora.items():
            n, part, which = key.split("/")
            state[f"llm_model.{prefix}model.transformer.blocks.{n}.{part}.lora_{which}{leaf}"] = (
                value.detach().clone()
            )
        return state

    def llada(self):
        """LLaDA's state dict, under its own names."""
        state, outer = {}, {"model.embed_tokens": "wte", "model.norm": "ln_f", "lm_head": "ff_out"}
        inner = {v: k for k, v in LLAMA.items()}
        for key, value in self.llama.state_dict().items():
            module = key.removesuffix(".weight")
            if module.startswith("model.layers."):
                n, part = module.removeprefix("model.layers.").split(".", 1)
                module = f"blocks.{n}.{inner[part]}"
            else:
                module = outer[module]
            state[f"model.transformer.{module}.weight"] = value.clone()
        return state


def write_llada(folder, state, tokenizer, shards=3):
    os.makedirs(folder, exist_ok=True)
    keys, where = sorted(state), {}
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({k: state[k] for k in keys[i::shards]}, f"{folder}/{name}")
        where |= dict.fromkeys(keys[i::shards], name)
    with open(f"{folder}/model.safetensors.index.json", "w") as f:
        json.dump({"metadata": {}, "weight_map": where}, f)
    with open(f"{folder}/config.json", "w") as f:
        json.dump({"model_type": "llada", "architectures": ["LLaDAModelLM"]}, f)
    tokenizer.save(f"{folder}/tokenizer.json")


def write_whisper(folder, encoder, c, kind):
    state = {k: v.clone() for k, v in encoder.state_dict().items()}
    path = f"{folder}/whisper.{kind}"
    if kind == "safetensors":
        wrapped = {f"model.encoder.{k}": v for k, v in state.items()}
        save_file(wrapped | {"model.decoder.layer_norm.weight": torch.ones(3)}, path)
        return path
    names = {
        "self_attn.q_proj": "attn.query",
        "self_attn.k_proj": "attn.key",
        "self_attn.v_proj": "attn.value",
        "fc1": "mlp.0",
        "self_attn.out_proj": "attn.out",
        "self_attn_layer_norm": "attn_ln",
        "fc2": "mlp.2",
        "final_layer_norm": "mlp_ln",
    }
    renamed = {"decoder.ln.weight": torch.ones(3)}
    for key, value in state.items():
        for theirs, ours in names.items():
            key = key.replace(f".{theirs}.", f".{ours}.")
        if key.startswith("layers."):
            key = key.replace("layers.", "blocks.")
        else:
            key = key.replace("layer_norm", "ln_post")
        renamed["encoder." + key.replace("embed_positions.weight", "positional_embedding")] = value
    torch.save({"dims": {"n_mels": c.n_mels}, "model_state_dict": renamed}, path)
    return path


def sizes(tokenizer, lora=True, **more):
    rank = 4 if lora else 0
    return Config(**SIZES, **more, lora_rank=rank, lora_alpha=8.0, context=1024).with_tokenizer(tokenizer)


@pytest.fixture(scope="module")
def released(tmp_path_factory, tokenizer):
    """(taps, stage) -> config, the authors' model, and folders of files in the released formats."""
    made = {}

    def make(taps, stage):
        if (taps, stage) not in made:
            torch.manual_seed(0)
            lora = taps == 8 and stage > 1
            c = sizes(tokenizer, lora, **(EIGHT if taps == 8 else FOUR))
            authors = Authors(c, lora).eval()
            folder = str(tmp_path_factory.mktemp(f"released{taps}{stage}"))
            write_llada(f"{folder}/llada", authors.llada(), tokenizer)
            encoder = write_whisper(folder, authors.whisper_model, c, "pt" if taps == 8 else "safetensors")
            torch.save(authors.trained(peft=taps == 8), f"{folder}/pytorch_model.bin")
            made[taps, stage] = c, authors, folder, encoder
        return made[taps, stage]

    return make


CLIPS = [  # 1, 9.02, 30 s
    np.random.default_rng(n).uniform(-0.5, 0.5, n).astype(np.float32)
    for n in (16000, int(9.02 * 16000), 480000)
]


@pytest.mark.parametrize("taps, stage", [(8, 4), (4, 4), (8, 1), (4, 1)])
def test_parity(released, tokenizer, taps, stage):
    """Speech embeddings and logits within 1e-4 in fp32, alone and in a batch of three.

    And the same tokens in every mode.
    """
    c, authors, folder, encoder = released(taps, stage)
    model, _ = assemble(
        c, f"{folder}/llada", encoder, f"{folder}/pytorch_model.bin", "cpu", torch.float32, stage
    )
    if taps == 8 and stage > 1:
        merge_lora(model)
    mels, n_frames = zip(*(log_mel(a, c) for a in CLIPS), strict=True)
    questions = ["What?", "What sound is this?", "Do you hear a dog say seven?"]
    prompts, at = zip(*(build_prompt(tokenizer, q) for q in questions), strict=True)

    def predict(i):
        prompt = list(prompts[i])
        return lambda answer: authors.logits(prompt + answer, embeddings[i], at[i])[len(prompt) :]

    with torch.no_grad():
        audio, is_audio = model.adapt(
            *model.encode(torch.stack(mels), torch.tensor(n_frames)), torch.tensor(n_frames), stage
        )
        embeddings = [authors.encode(clip, stage) for clip in CLIPS]
        first = 4 if stage == 1 else 6
        assert (
            [len(h) for h in embeddings] == is_audio.sum(1).tolist() == [first + 12, first + 112, first + 375]
        )
        for i in range(3):
            torch.testing.assert_close(audio[i][is_audio[i]], embeddings[i], atol=1e-4, rtol=1e-4)
        L = 8
        for i in range(3):
            ids = torch.tensor([list(prompts[i]) + [c.mask_id] * L])
            everywhere = torch.ones_like(ids, dtype=torch.bool)
            mine = model(
                ids, everywhere, everywhere, audio[i : i + 1], is_audio[i : i + 1], torch.tensor([at[i]])
            )
            torch.testing.assert_close(mine[-L:], predict(i)([c.mask_id] * L), atol=1e-4, rtol=1e-4)
        for how in ({"steps": 8}, {"steps": 4}, {"factor": 1.0}, {"factor": 3.0}, {"threshold": 0.3}):
            for block in (8, 4):
                answers, calls = generate(
                    model, prompts, audio, is_audio, at, answer_length=L, block=block, **how
                )
                for i in range(3):
                    expected, n = reference(predict(i), c, L, block, **how)
                    assert (answers[i].tolist(), calls[i].item()) == (expected, n), (how, block, i)
    alone = ask(model, tokenizer, CLIPS[:1], ["What?"], answer_length=L, block=L)[0].text
    batch = ask(model, tokenizer, CLIPS, questions, answer_length=L, block=L)
    assert batch[0].text == alone


@pytest.mark.parametrize("taps, stage", [(8, 4), (4, 1)])
def test_gradients_of_the_sft_loss(released, tokenizer, taps, stage):
    c, authors, folder, encoder = released(taps, stage)
    model, _ = assemble(
        c, f"{folder}/llada", encoder, f"{folder}/pytorch_model.bin", "cpu", torch.float32, stage
    )
    prompt, at = build_prompt(tokenizer, "What sound is this?")
    answer = tokenizer.encode("Rain dog.").ids + [c.eot_id, c.eos_id, c.eos_id]
    ids = torch.tensor([prompt + answer])
    is_answer = torch.tensor([[False] * len(prompt) + [True] * len(answer)])
    is_masked = is_answer.clone()
    is_masked[0, -3::2] = False
    t = torch.tensor([0.6])
    for p in authors.parameters():
        p.requires_grad_(True)
    embeddings = authors.encode(CLIPS[0], stage)
    theirs = sft_loss(
        lambda noisy, where: authors.logits(noisy[0].tolist(), embeddings, at)[where[0]],
        ids,
        is_answer,
        c.mask_id,
        t,
        is_masked,
    )
    theirs.sum().backward()
    mel, n = log_mel(CLIPS[0], c)
    audio, is_audio = model.adapt(*model.encode(mel[None], torch.tensor([n])), torch.tensor([n]), stage)
    everywhere = torch.ones_like(ids, dtype=torch.bool)

    def predict(noisy, where):
        return model(noisy, everywhere, where, audio, is_audio, torch.tensor([at]))

    ours = sft_loss(predict, ids, is_answer, c.mask_id, t, is_masked)
    ours.sum().backward()
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    gradients, compared = dict(model.named_parameters()), 0
    for key, p in authors.named_parameters():
        if key.startswith("lora."):
            n, part, which = key.removeprefix("lora.").split("/")
            mine = gradients[f"backbone.blocks.{n}.{part}.lora_{which}"].grad
        elif key.startswith("acoustic_connector.layer_prompts."):
            mine = gradients["acoustic.queries"].grad
            mine = mine if mine is None else mine[int(key.rsplit(".", 1)[1])][None]
        elif key.startswith(("semantic_connector", "acoustic_connector", "trainable_prompts")):
            mine = gradients[released_name(key)].grad
        else:
            continue
        assert (mine is None) == (p.grad is None), key
        if mine is not None:
            torch.testing.assert_close(mine, p.grad, atol=1e-5, rtol=1e-3, msg=key)
            compared += 1
    assert compared == (11 if stage == 1 else 95)


def test_names_with_and_without_wrapping(released):
    """peft's wrapping on or off, and a full training state dict, give the same model."""
    c, authors, folder, encoder = released(8, 4)
    cpu = torch.device("cpu")
    plain, _ = assemble(c, f"{folder}/llada", encoder, f"{folder}/pytorch_model.bin", cpu, torch.float32, 4)
    unwrapped = f"{folder}/unwrapped.bin"
    torch.save(authors.trained(peft=False), unwrapped)
    full = authors.trained() | {
        f"whisper_model.{k}": v for k, v in authors.whisper_model.state_dict().items()
    }
    for key, value in authors.llada().items():
        part = key.split(".")[-2]
        wrapped = key.removesuffix("weight") + "base_layer.weight" if part in LORA else key
        full[f"llm_model.base_model.model.{wrapped}"] = value
    torch.save(full, f"{folder}/full.bin")
    for path in (unwrapped, f"{folder}/full.bin"):
        other, _ = assemble(c, f"{folder}/llada", encoder, path, cpu, torch.float32, 4)
        for key, value in plain.state_dict().items():
            assert torch.equal(other.state_dict()[key], value), key
        assert other.base == plain.base
    # what replaced LLaDA is known from it: a checkpoint that leaves it out must not find the published one
    full["llm_model.base_model.model.model.transformer.ln_f.weight"] = torch.full((c.width,), 2.0)
    torch.save(full, f"{folder}/full.bin")
    other, _ = assemble(c, f"{folder}/llada", encoder, f"{folder}/full.bin", cpu, torch.float32, 4)
    assert other.backbone.ln_f.weight[0] == 2 and other.base["llada"] != plain.base["llada"]


def test_stage_1_file_with_a_random_qformer_or_none(released):
    c, authors, folder, encoder = released(8, 1)
    state = authors.trained()
    torch.save({k: v for k, v in state.items() if not k.startswith("acoustic")}, f"{folder}/without.bin")
    cpu = torch.device("cpu")
    a, _ = assemble(c, f"{folder}/llada", encoder, f"{folder}/pytorch_model.bin", cpu, torch.float32, 1)
    b, _ = assemble(c, f"{folder}/llada", encoder, f"{folder}/without.bin", cpu, torch.float32, 1)
    assert not any("lora_" in n for n, _ in b.named_parameters())
    mel, n = log_mel(CLIPS[0], c)

    def encode(m):
        return m.adapt(*m.encode(mel[None], torch.tensor([n])), torch.tensor([n]), 1)[0]

    assert torch.equal(encode(a), encode(b))


def test_compact_checkpoint(released, tmp_path, tokenizer):
    """--export writes adapters and LoRA alone; load finds the frozen parts, and knows them from others."""
    c, authors, folder, encoder = released(8, 4)
    model, _ = assemble(
        c, f"{folder}/llada", encoder, f"{folder}/pytorch_model.bin", torch.device("cpu"), torch.float32, 4
    )
    save(model, tokenizer, tmp_path / "compact", dtype=torch.float32)
    with pytest.raises(UserError, match="save before merge_lora"):  # it would be nowhere
        save(merge_lora(copy.deepcopy(model)), tokenizer, tmp_path / "merged")
    assert not os.path.exists(tmp_path / "merged")
    parts = {"llada": f"{folder}/llada", "whisper": encoder}
    again, _ = load(str(tmp_path / "compact"), "cpu", torch.float32, **parts)
    assert again.stage == 4
    # on another machine: no path is stored, and parts beside the checkpoint are found
    assert folder.encode() not in (tmp_path / "compact" / "model.safetensors").read_bytes()
    os.rename(tmp_path / "compact", tmp_path / "moved")
    for part, where in parts.items():
        os.symlink(where, tmp_path / "moved" / part)
    load(str(tmp_path / "moved"), "cpu", torch.float32)
    # other weights of the same shapes
    other = {k: v + 1 for k, v in authors.llada().items()}
    write_llada(f"{tmp_path}/other", other, tokenizer)
    with pytest.raises(UserError, match="other: not the weights that .*moved was trained on .llada"):
        load(str(tmp_path / "moved"), "cpu", torch.float32, llada=f"{tmp_path}/other")
    os.rename(tmp_path / "moved", tmp_path / "compact")
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    trained = sum(v.numel() * 4 for v in authors.trained().values())
    assert os.path.getsize(tmp_path / "compact" / "model.safetensors") < trained + 20000


def test_dtypes(released):
    """Encoder, adapters and LoRA in fp32, the backbone in the type asked for."""
    c, _, folder, encoder = released(8, 4)
    model, _ = assemble(
        c, f"{folder}/llada", encoder, f"{folder}/pytorch_model.bin", torch.device("cpu"), torch.bfloat16, 4
    )
    for name, p in model.named_parameters():
        frozen = name.startswith("backbone.") and "lora_" not in name
        assert p.dtype == (torch.bfloat16 if frozen else torch.float32), name
        assert p.device.type == "cpu", name
    assert merge_lora(model).backbone.blocks[0].q_proj.weight.dtype == torch.bfloat16
    ask(
        model,
        assemble(c, f"{folder}/llada", encoder, None, torch.device("cpu"), torch.bfloat16, 4)[1],
        CLIPS[:1],
        ["Hm?"],
        answer_length=4,
        block=4,
    )


# ---------------------------------------------------------------------------------- bad files


@pytest.fixture
def files(released, tmp_path, tokenizer):
    """A copy that a test may break, and what loading it then says."""
    c, authors, _, encoder = released(8, 4)
    folder = str(tmp_path / "f")
    write_llada(f"{folder}/llada", authors.llada(), tokenizer)
    torch.save(authors.trained(), f"{folder}/pytorch_model.bin")

    def says(llada=f"{folder}/llada", encoder=encoder, diffa=f"{folder}/pytorch_model.bin"):
        with pytest.raises(UserError) as e:
            assemble(c, llada, encoder, diffa, torch.device("cpu"), torch.float32, 4)
        assert "\n" not in str(e.value)
        return str(e.value)

    return folder, says, authors, c


def test_broken_shard_sets(files, tokenizer):
    folder, says, authors, _ = files
    llada, state = f"{folder}/llada", authors.llada()
    second = f"{llada}/model-00002-of-00003.safetensors"
    data = pathlib.Path(second).read_bytes()
    pathlib.Path(second).write_bytes(data[:500])
    assert "cut short" in says()
    os.remove(second)
    assert "model-00002-of-00003.safetensors, which is not there" in says()
    write_llada(llada, {k: v for k, v in state.items() if "blocks.1.ff_out" not in k}, tokenizer)
    assert "backbone.blocks.1.ff_out.weight is missing" in says()
    write_llada(llada, state | {"model.transformer.wte.weight": torch.zeros(7, 32)}, tokenizer)
    assert "backbone.wte.weight has shape (7, 32)" in says()
    write_llada(llada, state | {"model.embed_tokens.weight": torch.zeros(7, 32)}, tokenizer)
    assert "not one of LLaDA's names" in says()
    write_llada(llada, state | {"model.transformer.blocks.0.new.weight": torch.zeros(2)}, tokenizer)
    assert "no place" in says()
    write_llada(llada, state, tokenizer)
    one, other = (f"{llada}/model-0000{i}-of-00003.safetensors" for i in (1, 2))
    key = min(state)
    assert key in load_file(one)
    save_file(load_file(other) | {key: state[key] + 1}, other)  # which of the two would count?
    assert f"{key.removeprefix('model.transformer.')} is there twice" in says()
    pathlib.Path(f"{llada}/model.safetensors.index.json").write_text("{}")
    assert "index" in says()
    pathlib.Path(f"{llada}/model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}')
    assert "not an index of shards" in says()


def test_other_families(files, tokenizer, released):
    """Llama says so in its config; iLLaDA calls itself llada but has other shapes."""
    folder, says, authors, c = files
    encoder = released(8, 4)[3]
    pathlib.Path(f"{folder}/llada/config.json").write_text('{"model_type": "llama"}')
    assert "'llama'" in says()
    os.remove(f"{folder}/llada/config.json")
    assert "no config.json" in says()
    pathlib.Path(f"{folder}/llada/config.json").write_text("[]")
    assert "not a JSON object" in says()
    # what no shape tells: the same tensors under another base, epsilon, number of heads
    same = {"model_type": "llada", "n_heads": 2, "rope_theta": 500000.0, "rms_norm_eps": 1e-5}
    same["rope_scaling"] = None
    other = {"n_heads": 4, "rope_theta": 1e7, "rms_norm_eps": 1e-2, "rope_scaling": {"factor": 8}}
    for field, value in other.items():
        pathlib.Path(f"{folder}/llada/config.json").write_text(json.dumps(same | {field: value}))
        assert f"has {field} {value}, not {same[field]}" in says()
    pathlib.Path(f"{folder}/llada/config.json").write_text(json.dumps(same))
    diffa = f"{folder}/pytorch_model.bin"
    assemble(c, f"{folder}/llada", encoder, diffa, torch.device("cpu"), torch.float32, 4)
    state = authors.llada()
    key = "model.transformer.blocks.0.k_proj.weight"
    state[key] = state[key][:8]  # grouped keys
    write_llada(f"{folder}/llada", state, tokenizer)
    assert "k_proj.weight has shape (8, 32), not (32, 32)" in says()


def test_tokenizers(files, tokenizer):
    folder, says, _, _ = files
    text = json.loads(tokenizer.to_str())
    text["added_tokens"] = [t for t in text["added_tokens"] if t["content"] != "<|mdm_mask|>"]
    del text["model"]["vocab"]["<|mdm_mask|>"]
    pathlib.Path(f"{folder}/llada/tokenizer.json").write_text(json.dumps(text))
    assert "<|mdm_mask|> at None" in says()
    # the right ids, read another way: a token that swallows what follows, one in pieces, a lost line feed
    whole = json.loads(tokenizer.to_str())
    eaten = [token | {"rstrip": True} for token in whole["added_tokens"]]
    one_line = {"type": "Replace", "pattern": {"String": "\n\n"}, "content": "\n"}
    for change in ({"added_tokens": eaten}, {"added_tokens": []}, {"normalizer": one_line}):
        pathlib.Path(f"{folder}/llada/tokenizer.json").write_text(json.dumps(whole | change))
        assert "the tokenizer reads '<|startoftext|>" in says(), change
    os.remove(f"{folder}/llada/tokenizer.json")
    assert "no tokenizer.json" in says()


class Evil:
    def __reduce__(self):
        return (os.system, ("touch /tmp/diffa2-test-was-here",))


def test_broken_released_files(files):
    folder, says, authors, _ = files
    path = f"{folder}/pytorch_model.bin"
    state = authors.trained()

    def saved(change):
        other = dict(state)
        change(other)
        torch.save(other, path)
        return says()

    assert "semantic.fc1.weight is missing" in saved(
        lambda s: s.pop("semantic_connector.linear_connector.0.weight")
    )
    assert "lora_A is missing" in saved(lambda s: [s.pop(k) for k in list(s) if "lora_A" in k])
    assert "acoustic.queries has shape" in saved(lambda s: s.pop("acoustic_connector.layer_prompts.3"))
    assert "mystery.weight is not one of" in saved(lambda s: s.update({"mystery.weight": torch.ones(1)}))
    assert "not one of DIFFA's" in saved(
        lambda s: s.update({"acoustic_connector.qformer.layer.0.new.weight": torch.ones(1)})
    )
    assert "no place" in saved(
        lambda s: s.update({"llm_model.model.transformer.blocks.9.q_proj.weight": torch.ones(1)})
    )
    assert "semantic.fc2.bias has shape (3,)" in saved(
        lambda s: s.update({"semantic_connector.linear_connector.2.bias": torch.ones(3)})
    )
    # one matrix with peft's name and without it: which of the two would count?
    with_peft = next(key for key in state if "lora_A" in key)
    without = with_peft.replace("base_model.model.", "").replace(".default", "")
    assert "lora_A is there twice" in saved(lambda s: s.update({without: s[with_peft] + 1}))
    assert "not one of DIFFA's" in saved(lambda s: s.update({"my.embed_positions.bias": torch.ones(1)}))
    queries = "acoustic_connector.layer_prompts.3"
    assert "not all of one shape" in saved(lambda s: s.update({queries: state[queries][..., :-1]}))
    torch.save({**state, "x": Evil()}, path)
    assert "holds code" in says() and not os.path.exists("/tmp/diffa2-test-was-here")
    with open(path, "wb") as f:
        pickle.dump(Evil(), f)
    assert "holds code" in says() or "not a file of weights" in says()
    torch.save(state, path)
    data = pathlib.Path(path).read_bytes()
    pathlib.Path(path).write_bytes(data[: len(data) // 2])
    assert "cut short" in says()
    pathlib.Path(path).write_text("text")
    assert "pytorch_model.bin" in says()
    torch.save([1, 2], path)
    assert "not a state dict" in says()


def test_whisper_of_another_size(files, tmp_path):
    folder, says, authors, c = files
    other = Authors(dataclasses.replace(c, audio_layers=33), False)
    assert "no place" in says(encoder=write_whisper(str(tmp_path), other.whisper_model, c, "safetensors"))
    torch.save({"a": torch.ones(1)}, tmp_path / "x.pt")
    assert "openai-whisper" in says(encoder=str(tmp_path / "x.pt"))


def test_command_line_without_network(tmp_path, capsys, monkeypatch):
    """No files and no network: what it wanted, one line, status 2."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    clip = str(tmp_path / "a.wav")
    soundfile.write(clip, CLIPS[0], 16000)
    for argv, says in (
        (["--model", "diffa2"], "GSAI-ML/LLaDA-8B-Instruct cannot be downloaded"),
        (["--model", "diffa2", "--llada", str(tmp_path / "none")], "--llada"),
        (["--model", "diffa1", "--stage", "1"], "last stage only"),
        (["--model", "tiny", "--llada", str(tmp_path)], "go with --model"),
    ):
        assert main([clip, "What emotion?", *argv]) == 2
        out, err = capsys.readouterr()
        lines = err.strip().splitlines()
        assert out == "" and says in lines[-1] and len(lines) <= 2
        if "cannot be downloaded" in says:
            assert "19.5 GB to download" in lines[0] and "memory" in lines[0]


def test_load_released_needs_no_frozen_parts(released):
    """load_released alone fills a model in memory: adapters, prompts, LoRA."""
    from model import DIFFA2

    c, authors, folder, _ = released(8, 4)
    model = DIFFA2(c, lora=True)
    load_released(model, f"{folder}/pytorch_model.bin")
    assert torch.equal(model.soft_prompts, authors.trainable_prompts.weight)
    assert torch.equal(model.acoustic.queries[5], authors.acoustic_connector.layer_prompts[5][0])
    assert torch.equal(model.backbone.blocks[1].up_proj.lora_B, authors.lora["1/up_proj/B"])


def test_full_disk_while_downloading(tmp_path, capsys, monkeypatch):
    """The hub's library raises OSError when the disk is full: one line, and the way out."""

    def full(*args, local_files_only=False, **kw):
        if local_files_only:
            raise FileNotFoundError
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("runtime.hub.snapshot_download", full)
    clip = str(tmp_path / "c.wav")
    soundfile.write(clip, np.zeros(1600), 16000)
    assert main([clip, "What emotion?", "--model", "diffa2"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert (
        "19.5 GB to download" in err[0]
        and "No space left on device" in err[-1]
        and "--llada" in err[-1]
        and len(err) == 2
    )


def test_full_disk_while_exporting(small_folder, tmp_path, capsys):
    """A file that may not grow past 100 kB stands in for a full disk; nothing half-written stays."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        assert main(["--model", small_folder, "--export", str(tmp_path / "e")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "cannot be written" in err
    assert not [f for f in os.listdir(tmp_path / "e") if f.startswith((".", "model"))]
