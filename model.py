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

Weights on disk, ours and others', are weights.py's business.
"""

import dataclasses
import functools
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from whisper.model import AudioEncoder, sinusoids

from adapters import AcousticAdapter, SemanticAdapter, add_lora, count
from runtime.errors import UserError


@dataclass(frozen=True)
class Config:
    # Whisper encoder (defaults: large-v3)
    n_mels: int = 128
    n_frames: int = 1500  # encoder frames in the window, 50 a second: 30 s
    audio_width: int = 1280
    audio_heads: int = 20
    audio_layers: int = 32
    taps: tuple = (3, 7, 11, 15, 19, 23, 27, 31)  # hidden states the Q-Former reads; 0 = before block 0
    pad_to: int = 0  # clips are padded with silence to a multiple of so many frames; 0: to the whole window
    norm_taps: bool = False  # LayerNorm without parameters on each tapped state
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
    causal: bool = False  # True: the autoregressive baseline
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
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            least = 0 if field.name.endswith("_id") or field.name in ("pad_to", "lora_rank") else 1
            if kind is int and not (type(value) is int and value >= least):
                raise ValueError(f"{field.name} is {value!r}")
        if not self.taps or min(self.taps) < 0:
            raise ValueError(f"taps are {self.taps}")
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
    "diffa1": Config(
        n_mels=80, audio_width=768, audio_heads=12, audio_layers=12, taps=(2, 5, 8, 11), lora_rank=0
    ),
    # the same system with small parts: Whisper tiny.en's encoder and a LLaDA of five million parameters.
    # Short windows spare a laptop two thirds of the encoder's work; tiny.en's last state has a channel of 310
    # beside a root mean square of 1.2, which keeps a small Q-Former from learning: hence norm_taps.
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
        vocab=2048,
        width=256,
        layers=6,
        heads=8,
        ffn=512,
        rope_theta=10000.0,
        context=1024,
        bos_id=0,
        eos_id=1,
        mask_id=2,
        start_header_id=3,
        end_header_id=4,
        eot_id=5,
    ),
}


# ---------------------------------------------------------------------------------------------
# the ear


class Encoder(AudioEncoder):
    """openai-whisper's encoder, returning chosen hidden states beside its final output."""

    def __init__(self, c):
        super().__init__(c.n_mels, c.n_frames, c.audio_width, c.audio_heads, c.audio_layers)
        # fixed sinusoids need no place in a checkpoint
        self.register_buffer("positional_embedding", sinusoids(c.n_frames, c.audio_width), persistent=False)

    def forward(self, mel, taps=()):
        """mel (B, n_mels, 2 * n_frames) or shorter -> taps (B, n_taps, n_frames, d), final (B, n_frames, d).

        Tap 0 is the input of the first block, tap k the output of openai-whisper's blocks[k - 1].  It is
        transformers' hidden_states[k], but for their last one, which has passed ln_post as `final` has.
        """
        x = F.gelu(self.conv1(mel))
        x = F.gelu(self.conv2(x)).transpose(1, 2)  # (B, n_frames, d)
        if x.size(1) > len(self.positional_embedding):
            raise ValueError(
                f"mel of {mel.size(2)} frames; the encoder takes {2 * len(self.positional_embedding)}"
            )
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
    those alone and overwrites their entries.  Attention here looks both ways: from the second
    layer on every entry depends on every token, so what is left in place is a little stale as
    soon as any token changes (Fast-dLLM, Wu et al. 2025).
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

        def take(x):
            return None if x is None else x.index_select(0, rows.to(x.device))

        self.k = {layer: take(k) for layer, k in self.k.items()}
        self.v = {layer: take(v) for layer, v in self.v.items()}
        self.valid, self.position = take(self.valid), take(self.position)


