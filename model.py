r"""DIFFA-2: Whisper's encoder, two adapters, and LLaDA, spliced into one masked-diffusion model.

   mel (80 or 128, 3000) -> Encoder (frozen) -> AcousticAdapter  64 tokens --+
                                            \-> SemanticAdapter  12.5 a second --+
   "... This is the audio:" + [those tokens] + " <audio>. What emotion?" + [MASK] [MASK] [MASK] ...
                                     |
                             LLaDA: a Llama without the causal mask
                                     |
                        logits for the [MASK]s asked for, and for nothing else

The backbone is written out because this project teaches it; the encoder is openai-whisper's own
class with two changes (it returns the tapped layers, and its window is a setting).  Rows of a
batch may differ in prompt, clip and answer: padding is masked everywhere and RoPE counts valid
tokens only, so a row's logits are the same alone and in company.

Weights: `save` and `load` use one safetensors file whose header holds Config and stage.
"""

import argparse
import dataclasses
import glob
import json
import os
import pickle
import sys
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from whisper.model import AudioEncoder, sinusoids

from adapters import AcousticAdapter, SemanticAdapter, add_lora, count

HERE = os.path.dirname(os.path.abspath(__file__))


class UserError(Exception):
    """Something the user can put right: shown as one line, exit status 2."""


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line as every other wrong input: one line, exit status 2."""

    def error(self, message):
        raise UserError(message)


@dataclass(frozen=True)
class Config:
    # Whisper encoder (defaults: large-v3)
    n_mels: int = 128
    n_frames: int = 1500  # encoder frames in the window, 50 a second: 30 s
    audio_width: int = 1280
    audio_heads: int = 20
    audio_layers: int = 32
    taps: tuple = (3, 7, 11, 15, 19, 23, 27, 31)  # hidden states the Q-Former reads; 0 = before block 0
    # adapters
    qformer_ffn: int = 3072
    n_queries: int = 64
    n_soft_prompts: int = 20  # stage 1 only
    # LLaDA (defaults: 8B)
    vocab: int = 126464
    width: int = 4096
    layers: int = 32
    heads: int = 32
    ffn: int = 12288
    rope_theta: float = 500000.0
    norm_eps: float = 1e-5
    context: int = 4096  # audio + prompt + answer
    causal: bool = False  # True: the autoregressive twin
    # LoRA (rank 0: none)
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.05
    # special tokens of LLaDA's chat format; `with_tokenizer` reads another tokenizer's
    bos_id: int = 126080  # <|startoftext|>
    eos_id: int = 126081  # <|endoftext|>: end of answer, and padding
    mask_id: int = 126336  # <|mdm_mask|>
    start_header_id: int = 126346
    end_header_id: int = 126347
    eot_id: int = 126348

    def __post_init__(self):
        if self.width % self.heads or self.audio_width % self.audio_heads:
            raise ValueError("a width must be a multiple of its number of heads")
        if max(self.taps) > self.audio_layers:
            raise ValueError(f"tap {max(self.taps)} of an encoder with {self.audio_layers} layers")

    def with_tokenizer(self, tokenizer):
        """The same sizes with this tokenizer's vocabulary and special ids."""
        ids = {}
        for field, token in SPECIAL_TOKENS.items():
            ids[field] = tokenizer.token_to_id(token)
            if ids[field] is None:
                raise UserError(f"the tokenizer has no {token}: it is not one of LLaDA's")
        return dataclasses.replace(self, vocab=max(tokenizer.get_vocab_size(), max(ids.values()) + 1), **ids)


SPECIAL_TOKENS = {  # Config field -> its text in the tokenizer
    "bos_id": "<|startoftext|>",
    "eos_id": "<|endoftext|>",
    "mask_id": "<|mdm_mask|>",
    "start_header_id": "<|start_header_id|>",
    "end_header_id": "<|end_header_id|>",
    "eot_id": "<|eot_id|>",
}

PRESETS = {
    "diffa2": Config(),
    "diffa1": Config(n_mels=80, audio_width=768, audio_heads=12, audio_layers=12, taps=(2, 5, 8, 11), lora_rank=0),
    # the same code with small numbers: 10 s of audio, a vocabulary set by its tokenizer
    "tiny": Config(
        n_mels=80, n_frames=500, audio_width=192, audio_heads=4, audio_layers=4, taps=(1, 2, 3, 4), qformer_ffn=768,
        n_queries=16, n_soft_prompts=4, vocab=640, width=256, layers=6, heads=4, ffn=384, rope_theta=10000.0, context=1024,
        bos_id=0, eos_id=1, mask_id=2, start_header_id=3, end_header_id=4, eot_id=5,
    ),
}  # fmt: skip
ASSETS = {"tiny": os.path.join(HERE, "assets", "tiny")}  # presets whose weights come with the code


