"""The dress rehearsal: diffa2 at full size with random weights.

Files with the names, shapes and formats of LLaDA-8B-Instruct (6 shards, 16.03 GB), Whisper-large-v3's
encoder and DIFFA-2's pytorch_model.bin, loaded by the ordinary path; parameter counts held against those
that the paper's Table B.3 rounds; one clip answered.  Random weights mean nothing: the answer is noise.
What it proves is shapes, memory and speed.
"""

import functools
import glob
import json
import os
import platform
import shutil
import statistics
import tempfile
import time

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from adapters import merge_lora
from data import SAMPLE_RATE
from decode import ask
from model import DIFFA2, PRESETS, SPECIAL_TOKENS
from runtime.errors import UserError
from runtime.files import write_file
from runtime.names import ACOUSTIC_NAMES, QFORMER_NAMES, SEMANTIC_NAMES, released_name
from runtime.tutorials import count
from tools.measure import Laps, Peak
from weights import load

LLADA_BYTES, SHARDS = 16_031_162_368, 6  # model.safetensors.index.json of GSAI-ML/LLaDA-8B-Instruct
TABLE_B3 = {  # parameters; its backbone has 8.03 billion there, which seems to count LoRA too
    "encoder": 636_968_960,
    "semantic": 36_392_448,
    "acoustic": 47_892_992,
    "backbone": 8_015_581_184,
    "LoRA": 14_680_064,
}


