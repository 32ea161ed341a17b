"""What a description is worth: questions about clips answered from their facts, without hearing anything.

    python -m tools.imitated data/test.jsonl --model out/tiny/stage0     the ceiling of whatever listens
    python -m tools.evaluate exact data/test.jsonl                      the same questions, from the sound

The facts stand where the audio would, as stage 0 learns to read them (runtime/variations.py).
"""

import sys
from collections import defaultdict

import torch

from adapters import merge_lora
from data import answer_text, build_prompt, pad_imitations, read_manifest
from decode import generate
from runtime.errors import Parser, UserError, exit_status, number
from runtime.variations import imitate_audio
from tools.benchmarks import normalise, wilson, word_errors
from weights import load


@torch.no_grad()
def answer_imitated(model, tokenizer, examples, seed=0, **options):
    """The answers to a batch of Examples whose audio is imitated; options as decode.Options' fields."""
    imitated = []
    for example in examples:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + example.id)
        imitated.append(imitate_audio(example.facts, tokenizer, model.config, generator))
    batch = pad_imitations(imitated)
    audio = model.embed_imitation(batch["ids"], batch["weights"], batch["noise"])
    prompts, audio_at = zip(*(build_prompt(tokenizer, e.question) for e in examples), strict=True)
    ids, _ = generate(model, prompts, audio, batch["valid"], audio_at, **options)
    return [answer_text(tokenizer, row, model.config) for row in ids.tolist()]


def main(argv=None):
    parser = Parser(prog="imitated", description=__doc__)
    parser.add_argument("manifest")
    parser.add_argument("--model", default="tiny")
    parser.add_argument(
        "--limit", type=number(int, 1), default=100, help="questions a task and corpus (default 100)"
    )
    parser.add_argument("--batch", type=number(int, 1), default=16)

    def start():
        args = parser.parse_args(argv)
        model, tokenizer = load(args.model, "cpu", torch.float32)
        if model.config.causal:
            raise UserError(f"{args.model}: is autoregressive; facts are read by diffusion models only")
        merge_lora(model)
        groups = defaultdict(list)
        for example in read_manifest(args.manifest, check=False):
            if example.facts and len(groups[example.task, example.dataset]) < args.limit:
                groups[example.task, example.dataset].append(example)
        if not groups:
            raise UserError(f"{args.manifest}: no line has facts that could stand for its clip")
        for (task, corpus), examples in sorted(groups.items()):
            answers = []
            for i in range(0, len(examples), args.batch):
                some = examples[i : i + args.batch]
                answers += answer_imitated(model, tokenizer, some, answer_length=32, block=32)
            right = sum(normalise(a) == normalise(e.answer) for a, e in zip(answers, examples, strict=True))
            low, high = wilson(right, len(examples))
            n = len(examples)
            line = f"{task:14}{corpus:24}{n:>5}{right / n:>8.1%}{low:>8.1%} -{high:6.1%}"
            if task == "asr":
                line += f"   WER {word_errors([e.answer for e in examples], answers, normalise)['wer']:.1%}"
            print(line, flush=True)

    return exit_status("imitated", start)


if __name__ == "__main__":
    sys.exit(main())
