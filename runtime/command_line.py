"""The options of train.py and decode.py.  `--help` prints them below the commands at the top of each file."""

import argparse
import os

from data import refuse_special_tokens
from runtime.errors import Parser, UserError, number


def train(argv, description, models):
    """train.py's command line -> args.  models: names of those that have a table of stages."""
    parser = Parser("train.py", description=description)
    option = parser.add_argument
    positive, natural, rate = number(int, 1), number(int, 0), number(float, 1e-12)
    option("--stage", type=int, choices=range(5))
    option("--model", default="diffa2", choices=models)
    option("--objective", choices=("diffusion", "ar"), default="diffusion", help="ar: next-token loss")
    option("--data", nargs="+", metavar="FILE[:SHARE]", help="all or a SHARE (default: data/stageN.jsonl)")
    option("--held-out", help="stages 0 to 3: held-out examples (default: held_out.jsonl beside --data)")
    option("--init", help="folder to start from, or diffa2: the released model (default: see above)")
    option("--out", help="folder to write (default: out/MODEL/stageN)")
    option("--llada", help="diffa2: folder of LLaDA (docs/MODELS.md), instead of the hub's")
    option("--whisper", help="the encoder's file, instead of the hub's or the shipped one")
    option("--diffa", help="with --init diffa2: the authors' pytorch_model.bin, instead of the hub's")
    old_run = parser.add_mutually_exclusive_group()
    old_run.add_argument("--resume", action="store_true", help="go on with the run that --out holds")
    old_run.add_argument("--restart", action="store_true", help="begin anew over the run that --out holds")
    option("--wait", action="store_true", help="wait until no other run is training in --out")
    option("--dry-run", nargs="?", type=natural, const=0, metavar="PROCESSES", help="print the plan, stop")
    # instead of the table's: fine-tuning on a few hundred clips wants other numbers than the paper's stages
    option("--lr", type=rate, help="learning rate, instead of the table's")
    option("--batch", type=positive, help="examples in a step, instead of the table's")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--max-steps", type=positive, help="end the stage, and its schedule, here")
    length.add_argument("--epochs", type=rate, help="times the manifest is read, instead of the table's")
    option("--warmup", type=positive, metavar="STEPS", help="instead of the table's, less in a short run")
    option("--weight-decay", type=number(float, 0, 1000), help="instead of the table's")
    option("--augment", action=argparse.BooleanOptionalAction, help="speeds, levels, noise, SpecAugment")
    option("--no-dropout", action="store_false", dest="dropout")
    option("--seed", type=natural, default=42, help="of masks, order, augmentation, dropout, fresh weights")
    # none of the rest changes what is learned, but for rounding
    option("--stop-after", type=positive, help="save and leave after so many steps (the schedule stays)")
    option("--tokens", type=positive, default=6144, help="of a micro-batch, in positions: ten of diffa2")
    option("--workers", type=natural, default=0, help="processes that read clips, for each GPU")
    option("--save-every", type=positive, default=250, metavar="STEPS")
    option("--held-out-every", type=positive, default=100, metavar="STEPS")
    option("--precision", choices=("bf16", "fp32"), help="default: bf16 on a GPU, else fp32")
    option("--recompute", action="store_true", help="activation checkpointing: less memory, more time")
    option("--compile", action="store_true", help="torch.compile the backbone's blocks")
    option("--skip-limit", type=number(float, 0, 1), default=0.01, help="stop when a larger share is bad")
    option("--tensorboard", action="store_true", help="write TensorBoard's files beside log.jsonl")
    option("--device")
    args = parser.parse_args(argv)
    if args.stage is None:
        raise UserError("give a stage: python train.py --stage 1 --model tiny")
    return args


def add_model(parser, default="tiny"):
    """Adds what says which model is asked: --model, its files, --int8."""
    add, instead = parser.add_argument, "instead of the hub's (diffa1, diffa2)"
    add("--model", default=default, help="tiny (default), diffa1, diffa2, or a checkpoint folder")
    add("--llada", metavar="PATH", help=f"folder of LLaDA (which: docs/MODELS.md), {instead}")
    add("--whisper", metavar="PATH", help=f"encoder: .pt, .safetensors, model.bin, {instead}")
    add("--diffa", metavar="PATH", help=f"pytorch_model.bin, {instead}")
    add("--int8", action="store_true", help="matrices in int8: half the memory of bf16, about 1 %% off each")


def add_sampler(parser, caches):
    """Adds the sampling rules and the caches."""
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--steps", type=int, metavar="N", help="fixed-step remasking in N network calls")
    how.add_argument("--factor", type=float, metavar="F", help="factor decoding (Eq. 8)")
    how.add_argument("--threshold", type=float, metavar="C", help="keep what is surer than C")
    parser.add_argument("--cache", choices=caches, default="none")


def decode(argv, description, caches):
    """decode.py's command line -> args.  caches: what --cache may be.  UserError: what does not fit."""
    parser = Parser("decode.py", description=description)
    add = parser.add_argument
    add("words", nargs="*", metavar='CLIP... "QUESTION"')
    add_model(parser, None)
    add("--stage", type=int, choices=(1, 2, 3, 4), help="read audio as in this stage (default: the model's)")
    add("--device")
    add("--compile", action="store_true", help="torch.compile the backbone's blocks")
    add("--export", metavar="DIR", help="write the model as a compact bf16 checkpoint")
    # how it decodes: up to --temperature the fields of Options, by the same names
    add("--answer-length", type=int, default=32, metavar="N", help="tokens (default 32)")
    add("--block", type=int, metavar="N", help="tokens (default 32 if they tile the answer, else all)")
    add_sampler(parser, caches)
    add("--cache-refresh", dest="refresh", type=int, metavar="K", help="refresh the cache every K calls")
    add("--temperature", type=float, default=0.0)
    add("--seed", type=int, default=0)
    add("--long", choices=("split", "cut"), default="split", help="clips beyond the window: in pieces or cut")
    # what is printed
    live = parser.add_mutually_exclusive_group()
    live.add_argument("--show", action="store_true", help="watch the answer emerge")
    live.add_argument("--stream", action="store_true", help="print each --block as soon as it is final")
    add("--json", action="store_true", help="one JSON object a clip")
    args = parser.parse_args(argv)
    # refused now, not after minutes of loading
    if not 0 <= args.seed < 1 << 63:
        raise UserError(f"--seed {args.seed} must lie between 0 and 2^63")
    if len(args.words) < 2 and (args.words or args.export is None):
        raise UserError('give a recording and a question: python decode.py clip.wav "What do you hear?"')
    if args.export == "":
        raise UserError("--export needs the name of a folder")
    for question in args.words[-1:]:
        if not question.strip():
            raise UserError("the question is empty")
        if os.path.isfile(question):
            raise UserError(f"{question} is a file: the last word must be the question")
        refuse_special_tokens(question, "question")
    if args.refresh is not None and args.cache == "none":
        raise UserError("--cache-refresh goes with --cache")
    if args.int8 and args.compile:
        raise UserError("--compile cannot read matrices in int8: give one of the two")
    if args.int8 and args.export is not None:
        raise UserError("--export writes the weights as they were trained: leave --int8 out")
    if args.stream and args.json:
        raise UserError("--stream prints text as it becomes final; --json comes after it")
    if args.block is None:
        args.block = args.answer_length if args.answer_length % 32 else 32
    return args