# ---------------------------------------------------------------------------------------------
# the ear


class Encoder(AudioEncoder):
    """openai-whisper's encoder, returning chosen hidden states beside its final output."""

    def __init__(self, c):
        super().__init__(c.n_mels, c.n_frames, c.audio_width, c.audio_heads, c.audio_layers)
        # fixed sinusoids need no place in a checkpoint
        self.register_buffer("positional_embedding", sinusoids(c.n_frames, c.audio_width), persistent=False)

    def forward(self, mel, taps=()):
        """mel (B, n_mels, 2 * n_frames) or shorter.  Returns taps (B, n_taps, n_frames, d), final (B, n_frames, d).

        Tap k is transformers' hidden_states[k]: 0 the input of the first block, k the output of
        openai-whisper's blocks[k - 1].  The final output has passed ln_post, the taps have not.
        """
        x = F.gelu(self.conv1(mel))
        x = F.gelu(self.conv2(x)).transpose(1, 2)  # (B, n_frames, d)
        if x.size(1) > len(self.positional_embedding):
            raise ValueError(f"mel of {mel.size(2)} frames; the encoder takes {2 * len(self.positional_embedding)}")
        x = x + self.positional_embedding[: x.size(1)].to(x.dtype)
        tapped = {0: x} if 0 in taps else {}
        for k, block in enumerate(self.blocks, start=1):
            x = block(x)
            if k in taps:
                tapped[k] = x
        return torch.stack([tapped[k] for k in taps], 1) if taps else None, self.ln_post(x)


# ---------------------------------------------------------------------------------------------
# the backbone


class RMSNorm(nn.Module):
    """Normalised in fp32, cast back, then scaled: LLaDA's order of the three."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rope_table(position, head_dim, theta):
    """cos and sin of rotary position embedding, in fp32.  position (B, T) -> two (B, 1, T, head_dim)."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=position.device).float() / head_dim)
    angle = position[:, None, :, None].float() * frequency  # (B, 1, T, head_dim / 2)
    angle = torch.cat([angle, angle], -1)  # half-split, as Llama's
    return angle.cos(), angle.sin()


def rotate(x, rope):
    """Applies RoPE to x (B, H, T, head_dim) in fp32."""
    cos, sin = rope
    a, b = x.float().chunk(2, -1)
    return (x.float() * cos + torch.cat([-b, a], -1) * sin).to(x.dtype)


class Cache:
    """Keys and values of every layer for a whole row, prompt, audio and answer.

    A pass over the whole row fills it.  A later pass over columns start..start+T recomputes
    those alone and overwrites their entries.  Attention here looks both ways, so entries left
    in place go stale when a token changes: exact for unchanged tokens, approximate otherwise
    (Fast-dLLM, Wu et al. 2025).
    """

    def __init__(self):
        self.k, self.v, self.valid, self.position = {}, {}, None, None

    def update(self, layer, k, v, start):
        """Stores k, v (B, H, T, head_dim) of columns from `start` (None: all).  Returns the whole rows."""
        if start is None:
            self.k[layer], self.v[layer] = k, v
        else:
            self.k[layer][:, :, start : start + k.size(2)] = k
            self.v[layer][:, :, start : start + v.size(2)] = v
        return self.k[layer], self.v[layer]

    def keep(self, rows):
        """Drops all rows but these (indices on any device): whoever has finished leaves the batch."""
        take = lambda x: None if x is None else x.index_select(0, rows.to(x.device))
        self.k, self.v = ({layer: take(x) for layer, x in part.items()} for part in (self.k, self.v))
        self.valid, self.position = take(self.valid), take(self.position)


