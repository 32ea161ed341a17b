"""What trains: two adapters from sound to the backbone's embedding space, and LoRA.

  SemanticAdapter   what is said: the encoder's last layer, shortened 4x to 12.5 tokens a second
  AcousticAdapter   how it sounds: 64 learned queries read several layers of the encoder (Q-Former)
  add_lora          low-rank updates beside frozen matrices of the backbone

Together they are 1.1 % of DIFFA-2 (paper, Table B.3).  `python adapters.py` prints that table
beside the counts of the classes below; nothing is allocated for it.

The Q-Former is BLIP-2's idea in BERT's clothes (post-norm, GELU, biases everywhere), written
out here instead of imported: 60 lines that a test holds against transformers' BertLayer.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class SemanticAdapter(nn.Module):
    """50 Hz encoder frames of width d -> 12.5 Hz tokens of the backbone's width D (paper 3.1)."""

    def __init__(self, d, D):
        super().__init__()
        self.conv1 = nn.Conv1d(d, d, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(d, 4 * d, kernel_size=3, stride=4, padding=1)
        self.fc1 = nn.Linear(4 * d, d)
        self.fc2 = nn.Linear(d, D)
        self.norm = nn.LayerNorm(D)

    def forward(self, final, n_frames):
        """final (B, F, d): the encoder's output.  n_frames (B,): frames of real audio in each clip.

        Frames past the last multiple of four are dropped; a clip too short for one token borrows
        the frames of silence behind it.  Returns tokens (B, A, D) and is_audio (B, A), where
        A belongs to the longest clip and is_audio tells which tokens are a clip's own.
        """
        n_tokens = (n_frames // 4).clamp(min=1)  # (B,)
        A = int(n_tokens.max())
        # The strided convolution reads frames 4j-1..4j+1 for token j and the one before it one
        # frame more on either side, so no token of a clip sees what follows its last multiple
        # of four: cutting the batch at the longest clip leaves the shorter ones exact.
        x = final[:, : 4 * A].transpose(1, 2)  # (B, d, 4A)
        x = self.conv2(F.gelu(self.conv1(x)))  # (B, 4d, A)
        x = F.relu(self.fc1(x.transpose(1, 2)))  # (B, A, d)
        x = self.norm(F.relu(self.fc2(x)))  # (B, A, D)
        is_audio = torch.arange(A, device=x.device) < n_tokens[:, None]  # (B, A)
        return x, is_audio


class QFormerAttention(nn.Module):
    """Multi-head attention, its output projection, and the post-norm residual around both."""

    def __init__(self, d, n_heads, dropout):
        super().__init__()
        self.n_heads, self.p = n_heads, dropout
        self.query, self.key, self.value = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
        self.out = nn.Linear(d, d)
        self.norm = nn.LayerNorm(d, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, context, mask=None):
        """x (B, Q, d) attends to context (B, F, d), where mask (B, 1, 1, F) is True.  Returns (B, Q, d)."""
        q, k, v = self.query(x), self.key(context), self.value(context)
        q, k, v = (y.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for y in (q, k, v))  # (B, H, n, d/H)
        dropout = self.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        y = y.transpose(1, 2).flatten(2)  # (B, Q, d)
        return self.norm(x + self.dropout(self.out(y)))


class QFormerLayer(nn.Module):
    """Queries attend to each other, then to the frames, then think: BERT's layer, post-norm."""

    def __init__(self, d, n_heads, d_ffn, dropout):
        super().__init__()
        self.self_attention = QFormerAttention(d, n_heads, dropout)
        self.cross_attention = QFormerAttention(d, n_heads, dropout)
        self.fc1, self.fc2 = nn.Linear(d, d_ffn), nn.Linear(d_ffn, d)
        self.norm = nn.LayerNorm(d, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, frames, mask=None):
        x = self.self_attention(x, x)
        x = self.cross_attention(x, frames, mask)
        return self.norm(x + self.dropout(self.fc2(F.gelu(self.fc1(x)))))


class AcousticAdapter(nn.Module):
    """Several layers of the encoder -> 64 tokens of the backbone's width D (paper 3.1).

    Every tapped layer has its own 64 queries; one Q-Former, shared by all taps, fills them with
    what the 1500 frames of that layer hold; a softmax learned per query mixes the taps.
    """

    def __init__(self, d, D, n_taps, n_heads, d_ffn=3072, n_queries=64, n_layers=2, dropout=0.1):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(n_taps, n_queries, d))
        self.tap_logits = nn.Parameter(torch.zeros(n_queries, n_taps))
        self.layers = nn.ModuleList(QFormerLayer(d, n_heads, d_ffn, dropout) for _ in range(n_layers))
        self.norm = nn.LayerNorm(d)
        self.proj = nn.Linear(d, D)

    def forward(self, taps, is_frame=None):
        """taps (B, n_taps, F, d): hidden states of the tapped layers.  Returns (B, n_queries, D).

        is_frame (B, F): the frames that a clip's window has, where windows differ; None: all.
        """
        B, n_taps, n_frames, d = taps.size()
        mask = None
        if is_frame is not None:
            mask = is_frame[:, None, None, :].repeat_interleave(n_taps, 0)  # (B * n_taps, 1, 1, F)
        # the taps fold into the batch: the shared Q-Former runs once instead of n_taps times
        x = self.queries.expand(B, -1, -1, -1).flatten(0, 1)  # (B * n_taps, Q, d)
        frames = taps.flatten(0, 1)  # (B * n_taps, F, d)
        for layer in self.layers:
            x = layer(x, frames, mask)
        x = x.unflatten(0, (B, n_taps))  # (B, n_taps, Q, d)
        mix = self.tap_logits.softmax(-1)  # (Q, n_taps)
        x = torch.einsum("qt,btqd->bqd", mix.to(x.dtype), x)
        return self.proj(self.norm(x))


class LoRALinear(nn.Linear):
    """A frozen Linear plus a trained update of rank r: y = W x + (alpha / r) B A dropout(x).

    B starts at zero, so the update does; `weight` keeps its name, so checkpoints of the plain
    layer fit (Hu et al., 2022).
    """

    def __init__(self, linear, r, alpha, dropout):
        nn.Module.__init__(self)  # not Linear's: it would allocate a second weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        # trained in fp32 even beside bf16 weights: steps of 1e-5 would round to nothing in bf16
        new = {"device": linear.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, **new))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, **new))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scale = alpha / r
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        low = F.linear(F.linear(self.dropout(x).to(self.lora_A.dtype), self.lora_A), self.lora_B)
        return super().forward(x) + (self.scale * low).to(x.dtype)

    def merged(self):
        """The plain Linear that computes the same."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        update = self.scale * self.lora_B @ self.lora_A
        linear.weight = nn.Parameter(
            (self.weight.to(update.dtype) + update).to(self.weight.dtype).detach(), requires_grad=False
        )
        linear.bias = self.bias
        return linear


LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "ff_proj", "up_proj")


def replace_modules(module, kind, make):
    """Puts make(last name, child) in the place of every child of a class, in place; None leaves a child."""
    for name, child in list(module.named_modules()):
        if isinstance(child, kind) and name:
            parent, _, leaf = name.rpartition(".")
            new = make(leaf, child)
            if new is not None:
                setattr(module.get_submodule(parent), leaf, new)
    return module


def add_lora(module, r=8, alpha=16, dropout=0.05, targets=LORA_TARGETS):
    """Replaces, in place, every Linear whose last name is in `targets`.  Returns the module."""

    def wrap(leaf, linear):
        return LoRALinear(linear, r, alpha, dropout) if leaf in targets else None

    return replace_modules(module, nn.Linear, wrap)


def merge_lora(module):
    """Folds every update into its matrix: one product per projection, LoRA gone.  In place."""
    return replace_modules(module, LoRALinear, lambda leaf, lora: lora.merged())


def count(module):
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())


if __name__ == "__main__":
    with torch.device("meta"):
        D, ffn = 4096, 12288
        outputs = {"q_proj": D, "k_proj": D, "v_proj": D, "ff_proj": ffn, "up_proj": ffn}
        backbone = nn.ModuleList()
        for _ in range(32):
            backbone.append(nn.ModuleDict({n: nn.Linear(D, o, bias=False) for n, o in outputs.items()}))
        frozen = count(backbone)
        semantic, acoustic = SemanticAdapter(1280, D), AcousticAdapter(1280, D, n_taps=8, n_heads=20)
        rows = [
            ("semantic adapter, 1280 -> 4096", "36.4M", count(semantic)),
            ("acoustic adapter, 8 taps, 64 queries", "47.9M", count(acoustic)),
            ("LoRA, rank 8, 5 matrices in 32 layers", "14.7M", count(add_lora(backbone)) - frozen),
        ]
    rows.append(("trained in stages 3 and 4", "99.0M", sum(n for *_, n in rows)))
    print(f"{'module':40}{'Table B.3':>10}{'this file':>14}")
    for name, paper, ours in rows:
        print(f"{name:40}{paper:>10}{ours:>14,}")
