"""Everything about weights on disk: our checkpoints, Whisper's encoder, LLaDA's shards, the authors' files.

    load("tiny")                       the small model that comes with the code
    load("out/tiny/stage4")            a folder that `save` wrote
    load("diffa2", whisper=FILE)       the released model; what is not given comes from the hub

    python weights.py                  what the small model's files hold

What is read, always as data, never as code:

    ours           model.safetensors (Config and stage in its header) and tokenizer.json
    Whisper        openai-whisper's .pt, transformers' .safetensors, CTranslate2's model.bin (faster-whisper),
                   and our encoder.safetensors
    LLaDA          a folder of safetensors shards with their index
    DIFFA, DIFFA-2 the authors' pytorch_model.bin

Loading is strict: each tensor of a file has a place and each place gets a tensor of its shape, or the
message names the one that is wrong.  A network with one random matrix still runs and still answers, only
badly, and nobody would look for the reason here.
A model is built on the meta device and filled from mapped files, so no second copy of 8 B parameters
exists at any time; `from_pretrained` of transformers does the same for one library's own format.
A checkpoint leaves out what was never trained and lies elsewhere: the small model's holds no Whisper, the
released ones' neither Whisper nor LLaDA.  It says what they are (`model.base`: a name and a fingerprint of
the weights), never where they lie, so that it can be given to somebody else.
"""

import contextlib
import dataclasses
import glob
import hashlib
import json
import os
import pickle
import re
import sys
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from whisper.model import sinusoids

from model import DIFFA2, PRESETS, SPECIAL_TOKENS, Config
from runtime import ctranslate2
from runtime.errors import UserError, first_line
from runtime.files import write_file
from runtime.int8 import Int8Linear, quantise
from runtime.processes import pick_device

HERE = os.path.dirname(os.path.abspath(__file__))
ASSETS = {"tiny": os.path.join(HERE, "assets", "tiny")}  # presets whose weights come with the code
TINY_ENCODER = "whisper-tiny.en"  # the folder of assets that holds the encoder of preset tiny
TINY_FINGERPRINT = "c7311073ee9e7c16"  # its `fingerprint`


# ---------------------------------------------------------------------------------------------
# our checkpoints.  Safetensors and not a pickle: a pickle is a program that runs when it is opened.  A
# safetensors file is a length (8 bytes), a header in JSON (names, types, shapes, places, and strings of
# one's own: here Config and stage) and the bare numbers, which can be mapped instead of read.


def save(model, tokenizer, folder, dtype=torch.bfloat16):
    """Writes folder/model.safetensors and folder/tokenizer.json.

    A released model is written as the 99 million parameters of Table B.3 (200 MB in bf16) instead of 8.75
    billion.  bf16 halves a file to be given away; a stage that another one goes on from is saved in fp32,
    or its last small steps would be rounded off.
    """
    if any(isinstance(module, Int8Linear) for module in model.modules()):
        raise UserError(f"{folder}: a model in int8 is not written, its LoRA is merged; load it without int8")
    header = {"config": json.dumps(dataclasses.asdict(model.config)), "stage": str(model.stage)}
    if model.base:
        header["base"] = json.dumps(model.base)
    state = model.state_dict()
    weights = {k: state[k].detach().to("cpu", dtype).contiguous() for k in saved_part(model)}
    text = tokenizer.to_str(True)
    # the weights last: whoever looks for model.safetensors finds a folder that is complete
    write_file(os.path.join(folder, "tokenizer.json"), lambda path: Path(path).write_text(text, "utf-8"))
    write_file(os.path.join(folder, "model.safetensors"), lambda path: save_sorted(weights, path, header))


def save_sorted(weights, path, metadata):
    """safetensors' save_file, but equal models give equal bytes, so that a SHA-256 can stand on a card.

    The library keeps metadata in a hash map and writes it in another order in each process.  The sorted
    header has the same length, and spaces may follow it: it takes the place of the one that was written.
    """
    save_file(weights, path, metadata=metadata)
    with open(path, "r+b") as f:
        size = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= size, "a header written another way than safetensors does"
        f.seek(8)
        f.write(text.ljust(size))


def load_tokenizer(folder):
    """The tokenizer that a model was trained with: the same ids mean other words under another one."""
    try:
        return Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
    except Exception as e:  # the library raises a bare Exception for a missing file and every kind of bad one
        raise UserError(f"{folder}: no tokenizer.json that can be read ({first_line(e)})") from None