def attend(q, k, v, mask):
    """softmax(q k^T / sqrt(d)) v of q, k, v (B, H, T, head_dim); mask: where to look, or None."""
    if q.device.type == "cpu" and q.requires_grad:
        # torch's fused kernel is a quarter of a training step there, its backward most of it: spelled out it is twice as fast
        score = q @ k.transpose(-1, -2) * q.size(-1) ** -0.5
        score = score if mask is None else score.masked_fill(~mask, float("-inf"))
        return score.softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Block(nn.Module):
    """LLaDA's layer: pre-norm attention and a gated SiLU feed-forward, no biases."""

    def __init__(self, c):
        super().__init__()
        self.heads = c.heads
        linear = lambda i, o: nn.Linear(i, o, bias=False)
        self.attn_norm, self.ff_norm = RMSNorm(c.width, c.norm_eps), RMSNorm(c.width, c.norm_eps)
        self.q_proj, self.k_proj, self.v_proj = (linear(c.width, c.width) for _ in range(3))
        self.attn_out = linear(c.width, c.width)
        self.ff_proj, self.up_proj = linear(c.width, c.ffn), linear(c.width, c.ffn)  # gate and value
        self.ff_out = linear(c.ffn, c.width)

    def forward(self, x, rope, mask, cache=None, layer=None, start=None, read_from=0):
        """x (B, T, C) -> (B, T - read_from, C): columns before read_from are only looked at."""
        heads = lambda z: z.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, T, head_dim)
        y = self.attn_norm(x)
        k, v = heads(self.k_proj(y)), heads(self.v_proj(y))
        k = rotate(k, rope)
        if cache is not None:
            k, v = cache.update(layer, k, v, start)
        if read_from:
            x, y, rope = x[:, read_from:], y[:, read_from:], [table[:, :, read_from:] for table in rope]
            mask = mask[:, :, read_from:] if mask is not None and mask.size(2) > 1 else mask
        q = rotate(heads(self.q_proj(y)), rope)
        y = attend(q, k, v, mask)  # every token sees every token
        x = x + self.attn_out(y.transpose(1, 2).flatten(2))
        y = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(y)) * self.up_proj(y))


