"""Wrong input is one line and exit status 2: errors, command lines, exit statuses.

A traceback tells the author of a program where it broke; its user wants to know which file or option is
wrong.  So what the user can put right is one line, and all else stays a traceback: a mistake of ours must
not look like one of theirs.
"""

import argparse
import contextlib
import errno
import os
import sys


class UserError(Exception):
    """Something the user can put right: shown as one line, exit status 2."""


def tell(text):
    """A line on stderr.  Where nobody reads it any more (a closed terminal) nothing else is lost."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr)


def first_line(error):
    """The first line of a library's error, or its type where it says nothing.

    Some of torch's errors bring a stack of C++ calls along, which would bury the line that matters.
    """
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# a line or a clip that raises one of these is skipped
CANNOT_BE_USED = (UserError, OSError, ValueError, RuntimeError)


def unusable(id, where, error):
    """What skipped.jsonl says of an example."""
    return {"id": id, "where": where, "why": first_line(error)}


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line as every other wrong input: one line, exit status 2.

    A description, the docstring of a program, keeps its lines.
    """

    def __init__(self, *args, **kw):
        super().__init__(*args, formatter_class=argparse.RawDescriptionHelpFormatter, **kw)

    def error(self, message):
        raise UserError(message)


def exit_status(program, run):
    """run() as a program: its status (None is 0); 2 and one line for a UserError, 130 for Ctrl-C."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller (>&-)
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that is not UTF-8 shows "?" for what it cannot
            stream.reconfigure(errors="replace")
    try:
        status = run() or 0
        sys.stdout.flush()  # now: an error while Python exits could not be told in one line
        return status
    except UserError as e:
        why = e
    except KeyboardInterrupt:
        return 130
    except UnicodeEncodeError as e:  # a name or a question that came as bytes
        why = f"not UTF-8: {e.object!r}"
    except OSError as e:
        if e.errno not in (errno.EPIPE, errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise
        with contextlib.suppress(OSError):  # what was printed before a file failed
            sys.stdout.flush()
        # nothing may be left for Python to flush at its end, which would fail once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if e.errno == errno.EPIPE:  # `| head` has seen enough
            return 0
        what = "the output cannot be written"
        if e.errno == errno.EIO:  # a damaged disk, or a terminal that was closed
            what = "a file cannot be read, or the output not be written"
        why = f"{what}: {e.strerror.lower()}"
    tell(f"{program}: {why}")
    return 2


def number(kind, low, high=10**9):
    """An argparse type: an int or a float from low to high; NaN lies nowhere and is refused with the rest."""

    def read(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} must lie between {low} and {high}")
        return value

    read.__name__ = kind.__name__  # argparse calls what is no number an "invalid int value"
    return read
