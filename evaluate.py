"""Scoring a model on a manifest of questions with known answers.

    python evaluate.py exact data/test.jsonl                        the shipped small model, factor decoding
    python evaluate.py exact data/test.jsonl --steps 32             fixed-step decoding
    python evaluate.py exact data/test.jsonl --out answers.jsonl    keeps every answer

`exact`: an answer is right when it equals the expected one after lower-casing and dropping
punctuation.  Each task of the manifest gets its accuracy with Wilson's 95 % interval and the mean
over its labels (macro); questions of task "asr" get a word error rate as well.
"""

import argparse
import json
import os
import re
import sys
from collections import defaultdict

import jiwer
from tqdm import tqdm

from adapters import merge_lora
from data import load_audio, read_manifest, window_seconds
from decode import ask, check_budget
from model import Parser, UserError, load


def normalise(text):
    """Lower case, no punctuation, single spaces."""
    return " ".join(re.sub(r"[^\w\s]", "", text.lower()).split())


def wilson(right, n, z=1.959964):
    """Wilson's 95 % interval of a proportion.  Returns (low, high)."""
    p, d = right / n, 1 + z * z / n
    centre, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, (centre - half) / d), min(1.0, (centre + half) / d)


def word_errors(expected, answers):
    """Corpus word error rate: (substitutions + deletions + insertions) / words expected."""
    return jiwer.wer([normalise(e) for e in expected], [normalise(a) for a in answers])


def answer_all(model, tokenizer, examples, batch_size, **options):
    """Asks every example, batches of similar length; returns Answers in the examples' order."""
    clips = {i: load_audio(e.audio, e.offset, e.duration, window_seconds(model.config))[0] for i, e in enumerate(examples)}
    answers = [None] * len(examples)
    order = sorted(clips, key=lambda i: len(clips[i]))
    for i in tqdm(range(0, len(order), batch_size), unit=" batches"):
        chosen = order[i : i + batch_size]
        found = ask(model, tokenizer, [clips[j] for j in chosen], [examples[j].question for j in chosen], **options)
        for j, answer in zip(chosen, found):
            answers[j] = answer
    return answers


def report(examples, tasks, answers):
    """Prints a row per task."""
    by_task = defaultdict(list)
    for example, task, answer in zip(examples, tasks, answers):
        by_task[task].append((example.answer, answer))
    print(f"{'task':10}{'n':>6}{'right':>9}{'95 % interval':>18}{'macro':>9}{'WER':>8}{'calls':>8}")
    for task, pairs in sorted(by_task.items()):
        right = [normalise(e) == normalise(a.text) for e, a in pairs]
        by_label = defaultdict(list)
        for (expected, _), ok in zip(pairs, right):
            by_label[expected].append(ok)
        macro = sum(sum(v) / len(v) for v in by_label.values()) / len(by_label)
        low, high = wilson(sum(right), len(right))
        errors = f"{word_errors([e for e, _ in pairs], [a.text for _, a in pairs]):8.1%}" if task == "asr" else f"{'':8}"
        calls = sum(a.calls for _, a in pairs) / len(pairs)
        print(f"{task:10}{len(pairs):6}{sum(right) / len(right):9.1%}{low:9.1%} -{high:6.1%}{macro:9.1%}{errors}{calls:8.2f}")


def run(args):
    examples = read_manifest(args.manifest)
    tasks = [e.task or "all" for e in examples]
    block = args.block or min(32, args.answer_length)
    options = dict(answer_length=args.answer_length, block=block, steps=args.steps, factor=args.factor or 1.0, cache=args.cache)
    check_budget(args.answer_length, block, args.steps, options["factor"])
    model, tokenizer = load(args.model, args.device)
    answers = answer_all(merge_lora(model), tokenizer, examples, args.batch, **options)
    how = f"steps {args.steps}" if args.steps else f"factor {options['factor']:g}"
    print(f"{args.model}, {how}, answer length {args.answer_length}, block {block}, cache {args.cache}")
    report(examples, tasks, answers)
    if args.out:
        with open(args.out + ".tmp", "w", encoding="utf-8") as f:
            for example, task, answer in zip(examples, tasks, answers):
                line = {"audio": example.audio, "task": task, "question": example.question, "expected": example.answer}
                f.write(json.dumps(line | {"answer": answer.text, "calls": answer.calls}) + "\n")
        os.replace(args.out + ".tmp", args.out)


def main(argv=None):
    parser = Parser(prog="evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=("exact",))
    parser.add_argument("manifest")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--answer-length", type=int, default=32)
    parser.add_argument("--block", type=int)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--steps", type=int)
    how.add_argument("--factor", type=float)
    parser.add_argument("--cache", choices=("none", "prefix", "dual"), default="none")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device")
    parser.add_argument("--out", help="write every answer to this JSONL file")
    try:
        run(parser.parse_args(argv))
    except UserError as e:
        print(f"evaluate.py: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
