"""Intervals against textbook values and by simulation; scores by hand."""

from __future__ import annotations

import numpy as np
import pytest

from dpo_lora.evaluation.scores import PairScores
from dpo_lora.evaluation.statistics import wilson_interval


def test_wilson_against_published_values() -> None:
    # Newcombe (Statistics in Medicine 17, 1998), table I: 81/263, 15/148, 0/20, 1/29 at 95 %.
    for successes, count, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        interval = wilson_interval(successes / count, count)
        assert interval == pytest.approx((low, high), abs=5e-5)


def scores(margins: list[float]) -> PairScores:
    count = len(margins)
    zero = np.zeros(count)
    tokens = np.full(count, 10)
    ids = [str(i) for i in range(count)]
    return PairScores(ids, ids, ids, None, np.asarray(margins), zero, zero, zero, tokens, tokens)


def test_ties_count_one_half() -> None:
    found = scores([1.0, 1.0, 1.0, -1.0, 0.0])
    assert found.wins.mean() == pytest.approx(0.7)
    assert list(found.wins) == [1, 1, 1, 0, 0.5]


def test_an_untrained_policy_scores_one_half() -> None:
    assert scores([0.0] * 7).wins.mean() == 0.5
