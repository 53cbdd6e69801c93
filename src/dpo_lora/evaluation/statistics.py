"""Intervals for shares and means of pairs."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray


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
    # At a share of 0 or 1 the bound is exactly 0 or 1; rounding would leave it 1e-17 off.
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def mean_interval(values: NDArray[np.float64], confidence: float = 0.95) -> tuple[float, float]:
    """Normal interval of the mean of independent values; (nan, nan) for fewer than two."""
    if len(values) < 2:
        return float("nan"), float("nan")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    half = z * float(np.std(values, ddof=1)) / float(np.sqrt(len(values)))
    mean = float(np.mean(values))
    return mean - half, mean + half