def random_tensor(shape, pool, rng):
    """std 0.02, cut from a pool of random numbers: drawing eight billion anew would take many minutes."""
    n = int(np.prod(shape))
    start = int(rng.integers(len(pool)))
    return torch.cat([pool[start:], *[pool] * (n // len(pool)), pool])[:n].reshape(shape).clone()


def full_tokenizer(config):
    """A byte-level tokenizer of LLaDA's size with its special tokens at their exact ids."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    special = {getattr(config, field): token for field, token in SPECIAL_TOKENS.items()}
    for i in range(len(vocab), max(special) + 1):
        vocab[special.get(i, f"<filler {i}>")] = i
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special.values()))
    return tokenizer


def write_fullsize(folder, config):
    """LLaDA's shards, Whisper's .pt and DIFFA-2's pytorch_model.bin, random."""
    os.makedirs(f"{folder}/llada")
    rng = np.random.default_rng(0)
    pool = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    half = pool.to(torch.bfloat16)
    with torch.device("meta"):
        model = DIFFA2(config, lora=True)
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    backbone = {}
    for name, shape in shapes.items():
        if name.startswith("backbone.") and "lora_" not in name:
            backbone[name.removeprefix("backbone.")] = shape

    per_shard, where = -(-len(backbone) // SHARDS), {}
    for i in range(SHARDS):
        name = f"model-{i + 1:05}-of-{SHARDS:05}.safetensors"
        tensors = {}
        for key, shape in list(backbone.items())[i * per_shard : (i + 1) * per_shard]:
            is_norm = len(shape) == 1
            tensor = torch.ones(shape, dtype=half.dtype) if is_norm else random_tensor(shape, half, rng)
            tensors[f"model.transformer.{key}"] = tensor
        write_file(f"{folder}/llada/{name}", functools.partial(save_file, tensors))
        where |= dict.fromkeys(tensors, name)
    size = sum(int(np.prod(s)) * 2 for s in backbone.values())
    assert size == LLADA_BYTES, size
    index = {"metadata": {"total_size": size}, "weight_map": where}
    for name, content in (("model.safetensors.index.json", index), ("config.json", {"model_type": "llada"})):
        with open(f"{folder}/llada/{name}", "w") as f:
            json.dump(content, f)
    full_tokenizer(config).save(f"{folder}/llada/tokenizer.json")
    encoder = {k: random_tensor(s, pool, rng).half() for k, s in shapes.items() if k.startswith("encoder.")}
    whisper = {"dims": {}, "model_state_dict": encoder}
    write_file(f"{folder}/large-v3.pt", functools.partial(torch.save, whisper))
    trained = {}
    for key, name in released_keys(config):
        shape = (1, *shapes[name][1:]) if name == "acoustic.queries" else shapes[name]
        trained[key] = random_tensor(shape, pool, rng)
    write_file(f"{folder}/pytorch_model.bin", functools.partial(torch.save, trained))


def released_keys(config):
    """(the authors' key, ours) of everything in DIFFA-2's file, peft's wrapping included."""
    keys = ["acoustic_connector.layer_weights", "trainable_prompts.weight"]
    modules = [f"semantic_connector.{name}" for name in SEMANTIC_NAMES]
    modules += [f"acoustic_connector.{name}" for name in ACOUSTIC_NAMES]
    modules += [f"acoustic_connector.qformer.layer.{n}.{name}" for n in (0, 1) for name in QFORMER_NAMES]
    keys += [f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")]
    for n in range(config.layers):
        block = f"llm_model.base_model.model.model.transformer.blocks.{n}"
        for part in ("q_proj", "k_proj", "v_proj", "ff_proj", "up_proj"):
            keys += [f"{block}.{part}.lora_{x}.default.weight" for x in "AB"]
    for key in keys:
        yield key, released_name(key)
    for i in range(len(config.taps)):
        yield f"acoustic_connector.layer_prompts.{i}", "acoustic.queries"


def timed(name, work):
    """What work() returns; prints its seconds and its peak of memory."""
    start = time.perf_counter()
    with Peak() as peak:
        found = work()
    seconds = time.perf_counter() - start
    print(f"{name:18}{seconds:8.1f} s   {peak.words()}", flush=True)
    return found


def check_counts(model):
    """Holds the numbers of parameters against the paper's."""
    lora = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    ours = {part: count(getattr(model, part)) for part in ("encoder", "semantic", "acoustic", "backbone")}
    ours["encoder"] += model.encoder.positional_embedding.numel()
    ours["backbone"] -= lora
    ours["LoRA"] = lora
    assert ours == TABLE_B3, ours
    print("parameters        " + ", ".join(f"{part} {n:,}" for part, n in ours.items()) + ": Table B.3")


def fullsize(folder, device, int8=False):
    """Writes the weights to a new folder in `folder`, loads, counts and asks; removes them.

    int8: the matrices are rounded while they are read, LoRA merged, and nothing is counted.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        own = tempfile.TemporaryDirectory(prefix="random_weights_", dir=folder)
        free = shutil.disk_usage(folder).free
    except OSError as e:
        raise UserError(f"{folder}: cannot be written to ({e.strerror})") from None
    with own as name:
        if free < 20e9:
            raise UserError(f"{folder}: {free / 1e9:.0f} GB free; the rehearsal writes 18 GB")
        rehearse(name, device, int8)


def rehearse(folder, device, int8):
    """`fullsize`, in an empty folder of its own."""
    start = time.perf_counter()
    write_fullsize(folder, PRESETS["diffa2"])
    print(f"wrote random weights in {time.perf_counter() - start:.0f} s")
    sources = (f"{folder}/llada", f"{folder}/large-v3.pt", f"{folder}/pytorch_model.bin")
    files = [*glob.glob(f"{glob.escape(folder)}/llada/*.safetensors"), *sources[1:]]
    on_disk = sum(map(os.path.getsize, files))
    threads = f"{torch.get_num_threads()} CPU threads"
    where = f"{platform.system()}, {threads}, device {device or 'cpu'}, torch {torch.__version__}"
    print(f"{where}, {on_disk / 1e9:.2f} GB of weights on disk")
    model, tokenizer = timed("load", lambda: load("diffa2", device or "cpu", None, 4, *sources, int8))
    if not int8:
        check_counts(model)
        timed("merge LoRA", lambda: merge_lora(model))
    clip = np.random.default_rng(0).uniform(-0.3, 0.3, 10 * SAMPLE_RATE).astype(np.float32)
    for cache in ("none", "prefix"):
        laps, start = Laps(device or "cpu"), time.perf_counter()
        with Peak() as peak:
            options = {"answer_length": 16, "block": 16, "steps": 16, "cache": cache, "on_step": laps}
            (answer,) = ask(model, tokenizer, [clip], ["What emotion?"], **options)
        wall, (first, *rest) = time.perf_counter() - start, laps.seconds
        others = f"others median {statistics.median(rest):.2f} s ({min(rest):.2f} - {max(rest):.2f})"
        print(
            f"16 tokens, cache {cache:8}{wall:8.1f} s   {answer.calls} calls; "
            f"first with encoder {first:.1f} s, {others}   {peak.words()}",
            flush=True,
        )
    if device and torch.device(device).type == "cuda":
        print(f"peak GPU memory   {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
