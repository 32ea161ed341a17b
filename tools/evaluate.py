"""Scores, as the benchmarks define them, for any checkpoint: ours, small or released.

    python -m tools.evaluate exact data/test.jsonl             questions with short answers; the shipped model
    python -m tools.evaluate mmau mmau-test-mini.json --audio-root DIR --model diffa2 --out mmau.json
    python -m tools.evaluate mmsu mmsu.jsonl ... | mmar MMAR.jsonl ... | voicebench alpacaeval.jsonl ...
    python -m tools.evaluate asr DIR_OR_MANIFEST --model diffa2 --stage 1   word error rate, real-time factor
    torchrun --nproc_per_node=8 -m tools.evaluate mmau ... --out mmau.json  several GPUs, one result
    python -m tools.evaluate --compare a.json b.json           question by question, McNemar's p
    python -m tools.evaluate --table a.json b.json             beside the paper's own rows

Where prompts, rules and settings are from, and where they depart: benchmarks.py, judge.py.  Default: fixed
steps; --factor: parallel decoding.  Answers are kept in OUT.answers.jsonl as they come, so a killed run goes
on where it was; OUT is written at the end with the field names that the official scripts read.
"""

import datetime
import functools
import glob
import hashlib
import json
import os
import subprocess
import sys
from collections import defaultdict

import numpy as np
import soxr
from tqdm import tqdm

from adapters import merge_lora
from data import SAMPLE_RATE, load_audio, window_seconds
from decode import CACHES, Options, ask
from runtime import command_line
from runtime.errors import Parser, UserError, exit_status, number
from runtime.files import ROOT, check_out, fingerprint
from runtime.pieces import is_transcription
from runtime.processes import exit_process, process_group
from tools.benchmarks import (
    BENCHMARKS,
    OFFICIAL,
    TRANSCRIPTS,
    VOICEBENCH_DECODING,
    is_transcript,
    mcnemar,
    normalise,
    score_voicebench,
    wilson,
    word_errors,
)
from tools.judge import TIMES, judge, report_judged
from tools.questions import append_lines, check_text, seconds_of, write_lines, write_text
from tools.writer import Endpoint
from weights import load

# rows of the paper's tables: benchmark -> {"table", "columns", "rows": model -> its scores}
with open(os.path.join(ROOT, "tools", "paper_tables.json"), encoding="utf-8") as f:
    PAPER = json.load(f)


def subset_of(path):
    return os.path.splitext(os.path.basename(path))[0]


def answer_settings(args):
    """Everything that decides an answer; a file of answers keeps to one of these."""
    length, block, steps = BENCHMARKS[args.benchmark].decoding
    if args.benchmark == "voicebench":
        length, block, steps = VOICEBENCH_DECODING.get(subset_of(args.file), (length, block, steps))
    if args.answer_length is not None:
        length, steps = args.answer_length, steps and args.answer_length
        block = min(block, length)
    block = block if args.block is None else args.block
    factor = args.factor
    if args.steps is not None:
        steps = args.steps
    elif factor is not None or args.threshold is not None or steps is None:
        steps, factor = None, 1.0 if factor is None else factor
    Options(length, block, steps, factor, args.threshold).check()
    file = args.file if os.path.isfile(args.file) else os.path.join(args.file, "wav.scp")
    digest = ""
    if os.path.isfile(file):
        with open(file, "rb") as f:
            digest = hashlib.sha256(f.read()).hexdigest()[:12]
    return {
        "benchmark": args.benchmark,
        "questions": digest,
        "model": args.model,
        "stage": args.stage,
        "answer_length": length,
        "block": block,
        "steps": steps,
        "factor": factor,
        "cache": args.cache,
        "limit": args.limit,
        **({"threshold": args.threshold} if args.threshold is not None else {}),
        **({"int8": True} if args.int8 else {}),
        **({"audio_root": os.path.abspath(args.audio_root)} if args.audio_root else {}),
    }


