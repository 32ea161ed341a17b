"""Manifests: where the entries lie in a file of any length, and what the fields of each format say.

data.py makes Examples of them.
"""

import itertools
import json
import mmap
import os
import re

from runtime.errors import UserError, first_line
from runtime.recordings import MAX_SECONDS

ASR_QUESTION = "Please transcribe the audio to text."  # the first that Figure A.1 shows of the paper's 25

# ---------------------------------------------------------------------------------------------
# a file of entries, JSONL or one JSON list


def read_entries(path):
    """The entries of a manifest -> (where, decoded JSON), one by one: memory does not grow with it."""
    with open_manifest(path) as f:
        is_list = starts_a_list(f)
        for _, number, raw in scan(f, path):
            where = where_in(path, number, is_list)
            yield where, decode_entry(raw, where)


def open_manifest(path):
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such manifest")
    return open(path, "rb")  # bytes: the index counts in them, and text cannot be entered at any of them


def starts_a_list(f):
    """Whether an open manifest is one JSON list; else it is JSONL."""
    start = f.read(4096).removeprefix(b"\xef\xbb\xbf")  # the mark that some Windows editors write in front
    f.seek(0)
    return start.lstrip().startswith(b"[")


def where_in(path, number, is_list):
    """How messages name an entry.  In a list, lines say nothing: all of it may be one."""
    return f"{path}: entry {number}" if is_list else f"{path}:{number}"


def decode_entry(raw, where):
    """The bytes of an entry -> what they say.  Raises UserError."""
    try:
        return json.loads(raw)
    except UnicodeDecodeError:
        raise UserError(f"{where}: not a text file") from None
    except (ValueError, RecursionError) as e:
        raise not_json(where, e) from None


def not_json(where, error):
    """-> UserError.  Errors about numbers too long and lists nested too deeply have no `msg`."""
    return UserError(f"{where}: not JSON ({getattr(error, 'msg', first_line(error))})")


def scan(f, path, chunk=1 << 16):
    """Where the entries of an open manifest lie: (first byte, number of the line or entry, bytes).

    Lines are cut and not decoded: one broken line must not end the reading of a million good ones.
    """
    if starts_a_list(f):
        yield from scan_list(f, path, chunk)
        return
    start = 0
    for number, line in enumerate(f, 1):
        if line.strip():
            yield start, number, line
        start += len(line)


def scan_list(f, path, chunk):
    """`scan` of a JSON list, which may be larger than memory: json.load would hold all of it.

    From each entry on, a piece of the mapped file is decoded, long enough for most.  As latin-1, since a
    character is then a byte, and what JSON is made of is ASCII in any case.
    """
    decoder = json.JSONDecoder()
    gap = re.compile(rb"[ \t\r\n,]*")  # between entries
    with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        at = whole.find(b"[") + 1
        for number in itertools.count(1):
            at = gap.match(whole, at).end()
            if whole[at : at + 1] == b"]":
                break
            size = chunk
            while True:
                try:
                    _, length = decoder.raw_decode(whole[at : at + size].decode("latin-1"))
                    break
                except (ValueError, RecursionError) as e:  # broken, or longer than the piece
                    if at + size >= len(whole) or not isinstance(e, json.JSONDecodeError):
                        raise not_json(where_in(path, number, True), e) from None
                    size *= 2
            yield at, number, whole[at : at + length]
            at += length
        if whole[at + 1 :].strip():
            raise UserError(f"{path}: something follows the list")


# ---------------------------------------------------------------------------------------------
# the fields of an entry: one parser a format


def parse_entry(entry, where, folder, stage, check):
    """An entry of any format -> the fields of an Example.  folder: what its path is relative to.

    check: the audio file must exist.  Raises UserError for what is missing or of the wrong kind.
    """
    if not isinstance(entry, dict):
        raise UserError(f"{where}: not a JSON object")
    if "messages" in entry:
        audio, question, answer, rejected = parse_messages(entry, where)
    elif "audio_filepath" in entry:
        audio, question, answer, rejected = parse_fields(entry, where, stage)
    else:
        raise UserError(f"{where}: has neither 'messages' nor 'audio_filepath'")
    if stage == 4 and rejected is None:
        raise UserError(f"{where}: stage 4 needs a rejected_response")
    if not isinstance(rejected, str | None):
        raise UserError(f"{where}: rejected_response must be text")
    if not question.strip():
        raise UserError(f"{where}: the question is empty")
    facts = need(entry, "facts", where, dict) if "facts" in entry else {}
    if not all(isinstance(value, str) for value in facts.values()):
        raise UserError(f"{where}: facts must be text")
    if question == ASR_QUESTION and "messages" not in entry:  # NeMo's and the authors' transcripts
        facts = {"words": answer} | facts
    if audio is not None:
        audio = os.path.join(folder, audio)
        if check and not os.path.isfile(audio):
            raise UserError(f"{where}: no such audio file: {audio}")
    return {
        "audio": audio,
        "question": question,
        "answer": answer,
        "rejected": rejected,
        "facts": facts,
        "dataset": str(entry.get("dataset", "")),
        "task": str(entry.get("task", "")),
        "offset": seconds_in(entry, "offset", where, 0.0),
        "duration": seconds_in(entry, "duration", where, None),
    }


def parse_messages(entry, where):
    """ms-swift's and LLaMA-Factory's format -> audio, question, answer, rejected answer."""
    match entry["messages"]:
        case [{"role": "user", "content": str(question)}, {"role": "assistant", "content": str(answer)}]:
            pass
        case _:
            how = "one of role user and one of role assistant, in this order, with text as content"
            raise UserError(f"{where}: messages must be {how}")
    audios = entry.get("audios") or []
    if not isinstance(audios, list) or not all(isinstance(audio, str) for audio in audios):
        raise UserError(f"{where}: audios must be a list of paths")
    if len(audios) > 1 or question.count("<audio>") > 1:
        raise UserError(f"{where}: more than one audio in an example")
    question = question.replace("<audio>", "").strip()  # THE prompt has the audio in front of the question
    return audios[0] if audios else None, question, answer, entry.get("rejected_response")


def parse_fields(entry, where, stage):
    """NeMo's format or the authors' -> the same.  One file of the authors' serves several stages."""
    if "text" in entry:
        return need(entry, "audio_filepath", where), ASR_QUESTION, need(entry, "text", where), None
    need(entry, "audio_id", where, (str, int))
    question = entry.get("input")
    if not isinstance(question, str) or not question.strip():
        question = ASR_QUESTION  # their transcripts come without one
    answer = need(entry, "transcription" if stage == 1 else "target", where)
    rejected = need(entry, "rejected", where) if stage == 4 else None
    return need(entry, "audio_filepath", where), question, answer, rejected


def need(entry, field, where, kind=str):
    """entry[field], which must be there and of this kind; True is no number, though Python says so."""
    value = entry.get(field)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"{where}: field {field!r} is missing or not of the right type")
    return value


def seconds_in(entry, field, where, default):
    """A length of time in a manifest, or the default where there is none."""
    if entry.get(field) is None:
        return default
    value = need(entry, field, where, (int, float))
    if not 0 <= value < MAX_SECONDS:
        raise UserError(f"{where}: {field} is {value}")
    return value
