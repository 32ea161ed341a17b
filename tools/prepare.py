"""Corpora on disk -> manifests that train.py reads.

    python -m tools.prepare tour --audio DIR --out data     all manifests of the small model, and tokenizer
    python -m tools.prepare fsdd DIR --out fsdd.jsonl       one corpus, plain questions
    python -m tools.prepare toy                             no data at hand: synthetic clips and manifests
    python -m tools.prepare speak sentences BOOKS --out speech/lines.jsonl --tts URL --voices a,b,c
    python -m tools.prepare check data/stage*.jsonl data/held_out.jsonl data/test.jsonl     what they hold
    python -m tools.prepare show data/stage2.jsonl -n 5     examples as the model sees them

The parts: corpora.py reads corpora, questions.py asks about clips, speech.py speaks, writer.py has a
language model write, tour.py puts together what the small model is trained on.  The same seed writes the
same bytes.
"""

import itertools
import os
import random
import re
import sys
from collections import Counter

from tqdm import tqdm

from data import build_prompt, encode_question, load_audio, parse_example, read_manifest, window_seconds
from model import PRESETS
from runtime.errors import Parser, UserError, exit_status, number
from runtime.files import check_out
from runtime.manifests import ASR_QUESTION, read_entries
from tools.corpora import CORPORA, read_corpus
from tools.questions import (
    DOMAINS,
    TASKS,
    check_text,
    choice_line,
    choices_in,
    domain_of,
    labels_of,
    make_folder,
    preference_line,
    question_lines,
    seconds_of,
    write_lines,
)
from tools.speech import choose_engine, speak_questions, speak_sentences
from tools.spoken_questions import TEXTS
from tools.tour import sentences_to_copy, tour
from tools.toy import demo, toy
from tools.writer import Endpoint, write_with_llm
from weights import load_tokenizer

# ---------------------------------------------------------------------------------------------
# checking manifests

# corpora whose test speakers must be unheard
SPEAKER_MATTERS = (
    "ravdess",
    "librispeech",
    "iemocap",
    "vctk",
    "voxceleb1",
    "vocalsound",
    "speechocean762",
    "neural",
)


def wrong_option(question, answer):
    """What is wrong with a multiple-choice answer, or None: each letter must be listed, for its text."""
    choices = choices_in(question)
    if not choices:
        return None
    if len(set(choices.values())) < len(choices):
        return "two options are the same"
    texts = {letter: choice.rstrip(".").lower() for letter, choice in choices.items()}
    for part in re.split(r"(?<=\.) (?=[A-H]\. )", answer.strip()):
        match = re.fullmatch(r"([A-H])[.):]?(?:\s+(.+?))?\.?", part)
        if match:
            letter, text = match[1], match[2]
            if letter not in texts or (text and text.lower() != texts[letter]):
                return f"option {letter} is not what the answer says"
        elif part.rstrip(".").lower() not in texts.values():
            return "the answer is none of the options"
    return None