class LLaDA(nn.Module):
    """The masked-diffusion language model; names of parts are those of the released weights."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.wte = nn.Embedding(c.vocab, c.width)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.ln_f = RMSNorm(c.width, c.norm_eps)
        self.ff_out = nn.Linear(c.width, c.vocab, bias=False)  # the head, not tied to wte

    def forward(self, x, valid, cache=None, start=None, read_from=0):
        """x (B, T, width) embeddings, valid (B, T).  Returns hidden states after ln_f (B, T - read_from, width).

        valid=None: no padding anywhere; nothing is masked, and nobody waits for the device to say so.
        With `cache` and start=None the whole row is computed and the cache filled; with `start`,
        x holds columns start..start+T of a row that the cache has seen.  read_from: the last layer
        computes no query and no feed-forward for the columns before it, which nobody reads.
        """
        if start is None:
            if valid is None or valid.all():
                valid, position = None, torch.arange(x.size(1), device=x.device).expand(x.size(0), -1)
            else:
                position = (valid.cumsum(1) - 1).clamp(min=0)  # padding takes no position
            seen, seen_position = valid, position
            if cache is not None:
                cache.valid, cache.position = valid, position
        else:
            seen, seen_position = cache.valid, cache.position
            position = cache.position[:, start : start + x.size(1)]
        mask = None if seen is None else seen[:, None, None, :]  # (B, 1, 1, keys)
        if self.c.causal:
            past = seen_position[:, None, None, :] <= position[:, None, :, None]  # (B, 1, T, keys)
            mask = past if mask is None else past & mask
        rope = rope_table(position, self.c.width // self.c.heads, self.c.rope_theta)
        for layer, block in enumerate(self.blocks):
            is_last = layer + 1 == len(self.blocks)
            x = block(x, rope, mask, cache, layer, start, read_from if is_last else 0)
        return self.ln_f(x)


# ---------------------------------------------------------------------------------------------
# the whole


def splice_order(n_text, n_audio, audio_at):
    """Where each column of the spliced row comes from, as an index into [text | audio].

    audio_at (B,): the audio goes in front of this text token.  Returns (B, n_text + n_audio).
    """
    column = torch.arange(n_text + n_audio, device=audio_at.device)[None]  # (1, T + A)
    at = audio_at[:, None]
    is_audio = (column >= at) & (column < at + n_audio)
    return torch.where(is_audio, n_text + column - at, column - n_audio * (column >= at + n_audio))


class DIFFA2(nn.Module):
    def __init__(self, config, lora=False):
        super().__init__()
        c = self.config = config
        self.stage = 0  # what the weights have been trained for; saved and loaded with them
        self.base = None  # where the frozen parts were loaded from, if not from the same file
        self.encoder = Encoder(c)
        self.semantic = SemanticAdapter(c.audio_width, c.width)
        self.acoustic = AcousticAdapter(
            c.audio_width, c.width, len(c.taps), c.audio_heads, c.qformer_ffn, c.n_queries
        )
        self.soft_prompts = nn.Parameter(torch.randn(c.n_soft_prompts, c.width) * 0.02)
        self.backbone = LLaDA(c)
        if lora:
            self.add_lora()

    def add_lora(self):
        c = self.config
        if c.lora_rank:
            add_lora(self.backbone, c.lora_rank, c.lora_alpha, c.lora_dropout)

    def encode(self, mel):
        """mel (B, n_mels, 2 * n_frames) -> taps (B, n_taps, n_frames, d), final (B, n_frames, d).  Frozen."""
        with torch.no_grad():
            return self.encoder(mel, self.config.taps)

    def adapt(self, taps, final, n_frames, stage):
        """The audio tokens the backbone reads: audio (B, A, D), is_audio (B, A).

        Stage 1: 20 soft prompts, then the semantic tokens.  From stage 2: 64 acoustic tokens,
        then the semantic ones.  n_frames (B,): encoder frames of real audio.
        """
        semantic, is_audio = self.semantic(final, n_frames)
        if stage == 1:
            first = self.soft_prompts.to(semantic.dtype).expand(len(semantic), -1, -1)
        else:
            first = self.acoustic(taps)
        always = torch.ones(first.shape[:2], dtype=torch.bool, device=first.device)
        return torch.cat([first, semantic], 1), torch.cat([always, is_audio], 1)

    def forward(self, ids, valid, where, audio=None, is_audio=None, audio_at=None, cache=None, start=None, read_from=0):
        """Logits (N, vocab) at the N text positions `where` is True, in row-major order.

        ids, valid, where: (B, T) text, canvas included.  audio (B, A, D) and is_audio (B, A) go in
        front of text token audio_at (B,); audio=None is text alone.  The spliced row has T + A
        columns.  With `cache`, see LLaDA.forward; `start` counts spliced columns, and ids, valid,
        where are then just the columns to recompute, all of them text.
        valid=None: no padding, neither in ids nor in audio.  where may also be a pair of index
        tensors (row (N,), text column (N,)), which spares a GPU the wait for their number.
        read_from: a spliced column; `where` names none before it.
        """
        x = self.backbone.wte(ids)
        if isinstance(where, torch.Tensor):
            where = where.nonzero(as_tuple=True)
        row, column = where
        if audio is not None:
            order = splice_order(ids.size(1), audio.size(1), audio_at)
            x = torch.cat([x, audio.to(x.dtype)], 1)
            x = x.gather(1, order[:, :, None].expand(-1, -1, x.size(2)))
            valid = None if valid is None else torch.cat([valid, is_audio], 1).gather(1, order)
            column = column + audio.size(1) * (column >= audio_at[row])
        h = self.backbone(x, valid, cache, start, read_from)
        return self.backbone.ff_out(h[row, column - read_from])  # rows that nobody reads never meet the vocabulary


# ---------------------------------------------------------------------------------------------
# weights


def build(config, device="cpu", lora=False, seed=None):
    """A model with fresh random weights: what stage 0 and the tests start from."""
    if seed is not None:
        torch.manual_seed(seed)
    model = DIFFA2(config, lora=lora)
    for conv in (model.encoder.conv1, model.encoder.conv2):
        # PyTorch's default lets the sound through at a tenth of the positions' loudness
        nn.init.kaiming_normal_(conv.weight)
        nn.init.zeros_(conv.bias)
    for name, p in model.backbone.named_parameters():
        if p.dim() == 2 and "lora" not in name:
            std = {"wte.weight": 1.0, "ff_out.weight": 0.02}.get(name, p.size(1) ** -0.5)
            if name.endswith((".attn_out.weight", ".ff_out.weight")):
                std *= (2 * config.layers) ** -0.5  # all layers together add about as much as was there (GPT-2)
            nn.init.normal_(p, std=std)
    nn.init.normal_(model.soft_prompts)  # as loud as words: what is ten times quieter than a layer's output drowns in the first
    return model.to(device)


def save(model, tokenizer, folder, dtype=torch.bfloat16):
    """Writes folder/model.safetensors (Config and stage in its header) and folder/tokenizer.json.

    Of a model whose frozen parts came from the hub or from files, only what was trained is
    written, and where the rest lies (about 200 MB instead of 20 GB).
    Each file is written under a temporary name and renamed: a reader finds the old one or the new.
    """
    header = {"config": json.dumps(dataclasses.asdict(model.config)), "stage": str(model.stage)}
    state = model.state_dict()
    if model.base:
        header["base"] = json.dumps(model.base)
        state = {k: state[k] for k in trained_part(model)}
    weights = {k: v.detach().to("cpu", dtype).contiguous() for k, v in state.items()}
    for name, write in (
        ("tokenizer.json", lambda path: tokenizer.save(path)),
        ("model.safetensors", lambda path: save_file(weights, path, metadata=header)),
    ):
        temporary = os.path.join(folder, f".{name}.tmp")
        try:
            os.makedirs(folder, exist_ok=True)
            write(temporary)
            os.replace(temporary, os.path.join(folder, name))
        except (OSError, SafetensorError) as e:
            raise UserError(f"{folder}: cannot be written ({getattr(e, 'strerror', None) or e})") from None
        finally:
            if os.path.exists(temporary):
                os.remove(temporary)


def load_tokenizer(folder):
    path = os.path.join(folder, "tokenizer.json")
    if not os.path.exists(path):
        raise UserError(f"{folder}: no tokenizer.json beside the weights")
    try:
        return Tokenizer.from_file(path)
    except Exception as e:  # the library raises a bare Exception for every kind of bad file
        raise UserError(f"{path}: not a tokenizer file ({e})") from None


def load(name_or_path, device=None, dtype=None, stage=None, llada=None, whisper=None, diffa=None):
    """A preset ("tiny", "diffa1", "diffa2") or a checkpoint folder -> model, tokenizer.

    Strict: every key and shape is accounted for.  LoRA, if the checkpoint has it, is kept apart;
    adapters.merge_lora(model) folds it in.  dtype: the backbone's (default fp32 on a CPU, bf16 on
    a GPU; the released models bf16 everywhere); encoder and adapters of the released models stay
    in fp32.  stage, llada, whisper, diffa: see `assemble`; files not given come from the hub.
    Raises UserError with one line for anything wrong.
    """
    device = pick_device(device)
    if name_or_path in RELEASES and name_or_path not in ASSETS:
        paths = fetch(name_or_path, stage, llada, whisper, diffa)
        return assemble(PRESETS[name_or_path], *paths, device, dtype or torch.bfloat16, stage or 4, name_or_path)
    if llada or whisper or diffa:
        raise UserError("--llada, --whisper and --diffa go with --model diffa1 or diffa2")
    folder = ASSETS.get(name_or_path, name_or_path)
    path = os.path.join(folder, "model.safetensors")
    if not os.path.exists(path):
        known = ", ".join(PRESETS)
        raise UserError(f"no model {name_or_path!r}: give one of {known}, or a folder that holds model.safetensors")
    tokenizer = load_tokenizer(folder)
    with open_safetensors(path) as f:
        header = f.metadata() or {}
        weights = {k: f.get_tensor(k) for k in f.keys()}
    if "config" not in header or "stage" not in header:
        raise UserError(f"{path}: has no Config in its header; it was not written by this code")
    fields = json.loads(header["config"])
    config = Config(**{**fields, "taps": tuple(fields["taps"])})
    if "base" in header:  # only what was trained lies here; the frozen rest where it was loaded from
        base = json.loads(header["base"])
        model, _ = assemble(
            config, base["llada"], base["whisper"], None, device, dtype or torch.bfloat16, int(header["stage"]), base["name"]
        )
        fill(model, weights, path, device, torch.float32, expected=trained_part(model))
        return model.eval(), tokenizer
    with torch.device("meta"):
        model = DIFFA2(config, lora=any("lora_A" in k for k in weights))
    model.stage = int(header["stage"])
    fill(model, weights, path, device, dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32))
    fix_positions(model)
    return model.eval(), tokenizer


def open_safetensors(path):
    try:
        return safe_open(path, "pt", device="cpu")
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: cut short or not a safetensors file ({e})") from None


def fill(model, weights, path, device, dtype=None, expected=None):
    """Gives a model, or the part of it named by `expected`, its weights; each key and shape is checked first.

    Tensors already of the right type and device are taken as they are: what safetensors has mapped
    from the disk stays there, and no second copy exists at any time.
    """
    state = model.state_dict()
    expected = state.keys() if expected is None else expected
    for key in expected:
        if key not in weights:
            raise UserError(f"{path}: {key} is missing")
        if weights[key].shape != state[key].shape:
            raise UserError(f"{path}: {key} has shape {tuple(weights[key].shape)}, not {tuple(state[key].shape)}")
    for key in weights:
        if key not in expected:
            raise UserError(f"{path}: {key} has no place in this model")
    model.load_state_dict({k: v.to(device, dtype) for k, v in weights.items()}, strict=len(expected) == len(state), assign=True)


def fix_positions(model):
    """The encoder's sinusoids are computed, not loaded."""
    c, weight = model.config, model.encoder.conv1.weight
    model.encoder.positional_embedding = sinusoids(c.n_frames, c.audio_width).to(weight.device, weight.dtype)


