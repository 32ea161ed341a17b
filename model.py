r"""DIFFA-2: Whisper's encoder, two adapters, and LLaDA, spliced into one masked-diffusion model.

   mel (80 or 128, 3000) -> Encoder (frozen) -> AcousticAdapter  64 tokens --+
                                            \-> SemanticAdapter  12.5 a second --+
   "... This is the audio:" + [those tokens] + " <audio>. What emotion?" + [MASK] [MASK] [MASK] ...
                                     |
                             LLaDA: a Llama without the causal mask
                                     |
                        logits for the [MASK]s asked for, and for nothing else

The backbone is written out because this project teaches it; the encoder is openai-whisper's own
class with two changes (it also returns hidden states, and takes windows shorter than 30 s).  Rows of
a batch may differ in prompt, clip and answer: no token attends to padding and RoPE's positions count
valid tokens only, so a row's logits are the same alone and in any batch.

Shapes: B rows, T text tokens, A audio tokens, F encoder frames (50 a second), d the encoder's width,
D the backbone's, H attention heads.  weights.py reads and writes what is learned.

`python model.py` shows a spliced row and counts each part's parameters.
"""

import dataclasses
import functools

import torch
import torch.nn as nn
import torch.nn.functional as F
from whisper.model import AudioEncoder, sinusoids

from adapters import AcousticAdapter, SemanticAdapter, add_lora
from runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    # Whisper's encoder (defaults: large-v3)
    n_mels: int = 128
    n_frames: int = 1500  # encoder frames in the window, 50 a second: 30 s
    audio_width: int = 1280  # d
    audio_heads: int = 20
    audio_layers: int = 32
    taps: tuple = (3, 7, 11, 15, 19, 23, 27, 31)  # hidden states the Q-Former reads; k: after k blocks
    pad_to: int = 0  # pad clips with silence to a multiple of so many encoder frames; 0: to the window
    norm_taps: bool = False  # LayerNorm without parameters on each tapped state
    # adapters
    qformer_ffn: int = 3072
    n_queries: int = 64  # acoustic tokens
    n_soft_prompts: int = 20  # learned embeddings in the acoustic tokens' place, stage 1 only
    # LLaDA (defaults: 8B)
    vocab: int = 126464
    width: int = 4096  # D
    layers: int = 32
    heads: int = 32
    ffn: int = 12288  # hidden width of the feed-forward
    rope_theta: float = 500000.0  # base of the rotary frequencies
    norm_eps: float = 1e-5
    context: int = 4096  # the most that audio, prompt and answer may have together
    causal: bool = False  # True: the autoregressive baseline
    # LoRA (rank 0: none)
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.05
    # special tokens of LLaDA's chat format; `with_tokenizer` takes them from another tokenizer
    bos_id: int = 126080  # <|startoftext|>
    eos_id: int = 126081  # <|endoftext|>: end of answer, and padding
    mask_id: int = 126336  # <|mdm_mask|>
    start_header_id: int = 126346  # a turn begins <|start_header_id|>user<|end_header_id|>
    end_header_id: int = 126347
    eot_id: int = 126348  # <|eot_id|>: end of a turn

    def __post_init__(self):
        # a Config may come from any file's header
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            least = 0 if field.name.endswith("_id") or field.name in ("pad_to", "lora_rank") else 1
            if kind is int and not (type(value) is int and value >= least):
                raise ValueError(f"{field.name} is {value!r}")
        if self.width % self.heads or self.audio_width % self.audio_heads:
            raise ValueError("a width must be a multiple of its number of heads")
        if not self.taps or min(self.taps) < 0 or max(self.taps) > self.audio_layers:
            raise ValueError(f"taps are {self.taps}, of an encoder with {self.audio_layers} layers")

    def with_tokenizer(self, tokenizer):
        """The same sizes with this tokenizer's vocabulary and special ids."""
        ids = {}
        for field, token in SPECIAL_TOKENS.items():
            ids[field] = tokenizer.token_to_id(token)
            if ids[field] is None:
                raise UserError(f"the tokenizer has no {token}: it is not one of LLaDA's")
        # a tokenizer with gaps among its ids counts fewer tokens than the embedding needs rows
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
    # the first generation: Whisper small, no LoRA
    "diffa1": Config(
        n_mels=80, audio_width=768, audio_heads=12, audio_layers=12, taps=(2, 5, 8, 11), lora_rank=0
    ),
    # the same system with small parts: Whisper tiny.en's encoder and a LLaDA of five million parameters.
    # Windows of 10 s save two thirds of the encoder's work; two taps (the authors have four for this
    # encoder), 16 queries and a narrow Q-Former save most of the adapter's.  In tiny.en's last hidden
    # state one channel is 310, the others' root mean square 1.2; a small Q-Former does not learn then: hence
    # norm_taps.
    "tiny": Config(
        n_mels=80,
        n_frames=500,
        audio_width=384,
        audio_heads=6,
        audio_layers=4,
        taps=(2, 4),
        qformer_ffn=768,
        pad_to=125,
        norm_taps=True,
        n_queries=16,
        n_soft_prompts=4,
        vocab=2016,
        width=256,
        layers=6,
        heads=8,
        ffn=512,
        rope_theta=10000.0,
        context=1024,
        **{field: i for i, field in enumerate(SPECIAL_TOKENS)},  # the first ids of its tokenizer
    ),
}