class Report:
    """What is counted while manifests are read, and the first of their errors."""

    def __init__(self, decode, show):
        self.decode, self.show = decode, show
        self.lines, self.duplicates, self.n_errors = 0, 0, 0
        self.errors = []  # the first `show` of them
        self.by_corpus, self.hours, self.by_task = Counter(), Counter(), Counter()
        self.answer_words = []  # of a million answers at most
        self.seen = set()  # hashes of lines
        self.seconds = {}  # hash of a clip's path -> its length
        self.cut = Counter()  # model -> transcripts of clips beyond its window
        self.clips = {True: set(), False: set()}  # for testing or not -> hashes of clips
        self.speakers = {True: set(), False: set()}

    def error(self, where, what):
        self.n_errors += 1
        if len(self.errors) < self.show:
            self.errors.append(f"{where}: {what}")

    def add(self, where, entry, folder, is_test, held_out):
        """One line of a manifest."""
        self.lines += 1
        try:
            check_text(entry, where)
            example = parse_example(entry, self.lines, where, folder, None, check=False)
        except UserError as e:
            self.error(where, str(e).removeprefix(where + ": "))
            return
        key = hash((example.audio, example.question, example.answer, example.rejected))
        self.duplicates += key in self.seen
        self.seen.add(key)
        corpus = (domain_of(example.facts), example.dataset or "-")
        self.by_corpus[corpus] += 1
        self.by_task[example.task or "-"] += 1
        if len(self.answer_words) < 1_000_000:
            self.answer_words.append(len(example.answer.split()))
        if problem := wrong_option(example.question, example.answer):
            self.error(where, problem)
        if example.rejected is not None and example.rejected.strip() == example.answer.strip():
            self.error(where, "the rejected answer is the chosen one")
        if example.audio is not None:
            self.add_audio(where, example, corpus, is_test, held_out)

    def add_audio(self, where, example, corpus, is_test, held_out):
        # realpath raises an error for a name with NUL in it: only what is there can have two names
        is_there = os.path.isfile(example.audio)
        clip = hash(os.path.realpath(example.audio) if is_there else example.audio)
        if clip not in self.seconds:
            seconds = self.seconds[clip] = seconds_of(example.audio)
            self.hours[corpus] += (seconds or 0) / 3600
            if seconds is None:
                self.error(where, f"{example.audio}: missing, or not readable as audio")
            elif self.decode:
                try:
                    load_audio(example.audio)
                except UserError as e:
                    self.error(where, str(e))
        if example.question == ASR_QUESTION or example.facts.get("words") == example.answer:
            seconds = example.duration or self.seconds[clip] or 0.0
            self.cut.update(name for name in ("tiny", "diffa2") if seconds > window_seconds(PRESETS[name]))
        self.clips[is_test].add(clip)
        if clip in self.clips[not is_test]:
            self.error(where, f"{example.audio}: is in a test manifest and in another one")
        # held-out clips are of speakers that are trained on: the loss on them is watched, not reported
        if example.dataset in SPEAKER_MATTERS and "speaker" in example.facts and not held_out:
            speaker = (example.dataset, example.facts["speaker"])
            self.speakers[is_test].add(speaker)
            if speaker in self.speakers[not is_test]:
                self.error(where, f"{' '.join(speaker)} speaks in a test manifest and in another one")

    def print(self):
        print(f"{'domain':10}{'corpus':26}{'lines':>10}{'hours of clips':>16}")
        for domain in DOMAINS:
            for corpus in sorted(c for c in self.by_corpus if c[0] == domain):
                print(f"{domain:10}{corpus[1]:26}{self.by_corpus[corpus]:>10,}{self.hours[corpus]:>16.2f}")
        total = sum(self.hours.values())
        print(f"{'total':36}{self.lines:>10,}{total:>16.2f}   {len(self.seconds):,} clips")
        print("tasks: " + ", ".join(f"{task} {n:,}" for task, n in self.by_task.most_common()))
        if self.answer_words:
            words = sorted(self.answer_words)
            most = words[int(len(words) * 0.95)]
            print(f"words in an answer: median {words[len(words) // 2]}, 95 % up to {most}, most {words[-1]}")
        print(f"duplicate lines: {self.duplicates:,}")
        for name, n in self.cut.items():
            window = f"window of {window_seconds(PRESETS[name]):g} s"
            print(f"transcripts of clips beyond {name}'s {window}, which training cuts: {n:,}")
        for line in self.errors:
            print(line, file=sys.stderr)
        if self.n_errors:
            plural = "s" if self.n_errors > 1 else ""
            above = f", the first {self.show} above" if self.n_errors > self.show else ""
            print(f"prepare: {self.n_errors} error{plural} in {self.lines} lines{above}", file=sys.stderr)


def check(paths, decode=False, show=5):
    """Prints what manifests hold, as Table A.1 does, and what is wrong with them -> number of errors.

    A manifest whose name has "test" or "held_out" in it is for testing: its clips, and the speakers of a
    "test" where that matters, must be in no other.  Audio is looked at by its header, with decode=True read.
    """
    report = Report(decode, show)
    for path in paths:
        name, folder = os.path.basename(path), os.path.dirname(os.path.abspath(path))
        held_out = "held_out" in name
        for where, entry in tqdm(read_entries(path), desc=name, unit=" lines", mininterval=1):
            report.add(where, entry, folder, held_out or "test" in name, held_out)
    report.print()
    return report.n_errors


# ---------------------------------------------------------------------------------------------
# showing


def show(path, n, tokenizer_folder):
    """Prints n examples as the model sees them: prompt, splice, response and its length."""
    tokenizer = load_tokenizer(tokenizer_folder)
    config = PRESETS["tiny"].with_tokenizer(tokenizer)

    def text(ids):
        return repr(tokenizer.decode(ids, skip_special_tokens=False))

    for example in read_manifest(path)[:n]:
        item = encode_question(example, tokenizer, config)["text"]
        _, audio_at = build_prompt(tokenizer, example.question)
        ids, start = item["ids"], item["is_answer"].index(True)
        response = ids[start:]
        print(f"{example.where}  {example.audio}")
        print(f"  {text(ids[:audio_at])} + [audio] +")
        print(f"  {text(ids[audio_at:start])}")
        print(f"  response of {len(response)} tokens: {text([i for i in response if i != config.eos_id])}")