def load(name_or_path, device=None, dtype=None, stage=None, llada=None, whisper=None, diffa=None, int8=False):
    """A preset ("tiny", "diffa1", "diffa2") or a checkpoint folder -> model, tokenizer.

    LoRA, if the checkpoint has it, is kept apart; adapters.merge_lora(model) folds it in.  dtype: the
    backbone's (default fp32 on a CPU, bf16 on a GPU; the released models bf16 everywhere, their encoder and
    adapters fp32).  stage, llada, whisper, diffa: see `assemble`; files not given are looked for beside the
    checkpoint (FOLDER/llada, FOLDER/whisper), then in the hub's cache, then on the hub.
    int8: the matrices of encoder and backbone in int8, LoRA merged (runtime/int8.py), for asking only.
    Raises UserError with one line for anything wrong.
    """
    device = pick_device(device)
    if int8:
        # from the mapped files, so that no device ever holds the whole model in bf16
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else None)
        model, tokenizer = load(name_or_path, "cpu", dtype, stage, llada, whisper, diffa)
        return quantise(model, device).to(device), tokenizer
    if name_or_path in RELEASES:
        # two of the authors' files: after stage 1, and after the last; stages 2 to 4 read audio alike
        file_stage = 1 if stage == 1 else 4
        files = fetch(name_or_path, file_stage, llada, whisper, diffa)
        dtype = dtype or torch.bfloat16  # on a CPU too: in fp32 LLaDA alone would take 32 GB
        return assemble(PRESETS[name_or_path], *files, device, dtype, file_stage, name_or_path)
    return load_checkpoint(name_or_path, device, dtype, {"llada": llada, "whisper": whisper, "diffa": diffa})


def load_checkpoint(name, device, dtype, given):
    """`load` of a folder that `save` wrote.  given: {part: path or None}, frozen parts from elsewhere."""
    folder = ASSETS.get(name, name)
    path = os.path.join(folder, "model.safetensors")
    if not os.path.exists(path):
        raise UserError(f"no model {name!r}: give {', '.join(PRESETS)} or a folder with a model.safetensors")
    tokenizer = load_tokenizer(folder)
    with open_safetensors(path) as f:
        header = f.metadata() or {}
        weights = {key: f.get_tensor(key) for key in f.keys()}
    try:
        fields = json.loads(header["config"])
        config = Config(**{**fields, "taps": tuple(fields["taps"])})  # JSON has no tuples
        base = json.loads(header.get("base", "{}"))
        if base and base["name"] not in (RELEASES if "llada" in base else PRESETS):
            raise ValueError(f"frozen parts of {base['name']!r}")
        # on "meta" a tensor has a shape and no memory: only what is loaded into it takes any
        with torch.device("meta"):
            model = DIFFA2(config, lora=any("lora_" in key for key in weights))
        model.stage = int(header["stage"])
    except Exception as e:  # as many kinds of error as a header can have wrong values
        raise UserError(f"{path}: no Config of this code in its header ({first_line(e)})") from None
    check_tokenizer(tokenizer, config, folder)

    # ---- the frozen parts: each from the command line, else from beside the checkpoint, else from where it
    # is published.  base says which they were when this checkpoint was trained.
    files = {}
    for part, where in given.items():
        if where and part not in base:
            raise UserError(
                f"--{part}: {name} brings this part itself; --llada, --whisper and --diffa "
                "go with --model diffa1 or diffa2, --whisper with a model that shares Whisper's encoder too"
            )
        beside = os.path.join(folder, part)
        files[part] = where or (beside if os.path.exists(beside) else None)
    if "llada" in base:
        llada, whisper, _ = fetch(base["name"], None, files["llada"], files["whisper"], adapters=False)
        load_frozen(model, llada, whisper, device, dtype or torch.bfloat16, base["name"])
        files = {"llada": llada, "whisper": whisper}
        dtype = torch.float32  # of all that was trained: see LoRALinear
    else:
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        if base:
            load_tiny_encoder(model, files["whisper"], device, dtype)
    for part, wanted in base.items():
        # beside another backbone of the same shapes the adapters would load, and the answers be nonsense
        if part != "name" and model.base[part] != wanted:
            where = files[part] or "the shipped encoder"
            which = f"({part} {model.base[part]}, wanted {wanted})"
            raise UserError(f"{where}: not the weights that {name} was trained on {which}")

    load_strictly(model, weights, path, device, dtype, saved_part(model))
    return model.eval(), tokenizer