# ---------------------------------------------------------------------------------------------
# Whisper's encoder


class Encoder(AudioEncoder):
    """openai-whisper's encoder; beside its output it returns the hidden states that are asked for."""

    def __init__(self, c):
        super().__init__(c.n_mels, c.n_frames, c.audio_width, c.audio_heads, c.audio_layers)
        # computed, not learned: kept out of checkpoints
        self.register_buffer("positional_embedding", sinusoids(c.n_frames, c.audio_width), persistent=False)

    def forward(self, mel, taps=()):
        """mel (B, n_mels, 2F), F at most the window -> tapped states (B, n_taps, F, d), output (B, F, d).

        Tap 0 is the input of the first block, tap k the output of the k-th, transformers' hidden_states[k].
        (Not their last one: that has passed ln_post, and is the output here.)  No taps: None for the first.
        """
        x = F.gelu(self.conv1(mel))
        x = F.gelu(self.conv2(x)).transpose(1, 2)  # stride 2: (B, F, d)
        window = len(self.positional_embedding)
        if x.size(1) > window:
            raise ValueError(f"mel of {mel.size(2)} frames; the encoder takes {2 * window}")
        x = x + self.positional_embedding[: x.size(1)].to(x.dtype)
        tapped = {0: x} if 0 in taps else {}
        for k, block in enumerate(self.blocks, start=1):
            x = block(x)
            if k in taps:  # no other state is kept in memory
                tapped[k] = x
        return torch.stack([tapped[k] for k in taps], 1) if taps else None, self.ln_post(x)


# ---------------------------------------------------------------------------------------------
# the backbone: LLaDA


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in fp32, cast back, and only then scaled: LLaDA's order."""

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
    angle = torch.cat([angle, angle], -1)  # as Llama: channel i turns with channel i + head_dim / 2
    return angle.cos(), angle.sin()


def rotate(x, rope):
    """Applies RoPE to x (B, H, T, head_dim) in fp32: (a, b) -> (a cos - b sin, b cos + a sin)."""
    cos, sin = rope
    a, b = x.float().chunk(2, -1)  # (B, H, T, head_dim / 2) each
    return (x.float() * cos + torch.cat([-b, a], -1) * sin).to(x.dtype)


