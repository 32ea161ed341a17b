"""What a stage of train.py begins with: its model, its files, its row with what the command line says."""

import dataclasses
import importlib.util
import math
import os

import torch

import weights
from model import PRESETS
from runtime.errors import UserError
from runtime.fresh import build, with_fresh_adapters
from runtime.hub import RELEASES, fetch
from runtime.loading import epoch_length, path_and_share


def folder_of(args, stage):
    """Where a stage writes, and the next one begins: out/tiny/stage2, of the baseline out/tiny-ar/stage2."""
    return f"out/{args.model}{'-ar' if args.objective == 'ar' else ''}/stage{stage}"


def complete(args, stages):
    """-> args with data and out filled in; UserError for what cannot be trained.  stages: the model's rows.

    What can be wrong with the options is found here, before a model of 8 billion parameters is read.
    """
    stage, name = args.stage, args.model
    if stage not in stages:
        raise UserError(f"there is no stage {stage} for {name}; there are {sorted(stages)}")
    if args.init in RELEASES and args.init != name:
        raise UserError(f"--init {args.init} does not go with --model {name}")
    if args.diffa and args.init not in RELEASES:  # nothing else would read it
        raise UserError(f"--diffa goes with --init {name}")
    if args.restart and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        raise UserError("--restart beside torchrun's --max-restarts would begin anew after every failure")
    if args.objective == "ar" and (name in RELEASES or stage == 4):
        raise UserError("the autoregressive baseline is a small model's, stages 0 to 3")
    args.data, args.out = args.data or [f"data/stage{stage}.jsonl"], args.out or folder_of(args, stage)
    first, _ = path_and_share(args.data[0])
    if not os.path.exists(first):
        raise UserError(f"{first}: no such manifest; docs/DATA.md says how one is made of your corpora")
    if args.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise UserError("--tensorboard needs a package that is not installed: pip install tensorboard")
    return args


def origin(args):
    """What a stage begins with, and the folder that has its tokenizer: None where that is on the hub.

    "fresh": random weights.  "published": LLaDA and Whisper.  "released": the authors' model.  "checkpoint":
    a folder that `weights.save` wrote, by default the stage before.  Raises UserError where it is missing.
    """
    stage, name, init = args.stage, args.model, args.init
    if stage == 0 and not init:  # under the manifest's own tokenizer, made from its text
        return "fresh", os.path.dirname(args.data[0]) or "."
    if stage == 1 and name in RELEASES and not init:
        return "published", args.llada
    if init in RELEASES:
        return "released", args.llada
    if stage == 1 and name in weights.ASSETS and args.objective != "ar":
        init = init or weights.ASSETS[name]  # the shipped backbone, as it was before any audio
    how = ""
    if not init:  # adapters that already write what LLaDA can read are the reason to train in stages
        init, objective = folder_of(args, stage - 1), " --objective ar" * (args.objective == "ar")
        how = f"; `python train.py --stage {stage - 1} --model {name}{objective}` makes it"
    if not os.path.exists(os.path.join(init, "model.safetensors")):
        raise UserError(f"{init}: no checkpoint to start from{how}")
    return "checkpoint", init


def start_from(args, device):
    """The model a stage begins with, and its tokenizer."""
    stage, name, is_causal = args.stage, args.model, args.objective == "ar"
    kind, folder = origin(args)
    files = {"llada": args.llada, "whisper": args.whisper}
    if kind == "fresh":
        tokenizer = weights.load_tokenizer(folder)
        config = dataclasses.replace(PRESETS[name].with_tokenizer(tokenizer), causal=is_causal)
        model = build(config, device, seed=args.seed)
        if name in weights.ASSETS:
            weights.load_tiny_encoder(model, args.whisper, device)
        return model, tokenizer

    dtype = torch.bfloat16 if name in RELEASES and args.precision != "fp32" else torch.float32
    if kind == "published":
        llada, whisper, _ = fetch(name, **files, adapters=False)
        model, tokenizer = weights.assemble(PRESETS[name], llada, whisper, None, device, dtype, 1, name)
        return with_fresh_adapters(model, args.seed), tokenizer

    if kind == "released":  # as it was after stage 1 for stages 1 and 2, else after the last
        released_stage = 1 if stage in (1, 2) else 4
        model, tokenizer = weights.load(args.init, device, dtype, released_stage, **files, diffa=args.diffa)
    else:
        model, tokenizer = weights.load(folder, device, dtype, **files)
    if model.base and model.base["name"] != name:  # it would train, by the other model's numbers
        raise UserError(f"{folder}: a checkpoint of {model.base['name']}: give --model {model.base['name']}")
    if model.config.causal != is_causal:  # the weights would fit, and mean something else
        found = "ar" if model.config.causal else "diffusion"
        raise UserError(f"{folder}: a backbone of the other kind; --objective {found} goes with it")
    if stage == 1 and model.stage != 1 and name in weights.ASSETS:  # the backbone alone
        model = with_fresh_adapters(model, args.seed)
    # stage 1 does not train it: where its file has none there are zeros, and no gradient leads away from them
    if stage > 1 and not any(p.any() for p in model.acoustic.parameters()):
        model.acoustic = with_fresh_adapters(model, args.seed).acoustic
    return model, tokenizer


def settings_of(row, args, examples):
    """A row of the table with what the command line says otherwise, and the number of steps."""
    names = ("lr", "batch", "warmup", "weight_decay", "augment", "epochs")
    asked = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.epochs:
        asked["steps"] = 0  # the paper's stages count epochs, the small model's steps
    settings = dataclasses.replace(row, **asked)
    an_epoch = math.ceil(epoch_length(examples.shares) / settings.batch)
    steps = args.max_steps or settings.steps or math.ceil(settings.epochs * an_epoch)
    # a warm-up made for a hundred thousand steps would outlast a short run.  With --init, --max-steps,
    # --batch or --epochs it is at most a tenth of the run; else it stays unless it exceeds a third (diffa2's
    # stage 4: 200 of 750 steps)
    is_own = args.init or args.max_steps or args.batch or args.epochs
    if settings.warmup > steps / (10 if is_own else 3) and args.warmup is None:
        settings = dataclasses.replace(settings, warmup=max(1, steps // 10))
    return settings, steps