def attend(q, k, v, mask):
    """softmax(q k^T / sqrt(d)) v of q, k, v (B, H, T, head_dim); mask: where to look, or None."""
    if q.device.type == "cpu" and q.requires_grad:
        # torch's fused kernel is a quarter of a training step there; spelled out it is twice as fast
        score = q @ k.transpose(-1, -2) * q.size(-1) ** -0.5
        score = score if mask is None else score.masked_fill(~mask, float("-inf"))
        return score.softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Block(nn.Module):
    """LLaDA's layer: pre-norm attention and a gated SiLU feed-forward, no biases."""

    def __init__(self, c):
        super().__init__()
        self.heads = c.heads
        linear = functools.partial(nn.Linear, bias=False)
        self.attn_norm, self.ff_norm = RMSNorm(c.width, c.norm_eps), RMSNorm(c.width, c.norm_eps)
        self.q_proj, self.k_proj, self.v_proj = (linear(c.width, c.width) for _ in range(3))
        self.attn_out = linear(c.width, c.width)
        self.ff_proj, self.up_proj = linear(c.width, c.ffn), linear(c.width, c.ffn)  # gate and value
        self.ff_out = linear(c.ffn, c.width)

    def split(self, x):
        """(B, T, C) -> (B, H, T, head_dim)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x, rope, mask, cache=None, layer=None, start=None, read_from=0):
        """x (B, T, C) -> (B, T - read_from, C): columns before read_from are only looked at."""
        y = self.attn_norm(x)
        k, v = self.split(self.k_proj(y)), self.split(self.v_proj(y))
        k = rotate(k, rope)
        if cache is not None:
            k, v = cache.update(layer, k, v, start)
        if read_from:
            x, y, rope = x[:, read_from:], y[:, read_from:], [table[:, :, read_from:] for table in rope]
            mask = mask[:, :, read_from:] if mask is not None and mask.size(2) > 1 else mask
        q = rotate(self.split(self.q_proj(y)), rope)
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
        """x (B, T, width) embeddings, valid (B, T) -> hidden states after ln_f (B, T - read_from, width).

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
        self.add_adapters()
        self.backbone = LLaDA(c)
        if lora:
            self.add_lora()

    def add_adapters(self):
        """Untrained adapters and soft prompts, in the place of those that were there."""
        c = self.config
        self.semantic = SemanticAdapter(c.audio_width, c.width)
        sizes = (len(c.taps), c.audio_heads, c.qformer_ffn, c.n_queries)
        self.acoustic = AcousticAdapter(c.audio_width, c.width, *sizes)
        self.soft_prompts = nn.Parameter(torch.randn(c.n_soft_prompts, c.width))

    def add_lora(self):
        c = self.config
        if c.lora_rank:
            add_lora(self.backbone, c.lora_rank, c.lora_alpha, c.lora_dropout)

    def windows(self, n_frames):
        """Frames of the window that each clip is encoded in.  (B,) -> (B,).

        A clip is followed by silence, a fifth of pad_to at the least: Whisper has not learned to hear one
        that ends with its window.
        """
        c = self.config
        if not c.pad_to:
            return torch.full_like(n_frames, c.n_frames)
        with_silence = n_frames + c.pad_to // 5
        return ((with_silence // c.pad_to + 1) * c.pad_to).clamp(max=c.n_frames)

    @torch.no_grad()
    def encode(self, mel, n_frames):
        """mel (B, n_mels, 2 * n_frames) -> taps (B, n_taps, F, d), final (B, F, d).  Frozen.

        n_frames (B,): encoder frames of real audio.  F is the longest of the batch's windows; frames
        behind a clip's own window are zero.  Clips of equal windows pass the encoder together, so a
        clip's states do not depend on its batch.
        """
        c = self.config
        windows = self.windows(n_frames)
        sizes = [c.n_frames] if not c.pad_to else sorted(set(windows.tolist()))
        if len(sizes) == 1:
            return self.encoder(mel[:, :, : 2 * sizes[0]], c.taps)
        taps = final = None
        for size in reversed(sizes):  # the longest first: it gives the others their room
            rows = (windows == size).nonzero()[:, 0]
            some_taps, some_final = self.encoder(mel[rows, :, : 2 * size], c.taps)
            if final is None:
                final = some_final.new_zeros(len(mel), *some_final.shape[1:])
                taps = some_taps.new_zeros(len(mel), *some_taps.shape[1:])
            final[rows, :size], taps[rows, :, :size] = some_final, some_taps
        return taps, final

    def embed_imitation(self, ids, weights, noise):
        """Audio tokens imitated by words (runtime/variations.py): weighted sums of embeddings plus noise.

        ids, weights (B, A, 2), noise (B, A, D) in units of the embeddings' root mean square -> (B, A, D).
        """
        mixed = (self.backbone.wte(ids) * weights[..., None]).sum(2)
        return mixed + self.backbone.wte.weight.detach().pow(2).mean().sqrt() * noise

    def adapt(self, taps, final, n_frames, stage):
        """The audio tokens the backbone reads: audio (B, A, D), is_audio (B, A).

        Stage 1: 20 soft prompts, then the semantic tokens.  From stage 2: 64 acoustic tokens,
        then the semantic ones.  n_frames (B,): encoder frames of real audio.
        """
        semantic, is_audio = self.semantic(final, n_frames)
        if stage == 1:
            first = self.soft_prompts.to(semantic.dtype).expand(len(semantic), -1, -1)
        else:
            is_frame = None
            if self.config.pad_to:
                is_frame = torch.arange(taps.size(2), device=taps.device) < self.windows(n_frames)[:, None]
            if self.config.norm_taps:
                taps = F.layer_norm(taps, taps.shape[-1:])
            first = self.acoustic(taps, is_frame)
        always = torch.ones(first.shape[:2], dtype=torch.bool, device=first.device)
        return torch.cat([first, semantic], 1), torch.cat([always, is_audio], 1)

    def forward(
        self, ids, valid, where, audio=None, is_audio=None, audio_at=None, cache=None, start=None, read_from=0
    ):
        """Logits (N, vocab) at the N text positions `where` is True, in row-major order.

        ids, valid, where: (B, T) text, the response included.  audio (B, A, D) and is_audio (B, A) go in
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
        # rows that nobody reads never meet the vocabulary
        return self.backbone.ff_out(h[row, column - read_from])


# ---------------------------------------------------------------------------------------------
# int8: half the memory of bf16, and less time on a CPU


# ---------------------------------------------------------------------------------------------
# fresh weights


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
                # all layers together add about as much as was there (GPT-2)
                std *= (2 * config.layers) ** -0.5
            nn.init.normal_(p, std=std)
    return model.to(device)


def with_fresh_adapters(model, seed):
    """The same encoder and backbone under untrained adapters and soft prompts, without LoRA."""
    weight = model.backbone.wte.weight
    with torch.device("meta"):
        fresh = DIFFA2(model.config)
    fresh.encoder, fresh.base = model.encoder, model.base
    frozen = {k: v for k, v in model.backbone.state_dict().items() if "lora_" not in k}
    fresh.backbone.load_state_dict(frozen, assign=True)
    torch.manual_seed(seed)
    with torch.device(weight.device):
        fresh.add_adapters()
    # with the root mean square of word embeddings: what is ten times smaller drowns in the first layer
    nn.init.normal_(fresh.soft_prompts, std=weight.float().pow(2).mean().sqrt().item())
    return fresh


if __name__ == "__main__":
    with torch.device("meta"):
        for name, config in PRESETS.items():
            model = DIFFA2(config, lora=True)
            print(f"\n{name}: {count(model):,} parameters")
            for part in ("encoder", "semantic", "acoustic", "backbone"):
                print(f"  {part:10}{count(getattr(model, part)):>16,}")