# ---------------------------------------------------------------------------------------------
# the authors' weights


RELEASES = {  # preset -> where its three parts lie, and what they weigh in GB
    "diffa2": {
        "llada": ("GSAI-ML/LLaDA-8B-Instruct", 16.0), "whisper": ("openai/whisper-large-v3", 3.1),
        "diffa": ("zhoujiaming777/DIFFA-2", 0.4), "memory": 20,
    },
    "diffa1": {
        "llada": ("GSAI-ML/LLaDA-8B-Instruct", 16.0), "whisper": ("openai/whisper-small", 1.0),
        "diffa": ("zhoujiaming777/DIFFA", 0.15), "memory": 17,
    },
}  # fmt: skip
PATTERNS = {  # files of each repository that are needed; stage 1 of DIFFA-2 has a folder of its own
    "llada": ["*.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json"],
    "whisper": ["model.safetensors"],
    "diffa": ["pytorch_model.bin"],
}


def fetch(name, stage=None, llada=None, whisper=None, diffa=None, adapters=True):
    """Paths of LLaDA's folder, Whisper's file and DIFFA's file: those given, else from the hub's cache or the hub.

    adapters=False: LLaDA and Whisper alone, for training from the start; the third path is None.
    Says what it will download and what the model needs before it starts.
    """
    release, given, found = RELEASES[name], {"llada": llada, "whisper": whisper} | ({"diffa": diffa} if adapters else {}), {}
    if stage == 1 and name == "diffa1":
        raise UserError("DIFFA-1 was released after its last stage only")
    patterns = PATTERNS | ({"diffa": ["stage1/pytorch_model.bin"]} if stage == 1 else {})
    for part, path in given.items():
        if path is not None:
            if not os.path.exists(path):
                raise UserError(f"--{part} {path}: no such file or folder")
            found[part] = path
            continue
        try:
            found[part] = snapshot_download(release[part][0], allow_patterns=patterns[part], local_files_only=True)
            if not all(glob.glob(os.path.join(found[part], p)) for p in patterns[part]):
                del found[part]
        except (OSError, ValueError):  # not in the cache
            pass
    missing = [part for part in given if part not in found]
    size = sum(release[part][1] for part in missing)
    print(f"{name}: {size:.1f} GB to download, about {release['memory']} GB of memory needed", file=sys.stderr)
    for part in missing:
        try:
            found[part] = snapshot_download(release[part][0], allow_patterns=patterns[part])
        except Exception as e:  # the hub's errors, the network's, the disk's: all of them end here
            why = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
            raise UserError(f"{release[part][0]} cannot be downloaded ({why}); give --{part} instead") from None
    for part in given:
        if part != "llada" and os.path.isdir(found[part]):
            found[part] = os.path.join(found[part], patterns[part][0])
    return found["llada"], found["whisper"], found.get("diffa")


