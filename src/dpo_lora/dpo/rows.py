"""Tokenised rows as the trainer reads them: a few at a time, from the memory map, however many there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from pyarrow import compute

from dpo_lora.engine.reference_cache import Tokens

REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")  # TRL's own column names

_SIDES = ("prompt_ids", "chosen_ids", "rejected_ids")


def lengths(rows: Dataset | ReferenceRows) -> NDArray[np.int64]:
    """Tokens of prompt, chosen and rejected, [N, 3]: from the columns' offsets, no token is read."""
    if isinstance(rows, ReferenceRows):
        rows = rows.rows
    table = rows.data.table
    found = np.stack([compute.list_value_length(table[side]).to_numpy() for side in _SIDES], axis=1)
    # What select() leaves has the whole table and the numbers of its rows. Asking for the rows themselves would copy
    # every token out of the memory map to count them.
    return (
        found.astype(np.int64) if rows._indices is None else found[rows._indices.column(0).to_numpy()].astype(np.int64)
    )


class ReferenceRows:
    """Rows with the reference's log-probabilities beside them, which the rows on the disk do not have.

    Columns added to a :class:`datasets.Dataset` that was selected from another are a copy of it on the disk.
    """

    def __init__(self, rows: Dataset, sums: NDArray[np.float64]):
        """
        Args:
            sums: [N, 2], log-probability of chosen and rejected.
        """
        assert sums.shape == (len(rows), 2)
        self.rows, self.sums = rows, sums

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
        return ReferenceRows(self.rows.select(numbers), self.sums[list(numbers)])

    def _with_sums(self, row: dict[str, Any], number: int) -> dict[str, Any]:
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
