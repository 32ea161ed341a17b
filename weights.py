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
message names the one that is wrong.  A model with one matrix that was not loaded would still run, only
worse.  Other projects' names of tensors are in runtime/names.py.  A model is built on the meta device and
filled from mapped files, so no second copy of 8 B parameters exists at any time.
A checkpoint leaves out what was never trained and lies elsewhere: the small model's holds no Whisper, the
released ones' neither Whisper nor LLaDA.  It says what they are (`model.base`: a name and a fingerprint of
the weights), never where they lie, so that it can be given to somebody else.
"""

import dataclasses
import json
import os
from pathlib import Path

import torch
from tokenizers import Tokenizer
from whisper.model import sinusoids

from model import DIFFA2, PRESETS, SPECIAL_TOKENS, Config
from runtime import ctranslate2
from runtime.errors import UserError, first_line
from runtime.files import ROOT, fingerprint, open_pickle, open_safetensors, save_sorted, write_file
from runtime.hub import RELEASES, fetch
from runtime.int8 import Int8Linear, quantise
from runtime.llada import check_llada, shards_of
from runtime.names import once, released_name, whisper_file, whisper_name
from runtime.processes import pick_device

ASSETS = {"tiny": os.path.join(ROOT, "assets", "tiny")}  # presets whose weights come with the code
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
    is_merged = model.stage >= 3 and model.config.lora_rank and not any("lora_" in key for key in state)
    if is_merged and "llada" in (model.base or {}):
        raise UserError(f"{folder}: LoRA is merged into LLaDA, which is not written: save before merge_lora")
    weights = {k: state[k].detach().to("cpu", dtype).contiguous() for k in saved_part(model)}
    text = tokenizer.to_str(True)
    # the weights last: whoever looks for model.safetensors finds a folder that is complete
    write_file(os.path.join(folder, "tokenizer.json"), lambda path: Path(path).write_text(text, "utf-8"))
    write_file(os.path.join(folder, "model.safetensors"), lambda path: save_sorted(weights, path, header))


def load_tokenizer(folder):
    """The tokenizer that a model was trained with: the same ids mean other words under another one."""
    try:
        tokenizer = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
    except Exception as e:  # the library raises a bare Exception for a missing file and every kind of bad one
        raise UserError(f"{folder}: no tokenizer.json that can be read ({first_line(e)})") from None
    # such a file may hold how somebody cut and padded batches with it
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def load(name_or_path, device=None, dtype=None, stage=None, llada=None, whisper=None, diffa=None, int8=False):
    """A preset ("tiny", "diffa1", "diffa2") or a checkpoint folder -> model, tokenizer.

    LoRA, if the checkpoint has it, is kept apart; adapters.merge_lora(model) folds it in.  dtype: of backbone
    and adapters (default fp32 on a CPU, bf16 on a GPU); of a released model the backbone's alone (default
    bf16, on a CPU too): its adapters stay in fp32, as does every encoder.  stage: 1 gives a released model as
    it was after stage 1; a folder says its own.  llada, whisper, diffa: files, see `assemble`; those not
    given are looked for beside the checkpoint (FOLDER/llada, FOLDER/whisper), then in the hub's cache, then
    on the hub.
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
        # two of the authors' files: after stage 1, and after the last; stages 2 to 4 read audio the same way
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
    for part, path_given in given.items():
        if path_given and part not in base:
            raise UserError(
                f"--{part}: {name} brings this part itself; --llada, --whisper and --diffa "
                "go with --model diffa1 or diffa2, --whisper with a model that shares Whisper's encoder too"
            )
        beside = os.path.join(folder, part)
        files[part] = path_given or (beside if os.path.exists(beside) else None)
    if "llada" in base:
        llada, whisper, _ = fetch(base["name"], None, files["llada"], files["whisper"], adapters=False)
        load_published(model, llada, whisper, device, dtype or torch.bfloat16, base["name"])
        files = {"llada": llada, "whisper": whisper}
        dtype = torch.float32  # of all that was trained: see LoRALinear
    else:
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        if base:
            load_tiny_encoder(model, files["whisper"], device)
    for part, wanted in base.items():
        # beside another backbone of the same shapes the adapters would load, and the answers be nonsense
        if part != "name" and model.base[part] != wanted:
            source = files[part] or "the shipped encoder"
            which = f"({part} {model.base[part]}, wanted {wanted})"
            raise UserError(f"{source}: not the weights that {name} was trained on {which}")

    load_strictly(model, weights, path, device, dtype, saved_part(model))
    return model.eval(), tokenizer


def check_tokenizer(tokenizer, config, folder):
    """Raises UserError for a tokenizer with other ids than the model's: its [MASK] would be some word."""
    for field, token in SPECIAL_TOKENS.items():
        found, wanted = tokenizer.token_to_id(token), getattr(config, field)
        if found != wanted:
            raise UserError(f"{folder}: the tokenizer has {token} at {found}, not {wanted}")
        # in a prompt it must be one token, and the line feeds beside it must stay
        text = f"{token}\n\nx{token}"
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if (ids[0], ids[-1]) != (wanted, wanted) or tokenizer.decode(ids, skip_special_tokens=False) != text:
            raise UserError(f"{folder}: the tokenizer reads {text!r} as {tokenizer.decode(ids)!r}")
    if tokenizer.get_vocab_size() > config.vocab:
        raise UserError(f"{folder}: the tokenizer has more tokens than the model's {config.vocab}")


