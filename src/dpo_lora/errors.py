"""What ends a run without a traceback: a mistake that people can put right, and a signal."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Something the caller can put right: says what they did, why that does not work, what to do instead.

    The command line prints the message alone and exits with code 2. Everything else that is raised
    is our fault or the machine's, and keeps its traceback.
    """


class Interrupted(SystemExit):
    """The run stopped on a signal, its state on the disk."""

    def __init__(self, exit_code: int):
        super().__init__(exit_code)
        self.exit_code = exit_code  # the shell's for that signal: 128 + its number


def nearest(name: str, valid: Iterable[str], most: int = 3) -> str:
    """``" Did you mean 'a', 'b'?"``, or an empty string where nothing in ``valid`` comes close."""
    close = get_close_matches(name, list(valid), n=most, cutoff=0.6)
    return f" Did you mean {', '.join(repr(c) for c in close)}?" if close else ""
