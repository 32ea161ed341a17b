"""A language model as a writer of answers, right and wrong, about clips that it knows by their facts.

    python -m tools.prepare preferences data/stage2.jsonl --out stage4.jsonl --llm URL --model NAME

Every reply goes to OUT.replies.jsonl at once: a stopped run goes on where it was, nothing is asked twice.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from tqdm import tqdm

from data import parse_example
from runtime.errors import UserError
from runtime.manifests import read_entries
from tools.corpora import Clip
from tools.endpoint import post_json
from tools.questions import line_of, make_folder, write_lines


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible chat endpoint."""

    url: str
    model: str
    timeout: float = 60.0  # seconds

    def complete(self, system, user, read):
        """One completion, `read` (text -> value, or ValueError); None when none could be read."""
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        body = {"model": self.model, "messages": messages}

        def read_reply(data):
            return read(json.loads(data)["choices"][0]["message"]["content"])

        return post_json(self.url, "/chat/completions", body, read_reply, self.timeout)


def strict_object(text, **fields):
    """A JSON object with exactly these fields and types; ValueError for anything else."""
    found = json.loads(text)
    right = isinstance(found, dict) and found.keys() == fields.keys()
    if not right or not all(type(found[name]) is kind for name, kind in fields.items()):
        raise ValueError(f"not an object with the fields {', '.join(fields)}")
    return found


def describe(facts):
    """What is known of a clip, in words, for a model that cannot hear it."""
    names = {
        "words": "words spoken",
        "background": "sound in the background",
        "instrument": "instrument or object",
    }
    return (
        "; ".join(f"{names.get(kind, kind)}: {value}" for kind, value in facts.items()) or "nothing is known"
    )


WRITER = (  # meets what the paper's Figure A.2 does: the description stands for the audio
    "You answer questions about a recording as if you had heard it. All you know of it is the description "
    "that stands where the recording would. Answer the question itself, truthfully to the description, in at "
    "most two sentences; never mention the description. "
    'Reply with one JSON object and nothing else: {"answer": "..."}'
)
SPOILER = (  # meets the requirements of the paper's Figure A.4
    "You write training data for a model that answers questions about recordings. You get what is known of "
    "a recording, a question about it and a good answer. Write one bad answer to the same question. It reads "
    "as fluently and sounds as plausible as the good one, and it answers the question directly; but one "
    "thing that could be heard is wrong in it or missing: another sound, feeling, voice, order, number or "
    "tempo. A matter of style or length is no error, nonsense and refusals are useless. "
    "Then judge the pair: is the "
    "good answer clearly the better one? If they are close, or you are in doubt, the pair is not usable. "
    "Reply with one JSON object and nothing else, with exactly these fields: "
    '{"bad_answer": "...", "explanation": "...", "usable": true or false}'
)


def read_answer(text):
    return strict_object(text, answer=str)


def read_pair(text):
    return strict_object(text, bad_answer=str, explanation=str, usable=bool)


def prompt_for(example, kind):
    """-> system prompt, user prompt and how to read the reply."""
    known = f"Recording: {describe(example.facts)}\n\nQuestion: {example.question}"
    if kind == "answers":
        return WRITER, known, read_answer
    return SPOILER, f"{known}\n\nGood answer: {example.answer}", read_pair


def read_journal(path):
    """The replies that an earlier run has had: key -> reply."""
    replies = {}
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as f:  # half a letter, where a run was killed
            for line in f:
                with contextlib.suppress(ValueError, KeyError):  # half a line
                    found = json.loads(line)
                    replies[found["key"]] = found["reply"]
    return replies


def complete_all(endpoint, prompts, path, workers):
    """prompts {key: prompt} -> {key: reply} of all that got one; the journal at `path` has them at once."""
    replies = read_journal(path)
    missing = {key: prompt for key, prompt in prompts.items() if key not in replies}
    try:
        journal = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - `with` below closes it
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror})") from None
    with (
        journal,
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(missing), desc="asking", unit=" lines") as progress,
    ):
        if journal.tell():
            journal.write("\n")  # a half-written line ends here
        jobs = {pool.submit(endpoint.complete, *prompt): key for key, prompt in missing.items()}
        try:
            for job in as_completed(jobs):
                key, reply = jobs[job], job.result()
                if reply is not None:
                    replies[key] = reply
                    journal.write(json.dumps({"key": key, "reply": reply}, ensure_ascii=False) + "\n")
                    journal.flush()
                progress.update()
        except BaseException:  # Ctrl-C too: what is not yet asked must not be paid for
            pool.shutdown(cancel_futures=True)
            raise
    return replies


def rewritten(example, out, **new):
    """An Example, of whatever format, with `new` fields -> a line of the manifest `out`."""
    e = dataclasses.replace(example, **new)
    clip = Clip(e.audio, e.dataset, e.facts, offset=e.offset, duration=e.duration)
    line = line_of(clip, e.task, e.question, e.answer, out)
    return line | ({"rejected_response": e.rejected} if e.rejected is not None else {})


def write_with_llm(manifest, out, endpoint, kind, workers=8, limit=None):
    """Has a language model write answers ("answers") or worse ones ("preferences") for a manifest's lines.

    Lines without facts, of whose clip it would know nothing, are left out.
    Returns lines written, lines found unusable, lines without a usable reply.
    """
    folder, examples = os.path.dirname(os.path.abspath(manifest)), []
    for i, (where, entry) in enumerate(itertools.islice(read_entries(manifest), limit)):
        example = parse_example(entry, i, where, folder, None, check=False)
        if example.facts:
            examples.append(example)
    if not examples:
        raise UserError(f"{manifest}: no line has facts to describe its clip by")
    make_folder(os.path.dirname(os.path.abspath(out)))
    keys, prompts = [], {}
    for example in examples:
        system, user, read = prompt_for(example, kind)
        key = hashlib.sha256("\0".join((endpoint.model, system, user)).encode()).hexdigest()
        keys.append(key)
        prompts[key] = (system, user, read)
    replies = complete_all(endpoint, prompts, out + ".replies.jsonl", workers)
    lines, unusable, silent = [], 0, 0
    for key, example in zip(keys, examples, strict=True):
        reply = replies.get(key)
        if reply is None:
            silent += 1
        elif kind == "answers":
            lines.append(rewritten(example, out, answer=reply["answer"]))
        else:
            worse = reply["bad_answer"].strip()
            if not reply["usable"] or not worse or worse == example.answer.strip():
                unusable += 1
            else:
                lines.append(rewritten(example, out, rejected=worse))
    return write_lines(lines, out), unusable, silent
