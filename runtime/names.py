"""Other projects' names of files and tensors, for weights.py.  Strict loading says if one has no place."""

import os
import re

from runtime.errors import UserError


def once(named, path):
    """Pairs of (name, tensor) as a dict.  UserError where two have one name: one of them would be lost."""
    weights = {}
    for name, value in named:
        if name in weights:
            raise UserError(f"{path}: {name} is there twice")
        weights[name] = value
    return weights


# ---------------------------------------------------------------------------------------------
# Whisper's encoder: three projects publish the same tensors under three sets of names

WHISPER_NAMES = {  # a module of a layer: transformers' name -> openai-whisper's
    "self_attn.q_proj": "attn.query",
    "self_attn.k_proj": "attn.key",
    "self_attn.v_proj": "attn.value",
    "self_attn.out_proj": "attn.out",
    "self_attn_layer_norm": "attn_ln",
    "fc1": "mlp.0",
    "fc2": "mlp.2",
    "final_layer_norm": "mlp_ln",
    # CTranslate2's, its slashes turned into dots; one matrix there holds q, k and v
    "self_attention.layer_norm": "attn_ln",
    "self_attention.linear_0": "attn.qkv",
    "self_attention.linear_1": "attn.out",
    "ffn.layer_norm": "mlp_ln",
    "ffn.linear_0": "mlp.0",
    "ffn.linear_1": "mlp.2",
}


def whisper_file(path):
    """The file itself, or the first of these in a folder: the hub's name, ours, CTranslate2's."""
    known = ("model.safetensors", "encoder.safetensors", "model.bin")
    for file in (path, *(os.path.join(path, name) for name in known)):
        if os.path.isfile(file):
            return file
    raise UserError(f"{path}: no such file, nor a folder with one of {', '.join(known)}")


def whisper_name(key):
    """Any project's name of a tensor -> ours; None for the decoder and for the positions, which are computed.

    Ours are openai-whisper's and pass unchanged.  So does a name that nobody knows: the strict loading
    that follows says that it has no place.
    """
    key = key.replace("/", ".").removeprefix("model.").removeprefix("encoder.")
    if key.startswith(("decoder.", "proj_out.", "embed_positions.", "positional_embedding")):
        return None
    # CTranslate2's: encoder/layer_0/ffn/layer_norm/gamma
    key = re.sub(r"^layer_(\d+)", r"layers.\1", key).replace(".gamma", ".weight").replace(".beta", ".bias")
    found = re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", key)
    if found:
        n, module, leaf = found.groups()
        return f"encoder.blocks.{n}.{WHISPER_NAMES.get(module, module)}.{leaf}"
    return "encoder." + key.replace("layer_norm", "ln_post")


# ---------------------------------------------------------------------------------------------
# the authors' adapters, soft prompts and LoRA

SEMANTIC_NAMES = {  # numbers are places in an nn.Sequential, ReLU and GELU stand between them
    "conv.0": "conv1",
    "conv.2": "conv2",
    "linear_connector.0": "fc1",
    "linear_connector.2": "fc2",
    "layernorm": "norm",
}
ACOUSTIC_NAMES = {"proj.0": "norm", "proj.1": "proj"}
QFORMER_NAMES = {  # transformers' BertLayer, which the authors' Q-Former is made of -> ours
    **{f"attention.self.{n}": f"self_attention.{n}" for n in ("query", "key", "value")},
    **{f"crossattention.self.{n}": f"cross_attention.{n}" for n in ("query", "key", "value")},
    "attention.output.dense": "self_attention.out",
    "attention.output.LayerNorm": "self_attention.norm",
    "crossattention.output.dense": "cross_attention.out",
    "crossattention.output.LayerNorm": "cross_attention.norm",
    "intermediate.dense": "fc1",
    "output.dense": "fc2",
    "output.LayerNorm": "norm",
}


def released_name(key):
    """One of the authors' names -> ours, or None for what has no counterpart in the paper's model.

    Theirs begin with the part of Section 3.1 that they belong to: semantic_connector is the semantic
    adapter, acoustic_connector the acoustic one, llm_model the backbone with its LoRA.
    """
    part, _, rest = key.partition(".")
    module, _, leaf = rest.rpartition(".")
    if key == "trainable_prompts.weight":
        return "soft_prompts"
    if part == "semantic_connector" and module in SEMANTIC_NAMES:
        return f"semantic.{SEMANTIC_NAMES[module]}.{leaf}"
    if part == "acoustic_connector":
        if rest == "layer_weights":
            return "acoustic.tap_logits"
        if module == "layer_prompts" and leaf.isdecimal():
            return f"acoustic.queries.{leaf}"  # one a tap; stacked in load_released
        if module in ACOUSTIC_NAMES:
            return f"acoustic.{ACOUSTIC_NAMES[module]}.{leaf}"
        found = re.fullmatch(r"qformer\.layer\.(\d+)\.(.+)", module)
        if found and found[2] in QFORMER_NAMES:
            return f"acoustic.layers.{found[1]}.{QFORMER_NAMES[found[2]]}.{leaf}"
    if part == "llm_model":
        # peft wraps the model in base_model.model, a matrix in base_layer, and calls its one LoRA "default":
        # base_model.model.model.transformer.blocks.0.q_proj.lora_A.default.weight
        rest = rest.removeprefix("base_model.model.").removeprefix("model.transformer.")
        rest = rest.replace(".base_layer.", ".").replace(".default", "")
        return "backbone." + (rest.removesuffix(".weight") if "lora_" in rest else rest)
    if part == "whisper_model":  # only where a whole training state was saved
        return whisper_name(rest)
    return None
