"""Speed and memory, measured.

    python bench.py fullsize DIR             dress rehearsal of diffa2 with random weights (20 GB of disk)
    python bench.py fullsize DIR --device cuda

`fullsize` writes files with the names, shapes and formats of LLaDA-8B-Instruct (6 shards, 16.03 GB),
Whisper-large-v3's encoder and DIFFA-2's pytorch_model.bin, loads them by the ordinary path, holds the
parameter counts against the paper's Table B.3, and answers one clip.  Random weights mean nothing:
the answer is noise; what it proves is shapes, memory and speed.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import threading
import time

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from adapters import count, merge_lora
from data import SAMPLE_RATE
from decode import ask
from model import DIFFA2, PRESETS, SPECIAL_TOKENS, Parser, UserError, load, released_name

LLADA_BYTES, SHARDS = 16_031_162_368, 6  # FACTS section 6
TABLE_B3 = {"encoder": 636_968_960, "semantic": 36_392_448, "acoustic": 47_892_992, "backbone": 8_015_581_184, "LoRA": 14_680_064}


class Peak:
    """Samples this process's anonymous memory (mapped files are not counted) while a block runs."""

    def __enter__(self):
        self.bytes, self.done = 0, threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self):
        while not self.done.wait(0.02):
            self.bytes = max(self.bytes, anonymous_bytes())

    def __exit__(self, *error):
        self.done.set()
        self.thread.join()
        self.bytes = max(self.bytes, anonymous_bytes())


def anonymous_bytes():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("RssAnon"))


# ---------------------------------------------------------------------------------------------
# files like the published ones


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
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special.values()))
    return tokenizer


