"""Rows and prompts that come again: the same, turned round, or nearly the same."""

from __future__ import annotations

import json

import datasets
import numpy as np
import numpy.typing as npt

from dpo_lora.preferences import similarity
from dpo_lora.preferences.lint.columns import Columns, Flags, flag, usable
from dpo_lora.preferences.lint.kinds import BIT, ERRORS
from dpo_lora.preferences.similarity import Rows


def repeated(hashes: npt.NDArray[np.uint64]) -> int:
    """How many values came before; sorts ``hashes`` in place."""
    hashes.sort()
    return int(np.count_nonzero(hashes[1:] == hashes[:-1]))


def duplicates(columns: Columns, faults: Flags) -> None:
    """Note rows that are an earlier one again, and pairs that other rows prefer the other way round."""
    rows = usable(faults)
    pairs = columns["pair"][rows]
    flag(faults, rows[_later(pairs)], "exact_duplicate")
    turned = columns["turned"][rows]
    pairs.sort()
    places = np.minimum(np.searchsorted(pairs, turned), max(len(pairs) - 1, 0))
    flag(faults, rows[pairs[places] == turned] if len(rows) else rows, "contradiction")


def _later(hashes: npt.NDArray[np.uint64]) -> Rows:
    """Positions whose value came before."""
    order = np.argsort(hashes, kind="stable").astype(np.int32)
    ordered = hashes[order]
    return order[1:][ordered[1:] == ordered[:-1]].astype(np.int64)


def groups(
    columns: Columns, rows: Rows, prompts: npt.NDArray[np.uint64], texts: datasets.Dataset, threshold: float | None
) -> npt.NDArray[np.int32]:
    """For every row the group of prompts that are equal, or nearly so, to its own; -1 for rows not among ``rows``.

    Args:
        prompts: hash of the normalised prompt of every row.
        texts: the rows' texts, for a closer look at prompts whose sketches agree.
        threshold: Jaccard similarity from which prompts are nearly equal; None: equal ones only.
    """
    _, first, of = np.unique(prompts[rows], return_index=True, return_inverse=True)
    joined = similarity.Groups(len(prompts))
    if threshold is not None:
        look = _CloserLook(texts, threshold)
        for a, b in similarity.near(columns.sketch("prompt_sketch"), rows[first], threshold):
            for x, y in zip(a.tolist(), b.tolist(), strict=True):
                if joined.find(x) != joined.find(y) and look.alike(x, y):
                    joined.join(x, y)
    found = np.full(len(prompts), -1, dtype=np.int32)
    found[rows] = joined.names()[rows[first][of.astype(np.int32)]]
    return found


class _CloserLook:
    """Whether two prompts are as similar as their sketches promise: those err by 0.04 either way."""

    def __init__(self, texts: datasets.Dataset, threshold: float):
        self._texts, self._threshold = texts.select_columns(["texts"]), threshold
        self._unlike: set[tuple[int, int]] = set()  # met in one band, met again in the next

    def alike(self, a: int, b: int) -> bool:
        if (a, b) in self._unlike:
            return False
        one, other = self._shingles(a), self._shingles(b)
        alike = len(one & other) >= self._threshold * len(one | other)
        if not alike:
            self._unlike.add((a, b))
        return alike

    def _shingles(self, row: int) -> set[str]:
        prompt = json.loads(self._texts[row]["texts"])["prompt"]
        return set(similarity.shingles(similarity.normalised(similarity.asked(prompt))))


def near_pairs(columns: Columns, faults: Flags, within: npt.NDArray[np.int32], threshold: float) -> None:
    """Note rows whose prompt and answers are nearly those of an earlier one.

    Args:
        within: the group of prompts that each row belongs to.
    """
    rows = np.flatnonzero((faults & np.uint64(ERRORS | BIT["exact_duplicate"])) == 0)
    group = within[rows]
    # Only prompts that more than one row asks can have any.
    many = np.bincount(group, minlength=1)[group] > 1 if len(group) else np.zeros(0, dtype=bool)
    rows, group = rows[many], group[many]
    if len(rows):
        for a, b in similarity.near(columns.sketch("answer_sketch"), rows, threshold, group):
            flag(faults, np.maximum(a, b), "near_duplicate")
