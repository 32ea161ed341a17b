"""Where the entries of a manifest lie in its file, JSONL or one JSON list, of any length.

data.py says what an entry means.
"""

import itertools
import json
import mmap
import os
import re

from runtime.errors import UserError, first_line


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
