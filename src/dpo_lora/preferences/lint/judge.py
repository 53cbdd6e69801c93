"""Faults that only show in the whole set, and which rows are left to train on and to score.

Works on columns (prepare.COLUMNS) of a few bytes a row, one or two at a time: 60 MB for a million
pairs at the most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import xxhash

from dpo_lora.evaluation.statistics import wilson_interval
from dpo_lora.preferences import split
from dpo_lora.preferences.lint import repeats
from dpo_lora.preferences.lint.columns import Columns, Flags, flag, usable
from dpo_lora.preferences.lint.kinds import BIT, ERRORS, bits
from dpo_lora.preferences.parts import HELDOUT, TRAIN, UNDECIDED, Part
from dpo_lora.preferences.similarity import Rows
from dpo_lora.preferences.store import Store
from dpo_lora.schema import DataSettings

_OUTLIER_TIMES = 3  # times the median length, at the least


@dataclass
class Judgement:
    """What every row's faults are, where it goes, and which rows are used."""

    faults: Flags
    goes: npt.NDArray[np.uint8]
    left_out: npt.NDArray[np.bool_]
    train: Rows
    heldout: Rows
    figures: dict[str, Any]


def judge(
    stores: Sequence[Store], texts: datasets.Dataset, parts: Sequence[Part], data: DataSettings, seed: int
) -> Judgement:
    """Find the set's faults, part training from held-out rows, and leave out what cannot or shall not be used.

    Args:
        texts: every row of ``stores`` (prepare.SCHEMA), in order.
    """
    columns = Columns(stores)
    faults: Flags = columns["faults"]
    figures: dict[str, Any] = {"repeated_ids": repeats.repeated(columns["id"])}
    repeats.duplicates(columns, faults)
    goes = _part(columns, faults, texts, data, figures)
    _outliers(columns, faults, data.lint.outlier)
    out = ERRORS | bits(data.drop) | BIT["prompt_leak"] | BIT["near_prompt_leak"]
    left_out = (faults & np.uint64(out)) != 0
    train, heldout = _chosen(columns, goes, left_out, stores, parts, data, seed)
    figures["parts"] = {
        name: {"pairs": len(rows), **_content(columns, rows)} for name, rows in (("train", train), ("heldout", heldout))
    }
    figures["lengths"] = _lengths(columns, train)
    figures["marred"] = _marred(columns["marred"][train])
    bounds = np.cumsum([0, *map(len, stores)])
    figures["sources"] = [
        _source(columns, part, first, last, faults, train)
        for part, (first, last) in zip(parts, pairwise(bounds.tolist()), strict=True)
    ]
    return Judgement(faults, goes, left_out, train, heldout, figures)


def _part(
    columns: Columns, faults: Flags, texts: datasets.Dataset, data: DataSettings, figures: dict[str, Any]
) -> npt.NDArray[np.uint8]:
    prompts, goes = columns["prompt"], columns["goes"]
    ours = bool((goes == UNDECIDED).any())
    goes = split.by_prompt(goes, prompts, data.heldout_share)
    rows = usable(faults)
    fit = np.zeros(len(faults), dtype=bool)
    fit[rows] = True
    flag(faults, split.shared_prompts(np.where(fit, goes, UNDECIDED).astype(np.uint8), prompts), "prompt_leak")
    figures["prompts"] = len(np.unique(prompts[rows]))
    groups = repeats.groups(columns, rows, prompts, texts, data.near_duplicate)
    if data.near_duplicate is not None:
        # Held-out rows of the user's own choice stay; of ours, the training rows do: that loses fewer.
        leaks = split.straddling(goes, groups, HELDOUT if ours else TRAIN)
        leaks &= (faults & np.uint64(BIT["prompt_leak"])) == 0
        flag(faults, leaks, "near_prompt_leak")
        repeats.near_pairs(columns, faults, groups, data.near_duplicate)
    return goes


