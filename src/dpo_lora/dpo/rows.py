"""Tokenised rows as the trainer reads them: a few at a time, from the memory map, however many there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from pyarrow import compute
from torch.utils.data import Sampler

from dpo_lora.engine.reference_cache import Tokens

REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")  # TRL's own column names

_FEW = 16  # a sixteenth of the rows is few

_SIDES = ("prompt_ids", "chosen_ids", "rejected_ids")


def lengths(rows: Dataset | ReferenceRows) -> NDArray[np.int32]:
    """Tokens of prompt, chosen and rejected, [N, 3]: from the columns' offsets, no token is read."""
    if isinstance(rows, ReferenceRows):
        rows = rows.rows
    table = rows.data.table
    found = np.empty((len(table), len(_SIDES)), dtype=np.int32)
    for place, side in enumerate(_SIDES):
        found[:, place] = compute.list_value_length(table[side]).to_numpy()
    # What select() leaves has the whole table and the numbers of its rows. Asking for the rows themselves would copy
    # every token out of the memory map to count them.
    return found if rows._indices is None else found[rows._indices.column(0).to_numpy()]


class SeededOrder(Sampler[int]):
    """All row numbers, in an order of each epoch's own that the seed gives: known before training starts."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed, self.epoch = count, seed, 0

    def __len__(self) -> int:
        return self.count

    def set_epoch(self, epoch: int) -> None:
        """Which epoch comes next; the loader says so."""
        self.epoch = epoch

    def first(self, count: int) -> NDArray[np.int64]:
        """The numbers of the first ``count`` rows of the first epoch, sorted."""
        return np.sort(self._order(0)[:count])

    def __iter__(self) -> Iterator[int]:
        return map(int, self._order(self.epoch))  # of an array: a tensor would make an object of every number first

    def _order(self, epoch: int) -> NDArray[np.int64]:
        drawn = torch.randperm(self.count, generator=torch.Generator().manual_seed(self.seed + epoch))
        return np.asarray(drawn)


def rows_read(count: int, seed: int, steps: int, pairs_per_step: int) -> NDArray[np.int64]:
    """Numbers, sorted, of the rows that training reads out of ``count``; all of them where it reads more than a few.

    Log-probabilities differ in their last bits with the rows that are computed beside them, so runs over the same pairs
    should ask for the same rows; only a small share of many is worth its own choice.
    """
    needed = (steps + 1) * pairs_per_step  # the loader, in this process, reads a step ahead
    return SeededOrder(count, seed).first(needed) if needed * _FEW <= count else np.arange(count)


class ReferenceRows:
    """Rows with the reference's log-probabilities beside them, which the rows on the disk do not have.

    Columns added to a :class:`datasets.Dataset` that was selected from another are a copy of it on the disk.
    """

    def __init__(self, rows: Dataset, sums: NDArray[np.float64], known: NDArray[np.bool_] | None = None):
        """
        Args:
            sums: [N, 2], log-probability of chosen and rejected.
            known: [N], false for rows that nobody will ask for; None: all are known.
        """
        assert sums.shape == (len(rows), 2)
        self.rows, self.sums = rows, sums
        self.known = np.ones(len(rows), dtype=bool) if known is None else known

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self._with_sums(self.rows[number], number)

    def __getitems__(self, numbers: list[int]) -> list[dict[str, Any]]:
        """What torch's loader asks for: a batch in one read."""
        return [self._with_sums(row, n) for row, n in zip(self.rows.__getitems__(numbers), numbers, strict=True)]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self._with_sums(row, number) for number, row in enumerate(self.rows))

    def select(self, numbers: Sequence[int]) -> ReferenceRows:
        """The same with these rows only."""
        chosen = list(numbers)
        return ReferenceRows(self.rows.select(numbers), self.sums[chosen], self.known[chosen])

    def _with_sums(self, row: dict[str, Any], number: int) -> dict[str, Any]:
        assert self.known[number], f"row {number} was asked for, but its reference was not computed"
        return row | dict(zip(REFERENCE, self.sums[number].tolist(), strict=True))


class PairTokens(Sequence[Tokens]):
    """Rows as the reference cache takes them, made when they are asked for."""

    def __init__(self, rows: Dataset):
        self.rows = rows.select_columns(list(_SIDES))

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, number: int) -> Tokens: ...

    @overload
    def __getitem__(self, number: slice) -> Sequence[Tokens]: ...

    def __getitem__(self, number: int | slice) -> Tokens | Sequence[Tokens]:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        return _tokens(self.rows[number])

    def __iter__(self) -> Iterator[Tokens]:
        return map(_tokens, self.rows)


def _tokens(row: dict[str, Any]) -> Tokens:
    prompt = row["prompt_ids"]
    return ([*prompt, *row["chosen_ids"]], len(prompt)), ([*prompt, *row["rejected_ids"]], len(prompt))
