"""What trains: two adapters from sound to the backbone's embedding space, and LoRA.

  SemanticAdapter   what is said: the encoder's last layer, shortened 4x to 12.5 tokens a second
  AcousticAdapter   how it sounds: 64 learned queries read several layers of the encoder (Q-Former)
  add_lora          low-rank updates beside frozen matrices of the backbone

Together they are 1.1 % of DIFFA-2.  `python adapters.py` prints what the paper's Table B.3 says of
them beside the counts of the classes below, without allocating any of the weights.

The Q-Former is in BLIP-2's style, of fresh BERT layers (post-norm, GELU, biases everywhere).  It is written
out here instead of imported; a test compares it with transformers' BertLayer.

Shapes: B clips, F encoder frames, A audio tokens, Q queries, d the encoder's width, D the backbone's.
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

        Every four frames give a token, and a rest of fewer is dropped.  A clip of fewer than four frames
        still gives one token, with silence in it.  Returns tokens (B, A, D) and is_audio (B, A): A is the
        longest clip's number of tokens; is_audio marks each clip's own, the rest is padding.
        """
        n_tokens = (n_frames // 4).clamp(min=1)  # (B,)
        A = int(n_tokens.max())
        # The authors' sizes: every fourth frame of conv1 is skipped, but its neighbours have mixed it in.
        # Token j of conv2 reads frames 4j-1..4j+1 of conv1, which are made of frames 4j-2..4j+2 of the
        # encoder.  The last of a clip's n tokens reads up to frame 4n-2, so none depends on the frames from
        # 4n on, and cutting the batch at the longest clip leaves the shorter ones' tokens exact.
        x = final[:, : 4 * A].transpose(1, 2)  # (B, d, 4A)
        x = self.conv2(F.gelu(self.conv1(x)))  # (B, 4d, A)
        # contiguous: torch then takes the same kernel with gradients as without; VRPO compares the results
        x = F.relu(self.fc1(x.transpose(1, 2).contiguous()))  # (B, A, d)
        x = self.norm(F.relu(self.fc2(x)))  # (B, A, D)
        is_audio = torch.arange(A, device=x.device) < n_tokens[:, None]  # (B, A)
        return x, is_audio


class QFormerAttention(nn.Module):
    """Multi-head attention, its output projection, and the post-norm residual around both."""

    def __init__(self, d, n_heads, dropout):
        super().__init__()
        self.n_heads = n_heads
        self.query, self.key, self.value = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
        self.out = nn.Linear(d, d)
        self.norm = nn.LayerNorm(d, eps=1e-12)
        self.dropout = nn.Dropout(dropout)  # its rate holds for the attention weights as well

    def forward(self, x, source, mask=None):
        """x (B, Q, d) attends to source (B, F, d), where mask (B, 1, 1, F) is True.  Returns (B, Q, d)."""
        q, k, v = self.query(x), self.key(source), self.value(source)
        q, k, v = (y.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for y in (q, k, v))  # (B, H, ., d/H)
        dropout_p = self.dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)  # (B, H, Q, d/H)
        y = y.transpose(1, 2).flatten(2)  # (B, Q, d)
        return self.norm(x + self.dropout(self.out(y)))


class QFormerLayer(nn.Module):
    """Self-attention among the queries, cross-attention to the frames, feed-forward; all post-norm."""

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
    """Several layers of the encoder -> n_queries tokens (64) of the backbone's width D (paper 3.1).

    Each tapped layer has its own queries.  One Q-Former, shared by all taps, lets them attend to the F frames
    of their layer.  Each token is then a weighted mean over the taps, with learned weights of its own (a
    softmax).  Which taps, queries for each, the mean over them and d_ffn are the authors' code; the paper
    is silent there.
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

        is_frame (B, F): False past the end of a clip's window, if windows differ in length; None: all True.
        """
        B, n_taps = taps.shape[:2]
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
        x = torch.einsum("qt,btqd->bqd", mix.to(x.dtype), x)  # (B, Q, d)
        return self.proj(self.norm(x))


class LoRALinear(nn.Linear):
    """A frozen Linear plus a trained update of rank r: y = W x + (alpha / r) B A dropout(x).

    B is zero at first, and so is the update (Hu et al., 2022).  `weight` keeps its name, so that
    checkpoints of the plain Linear load.
    """

    def __init__(self, linear, r, alpha, dropout):
        nn.Module.__init__(self)  # not Linear's: it would allocate a second weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight.requires_grad_(False), linear.bias
        # trained in fp32 even beside bf16 weights: steps of 1e-5 would round to nothing in bf16
        new = {"device": linear.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, **new))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, **new))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as nn.Linear does
        self.scale = alpha / r
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        low = F.linear(self.dropout(x).to(self.lora_A.dtype), self.lora_A)  # (..., r)
        return super().forward(x) + (self.scale * F.linear(low, self.lora_B)).to(x.dtype)

    def merged(self):
        """The plain Linear that computes the same, up to rounding, as this one without dropout."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        update = self.scale * self.lora_B.float() @ self.lora_A.float()  # rounded only with the sum
        weight = self.weight.to(update.dtype) + update
        linear.weight = nn.Parameter(weight.to(self.weight.dtype), requires_grad=False)
        linear.bias = self.bias
        return linear


# the authors' five; with r = 8 they give Table B.3's 14.7M parameters
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "ff_proj", "up_proj")


def replace_modules(module, kind, make):
    """Replaces submodules of class `kind` by make(last name, submodule), in place, unless that is None."""
    for name, child in list(module.named_modules()):  # a list: the modules change under way
        if isinstance(child, kind) and name:  # no name: `module` itself
            parent, _, leaf = name.rpartition(".")
            new = make(leaf, child)
            if new is not None:
                setattr(module.get_submodule(parent), leaf, new)
    return module


def add_lora(module, r=8, alpha=16, dropout=0.05, targets=LORA_TARGETS):
    """Turns every Linear whose last name is in `targets` into a LoRALinear, in place; returns the module."""

    def wrap(leaf, linear):
        return LoRALinear(linear, r, alpha, dropout) if leaf in targets else None

    return replace_modules(module, nn.Linear, wrap)


def merge_lora(module):
    """Adds every update to its matrix, so that plain Linears remain.  In place; returns the module."""
    return replace_modules(module, LoRALinear, lambda leaf, lora: lora.merged())


if __name__ == "__main__":
    from runtime import tutorials

    tutorials.adapters(SemanticAdapter, AcousticAdapter, add_lora)
