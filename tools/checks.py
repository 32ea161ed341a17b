"""What the tools refuse before they begin: numbers out of range, texts that cannot be written."""

import argparse
import json

from runtime import UserError


def number(kind, low, high=10**9):
    """An argparse type: an int or a float from low to high; NaN lies nowhere and is refused with the rest."""

    def read(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} must lie between {low} and {high}")
        return value

    read.__name__ = kind.__name__  # argparse calls what is no number an "invalid int value"
    return read


def check_text(entry, where):
    r"""Refuses half of a surrogate pair: JSON can spell it, "\ud800", but no file can hold it."""
    try:
        json.dumps(entry, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):  # the latter of lists in lists without end
        raise UserError(f"{where}: holds half a character, or too many lists in lists") from None