def _outliers(columns: Columns, faults: Flags, beyond: float) -> None:
    """Leys et al. 2013: distance from the median in units of the scaled median absolute deviation."""
    rows = usable(faults)
    logs = np.log1p((columns["prompt_tokens"] + columns["full_tokens"])[rows].astype(np.float32))
    if not len(rows):
        return
    away = np.abs(logs - np.median(logs))
    spread = 1.4826 * float(np.median(away))
    # Where all rows are about as long, a little more is many deviations and yet no outlier.
    flag(faults, rows[away > max(beyond * spread, math.log(_OUTLIER_TIMES))], "length_outlier")


def _chosen(
    columns: Columns,
    goes: npt.NDArray[np.uint8],
    left_out: npt.NDArray[np.bool_],
    stores: Sequence[Store],
    parts: Sequence[Part],
    data: DataSettings,
    seed: int,
) -> tuple[Rows, Rows]:
    hashes = columns["pair"]
    bounds = np.cumsum([0, *map(len, stores)])
    kept = [
        first + np.flatnonzero((goes[first:last] == TRAIN) & ~left_out[first:last])
        for first, last in pairwise(bounds.tolist())
    ]
    counts = split.mixed(parts, [len(rows) for rows in kept])
    train = np.concatenate([split.choose(r, hashes[r], n, seed) for r, n in zip(kept, counts, strict=True)])
    heldout = np.flatnonzero((goes == HELDOUT) & ~left_out)
    return (
        split.choose(train, hashes[train], data.max_pairs, seed),
        split.choose(heldout, hashes[heldout], data.max_heldout, seed),
    )


def _content(columns: Columns, rows: Rows) -> dict[str, str]:
    """Fingerprints by content and order, of the pairs as written and as tokens (XXH3, 128 bit)."""
    named = {"rows": "pair", "tokens": "tokens"}
    return {k: xxhash.xxh3_128_hexdigest(columns[v][rows].tobytes()) for k, v in named.items()}


def longer_wins(chosen: npt.NDArray[Any], rejected: npt.NDArray[Any]) -> dict[str, Any]:
    """Accuracy of "the longer answer is the chosen one" (ties one half), and length's correlation with being chosen."""
    pairs = len(chosen)
    if not pairs:
        return {"accuracy": None, "interval": None, "correlation": None}
    won = float((np.count_nonzero(chosen > rejected) + 0.5 * np.count_nonzero(chosen == rejected)) / pairs)
    logs = np.log1p(np.concatenate((chosen, rejected)).astype(np.float64))
    spread = float(logs.std())
    # Point-biserial: the difference of the two means over twice the common standard deviation.
    correlation = float(logs[:pairs].mean() - logs[pairs:].mean()) / (2 * spread) if spread else 0.0
    return {"accuracy": won, "interval": list(wilson_interval(won, pairs)), "correlation": correlation}


def _lengths(columns: Columns, rows: Rows) -> dict[str, Any]:
    found: dict[str, Any] = {}
    kept = {name: columns[f"{name}_tokens"][rows] for name in ("prompt", "chosen", "rejected")}
    for name, values in kept.items():
        if len(values):
            marks = np.quantile(values, [0, 0.5, 0.95, 1])
            found[name] = dict(zip(("least", "median", "p95", "most"), map(int, marks), strict=True))
    return found | {"longer_wins": longer_wins(kept["chosen"], kept["rejected"])}


def _marred(values: npt.NDArray[np.uint8]) -> dict[str, int]:
    return {"chosen_only": int(np.count_nonzero(values == 1)), "rejected_only": int(np.count_nonzero(values == 2))}


def _source(columns: Columns, part: Part, first: int, last: int, faults: Flags, train: Rows) -> dict[str, Any]:
    mine = train[(train >= first) & (train < last)]
    lengths = longer_wins(columns["chosen_tokens"][mine], columns["rejected_tokens"][mine])
    return {
        "name": part.name,
        "pairs": last - first,
        "errors": int(np.count_nonzero(faults[first:last] & np.uint64(ERRORS))),
        "train": len(mine),
        "train_share": len(mine) / max(len(train), 1),
        "longer_wins": lengths["accuracy"],
    }
