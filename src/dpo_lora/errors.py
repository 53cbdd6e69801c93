"""The one exception that is shown to people without a traceback."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Something the caller can put right: says what they did, why it cannot be, what to do instead.

    The command line prints the message alone and exits with code 2. Everything else that is raised
    is our fault or the machine's, and keeps its traceback.
    """


def nearest(name: str, valid: Iterable[str], most: int = 3) -> str:
    """``" Did you mean 'a', 'b'?"``, or an empty string where nothing in ``valid`` comes close."""
    close = get_close_matches(name, list(valid), n=most, cutoff=0.6)
    return f" Did you mean {', '.join(repr(c) for c in close)}?" if close else ""