def is_ours(entry):
    """Whether a line of a file of answers has what is read of it; wrong types may raise an error instead."""
    if "settings" in entry:
        header = entry["settings"]
        return header["benchmark"] in BENCHMARKS and {"questions", "model"} < header.keys() and how_of(header)
    is_text = isinstance(entry["id"], str) and isinstance(entry["answer"], str)
    is_spent = entry["calls"] + entry["seconds"] + entry["audio_seconds"] >= 0
    return is_text and is_spent and isinstance(entry.get("judged"), int | float | None)


def read_answers(path, settings=None):
    """A file of answers -> its settings, {id: line}, without the half line that a kill may have left."""
    found, header = {}, None
    try:
        if not os.path.isfile(path):  # a pipe would be waited for
            raise OSError
        with open(path, "rb") as f:  # bytes: the half line may end within a letter
            raw = f.readlines()
    except OSError:
        raise UserError(f"{path}: no file of answers; tools.evaluate writes one with --out") from None
    for n, line in enumerate(raw, 1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        try:
            fits = is_ours(entry)
        except (KeyError, TypeError, ValueError, AttributeError):
            fits = False
        if not fits:
            raise UserError(f"{path}:{n}: not a line that tools.evaluate wrote")
        check_text(entry, f"{path}:{n}")
        if "settings" in entry:
            header = entry["settings"]
        else:
            found[entry["id"]] = entry
    if header is None:
        raise UserError(f"{path}: not a file of answers that tools.evaluate wrote")
    if settings is not None and header != settings:
        # either may have a name that the other lacks: threshold, int8
        both = {k: (header.get(k, "nothing"), settings.get(k, "nothing")) for k in settings | header}
        name, held, wanted = next((k, a, b) for k, (a, b) in both.items() if a != b)
        raise UserError(f"{path}: holds answers with {name} = {held}, not {wanted}; give another --out")
    return header, found


def journals_of(out):
    """The files of answers that a finished run, or the processes of a killed one, have left for OUT."""
    whole = answers_of(out)
    parts = sorted(glob.glob(f"{glob.escape(whole)}.*-of-*"))
    return [whole, *parts] if os.path.exists(whole) else parts


def known_answers(out, settings):
    """{id: line} of all that was answered before; clips that could not be read are tried again."""
    known = {}
    for path in reversed(journals_of(out)):  # the whole one last: what is in it is newer
        lines = read_answers(path, settings)[1]
        known |= {id: line for id, line in lines.items() if "bad" not in line}
    return known


def answer_all(group, model, tokenizer, questions, known, journal, settings, batch, allow_bad, running):
    """Asks what is not known yet; returns {id: line} of these questions, which are this process's share.

    Longest clips last; every batch is written to `journal` (or None) before the next begins.  A clip that
    cannot be read is answered with nothing (wrong), and noted; too many of them stop the run.
    """
    limit = window_seconds(model.config)
    mine = {q.id: known[q.id] for q in questions if q.id in known}
    if journal:
        whole = [json.dumps({"settings": settings}), *map(json.dumps, mine.values())]
        write_text("\n".join(whole) + "\n", journal)  # without the half line that a kill may have left
    todo = [q for q in questions if q.id not in mine]
    todo.sort(key=lambda q: (q.duration or seconds_of(q.audio) or 0.0, len(q.prompt)))
    how = ("answer_length", "block", "steps", "factor", "threshold", "cache")
    options = Options(**{name: settings.get(name) for name in how})
    right, scored = 0, 0

    def keep(lines):
        for line in lines:
            mine[line["id"]] = line
        if journal:
            append_lines(lines, journal)

    def read(q):
        """The clip's samples; None where it cannot be read."""
        # transcripts of pieces are joined; a choice is made from what fits the window
        is_joined = settings["benchmark"] in ("asr", "exact") and is_transcription(q.prompt)
        try:
            return load_audio(q.audio, q.offset, q.duration, None if is_joined else limit)[0]
        except UserError as e:
            nothing = {"answer": "", "calls": 0, "seconds": 0.0, "audio_seconds": 0.0}
            keep([{"id": q.id} | nothing | {"bad": str(e)}])
            n_bad = sum("bad" in line for line in mine.values())
            if n_bad > max(allow_bad > 0, allow_bad * len(questions)):  # a single one stops no run
                share = f"{n_bad} clips cannot be read, more than {allow_bad:.0%}"
                raise UserError(f"{share}; the last: {e} (--allow-bad takes another share)") from None

    bar = {"total": len(questions), "initial": len(mine), "unit": " questions"}
    with tqdm(**bar, disable=group.rank != 0) as progress:
        for i in range(0, len(todo), batch):
            some = todo[i : i + batch]
            pairs = [(q, clip) for q in some if (clip := read(q)) is not None]
            progress.update(len(some) - len(pairs))
            if not pairs:
                continue
            asked, clips = zip(*pairs, strict=True)
            prompts = [q.prompt for q in asked]
            answers = ask(model, tokenizer, clips, prompts, settings["stage"], options, batch=batch)
            lines = []
            for q, a in zip(asked, answers, strict=True):
                spent = {"calls": a.calls, "seconds": a.seconds, "audio_seconds": a.audio_seconds}
                lines.append({"id": q.id, "answer": a.text} | spent)
            keep(lines)
            if running:
                marks = [running(q, a.text)["right"] for q, a in zip(asked, answers, strict=True)]
                right += sum(mark is True for mark in marks)
                scored += sum(mark is not None for mark in marks)
                if scored:
                    progress.set_postfix(right=f"{right / scored:.1%}", refresh=False)
            progress.update(len(asked))
    return mine


def count(marks, field):
    """Of how many answers `score` found this to be so."""
    return sum(bool(mark[field]) for mark in marks)


def print_rows(rows):
    """(name, marks) rows: share right with Wilson's interval, share that could not be parsed."""
    print(f"{'':34}{'n':>6}{'right':>9}{'95 % interval':>17}{'not parsed':>12}")
    for name, marks in rows:
        n, right, parsed = len(marks), count(marks, "right"), count(marks, "parsed")
        low, high = wilson(right, n)
        print(f"{name:34}{n:>6}{right / n:>9.1%}{low:>9.1%} -{high:6.1%}{1 - parsed / n:>12.1%}")


def print_task(task, asked):
    """One task of `exact`.  asked: (question, mark, line) of its questions."""
    by_label = defaultdict(list)
    for q, mark, _ in asked:
        by_label[q.answer].append(mark["right"])
    macro = sum(sum(marks) / len(marks) for marks in by_label.values()) / len(by_label)
    calls = sum(line["calls"] for *_, line in asked) / len(asked)
    text = f"{task}: macro average over {len(by_label)} answers {macro:.1%}, {calls:.2f} network calls"
    if task.startswith(TRANSCRIPTS):
        found = word_errors([q.answer for q, *_ in asked], [line["answer"] for *_, line in asked], normalise)
        text += f", WER {found['wer']:.1%}"
    print(text)


def report_words(questions, answers):
    """Prints the word error rate of transcripts; returns what goes into the summary."""
    expected = [q.answer for q in questions]
    found = word_errors(expected, answers)
    kinds = ", ".join(f"{found[kind]} {kind}" for kind in ("substitutions", "deletions", "insertions"))
    print(f"WER {found['wer']:.2%}: {kinds} in {found['words']} words")
    # Whisper's normalizer makes one number, and so one word, of "four nine two"
    apart = word_errors(expected, answers, normalise)
    print(f"WER {apart['wer']:.2%} with each digit a word: {apart['words']} words")
    return found


def report_marks(benchmark, questions, lines, score):
    """Prints right and wrong, over all and for every group; returns what goes into the summary."""
    marks = [score(q, lines[q.id]["answer"]) for q in questions]
    if all(mark["right"] is None for mark in marks):
        empty = sum(not mark["parsed"] for mark in marks)
        print(f"{len(marks)} answers, {empty} of them empty; this set needs a judge or its official scorer")
        return {}
    groups = defaultdict(list)
    for q, mark in zip(questions, marks, strict=True):
        for heading, group in q.groups:
            groups[heading, group].append(mark)
    named = {f"{heading}: {group}": groups[heading, group] for heading, group in sorted(groups)}
    print_rows([("all", marks), *named.items()])
    summary = {"right": count(marks, "right") / len(marks), "groups": {}}
    for name, some in named.items():
        summary["groups"][name] = count(some, "right") / len(some)
    if "raw" in marks[0]:
        print(f"raw rule, letters not mapped: {count(marks, 'raw') / len(marks):.1%}")
    if benchmark != "exact":
        return summary
    asked = [(q, mark, lines[q.id]) for q, mark in zip(questions, marks, strict=True)]
    for task in sorted(group for heading, group in groups if heading == "task"):
        print_task(task, [x for x in asked if ("task", task) in x[0].groups])
    said = [(q.answer, line["answer"]) for q, _, line in asked if is_transcript(q)]
    if said:
        summary["wer"] = word_errors(*zip(*said, strict=True), normalise)["wer"]
        print(f"all {len(said)} transcripts: WER {summary['wer']:.1%}")
    return summary


def how_of(settings):
    """The sampling rule in words, and whether the matrices were in int8."""
    if settings["steps"]:
        rule = f"{settings['steps']} steps"
    elif "threshold" in settings:
        rule = f"threshold {settings['threshold']:g}"
    else:
        rule = f"factor {settings['factor']:g}"
    return rule + (", int8" if settings.get("int8") else "")


def report(settings, questions, lines, score, asr=False):
    """Prints the scores and break-downs; returns a summary."""
    lengths = f"answer length {settings['answer_length']}, block {settings['block']}"
    cache = f"cache {settings['cache']}"
    print(", ".join((settings["benchmark"], settings["model"], how_of(settings), lengths, cache)))
    asked = [lines[q.id] for q in questions]
    calls = sum(line["calls"] for line in asked) / len(questions)
    audio = sum(line["audio_seconds"] for line in asked)
    rtf = sum(line["seconds"] for line in asked) / audio if audio else float("nan")
    summary = {"n": len(questions), "calls": calls, "rtf": rtf}
    if asr:
        summary |= report_words(questions, [line["answer"] for line in asked])
    else:
        summary |= report_marks(settings["benchmark"], questions, lines, score)
    bad = [line["bad"] for line in asked if "bad" in line]
    unread = f", {len(bad)} clips could not be read" if bad else ""
    print(f"{calls:.2f} network calls an answer, real-time factor {rtf:.4f}{unread}")
    for message in bad[:5]:
        print(f"  {message}")
    return summary


def official_score(folder, subset, path):
    """What VoiceBench's own script prints for a file of answers; it runs in its checkout."""
    command = [sys.executable, "evaluate.py", "--src_file", os.path.abspath(path), "--evaluator", subset]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{folder}/evaluate.py failed on {path} ({last}); the answers are written")
    return done.stdout.strip()


# ---------------------------------------------------------------------------------------------
# comparing


def answers_of(path):
    """OUT or OUT.answers.jsonl -> the latter."""
    return path if path.endswith(".answers.jsonl") else path + ".answers.jsonl"


def load_result(path):
    """(settings, {id: line}) of a finished file of answers."""
    path = answers_of(path)
    settings, lines = read_answers(path)
    if not lines or not all(isinstance(line.get("right"), bool) for line in lines.values()):
        raise UserError(f"{path}: not finished, or of a benchmark that has no right and wrong")
    return settings, lines


def compare(a, b):
    """Two models question by question."""
    (sa, la), (sb, lb) = load_result(a), load_result(b)
    if (sa["benchmark"], sa["questions"]) != (sb["benchmark"], sb["questions"]) or la.keys() != lb.keys():
        raise UserError(f"{a} and {b} do not answer the same questions")
    pairs = [(la[i]["right"], lb[i]["right"]) for i in la]
    counts = {
        k: sum(p == k for p in pairs) for k in ((True, True), (True, False), (False, True), (False, False))
    }
    n = len(pairs)
    for name, path, right in (("A", a, [x for x, _ in pairs]), ("B", b, [y for _, y in pairs])):
        print(f"{name}: {path}: {sum(right) / n:.1%}")
    print(f"\n{'':12}{'B right':>9}{'B wrong':>9}")
    print(f"{'A right':12}{counts[True, True]:>9}{counts[True, False]:>9}")
    print(f"{'A wrong':12}{counts[False, True]:>9}{counts[False, False]:>9}\n")
    print(f"McNemar's exact p = {mcnemar(counts[True, False], counts[False, True]):.4g} ({n} questions)")


def row_of(path):
    """A finished run -> its benchmark, its row in the table."""
    path = answers_of(path)
    settings, _ = read_answers(path)
    beside = path.removesuffix(".answers.jsonl") + ".summary.json"
    if not os.path.isfile(beside):
        raise UserError(f"{path}: not finished: no summary beside it")
    try:
        with open(beside, encoding="utf-8") as f:
            cells = " · ".join(scores_of(settings["benchmark"], json.load(f)))
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise UserError(f"{beside}: not a summary that tools.evaluate wrote") from None
    name = os.path.basename(path).removesuffix(".answers.jsonl")
    return settings["benchmark"], f"| {settings['model']}, {how_of(settings)} ({name}) | {cells} |"


def scores_of(benchmark, summary):
    """The cells of one run's row in the table."""
    if benchmark == "asr":
        return [f"WER {100 * summary['wer']:.2f}", f"RTF {summary['rtf']:.4f}"]
    cells = []
    for group, share in sorted(summary.get("groups", {}).items()):
        heading = group.split(": ")[0]
        # the paper breaks MMAU down by task, the others by what else their files name
        if (
            heading not in ("task", "sub-category", "difficulty", "category")
            or benchmark == "mmau"
            and heading == "task"
        ):
            cells.append(f"{group} {100 * share:.2f}")
    if "judged_right" in summary:
        cells.append(f"judged right {100 * summary['judged_right']:.2f}")
    if "rating" in summary:
        cells.append(f"rating {summary['rating']:.2f}")
    if benchmark != "voicebench" or "right" in summary:  # some of its sets have no right and wrong
        cells.append(f"overall {100 * summary['right']:.2f} (n = {summary['n']})")
    return cells


def table(paths):
    """Our runs beside the paper's rows, as Markdown."""
    runs = [row_of(path) for path in paths]
    for benchmark in sorted({name for name, _ in runs}):
        paper = PAPER.get(benchmark)
        source = f"{paper['table']}: {paper['columns']}" if paper else "no rows in the paper"
        print(f"**{benchmark}** ({source})\n\n| model | scores |\n|---|---|")
        for name, values in paper["rows"].items() if paper else ():
            print(f"| {name} (paper) | {' · '.join(values.split())} |")
        for name, row in runs:
            if name == benchmark:
                print(row)
        print()


# ---------------------------------------------------------------------------------------------
# lmms-eval, the harness


class LmmsEval:
    """Lets lmms-eval drive a model of ours: its `generate_until` on requests that carry one clip each.

    harness.py joins it with the harness's own base class and starts the harness.
    """

    rank, world_size = 0, 1  # one process

    def __init__(
        self,
        pretrained="tiny",
        device=None,
        batch_size=1,
        max_batch_size=None,  # the harness passes it; batch_size decides
        answer_length=32,
        block=32,
        factor=1.0,
    ):
        super().__init__()
        self.model, self.tokenizer = load(pretrained, device)
        merge_lora(self.model)
        self.batch_size = int(batch_size)
        self.options = {"answer_length": int(answer_length), "block": int(block), "factor": float(factor)}
        self.task_dict = {}  # the harness fills it: task -> split -> documents

    def generate_until(self, requests):
        """requests: Instances with args (context, gen_kwargs, doc_to_visual, doc_id, task, split).

        Returns the answers' texts in the order of the requests.
        """
        questions, clips = [], []
        for request in requests:
            context, _, doc_to_visual, doc_id, task, split = request.args
            (clip,) = doc_to_visual(self.task_dict[task][split][doc_id])
            questions.append(context)
            clips.append(resampled(clip["array"], clip["sampling_rate"], self.model.config))
        answers = ask(self.model, self.tokenizer, clips, questions, batch=self.batch_size, **self.options)
        return [answer.text for answer in answers]

    def loglikelihood(self, requests):
        raise NotImplementedError("diffusion bounds the likelihood and has none: use generate_until tasks")

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("one clip, one question")


def resampled(array, rate, config):
    """Samples at any rate, mono or (channels, n) -> 16 kHz mono float32, cut to the model's window."""
    audio = np.asarray(array, dtype=np.float32)
    audio = audio.mean(0) if audio.ndim == 2 else audio
    audio = soxr.resample(audio, rate, SAMPLE_RATE) if rate != SAMPLE_RATE else audio
    return audio[: int(window_seconds(config) * SAMPLE_RATE)]


# ---------------------------------------------------------------------------------------------
# the command line


def read_questions(args):
    """The questions that args name; raises UserError where there are none, or two of one id."""
    if not os.path.exists(args.file):
        raise UserError(f"{args.file}: no such file")
    if args.audio_root and args.benchmark in ("asr", "exact") and os.path.isfile(args.file):
        raise UserError("--audio-root: the paths in a manifest start from the manifest's own folder")
    root = args.audio_root or ""
    if not root and os.path.isfile(args.file):
        root = os.path.dirname(os.path.abspath(args.file))
    questions = list(BENCHMARKS[args.benchmark].read(args.file, root))[: args.limit]
    if not questions:
        raise UserError(f"{args.file}: holds no question")
    for n, q in enumerate(questions, 1):
        check_text(vars(q), f"{args.file}: question {n}")
    if len({q.id for q in questions}) < len(questions):
        raise UserError(f"{args.file}: two questions have the same id")
    return questions


def check_voicebench(args, has_checker):
    """Says what --voicebench is for; raises UserError when it is given and cannot work.

    has_checker: this subset is scored by VoiceBench's own script.
    """
    if has_checker and not args.voicebench:
        what = f"evaluate: {subset_of(args.file)} is scored by VoiceBench's own checker"
        hint = "--voicebench DIR names its checkout, without it the answers are only written"
        print(f"{what}; {hint}", file=sys.stderr)
    if args.voicebench:
        script = os.path.join(args.voicebench, "evaluate.py")
        if not (has_checker and args.out and os.path.exists(script)):
            raise UserError(
                f"--voicebench {args.voicebench}: wants VoiceBench's checkout (with its evaluate.py), --out, "
                f"and one of {', '.join(OFFICIAL)}"
            )


def write_answers(args, settings, questions, lines):
    """OUT.answers.jsonl with all that is known, in the place of what each process has written."""
    parts = [path for path in journals_of(args.out) if path != answers_of(args.out)]
    write_lines([{"settings": settings}, *(lines[q.id] for q in questions)], answers_of(args.out))
    for path in parts:
        os.remove(path)


def write_results(args, questions, lines, summary):
    """OUT with the official field names, OUT.summary.json."""
    bench, official = BENCHMARKS[args.benchmark], []
    for q in questions:
        answers = dict.fromkeys(bench.written, lines[q.id]["answer"])
        official.append({**q.entry, "id": q.id, **answers})
    write_text(json.dumps(summary), args.out + ".summary.json")
    if bench.as_list:
        write_text(json.dumps(official, indent=1, ensure_ascii=False), args.out)
    else:
        write_lines(official, args.out)


def run(args):
    bench, subset = BENCHMARKS[args.benchmark], subset_of(args.file)
    args.out = args.out and args.out.removesuffix(".answers.jsonl")
    settings = answer_settings(args)
    questions = read_questions(args)
    is_voicebench = args.benchmark == "voicebench"
    if args.judge and not is_voicebench:
        raise UserError(f"--judge rates the answers of voicebench, not of {args.benchmark}")
    for ending in ("", ".answers.jsonl", ".summary.json") if args.out else ():
        check_out(args.out + ending)
        if os.path.exists(args.out + ending) and os.path.samefile(args.out + ending, args.file):
            raise UserError(f"--out {args.out}: would be written over the questions")
    score = functools.partial(score_voicebench, subset) if is_voicebench else bench.score
    check_voicebench(args, is_voicebench and subset in OFFICIAL)
    # one process may have far more to do than another: it reads the long clips
    with process_group(args.device, timeout=datetime.timedelta(days=7)) as group:
        files = (args.llada, args.whisper, args.diffa)
        model, tokenizer = load(args.model, group.device, None, args.stage, *files, args.int8)
        # a folder may hold others by now.  Before LoRA is merged: that is rounded by the device
        settings["weights"] = group.first_only(lambda: fingerprint(model, with_lora=True))
        merge_lora(model)
        known = known_answers(args.out, settings) if args.out else {}
        group.gather(None)  # all have read what the next line writes anew
        journal = args.out and answers_of(args.out)
        mine = journal if group.size == 1 or not journal else f"{journal}.{group.rank}-of-{group.size}"
        share, how = questions[group.rank :: group.size], (args.batch or bench.batch, args.allow_bad, score)
        lines = answer_all(group, model, tokenizer, share, known, mine, settings, *how)
        everything = {}
        for part in group.gather(lines):
            everything |= part
    if group.rank:  # the rest is done by one, and may take as long as a judge does
        return
    for q in questions:
        mark = score(q, everything[q.id]["answer"])
        if mark["right"] is not None:
            everything[q.id] |= mark
    if args.out:
        write_answers(args, settings, questions, everything)
    judged = {}
    if args.judge:
        endpoint = Endpoint(args.judge, args.judge_model)
        ratings = judge(questions, everything, endpoint, TIMES, args.out and answers_of(args.out))
        judged = report_judged(questions, ratings)
    trained = {"objective": "ar" if model.config.causal else "diffusion", "after_stage": model.stage}
    summary = report(settings, questions, everything, score, args.benchmark == "asr") | trained | judged
    if args.out:
        write_results(args, questions, everything, summary)
        if args.voicebench:
            print(official_score(args.voicebench, subset, args.out))


def main(argv=None):
    parser = Parser(prog="python -m tools.evaluate", description=__doc__)
    parser.add_argument("benchmark", nargs="?", choices=sorted(BENCHMARKS))
    parser.add_argument(
        "file", nargs="?", help="the benchmark's question file; asr: a manifest or a Kaldi folder"
    )
    parser.add_argument("--audio-root", help="folder that the audio paths start from (default: the file's)")
    command_line.add_model(parser)
    parser.add_argument("--stage", type=int, choices=(1, 2, 3, 4))
    parser.add_argument("--answer-length", type=int, help="tokens")
    parser.add_argument("--block", type=int)
    command_line.add_sampler(parser, CACHES)
    parser.add_argument("--batch", type=number(int, 1))
    parser.add_argument("--limit", type=number(int, 1), help="the first so many questions")
    parser.add_argument(
        "--allow-bad",
        type=number(float, 0, 1),
        default=0.01,
        help="share of clips that may be unreadable (default 0.01)",
    )
    parser.add_argument("--device")
    what = "write the answers, and go on where an earlier run was (VoiceBench: MODEL-DATA-SPLIT-audio.jsonl)"
    parser.add_argument("--out", help=what)
    parser.add_argument(
        "--judge", metavar="URL", help="voicebench: an OpenAI-compatible endpoint that rates answers"
    )
    parser.add_argument("--judge-model", default="gpt-4o-mini")
    parser.add_argument(
        "--voicebench", metavar="DIR", help="checkout of VoiceBench, whose script scores ifeval and bbh"
    )
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two results question by question")
    parser.add_argument(
        "--table", nargs="+", metavar="OUT", help="results beside the paper's rows, in Markdown"
    )

    def start():
        args = parser.parse_args(argv)
        if args.compare:
            compare(*args.compare)
        elif args.table:
            table(args.table)
        elif not args.file:
            raise UserError(f"give a benchmark ({', '.join(sorted(BENCHMARKS))}) and its question file")
        else:
            run(args)

    return exit_status("evaluate", start)


if __name__ == "__main__":
    exit_process(main())
