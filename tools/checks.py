"""What the tools refuse before they begin: texts that no file can hold."""

import json

from runtime.errors import UserError


def check_text(entry, where):
    r"""Refuses half of a surrogate pair: JSON can spell it, "\ud800", but no file can hold it."""
    try:
        json.dumps(entry, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):  # the latter of lists in lists without end
        raise UserError(f"{where}: holds half a character, or too many lists in lists") from None
