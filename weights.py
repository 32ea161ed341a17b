"""Everything about weights on disk: our checkpoints, Whisper's encoder, LLaDA's shards, the authors' files.

    load("tiny")                       the small model that comes with the code
    load("out/tiny/stage4")            a folder that `save` wrote
    load("diffa2", whisper=FILE)       the released model; what is not given comes from the hub

    python weights.py --whisper FILE --out assets/whisper-tiny.en       how the shipped encoder was made

What is read, always as data, never as code:

    ours           model.safetensors (Config and stage in its header) and tokenizer.json
    Whisper        openai-whisper's .pt, transformers' .safetensors, CTranslate2's model.bin (faster-whisper),
                   and our encoder.safetensors
    LLaDA          a folder of safetensors shards with their index
    DIFFA, DIFFA-2 the authors' pytorch_model.bin

Loading is strict: each tensor of a file has a place and each place gets a tensor of its shape, or the
message names the one that is wrong.  Each format's names turn into ours in one table and one function.
A model is built on the meta device and filled from mapped files, so no second copy of 8 B parameters
exists at any time; `from_pretrained` of transformers does the same for one library's own format.
A checkpoint leaves out what was never trained and lies elsewhere: the small model's holds no Whisper, the
released ones' neither Whisper nor LLaDA.  It says what they are (`model.base`: a name and a fingerprint of
the weights), never where they lie, so that it can be given to somebody else.
"""

import dataclasses
import glob
import hashlib
import json
import math
import os
import pickle
import re
import struct
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from whisper.model import sinusoids

from model import DIFFA2, PRESETS, SPECIAL_TOKENS, Config, Int8Linear, quantise
from runtime import Parser, UserError, exit_status, first_line, pick_device, write_file

HERE = os.path.dirname(os.path.abspath(__file__))
ASSETS = {"tiny": os.path.join(HERE, "assets", "tiny")}  # presets whose weights come with the code
TINY_ENCODER = "whisper-tiny.en"  # the folder of assets that holds the encoder of preset tiny
TINY_FINGERPRINT = "c7311073ee9e7c16"  # its `fingerprint`


# ---------------------------------------------------------------------------------------------
# our checkpoints


def save(model, tokenizer, folder, dtype=torch.bfloat16):
    """Writes folder/model.safetensors (Config and stage in its header) and folder/tokenizer.json.

    Of a model with frozen parts from other files only the rest is written, and what those are:
    the small model without its encoder, a released one as 200 MB instead of 20 GB.
    """
    if any(isinstance(module, Int8Linear) for module in model.modules()):
        raise UserError(f"{folder}: a model in int8 is not written, its LoRA is merged; load it without int8")
    header = {"config": json.dumps(dataclasses.asdict(model.config)), "stage": str(model.stage)}
    if model.base:
        header["base"] = json.dumps(model.base)
    state = model.state_dict()
    weights = {k: state[k].detach().to("cpu", dtype).contiguous() for k in saved_part(model)}
    write_file(os.path.join(folder, "tokenizer.json"), tokenizer.save)
    write_file(os.path.join(folder, "model.safetensors"), lambda path: save_sorted(weights, path, header))


def save_sorted(weights, path, metadata):
    """safetensors' save_file, which writes the metadata in an order of chance: equal models, equal bytes."""
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
    path = os.path.join(folder, "tokenizer.json")
    if not os.path.exists(path):
        raise UserError(f"{folder}: no tokenizer.json beside the weights")
    try:
        return Tokenizer.from_file(path)
    except Exception as e:  # the library raises a bare Exception for every kind of bad file
        raise UserError(f"{path}: not a tokenizer file ({e})") from None