def assemble(config, llada, whisper, diffa, device, dtype, stage, name=None):
    """LLaDA's folder + Whisper's file + DIFFA's pytorch_model.bin -> model, tokenizer.

    The module tree is built on the meta device; each tensor goes from its mapped file straight to
    its place.  stage: what the file was trained for (1: soft prompts, no LoRA).  diffa=None leaves
    adapters and LoRA empty (on no device) for the caller to fill.
    """
    check_llada(llada)
    tokenizer = load_tokenizer(llada)
    for field, token in SPECIAL_TOKENS.items():
        if tokenizer.token_to_id(token) != getattr(config, field):
            raise UserError(f"{llada}: the tokenizer has {token} at {tokenizer.token_to_id(token)}, not {getattr(config, field)}")
    with torch.device("meta"):
        model = DIFFA2(config, lora=stage >= 3)
    model.stage, model.base = stage, {"name": name, "llada": os.path.abspath(llada), "whisper": os.path.abspath(whisper)}
    load_llada(model, llada, device, dtype)
    load_whisper(model, whisper, device, torch.float32)
    if diffa is not None:
        load_released(model, diffa, device)
    return model.eval(), tokenizer


def trained_part(model):
    """Names of what the authors' files and our compact checkpoints hold: adapters, soft prompts, LoRA."""
    return [k for k in model.state_dict() if k.startswith(("semantic.", "acoustic.", "soft_prompts")) or "lora_" in k]


