"""Intervals, tests and sample sizes for shares and means of pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

DRAWS = 2000  # resamples: the percentile's own error is then below a tenth of the interval's width
SEED = 0
POWER = 0.8


def wilson_interval(share: float, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a share of ``count`` trials (E. B. Wilson, JASA 22, 1927).

    Keeps its coverage near 0 and 1 and for small counts, where the usual mean +- z * se does not.

    Args:
        share: successes / count in [0, 1]; a tie counts one half.
        count: number of trials; 0 gives (0, 1).
        confidence: coverage in (0, 1).
    """
    if count == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    scale = 1 + z * z / count
    centre = (share + z * z / (2 * count)) / scale
    half = z * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / scale
    # At a share of 0 or 1 the bound is exactly 0 or 1; rounding would leave it 1e-16 off.
    return 0.0 if share == 0 else float(centre - half), 1.0 if share == 1 else float(centre + half)


def mean_interval(values: Array, confidence: float = 0.95) -> tuple[float, float]:
    """Normal interval of the mean of independent values; (nan, nan) for fewer than two."""
    if len(values) < 2:
        return float("nan"), float("nan")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    half = z * float(np.std(values, ddof=1)) / float(np.sqrt(len(values)))
    mean = float(np.mean(values))
    return mean - half, mean + half


def bootstrap_intervals(
    statistics: Callable[[Array], Sequence[float]],
    clusters: Sequence[str],
    confidence: float = 0.95,
    draws: int = DRAWS,
    seed: int = SEED,
) -> list[tuple[float, float]]:
    """Percentile bootstrap intervals that resample whole clusters (B. Efron, Annals of Statistics 7, 1979).

    Pairs of one prompt rise and fall together, so prompts are what is drawn; with one pair a prompt
    this is the ordinary bootstrap.

    Args:
        statistics: from a weight for each of N values (how often each was drawn, [N]) to figures.
        clusters: N names; values that share one are drawn together.
        draws: resamples. A figure that is NaN in a resample is left out of its percentiles.
        seed: of ``numpy.random.default_rng``; clusters are numbered in sorted order, so the result
            does not depend on the order of the values.
    """
    names, member = np.unique(np.asarray(clusters), return_inverse=True)
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        times = np.bincount(rng.integers(0, len(names), size=len(names)), minlength=len(names))
        found.append(statistics(times[member].astype(np.float64)))
    tail = (1 - confidence) / 2
    columns = np.asarray(found, dtype=np.float64).T
    return [_percentiles(column[~np.isnan(column)], tail) for column in columns]


def _percentiles(values: Array, tail: float) -> tuple[float, float]:
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def weighted_mean(values: Array, weights: Array) -> float:
    """NaN where the weights add up to nothing."""
    total = float(weights.sum())
    return float((values * weights).sum()) / total if total else float("nan")


def sign_test(ahead: int, behind: int) -> float:
    """Two-sided exact p-value that ``ahead`` and ``behind`` come from a fair coin.

    On pairs where two models differ this is McNemar's exact test (Q. McNemar, Psychometrika 12, 1947).
    """
    count, fewer = ahead + behind, min(ahead, behind)
    if count == 0:
        return 1.0
    # In logarithms: for thousands of pairs the binomials pass a float's range.
    logs = [math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) for k in range(fewer + 1)]
    tail = sum(math.exp(value - count * math.log(2)) for value in logs)
    return min(1.0, 2 * tail)


def pairs_needed_against_coin(share: float, confidence: float = 0.95, power: float = POWER) -> int | None:
    """Pairs with which a true ``share`` would be told from 0.5; None when it is 0.5."""
    if share == 0.5:
        return None
    z, z_power = NormalDist().inv_cdf(0.5 + confidence / 2), NormalDist().inv_cdf(power)
    return math.ceil(((z * 0.5 + z_power * math.sqrt(share * (1 - share))) / (share - 0.5)) ** 2)


def pairs_needed_for_difference(differences: Array, confidence: float = 0.95, power: float = POWER) -> int | None:
    """Pairs with which the mean of ``differences`` would be told from 0, at the spread seen; None when it is 0."""
    mean = float(np.mean(differences))
    if mean == 0 or len(differences) < 2:
        return None
    z, z_power = NormalDist().inv_cdf(0.5 + confidence / 2), NormalDist().inv_cdf(power)
    return math.ceil((z + z_power) ** 2 * float(np.var(differences, ddof=1)) / mean**2)


def paired(differences: Array, clusters: Sequence[str], confidence: float = 0.95) -> dict[str, Any]:
    """What the second of two has over the first, item by item; positive differences are in its favour.

    Args:
        differences: second minus first, [N].
        clusters: N names; items that share one are drawn together.
        confidence: of the interval, and 1 - it the level of the test.
    """
    [interval] = bootstrap_intervals(lambda weights: [weighted_mean(differences, weights)], clusters, confidence)
    ahead, behind = int(np.sum(differences > 0)), int(np.sum(differences < 0))
    p_value = sign_test(ahead, behind)
    return {
        "difference": float(np.mean(differences)),
        "difference_interval": list(interval),
        "confidence": confidence,
        "second_ahead": ahead,
        "first_ahead": behind,
        "mcnemar_p": p_value,
        # Both, because the percentile bootstrap is too sure of itself when few items differ.
        "distinguishable": p_value < 1 - confidence and not interval[0] <= 0 <= interval[1],
        "pairs_needed": pairs_needed_for_difference(differences, confidence),
    }