def load(name_or_path, device=None, dtype=None, stage=None, llada=None, whisper=None, diffa=None, int8=False):
    """A preset ("tiny", "diffa1", "diffa2") or a checkpoint folder -> model, tokenizer.

    Strict: every key and shape is accounted for.  LoRA, if the checkpoint has it, is kept apart;
    adapters.merge_lora(model) folds it in.  dtype: the backbone's (default fp32 on a CPU, bf16 on
    a GPU; the released models bf16 everywhere); encoder and adapters of the released models stay
    in fp32.  stage, llada, whisper, diffa: see `assemble`; files not given are looked for beside the
    checkpoint (FOLDER/llada, FOLDER/whisper), then in the hub's cache, then on the hub.
    int8: the matrices of encoder and backbone in int8, LoRA merged (model.quantise), for asking only.
    Raises UserError with one line for anything wrong.
    """
    device = pick_device(device)
    if int8:
        # from the mapped files, so that no device ever holds the whole model in bf16
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else None)
        model, tokenizer = load(name_or_path, "cpu", dtype, stage, llada, whisper, diffa)
        return quantise(model, device).to(device), tokenizer
    if name_or_path in RELEASES:
        paths = fetch(name_or_path, stage, llada, whisper, diffa)
        dtype = dtype or torch.bfloat16
        return assemble(PRESETS[name_or_path], *paths, device, dtype, stage or 4, name_or_path)
    folder = ASSETS.get(name_or_path, name_or_path)
    path = os.path.join(folder, "model.safetensors")
    if not os.path.exists(path):
        known = ", ".join(PRESETS)
        raise UserError(
            f"no model {name_or_path!r}: give one of {known}, or a folder that holds model.safetensors"
        )
    tokenizer = load_tokenizer(folder)
    with open_safetensors(path) as f:
        header = f.metadata() or {}
        weights = {k: f.get_tensor(k) for k in f.keys()}
    if "config" not in header or "stage" not in header:
        raise UserError(f"{path}: has no Config in its header; it was not written by this code")
    fields = json.loads(header["config"])
    config = Config(**{**fields, "taps": tuple(fields["taps"])})
    base = json.loads(header.get("base", "{}"))  # what the frozen parts are
    has_lora = any("lora_" in key for key in weights)
    for part, given in (("llada", llada), ("whisper", whisper), ("diffa", diffa)):
        if given and part not in base:
            raise UserError(
                f"--{part}: {name_or_path} brings this part itself; --llada, --whisper and --diffa "
                "go with --model diffa1 or diffa2, --whisper with a model that shares Whisper's encoder too"
            )
    if "llada" in base:
        dtype = dtype or torch.bfloat16
        files = llada or beside(folder, "llada"), whisper or beside(folder, "whisper")
        if None in files:
            files = fetch(base["name"], None, *files, adapters=False)[:2]
        model, _ = assemble(config, *files, None, device, dtype, int(header["stage"]), base["name"], has_lora)
        for part, where in (("llada", files[0]), ("whisper", files[1])):
            check_fingerprint(name_or_path, part, where, model.base[part], base[part])
        dtype = torch.float32  # that of everything trained
    else:
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        with torch.device("meta"):
            model = DIFFA2(config, lora=has_lora)
        if base:
            whisper = whisper or beside(folder, "whisper")
            load_tiny_encoder(model, whisper, device, dtype)
            check_fingerprint(name_or_path, "whisper", whisper, model.base["whisper"], base["whisper"])
    model.stage = int(header["stage"])
    load_strictly(model, weights, path, device, dtype, expected=saved_part(model))
    fix_positions(model)
    return model.eval(), tokenizer


def beside(folder, part):
    """A frozen part that lies beside a checkpoint, under its own name; None where none does."""
    path = os.path.join(folder, part)
    return path if os.path.exists(path) else None


def load_tiny_encoder(model, whisper=None, device=None, dtype=None):
    """Gives a model of preset tiny the shipped encoder of Whisper tiny.en, or that of another file.

    model.base then says which it is, and `save` leaves it out.
    """
    weight = model.encoder.conv1.weight
    shipped = os.path.join(HERE, "assets", TINY_ENCODER)
    load_whisper(model, whisper or shipped, device or weight.device, dtype or weight.dtype)
    found = fingerprint(model.encoder)
    model.base = {"name": "tiny", "whisper": TINY_ENCODER if found == TINY_FINGERPRINT else found}


