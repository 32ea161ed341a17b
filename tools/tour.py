"""The small model's tour: corpora, books and neural speech -> its tokenizer and the manifests of all stages.

    python -m tools.prepare tour --audio DIR --text DIR --speech DIR --out data

Stage 1 transcribes, stages 2 and 3 ask about clips (stage 3 by multiple choice too), stage 4 has
preference pairs.  Stage 0 has no audio at all: the questions of the other stages with the facts that
are known of each clip, and sentences of the books to be written out from their pieces.

A clip for testing is in no other manifest, string or mixture.  The same seed writes the same bytes.
"""

import contextlib
import glob
import itertools
import json
import os
import random
import re
from collections import defaultdict

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from data import BEFORE_AUDIO, SYSTEM, prompt_text
from model import SPECIAL_TOKENS
from runtime.errors import UserError
from runtime.manifests import ASR_QUESTION, read_entries
from tools.compose import mix, strings
from tools.corpora import DIGITS, plain, read_corpus, read_paragraphs
from tools.prompts import LETTERS, mmau_prompt, mmsu_prompt
from tools.questions import (
    CHOICE_TASKS,
    TASKS,
    askable,
    choice_line,
    choices_in,
    domain_of,
    draw_balanced,
    labels_of,
    line_of,
    make_folder,
    multiple_choice,
    path_from,
    preference_line,
    question_line,
    question_lines,
    write_lines,
    write_text,
)

TOUR = ("fsdd", "speech_commands", "esc10", "ravdess", "librispeech", "berklee", "sonicpi", "speechocean762")
SENTENCES = ("speechocean762", "neural")  # corpora of sentences, no two clips alike
BALANCE = {  # fact -> clips drawn for it in a manifest, every value of it equally often
    "digit": 2500,
    "word": 2500,
    "sound": 2500,
    "instrument": 3000,
    "emotion": 5000,
    "sex": 4000,
    "intensity": 2000,
    "age": 1500,
}
TEST_TASKS = {  # corpus -> what its test clips are asked
    "fsdd": ("digit",),
    "speech_commands": ("word",),
    "esc10": ("sound",),
    "ravdess": ("emotion", "sex", "intensity"),
    "librispeech": ("sex",),
    "berklee": ("instrument",),
    "sonicpi": ("instrument",),
    "speechocean762": ("asr", "sex", "age"),
    "neural": ("asr", "sex"),
}
TEST_LINES = 300
OF_STAGES = tuple(f"stage{n}.jsonl" for n in range(5))
MANIFESTS = (*OF_STAGES, "held_out.jsonl", "test.jsonl", "mmsu.jsonl", "mmau.json")


def sentences_of(folder, most=15):
    """Sentences of 2 to `most` words of all *.txt in a folder (a paragraph a line), in order, none twice."""
    if not glob.glob(os.path.join(glob.escape(folder), "*.txt")):
        raise UserError(f"{folder}: holds no .txt")
    seen = {}
    for paragraph in read_paragraphs(folder):
        for sentence in re.split(r"(?<=[.!?;:])\W+", paragraph):
            words = plain(sentence).split()
            if 2 <= len(words) <= most and re.fullmatch(r"[\x20-\x7e’‘“”—]+", sentence.strip()):
                seen[" ".join(words)] = None
    return list(seen)


def words_of(sentences):
    return {word for sentence in sentences for word in sentence.split()}