def check_tokenizer(tokenizer, config, folder):
    """Raises UserError for a tokenizer with other ids than the model's: its [MASK] would be some word."""
    for field, token in SPECIAL_TOKENS.items():
        found, wanted = tokenizer.token_to_id(token), getattr(config, field)
        if found != wanted:
            raise UserError(f"{folder}: the tokenizer has {token} at {found}, not {wanted}")
    if tokenizer.get_vocab_size() > config.vocab:
        raise UserError(f"{folder}: the tokenizer has more tokens than the model's {config.vocab}")


def load_tiny_encoder(model, whisper=None, device="cpu", dtype=None):
    """Gives a model of preset tiny the shipped encoder of Whisper tiny.en, or that of another file.

    model.base then says which it is, and `save` leaves it out: it would be the same 30 MB in the
    checkpoint of every stage.  The shipped one goes by its name, any other by its fingerprint.
    """
    load_whisper(model, whisper or os.path.join(HERE, "assets", TINY_ENCODER), device, dtype)
    found = fingerprint(model.encoder)
    model.base = {"name": "tiny", "whisper": TINY_ENCODER if found == TINY_FINGERPRINT else found}


def fingerprint(module):
    """What tells one set of frozen weights from another: 16 hexadecimal digits.

    A hash of the first 256 numbers of each tensor: 16 GB would take long to read, and no training leaves the
    beginning of every tensor as it was.  In bf16, so that it is the same for every file format and
    precision that the weights were read from.
    """
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if "lora_" not in name:  # trained, and so no part of what it was trained beside
            digest.update(name.encode())
            # as 16-bit integers: numpy has no bf16
            digest.update(value.flatten()[:256].to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def saved_part(model):
    """Names of what a checkpoint of this model holds: all but the frozen parts that lie in other files."""
    if not model.base:
        return list(model.state_dict())
    if "llada" in model.base:
        return trained_part(model)
    # the small model's backbone is frozen from stage 1 on, but it was made here and lies nowhere else
    return [k for k in model.state_dict() if not k.startswith("encoder.")]


def trained_part(model):
    """Names of what the paper trains (Section 3.3): adapters, soft prompts, LoRA; 1.1 % of the whole.

    The authors' files and our checkpoints of the released models hold these and nothing else.
    """
    trained = ("semantic.", "acoustic.", "soft_prompts")
    return [k for k in model.state_dict() if k.startswith(trained) or "lora_" in k]


# ---------------------------------------------------------------------------------------------
# opening files, and filling a model.  Both kinds are mapped: the operating system reads a page when a
# number in it is looked at, and may drop it again.  What goes to a GPU then never fills the computer's own
# memory, and what stays on the CPU in the type of the file takes none beside the disk's cache.


def open_safetensors(path):
    try:
        return safe_open(path, "pt", device="cpu")
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: cut short or not a safetensors file ({e})") from None


def open_pickle(path):
    """A .bin or .pt of tensors, mapped; anything in it that is not data is refused (weights_only).

    These files come from strangers, and an ordinary unpickler calls whatever function they name.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as e:
        raise UserError(f"{path}: holds code or objects, and is not opened ({first_line(e)})") from None
    except (RuntimeError, OSError, EOFError, ValueError) as e:
        raise UserError(f"{path}: cut short or not a file of weights ({first_line(e)})") from None


def read_json(folder, name, key):
    """What stands under a key of a JSON file that LLaDA's folder must have."""
    try:
        return json.loads(Path(folder, name).read_text("utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{folder}: no {name} that has {key} ({first_line(e)})") from None


def load_strictly(model, weights, path, device, dtype, expected):
    """Gives the places named by `expected` their weights; each key and shape is checked before any moves.

    dtype=None: each in the type of its place.  What is of the right type and on the device is not copied.
    """
    state = model.state_dict()
    for key in expected:
        if key not in weights:
            raise UserError(f"{path}: {key} is missing")
        found, wanted = tuple(weights[key].shape), tuple(state[key].shape)
        if found != wanted:
            raise UserError(f"{path}: {key} has shape {found}, not {wanted}")
    unknown = weights.keys() - set(expected)
    if unknown:
        raise UserError(f"{path}: {min(unknown)} has no place in this model")
    moved = {k: v.to(device, dtype or state[k].dtype) for k, v in weights.items()}
    # assign: the tensors themselves take the places, also those on "meta", which have no memory to copy to.
    # strict=False: the rest of the model comes from other files; what this one owes was checked above.
    model.load_state_dict(moved, strict=False, assign=True)
    if "encoder.conv1.weight" in moved:
        # the encoder's positions are computed, not loaded: a shorter window takes the first of Whisper's.
        # They are in no file of ours, so a model that was built on "meta" has none until now.
        positions = sinusoids(model.config.n_frames, model.config.audio_width)
        model.encoder.positional_embedding = positions.to(moved["encoder.conv1.weight"])


# ---------------------------------------------------------------------------------------------
# Whisper's encoder.  Three projects publish the same tensors under three sets of names, and a reader may have
# any of them on the disk already; large-v3 is 3 GB.  The decoder, more than half of every size, is not read:
# LLaDA takes its place (Section 3.1).

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


def read_ctranslate2(path):
    """The encoder in CTranslate2's model.bin of a Whisper -> {openai-whisper's name: tensor}."""
    weights = {whisper_name(name): value for name, value in ctranslate2.read_encoder(path).items()}
    for name in [key for key in weights if key and ".attn.qkv." in key]:
        stacked = weights.pop(name)  # (3 * width, width), or a bias (3 * width,)
        if len(stacked) % 3:
            raise UserError(f"{path}: {name} has {len(stacked)} rows, which are not q, k and v")
        for part, value in zip(("query", "key", "value"), stacked.chunk(3), strict=True):
            weights[name.replace("qkv", part)] = value.clone()
        # Whisper's keys have no bias (it would add the same to all scores of a query, and softmax takes that
        # out again): the stack holds zeros in its place
        if name.endswith(".bias") and weights.pop(name.replace("qkv", "key")).any():
            raise UserError(f"{path}: {name} has a bias for the keys, which Whisper has not")
    return weights


def whisper_file(path):
    """The file itself, or the first of these in a folder: the hub's name, ours, CTranslate2's."""
    known = ("model.safetensors", "encoder.safetensors", "model.bin")
    for file in (path, *(os.path.join(path, name) for name in known)):
        if os.path.isfile(file):
            return file
    raise UserError(f"{path}: no such file, nor a folder with one of {', '.join(known)}")


def load_whisper(model, path, device, dtype):
    """The encoder from a file of any kind, of the whole model or the encoder alone, or from its folder."""
    path = whisper_file(path)
    if path.endswith(".safetensors"):
        with open_safetensors(path) as f:
            found = {key: f.get_tensor(key) for key in f.keys()}
    elif path.endswith(".bin"):
        found = read_ctranslate2(path)
    else:
        found = open_pickle(path)
        if not isinstance(found, dict) or "model_state_dict" not in found:
            raise UserError(f"{path}: not one of openai-whisper's files")
        found = found["model_state_dict"]
    weights = {whisper_name(key): value for key, value in found.items()}
    weights.pop(None, None)  # mapped and never looked at, the decoder stays on the disk
    expected = [k for k in model.state_dict() if k.startswith("encoder.")]
    load_strictly(model, weights, path, device, dtype, expected)


# ---------------------------------------------------------------------------------------------
# LLaDA's shards.  Our backbone has LLaDA's names, so there is no table: a prefix goes, another comes.


def load_llada(model, folder, device, dtype):
    """LLaDA's shards into model.backbone: 291 tensors in 6 files for LLaDA-8B-Instruct.

    The tensors alone are read.  The folder's own modelling code would run with the user's rights
    (trust_remote_code), and needs an older transformers.
    """
    # other models' folders have the same file names: say so at once, not by the first shape that differs
    kind = read_json(folder, "config.json", "model_type")
    if kind != "llada":
        raise UserError(f"{folder}: holds a model of type {kind!r}; this code runs LLaDA-8B")
    shard_of = read_json(folder, "model.safetensors.index.json", "weight_map")
    if not isinstance(shard_of, dict):
        raise UserError(f"{folder}: model.safetensors.index.json is not an index of shards")
    weights = {}
    for shard in sorted(set(shard_of.values())):
        path = os.path.join(folder, shard)
        if not os.path.isfile(path):
            raise UserError(f"{folder}: the index names {shard}, which is not there")
        with open_safetensors(path) as f:
            keys = list(f.keys())
        for key in keys:
            if not key.startswith("model.transformer."):
                raise UserError(f"{path}: {key} is not one of LLaDA's names")
            # a mapping for each tensor: who lets one go (runtime/int8.py) gives its memory back
            with open_safetensors(path) as f:
                weights["backbone." + key.removeprefix("model.transformer.")] = f.get_tensor(key)
    expected = [k for k in model.state_dict() if k.startswith("backbone.") and "lora_" not in k]
    load_strictly(model, weights, folder, device, dtype, expected)


# ---------------------------------------------------------------------------------------------
# the authors' adapters, soft prompts and LoRA.  Their file holds what they trained and nothing else:
# 396 MB in fp32 for the 99 million parameters of Table B.3.

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


def load_released(model, path, device="cpu"):
    """The authors' pytorch_model.bin into adapters, soft prompts and LoRA, strictly.

    Accepts the names with and without peft's wrapping, and a full training state dict that holds
    the frozen parts too.  A stage-1 file may lack the Q-Former, which that stage does not use, or
    hold a random one; a file of a later stage may lack the soft prompts, which stage 1 alone uses.
    All of them end in the same model; whatever else such a file holds is an error.
    """
    found = open_pickle(path)
    if not isinstance(found, dict) or not all(isinstance(v, torch.Tensor) for v in found.values()):
        raise UserError(f"{path}: not a state dict")
    weights = {}
    for key, value in found.items():
        if "embed_positions" in key:  # Whisper's sinusoids, which are computed
            continue
        name = released_name(key)
        if name is None:
            raise UserError(f"{path}: {key} is not one of DIFFA's names")
        weights[name] = value
    names = [f"acoustic.queries.{tap}" for tap in range(len(model.config.taps))]
    queries = [weights.pop(name) for name in names if name in weights]  # each (1, n_queries, d)
    if queries:
        if len({value.shape for value in queries}) > 1:
            raise UserError(f"{path}: acoustic_connector.layer_prompts are not all of one shape")
        weights["acoustic.queries"] = torch.cat(queries)
    trained, optional = trained_part(model), "acoustic." if model.stage == 1 else "soft_prompts"
    state = model.state_dict()
    for key in trained:
        if key.startswith(optional) and key not in weights:
            # nobody reads these in this stage; they only must not be left without memory
            weights[key] = torch.zeros(state[key].shape)
    expected = [k for k in state if k in trained or k in weights]  # also frozen parts, if the file has them
    load_strictly(model, weights, path, device, None, expected)


# ---------------------------------------------------------------------------------------------
# the released models: where their parts are published, and how they are put together

# preset -> where its three parts lie, and their GB, told without a network; GB of memory that asking takes
RELEASES = {
    "diffa2": {
        "llada": ("GSAI-ML/LLaDA-8B-Instruct", 16.0),
        "whisper": ("openai/whisper-large-v3", 3.1),
        "diffa": ("zhoujiaming777/DIFFA-2", 0.4),
        "memory": 20,
    },
    "diffa1": {
        "llada": ("GSAI-ML/LLaDA-8B-Instruct", 16.0),
        "whisper": ("openai/whisper-small", 1.0),
        "diffa": ("zhoujiaming777/DIFFA", 0.15),
        "memory": 17,
    },
}
PATTERNS = {  # files of each repository that are needed: the hub has the same weights in other formats too
    "llada": ["*.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json"],
    "whisper": ["model.safetensors"],
    "diffa": ["pytorch_model.bin"],
}


def fetch(name, stage=None, llada=None, whisper=None, diffa=None, adapters=True):
    """Paths of LLaDA's folder, Whisper's file or folder, DIFFA's file: those given, else the hub's.

    adapters=False: LLaDA and Whisper alone, for training from the start; the third path is None.
    Says what it will download and what the model needs before it starts: not every disk has room for
    19.5 GB.  What lies in the hub's cache already is found without a network.
    """
    if stage == 1 and name == "diffa1":
        raise UserError("DIFFA-1 was released after its last stage only")
    # DIFFA-2's root is the model after stage 4; that after stage 1 has a folder of its own
    patterns = PATTERNS | ({"diffa": ["stage1/pytorch_model.bin"]} if stage == 1 else {})
    release = RELEASES[name]
    found = {"llada": llada, "whisper": whisper} | ({"diffa": diffa} if adapters else {})
    for part, path in found.items():
        if path is not None:
            if not os.path.exists(path):
                raise UserError(f"--{part} {path}: no such file or folder")
            continue
        with contextlib.suppress(OSError, ValueError):  # not in the cache
            folder = snapshot_download(release[part][0], allow_patterns=patterns[part], local_files_only=True)
            # the cache holds a folder from its first file on, or with another stage's files alone
            if all(glob.glob(os.path.join(folder, p)) for p in patterns[part]):
                found[part] = folder
    missing = [part for part, path in found.items() if path is None]
    size = sum(release[part][1] for part in missing)
    download = f"{size:.1f} GB to download, " if missing else ""
    print(f"{name}: {download}asking it takes about {release['memory']} GB of memory", file=sys.stderr)
    for part in missing:
        try:
            found[part] = snapshot_download(release[part][0], allow_patterns=patterns[part])
        except Exception as e:  # the hub's errors, the network's, the disk's: all of them end here
            what = f"{release[part][0]} cannot be downloaded ({first_line(e)})"
            raise UserError(f"{what}; give --{part} instead") from None
    if adapters and os.path.isdir(found["diffa"]):
        found["diffa"] = os.path.join(found["diffa"], patterns["diffa"][0])
    return found["llada"], found["whisper"], found.get("diffa")


def load_frozen(model, llada, whisper, device, dtype, name):
    """LLaDA and Whisper's encoder, which no stage of the paper changes; model.base says what they are.

    dtype: LLaDA's, which is published in bf16.  Whisper stays in fp32, as in the authors' inference; beside
    16 GB of LLaDA its 2.5 GB are few.
    """
    load_llada(model, llada, device, dtype)
    load_whisper(model, whisper, device, torch.float32)
    model.base = {"name": name, "llada": fingerprint(model.backbone), "whisper": fingerprint(model.encoder)}


def assemble(config, llada, whisper, diffa, device, dtype, stage, name="diffa2"):
    """LLaDA's folder + Whisper's file + DIFFA's pytorch_model.bin -> model, tokenizer.

    stage: what the file was trained for (1: soft prompts; LoRA from stage 3 on, Section 3.3).
    diffa=None leaves adapters and LoRA empty (on no device) for the caller to fill.
    """
    tokenizer = load_tokenizer(llada)
    check_tokenizer(tokenizer, config, llada)
    with torch.device("meta"):
        model = DIFFA2(config, lora=stage >= 3)
    model.stage = stage
    load_frozen(model, llada, whisper, device, dtype, name)
    if diffa is not None:
        load_released(model, diffa, device)
    return model.eval(), tokenizer


def tutorial():
    """What `python weights.py` alone shows: what lies in the small model's checkpoint, and what does not."""
    path = os.path.join(ASSETS["tiny"], "model.safetensors")
    with open_safetensors(path) as f:
        header = f.metadata()
        sizes = {key: f.get_tensor(key).numel() for key in f.keys()}
    print(f"{os.path.relpath(path, HERE)}: {len(sizes)} tensors, trained up to stage {header['stage']}\n")
    print(f"{'part':12}{'tensors':>9}{'parameters':>13}   the largest")
    for part in sorted({key.split(".")[0] for key in sizes}):
        mine = {key: n for key, n in sizes.items() if key.split(".")[0] == part}
        print(f"{part:12}{len(mine):>9}{sum(mine.values()):>13,}   {max(mine, key=mine.get)}")
    print(f"\nnot in it, because it was never trained here: {header['base']}")
    _, tokenizer = load("tiny", "cpu")
    print(f"\nload('tiny'): every tensor in its place; {tokenizer.get_vocab_size()} kinds of tokens")
    print("Names of other formats that `load` turns into ours, one of each:")
    for format, rename, key in (
        ("transformers' Whisper", whisper_name, "layers.0.fc1.weight"),
        ("CTranslate2's Whisper", whisper_name, "encoder/layer_0/ffn/linear_0/weight"),
        ("the authors' adapters", released_name, "acoustic_connector.proj.1.weight"),
    ):
        print(f"  {format:24}{key:38}-> {rename(key)}")


if __name__ == "__main__":
    tutorial()