# ---------------------------------------------------------------------------------------------
# the command line


def names(text):
    """The parts of "a,b,c"."""
    return [part.strip() for part in text.split(",") if part.strip()]


def build_parser():
    parser = Parser(prog="prepare", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    p = commands.add_parser("tour", help="all manifests of the small model")
    p.set_defaults(run=run_tour)
    p.add_argument("--audio", required=True, help="folder that holds fsdd, speech_commands, esc10 and others")
    p.add_argument("--text", help="folder of books, a paragraph a line: what stage 0 reads")
    p.add_argument("--speech", help="folder that `speak sentences` has written")
    p.add_argument("--out", default="data")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--strings",
        type=number(int, 1),
        default=3000,
        help="composed strings; all else in proportion (default 3000)",
    )

    p = commands.add_parser("sentences", help="sentences of books, in text: more of stage 0 than tour writes")
    p.set_defaults(run=run_sentences)
    p.add_argument("text", help="folder of books, a paragraph a line")
    p.add_argument("--out", required=True)
    p.add_argument("--seed", type=int, default=0)

    p = commands.add_parser("toy", help="a synthetic corpus and all manifests from it (needs espeak-ng)")
    p.set_defaults(run=run_toy)
    p.add_argument("--out", default="toy", help="clips go to OUT/audio, manifests to OUT (default toy)")
    p.add_argument(
        "--each", type=number(int, 1), default=24, help="clips of every word and sound (default 24)"
    )
    p.add_argument("--seed", type=int, default=0)

    p = commands.add_parser(
        "speak", help="text read aloud: questions that are answered in text, or sentences of books"
    )
    p.set_defaults(run=run_speak)
    p.add_argument("corpus", choices=(*sorted(TEXTS), "sentences"))
    p.add_argument("source", help="its JSON, JSONL, CSV or TSV file; of sentences a .txt or a folder of them")
    p.add_argument("--out", required=True, help="a manifest; of sentences DIR/lines.jsonl, clips beside it")
    p.add_argument(
        "--tts", metavar="URL", help="OpenAI-compatible speech endpoint, e.g. http://localhost:8880/v1"
    )
    p.add_argument("--tts-model", metavar="NAME", help="its model (default tts-1)")
    p.add_argument("--voices", type=names, default=[], metavar="a,b,c", help="names of the engine's voices")
    p.add_argument(
        "--tts-command",
        metavar="COMMAND",
        help="any other engine, with {text}, {out}, {voice} or {speaker_wav}",
    )
    p.add_argument("--speakers", help="folder of recordings from which {speaker_wav} is drawn")
    p.add_argument("--empathetic", action="store_true", help="questions: ask for warm answers")
    p.add_argument(
        "--test-voices", type=names, default=[], metavar="a,b", help="sentences: voices for testing only"
    )
    p.add_argument("--limit", type=number(int, 1), help="stop after so many clips")
    p.add_argument(
        "--workers", type=number(int, 1, 1000), default=2, help="clips in the making at a time (default 2)"
    )
    p.add_argument("--seed", type=int, default=0)

    for command, what in (
        ("answers", "a language model writes the answers of a manifest"),
        ("preferences", "a language model writes worse answers: stage 4"),
    ):
        p = commands.add_parser(command, help=what)
        p.set_defaults(run=run_writer)
        p.add_argument("manifest", help="lines with facts, as this program writes them")
        p.add_argument("--out", required=True)
        p.add_argument(
            "--llm",
            required=True,
            metavar="URL",
            help="OpenAI-compatible endpoint, e.g. http://localhost:8000/v1 (key: OPENAI_API_KEY)",
        )
        p.add_argument("--model", required=True)
        p.add_argument(
            "--workers", type=number(int, 1, 1000), default=8, help="questions in flight (default 8)"
        )
        p.add_argument("--timeout", type=number(float, 0.001), default=60.0, help="seconds (default 60)")
        p.add_argument("--limit", type=number(int, 1))

    p = commands.add_parser("check", help="what manifests hold, and what is wrong with them")
    p.set_defaults(run=run_check)
    p.add_argument("manifests", nargs="+")
    p.add_argument("--decode", action="store_true", help="read every clip, not its header alone")
    p.add_argument("--errors", type=number(int, 0), default=5, help="how many errors to print (default 5)")

    p = commands.add_parser("show", help="examples as the model sees them")
    p.set_defaults(run=run_show)
    p.add_argument("manifest")
    p.add_argument("-n", type=number(int, 1), default=5)
    p.add_argument("--tokenizer", help="folder of tokenizer.json (default: the manifest's)")

    p = commands.add_parser("demo", help="the clips of assets/demo (needs espeak-ng)")
    p.set_defaults(run=lambda args: demo(args.out))
    p.add_argument("--out", default="assets/demo")

    for name, corpus in CORPORA.items():
        p = commands.add_parser(name, help=f"a manifest of the {name} corpus ({corpus.licence})")
        p.set_defaults(run=run_corpus)
        p.add_argument("source")
        p.add_argument("--out", required=True)
        p.add_argument("--split", choices=("train", "test", "all"), default="all")
        p.add_argument(
            "--tasks", type=names, default=[], metavar="a,b", help="these questions alone; asr: transcripts"
        )
        p.add_argument(
            "--kind",
            choices=("questions", "choices", "pairs"),
            default="questions",
            help="choices: multiple choice (stage 3); pairs: a better and a worse answer (stage 4)",
        )
        p.add_argument("--seed", type=int, default=0)
    return parser


