"""Training and held-out parts that share no prompt, whatever rows are added later."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dpo_lora.preferences.parts import HELDOUT, TRAIN, UNDECIDED, Part
from dpo_lora.preferences.similarity import Rows, mix

Hashes = npt.NDArray[np.uint64]


def by_prompt(goes: npt.NDArray[np.uint8], prompts: Hashes, share: float) -> npt.NDArray[np.uint8]:
    """Undecided rows placed: about ``share`` of the distinct prompts are held out, each with all its rows.

    A prompt's part depends on its normalised text alone, so adding rows never moves others across.

    Args:
        prompts: hash of each row's normalised prompt.
    """
    held = mix(prompts) < np.uint64(min(int(share * 2**64), 2**64 - 1))
    return np.where(goes == UNDECIDED, np.where(held, HELDOUT, TRAIN), goes).astype(np.uint8)


def shared_prompts(goes: npt.NDArray[np.uint8], prompts: Hashes) -> npt.NDArray[np.bool_]:
    """Training rows whose prompt is among the held-out ones."""
    return (goes == TRAIN) & np.isin(prompts, np.unique(prompts[goes == HELDOUT]))


def straddling(goes: npt.NDArray[np.uint8], groups: npt.NDArray[np.int32], aside: int) -> npt.NDArray[np.bool_]:
    """Rows of part ``aside`` whose prompt is nearly one of the other part's.

    They are set aside, not moved: moving them would let an added row push others across.

    Args:
        groups: for each row the group of nearly equal prompts it belongs to; below 0: none.
    """
    other = HELDOUT if aside == TRAIN else TRAIN
    seen = np.zeros(int(groups.max(initial=0)) + 1, dtype=bool)
    seen[groups[(goes == other) & (groups >= 0)]] = True
    found = (goes == aside) & (groups >= 0)
    found[found] = seen[groups[found]]
    return found


def choose(rows: Rows, hashes: Hashes, most: int | None, seed: int) -> Rows:
    """At most ``most`` of ``rows``, in their order: a choice by ``seed`` and content.

    A row that is added takes at most one other's place.

    Args:
        hashes: of the content of each of ``rows``.
    """
    if most is None or most >= len(rows):
        return rows
    rank = mix(hashes ^ mix(np.asarray([seed], dtype=np.uint64)))
    return np.sort(rows[np.argsort(rank, kind="stable")[:most]])


def mixed(parts: Sequence[Part], available: Sequence[int]) -> list[int]:
    """How many training pairs each source gives: up to its cap, and in proportion to the weights.

    No pair is repeated: the source that is shortest for its weight gives all it has.
    """
    most = [n if p.max_pairs is None else min(n, p.max_pairs) for p, n in zip(parts, available, strict=True)]
    weighted = [(n, p.weight) for n, p in zip(most, parts, strict=True) if p.weight is not None and p.goes != HELDOUT]
    if not weighted:
        return most
    unit = min(n / w for n, w in weighted)
    return [n if p.weight is None else min(n, round(p.weight * unit)) for n, p in zip(most, parts, strict=True)]
