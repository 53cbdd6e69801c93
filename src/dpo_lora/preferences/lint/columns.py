"""The prepared columns of all sources as one, and how faults are noted on their rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_lora.preferences import similarity
from dpo_lora.preferences.lint.kinds import BIT, ERRORS
from dpo_lora.preferences.similarity import Rows
from dpo_lora.preferences.store import Store

Flags = npt.NDArray[np.uint64]  # for each row the bits (kinds.BIT) of what was found in it


@dataclass
class Columns:
    """The columns of several stores as one, read from the disk at each call."""

    stores: Sequence[Store]

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        if len(self.stores) == 1:
            return self.stores[0].column(name)
        return np.concatenate([store.column(name) for store in self.stores])

    def sketch(self, name: str) -> similarity.SketchFile:
        return similarity.SketchFile([store.sketch(name) for store in self.stores])


def flag(faults: Flags, rows: Any, kind: str) -> None:
    """Note a finding of ``kind`` on ``rows``, in place."""
    faults[rows] |= np.uint64(BIT[kind])


def usable(faults: Flags) -> Rows:
    """The rows without an error."""
    return np.flatnonzero((faults & np.uint64(ERRORS)) == 0)