def run_tour(args):
    tour(args.audio, args.out, args.seed, args.strings, args.text, args.speech)


def run_sentences(args):
    print(f"{args.out}: {sentences_to_copy(args.text, args.out, args.seed)} lines")


def run_check(args):
    return 2 if check(args.manifests, args.decode, args.errors) else 0


def run_show(args):
    show(args.manifest, args.n, args.tokenizer or os.path.dirname(os.path.abspath(args.manifest)))


def run_toy(args):
    audio = os.path.join(args.out, "audio")
    make_folder(args.out)
    toy(audio, args.each, args.seed)
    tour(audio, args.out, args.seed, 20 * args.each)


def run_speak(args):
    check_out(args.out)
    engine = choose_engine(args.tts, args.tts_model, args.voices, args.tts_command, args.speakers)
    if args.corpus == "sentences":
        n, hours = speak_sentences(
            args.source, args.out, engine, args.test_voices, args.limit, args.seed, args.workers
        )
        print(f"{args.out}: {n} clips, {hours:.2f} hours")
        return
    n = speak_questions(
        args.corpus, args.source, args.out, engine, args.empathetic, args.limit, args.seed, args.workers
    )
    print(f"{args.out}: {n} lines")


def run_writer(args):
    check_out(args.out)
    endpoint = Endpoint(args.llm, args.model, args.timeout)
    n, unusable, silent = write_with_llm(
        args.manifest, args.out, endpoint, args.command, args.workers, args.limit
    )
    left_out = f"{unusable} pairs found unusable, {silent} without a reply that keeps to the rules"
    print(f"{args.out}: {n} lines; {left_out}")


def run_corpus(args):
    clips = read_corpus(args.command, args.source)
    if args.split != "all":
        clips = [clip for clip in clips if clip.is_test == (args.split == "test")]
    if unknown := set(args.tasks) - set(TASKS):
        raise UserError(f"--tasks {', '.join(sorted(unknown))}: choose {', '.join(TASKS)}")
    rng = random.Random(args.seed)
    if args.kind == "questions":
        lines = question_lines(clips, rng, args.out, args.tasks or None)
    else:
        one, labels = {"choices": choice_line, "pairs": preference_line}[args.kind], labels_of(clips)
        lines = (one(clip, rng, args.out, labels, args.tasks or None) for clip in clips)
    # a corpus' own questions are asked besides: here they are left out again
    wanted = {task + ending for task in args.tasks for ending in ("", "_choice")}
    lines = (line for line in lines if line and (not wanted or line["task"] in wanted))
    first = next(lines, None)
    if first is None:
        raise UserError(f"{args.source}: no clip of this split can be asked that")
    lines = itertools.chain([first], lines)
    print(f"{args.out}: {write_lines(lines, args.out)} lines")


def main(argv=None):
    def run():
        args = build_parser().parse_args(argv)
        return args.run(args)

    return exit_status("prepare", run)


if __name__ == "__main__":
    sys.exit(main())