class Cache:
    """Keys and values of every layer, for all columns of a row: prompt, audio and answer.

    A pass over the whole row fills it.  A later pass over T columns from `start` on recomputes those
    alone and overwrites their entries.  Attention here looks both ways: from the second layer on every
    entry depends on every token, so the entries left in place are a little stale as soon as any token
    changes (Fast-dLLM, Wu et al. 2025).  (In a causal model they stay exact.)
    """

    def __init__(self):
        self.k, self.v = {}, {}  # layer -> (B, H, columns, head_dim)
        self.valid, self.position = None, None  # (B, columns); valid None: no padding

    def update(self, layer, k, v, start):
        """Stores k, v (B, H, T, head_dim) of T columns from `start` (None: all).  Returns all columns'."""
        if start is None:
            self.k[layer], self.v[layer] = k, v
        else:
            self.k[layer][:, :, start : start + k.size(2)] = k
            self.v[layer][:, :, start : start + v.size(2)] = v
        return self.k[layer], self.v[layer]

    def keep(self, rows):
        """Drops all rows but these (indices), when the other rows' answers are finished."""
        for entries in (self.k, self.v):
            for layer, x in entries.items():
                entries[layer] = x[rows]
        self.valid = None if self.valid is None else self.valid[rows]
        self.position = self.position[rows]


