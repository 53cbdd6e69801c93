"""Which texts are equal but for trifles, and which are nearly equal.

Near-duplicates are found by MinHash (Broder 1997): two texts' sketches agree in a place with the
probability of their Jaccard similarity, over triples of words. Rows that agree in one of 21 bands of
6 places are compared place by place; at similarity 0.8 that misses 2 in 1,000.
"""

from __future__ import annotations

import mmap
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rensa import RMinHash

from dpo_lora.preferences.shapes.pair import Turns

BANDS, ROWS = 21, 6
PLACES = BANDS * ROWS
_WORD = re.compile(r"\w+")
_CHUNK = 1 << 16  # rows of sketches in memory at a time: 16 MiB


def normalised(text: str) -> str:
    """``text`` without case, punctuation and spacing; as it is where nothing else is in it."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(_WORD.findall(text.casefold())) or text.strip()


def asked(prompt: Turns) -> str:
    """What is asked: a system prompt shared by thousands of rows makes no two questions alike."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(m["content"] for m in prompt if m["role"] not in ("system", "developer"))


def shingles(text: str) -> list[str]:
    """Triples of words of a normalised text; of characters where the script puts no blanks between words."""
    words = text.split()
    if len(text) > 15 * len(words):
        return [text[n : n + 5] for n in range(max(1, len(text) - 4))]
    if len(words) < 3:
        return [text]
    return [" ".join(words[n : n + 3]) for n in range(len(words) - 2)]


def sketches(sets: Sequence[Sequence[str]]) -> npt.NDArray[np.uint16]:
    """MinHash sketches of sets of shingles, [sets, PLACES]."""
    values = RMinHash.digests_from_token_sets(sets, num_perm=PLACES, seed=1)
    return np.asarray(values, dtype=np.uint32).reshape(-1, PLACES).astype(np.uint16)


class Groups:
    """Disjoint sets of row numbers; each is named by its smallest member."""

    def __init__(self, size: int):
        self.parent = np.arange(size, dtype=np.int32)

    def find(self, row: int) -> int:
        parent = self.parent
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = int(parent[row])
        return row

    def join(self, a: int, b: int) -> None:
        a, b = self.find(a), self.find(b)
        self.parent[max(a, b)] = min(a, b)

    def names(self) -> npt.NDArray[np.int32]:
        """The name of every row's set."""
        while True:
            up = self.parent[self.parent]
            if np.array_equal(up, self.parent):
                return up
            self.parent = up


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class SketchFile:
    """Sketches on the disk, one row after the other; read in chunks, so memory stays small."""

    def __init__(self, paths: Sequence[Path]):
        self._files = [_mapped(p) for p in paths if p.stat().st_size]
        self._maps = [np.frombuffer(f, dtype=np.uint16).reshape(-1, PLACES) for f in self._files]
        self._starts = np.cumsum([0, *(len(m) for m in self._maps)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def band(self, number: int) -> npt.NDArray[np.uint64]:
        """A hash of one band's places, for every row."""
        keys = np.empty(len(self), dtype=np.uint64)
        columns = slice(number * ROWS, (number + 1) * ROWS)
        for start, chunk in self._chunks():
            mixed = np.zeros(len(chunk), dtype=np.uint64)
            for place in chunk[:, columns].T:
                mixed = mix(mixed ^ place.astype(np.uint64))
            keys[start : start + len(chunk)] = mixed
        return keys

    def agreement(self, a: npt.NDArray[np.int64], b: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Share of places in which rows ``a`` and ``b`` agree: estimates their Jaccard similarity."""
        found = np.empty(len(a))
        for start in range(0, len(a), _CHUNK):
            part = slice(start, start + _CHUNK)
            found[part] = (self._rows(a[part]) == self._rows(b[part])).mean(axis=1)
            self._forget()
        return found

    def _chunks(self) -> Iterator[tuple[int, npt.NDArray[np.uint16]]]:
        for first, one in zip(self._starts, self._maps, strict=False):
            for start in range(0, len(one), _CHUNK):
                yield int(first) + start, one[start : start + _CHUNK]
                self._forget()

    def _rows(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint16]:
        out = np.empty((len(rows), PLACES), dtype=np.uint16)
        which = np.searchsorted(self._starts, rows, side="right") - 1
        for n, one in enumerate(self._maps):
            here = which == n
            out[here] = one[rows[here] - self._starts[n]]
        return out

    def _forget(self) -> None:
        # Pages that were read count as ours until memory is short; give them back at once.
        for file in self._files:
            file.madvise(mmap.MADV_DONTNEED)


Rows = npt.NDArray[np.int64]


def near(
    file: SketchFile, rows: Rows, threshold: float, within: npt.NDArray[np.int32] | None = None
) -> Iterator[tuple[Rows, Rows]]:
    """Pairs of ``rows`` whose sketches agree in at least ``threshold`` of the places.

    Args:
        within: for every one of ``rows`` the group in which alone its likes are looked for; None: anywhere.
    """
    apart = None if within is None else mix(within.astype(np.uint64))
    for number in range(BANDS):
        keys = file.band(number)[rows]
        if apart is not None:
            keys ^= apart
        order = np.argsort(keys, kind="stable").astype(np.int32)
        keys = keys[order]
        equal = keys[1:] == keys[:-1]
        same = np.flatnonzero(equal)
        # Each against the one before it in its run, and against the run's first.
        breaks = np.flatnonzero(np.concatenate(([True], ~equal)))
        firsts = breaks[np.searchsorted(breaks, same, side="right") - 1]
        del keys, equal, breaks
        far = firsts != same
        a, b = np.concatenate((same, firsts[far])), np.concatenate((same, same[far])) + 1
        a, b = rows[order[a]], rows[order[b]]
        close = file.agreement(a, b) >= threshold
        yield a[close], b[close]


def mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A bijection of 64-bit numbers in which every bit depends on every bit (SplitMix64's finaliser)."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))