def compose_clips(part, n, rng, folder, progress):
    """Made of a split's clips: strings of digits and of words, speech over sounds -> {kind: clips}."""
    digits = [c for c in part if c.dataset == "fsdd"]
    words = [c for c in part if c.dataset == "speech_commands"]
    sounds = [c for c in part if "sound" in c.facts]
    speech = digits + words + [c for c in part if c.dataset in ("ravdess", "librispeech", *SENTENCES)]
    made = {"digits": [], "words": [], "mixtures": []}
    if digits:
        made["digits"] = list(strings(digits, n, 5, rng, f"{folder}_digits", progress))
    if words:
        made["words"] = list(strings(words, n // 2 + 1, 3, rng, f"{folder}_words", progress, 2))
    if sounds and speech:
        by_corpus = defaultdict(list)
        for clip in speech:
            by_corpus[clip.dataset].append(clip)
        for i, sound in enumerate(draw_balanced(sounds, "sound", n, rng)):
            voice = rng.choice(by_corpus[rng.choice(sorted(by_corpus))])
            made["mixtures"].append(mix(voice, sound, rng, f"{folder}_mixtures/{i:05}.flac"))
            progress.update()
    return made


def without_audio(line):
    """A manifest line without its audio: what stage 0 reads in its place are the facts."""
    return {k: v for k, v in line.items() if k not in ("audios", "duration", "offset")}


def spoken_line(source, question, words):
    """A line of stage 0 about no clip that exists: someone says `words`, the answer."""
    messages = [{"role": "user", "content": "<audio>" + question}, {"role": "assistant", "content": words}]
    return {"messages": messages, "dataset": source, "task": "asr", "facts": {"words": words}}


def string_in_text(words, rng):
    """Words that nothing connects, to be written in order: they cannot be guessed, only copied."""
    drawn_from = DIGITS if rng.random() < 0.5 or not words else words
    string = " ".join(rng.choice(drawn_from) for _ in range(rng.randint(1, 8)))
    return spoken_line("strings_in_text", rng.choice(TASKS["asr"].questions), string)


def sentences_to_copy(text, out, seed=0):
    """Writes more for stage 0 to copy: every sentence of a folder of books, and strings of their words.

    Returns the number of lines.  Copying takes far more steps than all else that a small backbone learns.
    """
    books = sentences_of(text)
    words, rng = sorted(words_of(books)), random.Random(seed)
    lines = itertools.chain(
        (spoken_line("books", ASR_QUESTION, sentence) for sentence in books),
        (string_in_text(words, rng) for _ in range(10_000)),
    )
    return write_lines(lines, out, rng)


def tour(audio, out, seed=0, n_strings=3000, text=None, speech=None):
    """Writes the manifests of the small model's run, the tokenizer and two benchmarks.

    They are tokenizer.json, stage0.jsonl to stage4.jsonl, held_out.jsonl, test.jsonl, mmsu.jsonl, mmau.json.

    audio: folder that holds the corpora of TOUR, or some of them.  text: folder of books.  speech: what
    `prepare speak sentences` wrote.  n_strings: composed digit strings; all else in proportion.
    """
    rng, scale = random.Random(seed), n_strings / 3000
    have = [name for name in TOUR if os.path.isdir(os.path.join(audio, name))]
    if not have:
        raise UserError(f"{audio}: holds none of the folders {', '.join(TOUR)}")
    books = sentences_of(text) if text else []
    make_folder(out)
    clips = [clip for name in have for clip in read_corpus(name, os.path.join(audio, name))]
    if speech:
        clips += read_corpus("neural", speech)
    trained_on = [c for c in clips if not c.is_test]
    if not trained_on:
        raise UserError(f"{audio}: holds clips for testing alone")
    held_out = {c.path for c in rng.sample(trained_on, max(1, len(trained_on) // 60))}
    folder, here = f"{out}/clips", f"{out}/manifest"  # paths are relative to the manifests
    for name in MANIFESTS:  # of an earlier run, whose clips are written over from here on
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(out, name))
    parts, made = {}, {}
    with tqdm(total=int(n_strings * 2.5), desc="composing", unit=" clips") as progress:
        for split in ("train", "test"):
            part = [c for c in clips if c.is_test == (split == "test") and c.path not in held_out]
            n = n_strings if split == "train" else int(200 * scale) + 1
            parts[split] = part
            made[split] = compose_clips(part, n, rng, f"{folder}/{split}", progress)
    train, composed = parts["train"], [c for some in made["train"].values() for c in some]
    labels = labels_of(train + composed)
    sentences = [c for c in train if c.dataset in SENTENCES and not c.qa]
    spoken_questions = [c for c in train if c.qa]

    def singles(share, r):
        """Single clips, the values of every fact equally often, each with a task that turns on the fact.

        Whether a child is a boy or a girl can hardly be heard, and would teach to guess: only adults are
        drawn for it.  A child's clip that is drawn for something else may still be asked.
        """
        for kind, n in BALANCE.items():
            asked = [c for c in train if kind != "sex" or c.facts.get("age") != "child"]
            for clip in draw_balanced(asked, kind, int(n * share * scale), r):
                yield clip, [kind]

    def questions(pairs, r):
        for clip, tasks in pairs:
            yield question_line(clip, r, here, tasks if r.random() < 0.75 else None)

    def choices(some_clips, r):
        return (choice_line(clip, r, here, labels) for clip in some_clips)

    def transcripts(r):
        yield from question_lines(composed, r, here, ["asr"])
        yield from question_lines(sentences, r, here, ["asr"])
        yield from (question_line(c, r, here, ["asr"]) for c, _ in singles(0.2, r))

    def about_clips(share, r):
        yield from question_lines(composed, r, here)
        yield from question_lines(made["train"]["mixtures"], r, here, ["background"])
        yield from questions(singles(share, r), r)
        yield from question_lines(spoken_questions, r, here, ["asr"])
        yield from question_lines(sentences, r, here)

    def by_choice(share, r):
        yield from choices((c for c, _ in singles(share, r)), r)
        yield from choices(composed[::2], r)

    def preferences(r):
        drawn = [c for c, _ in singles(0.15, r)] + r.sample(composed, len(composed) // 5)
        return (preference_line(c, r, here, labels) for c in drawn)

    def text_alone(r):
        for line in itertools.chain(transcripts(r), about_clips(1, r), by_choice(0.6, r)):
            if line and line["task"] != "speaker":  # imitated audio does not say who speaks
                yield without_audio(line)
        words = sorted(words_of(books) | labels.get("word", set()))
        for sentence in r.sample(books, min(len(books), int(8_000 * scale))):
            question = r.choice((ASR_QUESTION, r.choice(TASKS["asr"].questions)))
            yield spoken_line("books", question, sentence)
        for _ in range(int(10_000 * scale)):
            yield string_in_text(words, r)

    stages = {
        1: transcripts,
        2: lambda r: about_clips(1.5, r),
        3: lambda r: itertools.chain(about_clips(0.7, r), by_choice(1, r)),
        4: preferences,
        0: text_alone,
    }
    for stage, lines in stages.items():
        r = random.Random(f"{seed} stage {stage}")
        path = f"{out}/stage{stage}.jsonl"
        print(f"{path}: {write_lines(filter(None, lines(r)), path, r)} lines")
    lines = [question_line(c, rng, here, sentences=0) for c in clips if c.path in held_out and not c.qa]
    print(f"{out}/held_out.jsonl: {write_lines(filter(None, lines), f'{out}/held_out.jsonl')} lines")
    lines = list(test_lines(parts["test"], made["test"], rng, here))
    print(f"{out}/test.jsonl: {write_lines(lines, f'{out}/test.jsonl')} lines")
    asked = [*parts["test"], *made["test"]["digits"], *made["test"]["mixtures"]]
    found = benchmark(asked, labels, max(40, int(720 * scale)), rng, out)
    print(f"{out}/mmsu.jsonl: {found[0]} questions; {out}/mmau.json: {found[1]} questions")
    paths = [f"{out}/{name}" for name in OF_STAGES]
    tokenizer = train_tokenizer(entry for path in paths for _, entry in read_entries(path))
    tokenizer.save(f"{out}/tokenizer.json")
    print(f"{out}/tokenizer.json: {tokenizer.get_vocab_size()} entries")


def test_lines(clips, made, rng, out):
    """The test split.

    A question for each task that a corpus is tested by, spoken questions, and composed clips.
    At most TEST_LINES of each corpus and task, drawn at random.
    """
    by_task = defaultdict(list)
    for clip in clips:
        for question, answer in clip.qa:
            by_task[clip.dataset, "qa"].append(line_of(clip, "qa", question, answer, out))
        for task in () if clip.qa else TEST_TASKS[clip.dataset]:
            if askable(clip, [task]):
                by_task[clip.dataset, task].append(question_line(clip, rng, out, [task], 0))
    for _, lines in sorted(by_task.items()):
        yield from rng.sample(lines, min(len(lines), TEST_LINES))
    for task, kind in (("asr", "digits"), ("asr", "words"), ("background", "mixtures")):
        for clip in made[kind]:
            yield question_line(clip, rng, out, [task], 0)


def benchmark(clips, pools, n, rng, out):
    """Multiple-choice questions about held-out clips, written as MMSU's and MMAU's question files.

    Speech with four options goes to OUT/mmsu.jsonl; sound, music, mixtures and questions with fewer
    options to OUT/mmau.json; every task equally often.  Audio paths are relative to OUT.
    """
    by_task = defaultdict(list)
    for clip in clips:
        for task, fact in askable(clip, CHOICE_TASKS):
            if len(pools[task]) > 1:
                by_task[task].append((clip, fact))
    mmsu, mmau, tasks = [], [], sorted(by_task)
    for i in range(n if tasks else 0):
        task = tasks[i % len(tasks)]
        clip, fact = rng.choice(by_task[task])
        question, choices, right = multiple_choice(task, fact, pools[task], 4, rng)
        path = path_from(out, clip.path)
        domain = domain_of({task})
        if domain != "speech" or len(choices) != 4:  # MMSU always has four
            mmau.append(
                {
                    "id": f"q{i:04}",
                    "audio_id": path,
                    "question": question,
                    "choices": choices,
                    "answer": choices[right],
                    "task": domain,
                    "difficulty": "medium",
                    "sub-category": task,
                    "dataset": clip.dataset,
                }
            )
        else:
            paralinguistic = task in ("emotion", "intensity", "sex", "age", "accent")
            fields = dict(zip(("choice_a", "choice_b", "choice_c", "choice_d"), choices, strict=True))
            mmsu.append(
                {
                    "id": f"q{i:04}",
                    "audio_path": path,
                    "question": question,
                    **fields,
                    "answer_gt": choices[right],
                    "task_name": task,
                    "category": "Reasoning" if task == "count" else "Perception",
                    "sub-category": "Paralinguistics" if paralinguistic else "Linguistics",
                    "sub-sub-category": "Paralinguistics" if paralinguistic else "Semantics",
                }
            )
    write_lines(mmsu, os.path.join(out, "mmsu.jsonl"))
    write_text(json.dumps(mmau, indent=1, ensure_ascii=False), os.path.join(out, "mmau.json"))
    return len(mmsu), len(mmau)


def train_tokenizer(lines, vocab=2000):
    """Byte-level BPE on the prompts, answers and sentences of `lines`, with LLaDA's special tokens.

    Labels count 15 times in each of three spellings (in front of a sentence, within it, in small letters), so
    that a label is one token: tokens decoded together are drawn independently.  What every prompt says in the
    same words is one token too, for a small model has no positions to waste; so is a choice's letter with
    its dot.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def texts():
        for line in lines:
            question, answer = (message["content"].replace("<audio>", "") for message in line["messages"][:2])
            yield prompt_text(question)
            yield answer
            if line.get("task") in ("asr", "qa"):
                continue
            known = [v for k, v in line.get("facts", {}).items() if k not in ("words", "speaker", "caption")]
            for label in {answer, *choices_in(question).values(), *known}:
                if len(label) < 40:
                    for text in (label, f" {label}", f" {label.lower()}"):
                        yield from [text] * 15

    tokenizer.train_from_iterator(texts(), trainer)
    fixed = [asks("", []).split("Question:")[0] + "Question:" for asks in (mmsu_prompt, mmau_prompt)]
    letters = [f"{letter}." for letter in LETTERS]
    whole = (SYSTEM, BEFORE_AUDIO, " <audio>.", "\n\n", *fixed, *letters)
    tokenizer.add_tokens([AddedToken(text) for text in whole])
    return tokenizer