def attend(q, k, v, mask):
    """softmax(q k^T / sqrt(head_dim)) v of (B, H, T, head_dim); mask, if any: True where a query may look."""
    if q.device.type == "cpu" and q.requires_grad:
        # torch's fused kernel takes a quarter of a training step on a CPU; spelled out it is twice as fast
        score = q @ k.transpose(-1, -2) * q.size(-1) ** -0.5
        score = score if mask is None else score.masked_fill(~mask, float("-inf"))
        return score.softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Block(nn.Module):
    """LLaDA's layer: pre-norm attention, pre-norm SwiGLU feed-forward, no biases."""

    def __init__(self, c):
        super().__init__()
        self.heads = c.heads
        linear = functools.partial(nn.Linear, bias=False)
        self.attn_norm, self.ff_norm = RMSNorm(c.width, c.norm_eps), RMSNorm(c.width, c.norm_eps)
        self.q_proj, self.k_proj, self.v_proj, self.attn_out = (linear(c.width, c.width) for _ in range(4))
        self.ff_proj, self.up_proj = linear(c.width, c.ffn), linear(c.width, c.ffn)  # SwiGLU: gate, value
        self.ff_out = linear(c.ffn, c.width)

    def split(self, x):
        """(B, T, D) -> (B, H, T, head_dim)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x, rope, mask, cache=None, layer=None, start=None):
        """x (B, T, D) -> (B, T, D)."""
        y = self.attn_norm(x)
        q, k = (rotate(self.split(project(y)), rope) for project in (self.q_proj, self.k_proj))
        v = self.split(self.v_proj(y))
        if cache is not None:
            k, v = cache.update(layer, k, v, start)
        y = attend(q, k, v, mask)  # (B, H, T, head_dim)
        x = x + self.attn_out(y.transpose(1, 2).flatten(2))
        y = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(y)) * self.up_proj(y))


class LLaDA(nn.Module):
    """The masked-diffusion language model; its parts are named as in the released weights."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.wte = nn.Embedding(c.vocab, c.width)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.ln_f = RMSNorm(c.width, c.norm_eps)
        # LLaDA's name for the head; not the ff_out of a block, and not tied to wte
        self.ff_out = nn.Linear(c.width, c.vocab, bias=False)

    def forward(self, x, valid, cache=None, start=None):
        """x (B, T, D) embeddings, valid (B, T) -> hidden states after ln_f (B, T, D).

        valid: False on padding.  None: no padding, and nothing has to be read back from a GPU to know it.
        With `cache` and start=None the whole row is computed and the cache filled.  With `start`, x holds
        T columns, from `start` on, of a row that the cache has seen; `valid` is the cache's then.
        """
        if start is None:
            if valid is None or valid.all():
                valid, key_position = None, torch.arange(x.size(1), device=x.device).expand(x.size(0), -1)
            else:
                # (B, T); padding is not counted.  On the left it would be at -1, before any key that a causal
                # row may see: at 0 its softmax is not empty
                key_position = (valid.cumsum(1) - 1).clamp(min=0)
            query_position = key_position
            if cache is not None:
                cache.valid, cache.position = valid, key_position
        else:  # keys: all columns of the row; queries: those of x
            valid, key_position = cache.valid, cache.position
            query_position = key_position[:, start : start + x.size(1)]
        mask = None if valid is None else valid[:, None, None, :]  # (B, 1, 1, keys)
        if self.c.causal:  # the baseline; LLaDA hides nothing but padding
            past = key_position[:, None, None, :] <= query_position[:, None, :, None]  # (B, 1, T, keys)
            mask = past if mask is None else past & mask
        rope = rope_table(query_position, self.c.width // self.c.heads, self.c.rope_theta)
        for layer, block in enumerate(self.blocks):
            x = block(x, rope, mask, cache, layer, start)
        return self.ln_f(x)


# ---------------------------------------------------------------------------------------------
# encoder, adapters and backbone together


def splice_order(n_text, n_audio, audio_at):
    """Where each column of the spliced row comes from, as an index into [text | audio].

    audio_at (B,): the audio goes in front of this text token.  Returns (B, n_text + n_audio); for three
    text tokens, two audio tokens and audio_at 1 that is 0 3 4 1 2.
    """
    column = torch.arange(n_text + n_audio, device=audio_at.device)[None]  # (1, T + A)
    at = audio_at[:, None]
    is_audio = (column >= at) & (column < at + n_audio)  # (B, T + A)
    # text in front of the audio stays in place; behind it, it stands n_audio columns further on
    return torch.where(is_audio, n_text + column - at, column - n_audio * (column >= at + n_audio))


class DIFFA2(nn.Module):
    """encode (frozen) -> adapt -> forward: from sound to logits."""

    def __init__(self, config, lora=False):
        super().__init__()
        c = self.config = config
        self.stage = 0  # the last stage these weights were trained in; saved and loaded with them
        self.base = None  # what the frozen parts are, if a checkpoint leaves them out (weights.py)
        self.encoder = Encoder(c)
        self.add_adapters()
        self.backbone = LLaDA(c)
        if lora:
            self.add_lora()

    def add_adapters(self):
        """Untrained adapters and soft prompts; they replace any that were there."""
        c = self.config
        self.semantic = SemanticAdapter(c.audio_width, c.width)
        sizes = {"n_heads": c.audio_heads, "d_ffn": c.qformer_ffn, "n_queries": c.n_queries}
        self.acoustic = AcousticAdapter(c.audio_width, c.width, n_taps=len(c.taps), **sizes)
        self.soft_prompts = nn.Parameter(torch.randn(c.n_soft_prompts, c.width))

    def add_lora(self):
        c = self.config
        if c.lora_rank:
            add_lora(self.backbone, c.lora_rank, c.lora_alpha, c.lora_dropout)

    def windows(self, n_frames):
        """How many frames each clip is padded to for the encoder: real frames (B,) -> padded ones (B,).

        At least a fifth of pad_to is silence, unless the longest window leaves less: Whisper has not been
        trained on short windows without any.
        """
        c = self.config
        if not c.pad_to:
            return torch.full_like(n_frames, c.n_frames)
        with_silence = n_frames + c.pad_to // 5
        return ((with_silence // c.pad_to + 1) * c.pad_to).clamp(max=c.n_frames)

    @torch.no_grad()
    def encode(self, mel, n_frames):
        """mel (B, n_mels, 2 * config.n_frames) -> tapped states (B, n_taps, F, d), output (B, F, d).

        n_frames (B,): encoder frames of real audio.  F is the longest of the clips' windows; zeros follow
        a shorter one.  Only clips of equal windows share a pass: a clip's states do not depend on its batch.
        """
        c = self.config
        if not c.pad_to:
            return self.encoder(mel[:, :, : 2 * c.n_frames], c.taps)
        windows = self.windows(n_frames)
        taps = final = None
        for size in sorted(set(windows.tolist()), reverse=True):  # the longest first: its F is the batch's
            rows = windows == size  # (B,)
            some_taps, some_final = self.encoder(mel[rows, :, : 2 * size], c.taps)
            if final is None:
                taps = some_taps.new_zeros(len(mel), *some_taps.shape[1:])
                final = some_final.new_zeros(len(mel), *some_final.shape[1:])
            taps[rows, :, :size], final[rows, :size] = some_taps, some_final
        return taps, final

    def embed_imitation(self, ids, weights, noise):
        """What stands for audio tokens in stage 0 (runtime/variations.py): mixed word embeddings and noise.

        ids, weights (B, A, 2), noise (B, A, D) in units of the embeddings' root mean square -> (B, A, D).
        """
        mixed = (self.backbone.wte(ids) * weights[..., None]).sum(2)  # (B, A, 2, D) -> (B, A, D)
        return mixed + self.backbone.wte.weight.detach().pow(2).mean().sqrt() * noise

    def adapt(self, taps, final, n_frames, stage):
        """The audio tokens the backbone reads: audio (B, A, D), is_audio (B, A).

        Stage 1: soft prompts (the authors' code, not in the paper), then the semantic tokens.  From stage 2:
        the acoustic tokens, then the semantic ones.  is_audio is False where a shorter clip has no token.
        """
        semantic, is_audio = self.semantic(final, n_frames)
        if stage == 1:
            first = self.soft_prompts.to(semantic.dtype).expand(len(semantic), -1, -1)
        else:
            is_frame = None
            if self.config.pad_to:  # the Q-Former must not see the zeros behind a clip's window
                is_frame = torch.arange(taps.size(2), device=taps.device) < self.windows(n_frames)[:, None]
            if self.config.norm_taps:
                taps = F.layer_norm(taps, taps.shape[-1:])
            first = self.acoustic(taps, is_frame)
        always = torch.ones(first.shape[:2], dtype=torch.bool, device=first.device)
        return torch.cat([first, semantic], 1), torch.cat([always, is_audio], 1)

    def predictor(self, text, audio, is_audio):
        """`predict` of diffusion.py, which knows neither audio nor LLaDA: (noisy ids, where) -> logits there.

        text: a batch from data.collate.  audio, is_audio: from `adapt`.
        """
        return lambda noisy, where: self(noisy, text["valid"], where, audio, is_audio, text["audio_at"])

    def forward(self, ids, valid, where, audio=None, is_audio=None, audio_at=None, cache=None, start=None):
        """Logits (N, vocab) at the N text positions where `where` is True, row by row.

        ids, valid, where: (B, T) text, the response included.  audio (B, A, D) and is_audio (B, A) from
        `adapt` go in front of text token audio_at (B,): the spliced row has T + A columns.  audio=None:
        text alone.  valid=None: no padding, neither in ids nor in audio.
        where may also be a pair of index tensors (row (N,), text column (N,)): to count the True ones of a
        mask, the CPU has to wait for the GPU.
        cache, start: see LLaDA.forward; `start` counts spliced columns.  With it, ids and where are just
        the columns to recompute, all of them text.
        """
        x = self.backbone.wte(ids)
        row, column = where.nonzero(as_tuple=True) if isinstance(where, torch.Tensor) else where
        if audio is not None:
            order = splice_order(ids.size(1), audio.size(1), audio_at)  # (B, T + A)
            x = torch.cat([x, audio.to(x.dtype)], 1)  # (B, T + A, D): [text | audio]
            x = x.gather(1, order[:, :, None].expand(-1, -1, x.size(2)))  # spliced
            valid = None if valid is None else torch.cat([valid, is_audio], 1).gather(1, order)
            column = column + audio.size(1) * (column >= audio_at[row])  # from text to spliced columns
        h = self.backbone(x, valid, cache, start)
        # the head is the largest matrix of all: only the N columns asked for pass it
        return self.backbone.ff_out(h[row, column])


if __name__ == "__main__":
    from runtime import tutorials

    tutorials.model(DIFFA2, PRESETS, splice_order)