def write_fullsize(folder, config):
    """LLaDA's shards, Whisper's .pt and DIFFA-2's pytorch_model.bin, random; each under a temporary name first."""
    os.makedirs(f"{folder}/llada", exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < 20e9:
        raise UserError(f"{folder}: {free / 1e9:.0f} GB free; the rehearsal writes 18 GB")
    rng = np.random.default_rng(0)
    pool = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    half = pool.to(torch.bfloat16)
    with torch.device("meta"):
        model = DIFFA2(config, lora=True)
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    backbone = {k.removeprefix("backbone."): s for k, s in shapes.items() if k.startswith("backbone.") and "lora_" not in k}

    def written(name, write):
        path = f"{folder}/{name}"
        write(path + ".tmp")
        os.replace(path + ".tmp", path)

    per_shard, where = -(-len(backbone) // SHARDS), {}
    for i in range(SHARDS):
        name = f"model-{i + 1:05}-of-{SHARDS:05}.safetensors"
        chosen = dict(list(backbone.items())[i * per_shard : (i + 1) * per_shard])
        tensors = {f"model.transformer.{k}": torch.ones(s, dtype=half.dtype) if len(s) == 1 else random_tensor(s, half, rng) for k, s in chosen.items()}
        written(f"llada/{name}", lambda path: save_file(tensors, path))
        where |= dict.fromkeys(tensors, name)
        del tensors
    size = sum(int(np.prod(s)) * 2 for s in backbone.values())
    assert size == LLADA_BYTES, size
    for name, content in (("model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": where}), ("config.json", {"model_type": "llada"})):
        with open(f"{folder}/llada/{name}", "w") as f:
            json.dump(content, f)
    full_tokenizer(config).save(f"{folder}/llada/tokenizer.json")
    ear = {k: random_tensor(s, pool, rng).half() for k, s in shapes.items() if k.startswith("encoder.")}
    written("large-v3.pt", lambda path: torch.save({"dims": {}, "model_state_dict": ear}, path))
    del ear
    trained = {}
    for key, name in released_keys(config):
        shape = (1, *shapes[name][1:]) if name == "acoustic.queries" else shapes[name]
        trained[key] = random_tensor(shape, pool, rng)
    written("pytorch_model.bin", lambda path: torch.save(trained, path))


def released_keys(config):
    """(the authors' key, ours) of everything in DIFFA-2's file, peft's wrapping included."""
    semantic = [f"semantic_connector.{m}.{leaf}" for m in ("conv.0", "conv.2", "linear_connector.0", "linear_connector.2", "layernorm") for leaf in ("weight", "bias")]
    layers = [
        f"acoustic_connector.qformer.layer.{n}.{m}.{leaf}"
        for n in (0, 1)
        for m in [f"{a}.{p}" for a in ("attention", "crossattention") for p in ("self.query", "self.key", "self.value", "output.dense", "output.LayerNorm")]
        + ["intermediate.dense", "output.dense", "output.LayerNorm"]
        for leaf in ("weight", "bias")
    ]
    proj = [f"acoustic_connector.proj.{i}.{leaf}" for i in (0, 1) for leaf in ("weight", "bias")]
    lora = [
        f"llm_model.base_model.model.model.transformer.blocks.{n}.{p}.lora_{x}.default.weight"
        for n in range(config.layers)
        for p in ("q_proj", "k_proj", "v_proj", "ff_proj", "up_proj")
        for x in "AB"
    ]
    for key in [*semantic, *layers, *proj, *lora, "acoustic_connector.layer_weights", "trainable_prompts.weight"]:
        yield key, released_name(key)
    for i in range(len(config.taps)):
        yield f"acoustic_connector.layer_prompts.{i}", "acoustic.queries"


# ---------------------------------------------------------------------------------------------
# the rehearsal


def fullsize(folder, device, keep):
    config = PRESETS["diffa2"]
    if not os.path.exists(f"{folder}/pytorch_model.bin"):
        start = time.perf_counter()
        write_fullsize(folder, config)
        print(f"wrote random weights in {time.perf_counter() - start:.0f} s")
    files = [os.path.join(d, f) for d, _, names in os.walk(folder) for f in names if f.endswith((".safetensors", ".pt", ".bin"))]
    on_disk = sum(map(os.path.getsize, files))
    threads = torch.get_num_threads()
    print(f"{platform.system()}, {threads} CPU threads, device {device or 'cpu'}, torch {torch.__version__}, {on_disk / 1e9:.2f} GB of weights on disk")
    start = time.perf_counter()
    with Peak() as peak:
        model, tokenizer = load("diffa2", device or "cpu", None, 4, f"{folder}/llada", f"{folder}/large-v3.pt", f"{folder}/pytorch_model.bin")
    print(f"load              {time.perf_counter() - start:8.1f} s   peak anonymous memory {peak.bytes / 1e9:.2f} GB")
    lora = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    ours = {part: count(getattr(model, part)) for part in ("encoder", "semantic", "acoustic", "backbone")}
    ours["encoder"] += model.encoder.positional_embedding.numel()
    ours["backbone"] -= lora
    ours["LoRA"] = lora
    assert ours == TABLE_B3, ours
    print("parameters        " + ", ".join(f"{part} {n:,}" for part, n in ours.items()) + ": Table B.3")
    start = time.perf_counter()
    with Peak() as peak:
        merge_lora(model)
    print(f"merge LoRA        {time.perf_counter() - start:8.1f} s   peak anonymous memory {peak.bytes / 1e9:.2f} GB")
    clip = np.random.default_rng(0).uniform(-0.3, 0.3, 10 * SAMPLE_RATE).astype(np.float32)
    for cache in ("none", "prefix"):
        calls, last = [], [0.0]

        def on_step(*_):
            now = time.perf_counter()
            calls.append(now - last[0])
            last[0] = now

        last[0] = start = time.perf_counter()
        with Peak() as peak:
            (answer,) = ask(model, tokenizer, [clip], ["What emotion?"], answer_length=16, block=16, steps=16, cache=cache, on_step=on_step)
        wall, rest = time.perf_counter() - start, calls[1:]
        print(
            f"16 tokens, cache {cache:8}{wall:8.1f} s   {answer.calls} calls; first with encoder {calls[0]:.1f} s, "
            f"others median {statistics.median(rest):.2f} s ({min(rest):.2f} - {max(rest):.2f})   peak anonymous memory {peak.bytes / 1e9:.2f} GB"
        )
    if device and torch.device(device).type == "cuda":
        print(f"peak GPU memory   {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
    if not keep:
        for path in files:
            os.remove(path)


def main(argv=None):
    parser = Parser(prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    p = commands.add_parser("fullsize", help="diffa2 with random weights: shapes, memory, speed")
    p.add_argument("folder")
    p.add_argument("--device")
    p.add_argument("--keep", action="store_true", help="leave the weights on the disk")
    try:
        args = parser.parse_args(argv)
        fullsize(args.folder, args.device, args.keep)
    except UserError as e:
        print(f"bench.py: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