def load_tiny_encoder(model, whisper=None, device="cpu"):
    """Gives a model of preset tiny the shipped encoder of Whisper tiny.en, or that of another file.

    model.base then says which it is, and `save` leaves it out: it would be the same 30 MB in the
    checkpoint of every stage.  The shipped one goes by its name, any other by its fingerprint.
    """
    load_whisper(model, whisper or os.path.join(ROOT, "assets", TINY_ENCODER), device)
    found = fingerprint(model.encoder)
    model.base = {"name": "tiny", "whisper": TINY_ENCODER if found == TINY_FINGERPRINT else found}


def saved_part(model):
    """Names of what a checkpoint of this model holds: all but the frozen parts that lie in other files."""
    if not model.base:
        return list(model.state_dict())
    if "llada" in model.base:
        return trained_part(model)
    # the small model's backbone is frozen from stage 1 on, but it was made here and lies nowhere else
    return [k for k in model.state_dict() if not k.startswith("encoder.")]


def trained_part(model):
    """Names of what trains: adapters and LoRA (Section 3.3), and stage 1's soft prompts; 1.1 % of the whole.

    The authors' files and our checkpoints of the released models hold these and nothing else.
    """
    trained = ("semantic.", "acoustic.", "soft_prompts")
    return [k for k in model.state_dict() if k.startswith(trained) or "lora_" in k]


# ---------------------------------------------------------------------------------------------
# filling a model


def load_strictly(model, weights, path, device, dtype, expected):
    """Gives the places named by `expected` their weights; each key and shape is checked before any moves.

    dtype=None: each in the type of its place; the encoder's always in fp32, for Whisper's norms take nothing
    else (its other layers follow what comes in).  What is of the right type and on the device is not copied.
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
    moved = {}
    for key, value in weights.items():
        own = torch.float32 if key.startswith("encoder.") else dtype or state[key].dtype
        moved[key] = value.to(device, own)
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


def load_whisper(model, path, device):
    """The encoder from a file of any kind, of the whole model or the encoder alone, or from its folder."""
    path = whisper_file(path)
    if path.endswith(".safetensors"):
        with open_safetensors(path) as f:
            found = {key: f.get_tensor(key) for key in f.keys()}
    elif path.endswith(".bin"):
        found = ctranslate2.read_encoder(path)
    else:
        found = open_pickle(path)
        if not isinstance(found, dict) or "model_state_dict" not in found:
            raise UserError(f"{path}: not one of openai-whisper's files")
        found = found["model_state_dict"]
    # no name: the decoder, which was mapped and is never looked at, and so stays on the disk
    named = [(name, value) for key, value in found.items() if (name := whisper_name(key))]
    weights = once(named, path)
    expected = [k for k in model.state_dict() if k.startswith("encoder.")]
    load_strictly(model, weights, path, device, None, expected)


# ---------------------------------------------------------------------------------------------
# LLaDA's shards.  Our backbone has LLaDA's names, so there is no table: only the prefix changes.


def load_llada(model, folder, device, dtype):
    """LLaDA's shards into model.backbone: 291 tensors in 6 files for LLaDA-8B-Instruct.

    The tensors alone are read.  The folder's own modelling code would run with the user's rights
    (trust_remote_code), and needs an older transformers.
    """
    check_llada(folder, model.config)
    named = []
    for path in shards_of(folder):
        with open_safetensors(path) as f:
            keys = list(f.keys())
        for key in keys:
            if not key.startswith("model.transformer."):
                raise UserError(f"{path}: {key} is not one of LLaDA's names")
            # a mapping for each tensor: dropping one (runtime/int8.py) then frees its memory
            with open_safetensors(path) as f:
                named.append(("backbone." + key.removeprefix("model.transformer."), f.get_tensor(key)))
    weights = once(named, folder)
    expected = [k for k in model.state_dict() if k.startswith("backbone.") and "lora_" not in k]
    load_strictly(model, weights, folder, device, dtype, expected)


# ---------------------------------------------------------------------------------------------
# the authors' adapters, soft prompts and LoRA.  Their file holds what they trained and nothing else:
# 396 MB in fp32 for the 99 million parameters of Table B.3.


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
    named = []
    for key, value in found.items():
        if key.startswith("whisper_model.") and key.endswith("embed_positions.weight"):
            continue  # Whisper's sinusoids, which are computed
        name = released_name(key)
        if name is None:
            raise UserError(f"{path}: {key} is not one of DIFFA's names")
        named.append((name, value))
    weights = once(named, path)
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
# the released models, put together from parts that lie in three places (runtime/hub.py)


def load_published(model, llada, whisper, device, dtype, name, diffa=None):
    """LLaDA and Whisper's encoder, which no stage of the paper changes; model.base says what they are.

    dtype: LLaDA's, which is published in bf16.  Whisper stays in fp32, as in the authors' inference; beside
    16 GB of LLaDA its 2.5 GB are few.  diffa: adapters and LoRA, too, from the authors' file.
    """
    load_llada(model, llada, device, dtype)
    load_whisper(model, whisper, device)
    if diffa is not None:  # before model.base is told: a full training state replaces the frozen parts
        load_released(model, diffa, device)
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
    load_published(model, llada, whisper, device, dtype, name, diffa)
    return model.eval(), tokenizer


if __name__ == "__main__":
    from runtime import tutorials

    tutorials.weights(load, ASSETS["tiny"])