def check_llada(folder):
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        raise UserError(f"{folder}: no config.json: not a folder of LLaDA's weights")
    try:
        with open(path, encoding="utf-8") as f:
            found = json.load(f)
    except ValueError:
        raise UserError(f"{path}: not JSON") from None
    if found.get("model_type") != "llada":
        raise UserError(f"{folder}: holds a model of type {found.get('model_type')!r}; this code runs LLaDA-8B")


def load_llada(model, folder, device, dtype):
    """LLaDA's shards into model.backbone, one at a time."""
    index = os.path.join(folder, "model.safetensors.index.json")
    try:
        with open(index, encoding="utf-8") as f:
            shards = sorted(set(json.load(f)["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as e:
        raise UserError(f"{index}: missing or not an index of shards ({type(e).__name__})") from None
    expected = {k for k in model.backbone.state_dict() if "lora_" not in k}
    for shard in shards:
        path = os.path.join(folder, shard)
        if not os.path.isfile(path):
            raise UserError(f"{folder}: the index names {shard}, which is not there")
        with open_safetensors(path) as f:
            weights = {}
            for key in f.keys():
                if not key.startswith("model.transformer."):
                    raise UserError(f"{path}: {key} is not one of LLaDA's names")
                # converted one by one: a shard never exists in two types at once
                weights["backbone." + key.removeprefix("model.transformer.")] = f.get_tensor(key).to(device, dtype)
        expected -= {k.removeprefix("backbone.") for k in weights}
        fill(model, weights, path, device, dtype, expected=set(weights) & set(model.state_dict()))
    if expected:
        raise UserError(f"{folder}: the shards hold no {min(expected)} ({len(expected)} of {len(model.backbone.state_dict())} tensors missing)")


WHISPER_NAMES = {  # transformers' -> openai-whisper's
    "self_attn.q_proj": "attn.query", "self_attn.k_proj": "attn.key", "self_attn.v_proj": "attn.value",
    "self_attn.out_proj": "attn.out", "self_attn_layer_norm": "attn_ln", "fc1": "mlp.0", "fc2": "mlp.2",
    "final_layer_norm": "mlp_ln",
}  # fmt: skip


def whisper_name(key):
    """transformers' name of an encoder tensor -> ours; None for the positions, which are computed."""
    if key.startswith("embed_positions"):
        return None
    if key.startswith("layers."):
        _, n, rest = key.split(".", 2)
        module, leaf = rest.rsplit(".", 1)
        return f"encoder.blocks.{n}.{WHISPER_NAMES.get(module, module)}.{leaf}"
    return "encoder." + key.replace("layer_norm", "ln_post")


def load_whisper(model, path, device, dtype):
    """The encoder from openai-whisper's .pt, or from transformers' safetensors (file or folder)."""
    if os.path.isdir(path):
        path = os.path.join(path, "model.safetensors")
    if path.endswith(".safetensors"):
        with open_safetensors(path) as f:
            keys = {k: k.removeprefix("model.").removeprefix("encoder.") for k in f.keys() if "decoder." not in k and k != "proj_out.weight"}
            weights = {whisper_name(short): f.get_tensor(k) for k, short in keys.items()}
    else:
        found = open_pickle(path)
        if not isinstance(found, dict) or "model_state_dict" not in found:
            raise UserError(f"{path}: not one of openai-whisper's files")
        weights = {k: v for k, v in found["model_state_dict"].items() if k.startswith("encoder.")}
        weights.pop("encoder.positional_embedding", None)
    weights.pop(None, None)
    fill(model, weights, path, device, dtype, expected=[k for k in model.state_dict() if k.startswith("encoder.")])
    fix_positions(model)


def open_pickle(path):
    """A .bin or .pt of tensors, mapped; anything in it that is not data is refused."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as e:
        raise UserError(f"{path}: holds code or other objects beside tensors, and is not opened ({str(e).splitlines()[0]})") from None
    except (RuntimeError, OSError, EOFError, ValueError) as e:
        raise UserError(f"{path}: cut short or not a file of weights ({str(e).splitlines()[0]})") from None


SEMANTIC_NAMES = {"conv.0": "conv1", "conv.2": "conv2", "linear_connector.0": "fc1", "linear_connector.2": "fc2", "layernorm": "norm"}
QFORMER_NAMES = {
    **{f"attention.self.{n}": f"self_attention.{n}" for n in ("query", "key", "value")},
    **{f"crossattention.self.{n}": f"cross_attention.{n}" for n in ("query", "key", "value")},
    "attention.output.dense": "self_attention.out", "attention.output.LayerNorm": "self_attention.norm",
    "crossattention.output.dense": "cross_attention.out", "crossattention.output.LayerNorm": "cross_attention.norm",
    "intermediate.dense": "fc1", "output.dense": "fc2", "output.LayerNorm": "norm",
}  # fmt: skip


def released_name(key):
    """One of the authors' names -> ours, or None for what has no counterpart (FACTS 3, 4, 7)."""
    module, _, leaf = key.rpartition(".")
    if key == "trainable_prompts.weight":
        return "soft_prompts"
    if key.startswith("whisper_model."):
        return whisper_name(key.removeprefix("whisper_model.").removeprefix("encoder."))
    if key.startswith("semantic_connector."):
        name = SEMANTIC_NAMES.get(module.removeprefix("semantic_connector."))
        return name and f"semantic.{name}.{leaf}"
    if key.startswith("acoustic_connector."):
        rest = key.removeprefix("acoustic_connector.")
        if rest == "layer_weights":
            return "acoustic.tap_logits"
        if rest.startswith("layer_prompts."):
            return "acoustic.queries." + rest.removeprefix("layer_prompts.")  # one a tap; stacked by the caller
        if rest.startswith("proj."):
            return {"proj.0": "acoustic.norm.", "proj.1": "acoustic.proj."}[rest[:6]] + leaf if rest[:6] in ("proj.0", "proj.1") else None
        _, _, n, part = (module.removeprefix("acoustic_connector.").split(".", 3) + [""] * 4)[:4]
        return f"acoustic.layers.{n}.{QFORMER_NAMES[part]}.{leaf}" if part in QFORMER_NAMES else None
    if key.startswith("llm_model."):
        rest = key.removeprefix("llm_model.").removeprefix("base_model.model.").removeprefix("model.transformer.")
        rest = rest.replace(".base_layer.", ".").replace(".default", "")
        return "backbone." + (rest.removesuffix(".weight") if "lora_" in rest else rest)
    return None


def load_released(model, path, device=None):
    """The authors' pytorch_model.bin into adapters, soft prompts and LoRA, strictly; fp32.

    Accepts the names with and without peft's wrapping, and a full training state dict that holds
    the frozen parts too.  A stage-1 file may lack the Q-Former, which that stage does not use, or
    hold a random one; a file of a later stage may lack the soft prompts.
    """
    found = open_pickle(path)
    if not isinstance(found, dict) or not found or not all(isinstance(v, torch.Tensor) for v in found.values()):
        raise UserError(f"{path}: not a state dict")
    device = device or model.backbone.wte.weight.device
    weights, queries = {}, {}
    for key, value in found.items():
        name = released_name(key)
        if name is None and "embed_positions" in key:
            continue
        if name is None:
            raise UserError(f"{path}: {key} is not one of DIFFA's names")
        if name.startswith("acoustic.queries."):
            queries[int(name.rsplit(".", 1)[1])] = value
        else:
            weights[name] = value
    if queries:
        weights["acoustic.queries"] = torch.cat([queries[i] for i in sorted(queries)])
    expected, optional = trained_part(model), ("acoustic.",) if model.stage == 1 else ("soft_prompts",)
    state = model.state_dict()
    for key in expected:
        if key.startswith(optional) and key not in weights:
            # nobody reads these in this stage; they only must not be left without memory
            weights[key] = torch.zeros(state[key].shape)
    part = set(expected) | (weights.keys() & state.keys())
    weights = {k: v.to(state[k].dtype if k in state and k not in expected else torch.float32) for k, v in weights.items()}
    fill(model, weights, path, device, expected=part)


def pick_device(name=None):
    """A torch.device; by default the GPU if there is one."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ValueError) as e:
        raise UserError(f"device {name!r} cannot be used: {str(e).splitlines()[0]}") from None
    return device


if __name__ == "__main__":
    with torch.device("meta"):
        for name, config in PRESETS.items():
            model = DIFFA2(config, lora=True)
            print(f"\n{name}: {count(model):,} parameters")
            for part in ("encoder", "semantic", "acoustic", "backbone"):
                print(f"  {part:10}{count(getattr(model, part)):>16,}")