def fingerprint(module):
    """What tells one set of frozen weights from another: a hash of the first numbers of each tensor, in bf16.

    The same for every file format and precision that the weights were read from.
    """
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if "lora_" not in name:
            digest.update(name.encode())
            digest.update(value.flatten()[:256].to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def check_fingerprint(checkpoint, part, where, found, wanted):
    """Raises UserError when a frozen part is not the one that a checkpoint was trained on."""
    if found != wanted:
        raise UserError(
            f"{where or 'the shipped encoder'}: not the weights that {checkpoint} was trained on "
            f"({part} {found}, wanted {wanted})"
        )


def saved_part(model):
    """Names of what a checkpoint of this model holds: all but the frozen parts that lie in other files."""
    if not model.base:
        return list(model.state_dict())
    if "llada" in model.base:
        return trained_part(model)
    return [k for k in model.state_dict() if not k.startswith("encoder.")]


def trained_part(model):
    """Names of what the authors' files and our compact checkpoints hold: adapters, soft prompts, LoRA."""
    trained = ("semantic.", "acoustic.", "soft_prompts")
    return [k for k in model.state_dict() if k.startswith(trained) or "lora_" in k]


# ---------------------------------------------------------------------------------------------
# checkpoints of a stage that is running: what trains, the optimizers, random states

KEEP = 2  # the last ones


def write_state(state, out, step):
    """Writes out/state-STEP.pt and drops all but the last KEEP.

    Whatever moment the process dies at, a whole checkpoint is there.  Raises UserError when the disk
    is full; the older checkpoints stay.
    """

    def write(path):
        with open(path, "wb") as f:
            torch.save(state, f)

    try:
        write_file(os.path.join(out, f"state-{step:07}.pt"), write)
    except UserError as e:
        raise UserError(f"{e}; older checkpoints are kept") from None
    for old in list_states(out)[:-KEEP]:
        os.remove(old)


def in_memory(thing):
    """A copy, on the CPU, of the tensors in dicts and lists: training goes on changing the originals."""
    if torch.is_tensor(thing):
        return thing.detach().to("cpu", copy=True)
    if isinstance(thing, dict):
        return {key: in_memory(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return type(thing)(in_memory(value) for value in thing)
    return thing


class StateWriter:
    """write_state in a thread: training waits for a copy in memory, not for the disk."""

    def __init__(self, out):
        self.out, self.thread, self.last = out, ThreadPoolExecutor(1), None

    def write(self, state, step):
        self.wait()
        self.last = self.thread.submit(write_state, in_memory(state), self.out, step)

    def wait(self):
        """Until the last checkpoint is on the disk.  What went wrong with it is raised here."""
        if self.last is not None:
            self.last.result()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.thread.shutdown()


def list_states(out):
    """Checkpoints in `out`, oldest first."""
    names = [n for n in os.listdir(out) if re.fullmatch(r"state-\d{7}\.pt", n)] if os.path.isdir(out) else []
    return [os.path.join(out, n) for n in sorted(names)]


def read_state(path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        raise UserError(f"{path}: not a checkpoint of a running stage ({first_line(e)})") from None


# ---------------------------------------------------------------------------------------------
# opening files, and filling a model


def open_safetensors(path):
    try:
        return safe_open(path, "pt", device="cpu")
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: cut short or not a safetensors file ({e})") from None


def open_pickle(path):
    """A .bin or .pt of tensors, mapped; anything in it that is not data is refused."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as e:
        what = "holds code or objects beside tensors, and is not opened"
        raise UserError(f"{path}: {what} ({first_line(e)})") from None
    except (RuntimeError, OSError, EOFError, ValueError) as e:
        raise UserError(f"{path}: cut short or not a file of weights ({first_line(e)})") from None


def load_strictly(model, weights, path, device, dtype=None, expected=None):
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
            found, wanted = tuple(weights[key].shape), tuple(state[key].shape)
            raise UserError(f"{path}: {key} has shape {found}, not {wanted}")
    places = set(expected)
    for key in weights:
        if key not in places:
            raise UserError(f"{path}: {key} has no place in this model")
    moved = {k: v.to(device, dtype) for k, v in weights.items()}
    model.load_state_dict(moved, strict=len(places) == len(state), assign=True)


def fix_positions(model):
    """The encoder's sinusoids are computed, not loaded: a shorter window takes the first of Whisper's."""
    c, weight = model.config, model.encoder.conv1.weight
    model.encoder.positional_embedding = sinusoids(c.n_frames, c.audio_width).to(weight.device, weight.dtype)


# ---------------------------------------------------------------------------------------------
# Whisper's encoder


WHISPER_NAMES = {  # transformers' -> openai-whisper's
    "self_attn.q_proj": "attn.query",
    "self_attn.k_proj": "attn.key",
    "self_attn.v_proj": "attn.value",
    "self_attn.out_proj": "attn.out",
    "self_attn_layer_norm": "attn_ln",
    "fc1": "mlp.0",
    "fc2": "mlp.2",
    "final_layer_norm": "mlp_ln",
}


def whisper_name(key):
    """transformers' name of an encoder tensor -> ours; None for the positions, which are computed."""
    if key.startswith("embed_positions"):
        return None
    if key.startswith("layers."):
        _, n, rest = key.split(".", 2)
        module, leaf = rest.rsplit(".", 1)
        return f"encoder.blocks.{n}.{WHISPER_NAMES.get(module, module)}.{leaf}"
    return "encoder." + key.replace("layer_norm", "ln_post")


CTRANSLATE2_NAMES = {  # CTranslate2's -> openai-whisper's; q, k and v are one matrix there
    "self_attention/layer_norm": "attn_ln",
    "self_attention/linear_0": "attn.qkv",
    "self_attention/linear_1": "attn.out",
    "ffn/layer_norm": "mlp_ln",
    "ffn/linear_0": "mlp.0",
    "ffn/linear_1": "mlp.2",
    "gamma": "weight",
    "beta": "bias",
}


def ctranslate2_name(name):
    """CTranslate2's name of an encoder tensor -> ours."""
    module, _, leaf = name.removeprefix("encoder/").rpartition("/")
    leaf = CTRANSLATE2_NAMES.get(leaf, leaf)
    if module.startswith("layer_") and "/" in module:
        block, module = module.removeprefix("layer_").split("/", 1)
        return f"encoder.blocks.{block}.{CTRANSLATE2_NAMES.get(module, module)}.{leaf}"
    return f"encoder.{module.replace('layer_norm', 'ln_post')}.{leaf}"


CTRANSLATE2_TYPES = {0: torch.float32, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.float16}


def read_ctranslate2(path):
    """The encoder in CTranslate2's model.bin of a Whisper -> {openai-whisper's name: tensor}.

    The file is little-endian: version, name and revision of the model's kind, number of variables; each
    variable's name, rank, sizes, type, bytes, data; then aliases, other names for the same data.  Nothing
    follows.  Of the decoder only the headers are read.
    """
    try:
        with open(path, "rb") as f:
            return parse_ctranslate2(f, os.path.getsize(path), path)
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None


def parse_ctranslate2(f, size, path):
    """read_ctranslate2 of an open file of `size` bytes."""

    def check(n):
        if n > size - f.tell():
            raise UserError(f"{path}: cut short, or not a file of CTranslate2's")

    def number(code):
        n = struct.calcsize("<" + code)
        check(n)
        return struct.unpack("<" + code, f.read(n))[0]

    def string():
        n = number("H")
        check(n)
        return f.read(n).rstrip(b"\0").decode(errors="replace")

    weights = {}
    version = number("I")
    if version != 6:
        raise UserError(f"{path}: version {version} of CTranslate2's format, or another one; 6 is read")
    kind = string()
    if kind != "WhisperSpec":
        raise UserError(f"{path}: holds a {kind[:40]!r}, not a WhisperSpec")
    number("I")  # revision
    for _ in range(number("I")):
        name = string()
        shape = [number("I") for _ in range(number("B"))]
        dtype, n = number("B"), number("I")
        check(n)
        is_scalar = not shape  # settings, such as the number of heads
        if is_scalar or not name.startswith("encoder/") or name == "encoder/position_encodings/encodings":
            f.seek(n, os.SEEK_CUR)
            continue
        if dtype not in CTRANSLATE2_TYPES:
            raise UserError(f"{path}: {name} is of type {dtype}, which is unknown")
        dtype = CTRANSLATE2_TYPES[dtype]
        if not dtype.is_floating_point:
            raise UserError(f"{path}: {name} is quantised; convert the model with --quantization float16")
        if n == 0 or n != math.prod(shape) * dtype.itemsize:
            raise UserError(f"{path}: {name} has {n} bytes for the shape {tuple(shape)}")
        weights[ctranslate2_name(name)] = torch.frombuffer(bytearray(f.read(n)), dtype=dtype).view(shape)
    for _ in range(number("I")):
        string()
        string()
    if f.tell() != size:
        raise UserError(f"{path}: {size - f.tell()} bytes follow the last alias")
    for name in [k for k in weights if ".attn.qkv." in k]:
        stacked = weights.pop(name)
        if len(stacked) % 3:
            raise UserError(f"{path}: {name} has {len(stacked)} rows, which are not q, k and v")
        for part, value in zip(("query", "key", "value"), stacked.chunk(3), strict=True):
            weights[name.replace("qkv", part)] = value.clone()
        if name.endswith(".bias") and weights.pop(name.replace("qkv", "key")).any():
            raise UserError(f"{path}: {name} has a bias for the keys, which Whisper has not")
    return weights


def whisper_file(path):
    """The file itself, or the one of these names in a folder."""
    if os.path.isdir(path):
        known = ("model.safetensors", "encoder.safetensors", "model.bin")
        found = [name for name in known if os.path.isfile(os.path.join(path, name))]
        if not found:
            raise UserError(f"{path}: a folder without {', '.join(known[:-1])} or {known[-1]}")
        path = os.path.join(path, found[0])
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; Whisper's encoder is looked for there")
    return path


def load_whisper(model, path, device, dtype):
    """The encoder from a file of any of four kinds, or from a folder that holds one.

    openai-whisper's .pt; transformers' .safetensors, of the whole model or the encoder; CTranslate2's
    model.bin; our own encoder.safetensors, whose names are openai-whisper's.
    """
    path = whisper_file(path)
    if path.endswith(".safetensors"):
        weights = {}
        with open_safetensors(path) as f:
            for key in f.keys():
                if "decoder." in key or key == "proj_out.weight":
                    continue
                name = whisper_name(key.removeprefix("model.").removeprefix("encoder."))
                if name is not None:
                    weights[name] = f.get_tensor(key)
    elif path.endswith(".bin"):
        weights = read_ctranslate2(path)
    else:
        found = open_pickle(path)
        if not isinstance(found, dict) or "model_state_dict" not in found:
            raise UserError(f"{path}: not one of openai-whisper's files")
        weights = {k: v for k, v in found["model_state_dict"].items() if k.startswith("encoder.")}
        weights.pop("encoder.positional_embedding", None)
    expected = [k for k in model.state_dict() if k.startswith("encoder.")]
    load_strictly(model, weights, path, device, dtype, expected=expected)
    fix_positions(model)


def export_encoder(whisper, folder):
    """Writes folder/encoder.safetensors: the encoder of preset tiny in fp16.

    The header names the source; the same source gives the same bytes.  Returns both files' SHA-256.
    """
    whisper = whisper_file(whisper)
    with torch.device("meta"):
        model = DIFFA2(PRESETS["tiny"])
    load_whisper(model, whisper, torch.device("cpu"), torch.float16)
    weights = {k: v.contiguous() for k, v in model.state_dict().items() if k.startswith("encoder.")}
    source = {"source": os.path.basename(whisper), "source_sha256": sha256(whisper)}
    path = os.path.join(folder, "encoder.safetensors")
    write_file(path, lambda temporary: save_sorted(weights, temporary, source))
    return source["source_sha256"], sha256(path)


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()


# ---------------------------------------------------------------------------------------------
# LLaDA's shards


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
        kind = found.get("model_type")
        raise UserError(f"{folder}: holds a model of type {kind!r}; this code runs LLaDA-8B")


def load_llada(model, folder, device, dtype):
    """LLaDA's shards into model.backbone, a tensor at a time."""
    index = os.path.join(folder, "model.safetensors.index.json")
    try:
        with open(index, encoding="utf-8") as f:
            shards = sorted(set(json.load(f)["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as e:
        raise UserError(f"{index}: missing or not an index of shards ({type(e).__name__})") from None
    state = model.state_dict()
    expected = {k for k in model.backbone.state_dict() if "lora_" not in k}
    for shard in shards:
        path = os.path.join(folder, shard)
        if not os.path.isfile(path):
            raise UserError(f"{folder}: the index names {shard}, which is not there")
        with open_safetensors(path) as f:
            keys = list(f.keys())
        for key in keys:
            if not key.startswith("model.transformer."):
                raise UserError(f"{path}: {key} is not one of LLaDA's names")
            name = "backbone." + key.removeprefix("model.transformer.")
            # mapped one by one: who lets one go (model.quantise) gives its memory back
            with open_safetensors(path) as f:
                weights = {name: f.get_tensor(key)}
            expected -= {key.removeprefix("model.transformer.")}
            load_strictly(model, weights, path, device, dtype, expected={name} & state.keys())
    if expected:
        total = len(model.backbone.state_dict())
        missing = f"({len(expected)} of {total} tensors missing)"
        raise UserError(f"{folder}: the shards hold no {min(expected)} {missing}")


# ---------------------------------------------------------------------------------------------
# the authors' adapters, soft prompts and LoRA


SEMANTIC_NAMES = {
    "conv.0": "conv1",
    "conv.2": "conv2",
    "linear_connector.0": "fc1",
    "linear_connector.2": "fc2",
    "layernorm": "norm",
}
QFORMER_NAMES = {  # transformers' BertLayer -> ours
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
    """One of the authors' names -> ours, or None for what has no counterpart in the paper's model."""
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
            # one a tap; stacked by the caller
            return "acoustic.queries." + rest.removeprefix("layer_prompts.")
        if rest.startswith("proj."):
            name = {"proj.0": "norm", "proj.1": "proj"}.get(rest[:6])
            return name and f"acoustic.{name}.{leaf}"
        _, _, n, part = (module.removeprefix("acoustic_connector.").split(".", 3) + [""] * 4)[:4]
        return f"acoustic.layers.{n}.{QFORMER_NAMES[part]}.{leaf}" if part in QFORMER_NAMES else None
    if key.startswith("llm_model."):
        rest = key.removeprefix("llm_model.").removeprefix("base_model.model.")
        rest = rest.removeprefix("model.transformer.")
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
    is_state_dict = isinstance(found, dict) and all(isinstance(v, torch.Tensor) for v in found.values())
    if not is_state_dict or not found:
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
    for key, value in weights.items():
        is_frozen = key in state and key not in expected
        weights[key] = value.to(state[key].dtype if is_frozen else torch.float32)
    load_strictly(model, weights, path, device, expected=part)


# ---------------------------------------------------------------------------------------------
# the released models: where their parts are published, and how they are put together


RELEASES = {  # preset -> where its three parts lie, and what they weigh in GB
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
PATTERNS = {  # files of each repository that are needed; stage 1 of DIFFA-2 has a folder of its own
    "llada": ["*.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json"],
    "whisper": ["model.safetensors"],
    "diffa": ["pytorch_model.bin"],
}


def fetch(name, stage=None, llada=None, whisper=None, diffa=None, adapters=True):
    """Paths of LLaDA's folder, Whisper's file or folder, DIFFA's file: those given, else the hub's.

    adapters=False: LLaDA and Whisper alone, for training from the start; the third path is None.
    Says what it will download and what the model needs before it starts.
    """
    release, found = RELEASES[name], {}
    given = {"llada": llada, "whisper": whisper} | ({"diffa": diffa} if adapters else {})
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
            folder = snapshot_download(release[part][0], allow_patterns=patterns[part], local_files_only=True)
            if all(glob.glob(os.path.join(folder, p)) for p in patterns[part]):
                found[part] = folder
        except (OSError, ValueError):  # not in the cache
            pass
    missing = [part for part in given if part not in found]
    size = sum(release[part][1] for part in missing)
    needs = f"{size:.1f} GB to download, about {release['memory']} GB of memory needed"
    print(f"{name}: {needs}", file=sys.stderr)
    for part in missing:
        try:
            found[part] = snapshot_download(release[part][0], allow_patterns=patterns[part])
        except Exception as e:  # the hub's errors, the network's, the disk's: all of them end here
            what = f"{release[part][0]} cannot be downloaded ({first_line(e)})"
            raise UserError(f"{what}; give --{part} instead") from None
    if adapters and os.path.isdir(found["diffa"]):
        found["diffa"] = os.path.join(found["diffa"], patterns["diffa"][0])
    return found["llada"], found["whisper"], found.get("diffa")


def assemble(config, llada, whisper, diffa, device, dtype, stage, name=None, has_lora=None):
    """LLaDA's folder + Whisper's file + DIFFA's pytorch_model.bin -> model, tokenizer.

    The module tree is built on the meta device; each tensor goes from its mapped file straight to
    its place.  stage: what the file was trained for (1: soft prompts, no LoRA).  diffa=None leaves
    adapters and LoRA empty (on no device) for the caller to fill.
    """
    check_llada(llada)
    tokenizer = load_tokenizer(llada)
    for field, token in SPECIAL_TOKENS.items():
        if tokenizer.token_to_id(token) != getattr(config, field):
            found, wanted = tokenizer.token_to_id(token), getattr(config, field)
            raise UserError(f"{llada}: the tokenizer has {token} at {found}, not {wanted}")
    with torch.device("meta"):
        model = DIFFA2(config, lora=stage >= 3 if has_lora is None else has_lora)
    model.stage = stage
    load_llada(model, llada, device, dtype)
    load_whisper(model, whisper, device, torch.float32)
    prints = {"llada": fingerprint(model.backbone), "whisper": fingerprint(model.encoder)}
    model.base = {"name": name} | prints
    if diffa is not None:
        load_released(model, diffa, device)
    return model.eval(), tokenizer


def main(argv=None):
    parser = Parser(prog="weights.py", description="Whisper tiny.en's encoder as preset tiny reads it.")
    parser.add_argument("--whisper", required=True, help="tiny.en: .pt, .safetensors or model.bin")
    parser.add_argument("--out", required=True, metavar="DIR", help="where encoder.safetensors is written")

    def run():
        args = parser.parse_args(argv)
        source, result = export_encoder(args.whisper, args.out)
        print(f"{source}  {args.whisper}\n{result}  {os.path.join(args.out, 'encoder.safetensors')}")

    return exit_status("weights.py", run)


def tutorial():
    """What `python weights.py` alone shows: what lies in the small model's checkpoint, and what does not."""
    path = os.path.join(ASSETS["tiny"], "model.safetensors")
    with open_safetensors(path) as f:
        header = f.metadata()
        shapes = {key: tuple(f.get_slice(key).get_shape()) for key in f.keys()}
    print(f"{os.path.relpath(path, HERE)}: {len(shapes)} tensors, trained up to stage {header['stage']}\n")
    print(f"{'part':12}{'tensors':>9}{'parameters':>13}   the largest")
    for part in sorted({key.split(".")[0] for key in shapes}):
        mine = {key: shape for key, shape in shapes.items() if key.split(".")[0] == part}
        largest = max(mine, key=lambda key: math.prod(mine[key]))
        total = sum(math.prod(shape) for shape in mine.values())
        print(f"{part:12}{len(mine):>9}{total:>13,}   {largest} {mine[largest]}")
    if "base" in header:
        print(f"\nnot in it, because it was never trained here: {header['base']}")
    model, tokenizer = load("tiny", "cpu")
    print(f"\nload('tiny'): every tensor in its place; {tokenizer.get_vocab_size()} kinds of tokens")
    print("Names of other formats that `load` turns into ours, one of each:")
    print("  transformers' Whisper   layers.0.fc1.weight         ->", whisper_name("layers.0.fc1.weight"))
    name = "encoder/layer_0/ffn/linear_0/weight"
    print(f"  CTranslate2's Whisper   {name[8:]:27} ->", ctranslate2_name(name))
    name = "acoustic_connector.proj.1.weight"
    print(f"  the authors' adapters   {name[9:]:27} ->", released_name(name))
    return 0


if __name__ == "__main__":
    sys.exit(main() if len(sys.argv) > 1 else tutorial())
