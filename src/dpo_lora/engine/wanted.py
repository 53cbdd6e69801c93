"""Which rows wait for their log-probs, found by key: some 50 bytes a row, so that a million rows fit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

KEY_BYTES = 32


class Wanted:
    """Rows by key. Several rows may share one: the first of them, in order of keys, stands for all."""

    def __init__(self, keys: Sequence[bytes] | NDArray[np.bytes_], sizes: Sequence[int] | NDArray[np.int32]) -> None:
        """keys: KEY_BYTES each; sizes: what orders the rows that `missing` returns."""
        given = np.asarray(keys, dtype=f"S{KEY_BYTES}")
        self.order = np.argsort(given, kind="stable").astype(np.int32)
        self.keys = given[self.order]
        self.sizes = np.asarray(sizes, dtype=np.int32)
        self.lacking = np.ones(len(given), dtype=bool)
        self.lacking[1:] = self.keys[1:] != self.keys[:-1]
        self.distinct = int(np.count_nonzero(self.lacking))
        self.found = 0

    def take(self, keys: NDArray[np.bytes_]) -> list[tuple[int, NDArray[np.int32]]]:
        """(place in `keys`, the rows that waited for it) for each key that was lacking; it no longer is."""
        first, last = (np.searchsorted(self.keys, keys, side) for side in ("left", "right"))
        hits = []
        for place in np.flatnonzero(last > first).tolist():
            if self.lacking[first[place]]:
                self.lacking[first[place]] = False
                self.found += 1
                hits.append((place, self.order[first[place] : last[place]]))
        return hits

    @property
    def complete(self) -> bool:
        return self.found == self.distinct

    def missing(self) -> NDArray[np.int32]:
        """One row for each key that is still lacking, the smallest first."""
        rows = self.order[self.lacking]
        return rows[np.argsort(self.sizes[rows], kind="stable")]
