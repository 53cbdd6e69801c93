"""Which words of two answers differ."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

Piece = tuple[bool, str]  # whether it is not in the other text, the text itself


def differing(before: str, after: str) -> tuple[list[Piece], list[Piece]]:
    """Both texts in pieces, each piece with whether the other text lacks it; joined pieces are the texts."""
    a, b = re.findall(r"\s+|\S+", before), re.findall(r"\s+|\S+", after)
    left: list[Piece] = []
    right: list[Piece] = []
    for kind, i, j, k, m in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if j > i:
            left.append((kind != "equal", "".join(a[i:j])))
        if m > k:
            right.append((kind != "equal", "".join(b[k:m])))
    return left, right
