"""Intervals against textbook values and by simulation; tests and figures by hand."""

from __future__ import annotations

import numpy as np
import pytest

from dpo_lora.evaluation.figures import baselines, figures
from dpo_lora.evaluation.scores import PairScores
from dpo_lora.evaluation.statistics import (
    bootstrap_intervals,
    mean_interval,
    pairs_needed_against_coin,
    pairs_needed_for_difference,
    sign_test,
    weighted_mean,
    wilson_interval,
)

SIMULATIONS = 2000
# Each of these is a whole bootstrap. The share of 1,000 that covers has a standard error of sqrt(0.95 * 0.05 / 1000) =
# 0.007, so that 0.93 to 0.97 is 2.9 of them to either side; a true coverage of 0.90 would pass once in 1,200 times.
CLUSTERED = 1000


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
    assert wilson_interval(1.0, 42)[1] == 1.0


@pytest.mark.parametrize("truth", [0.5, 0.7, 0.9])
def test_wilson_covers_what_it_says(truth: float) -> None:
    rng = np.random.default_rng(1)
    shares = rng.binomial(200, truth, size=SIMULATIONS) / 200
    covered = [low <= truth <= high for low, high in (wilson_interval(s, 200) for s in shares)]
    assert 0.93 <= np.mean(covered) <= 0.97


def test_the_margin_interval_covers_what_it_says() -> None:
    rng = np.random.default_rng(2)
    covered = [low <= 0.3 <= high for low, high in (mean_interval(rng.normal(0.3, 1, 200)) for _ in range(SIMULATIONS))]
    assert 0.93 <= np.mean(covered) <= 0.97


def test_the_bootstrap_covers_what_it_says_where_pairs_share_prompts() -> None:
    """The three pairs of a prompt all win or all lose: Wilson, which takes them as independent, is too narrow there."""
    rng = np.random.default_rng(3)
    prompts = [f"{n:03d}" for n in range(200)]
    covered, wilson = [], {1: [], 3: []}
    for _ in range(CLUSTERED):
        won = (rng.random(200) < 0.7).astype(float)
        interval = _bootstrap(np.repeat(won, 3), np.repeat(prompts, 3))
        covered.append(interval[0] <= 0.7 <= interval[1])
        for pairs, found in wilson.items():
            low, high = wilson_interval(float(won.mean()), 200 * pairs)
            found.append(low <= 0.7 <= high)
    assert 0.93 <= np.mean(covered) <= 0.97
    assert np.mean(wilson[1]) > 0.93
    assert np.mean(wilson[3]) < 0.85
    assert _bootstrap(won, prompts) == pytest.approx(interval), "one pair a prompt tells as much"


def _bootstrap(wins: np.ndarray, prompts: list[str]) -> tuple[float, float]:
    return bootstrap_intervals(lambda weights: [weighted_mean(wins, weights)], prompts, draws=200)[0]


def test_mcnemar_by_hand() -> None:
    assert sign_test(0, 0) == 1.0
    assert sign_test(1, 9) == pytest.approx(22 / 1024)
    assert sign_test(5, 5) == 1.0
    assert sign_test(5200, 4800) == pytest.approx(6.4e-5, rel=0.05)


def test_pairs_needed_find_the_difference_four_times_in_five() -> None:
    needed = pairs_needed_against_coin(0.6)
    assert needed == pytest.approx(194, abs=2)  # Fleiss, Statistical Methods for Rates and Proportions, one sample
    rng = np.random.default_rng(4)
    shares = rng.binomial(needed, 0.6, size=SIMULATIONS) / needed
    found = np.mean([wilson_interval(s, needed)[0] > 0.5 for s in shares])
    assert 0.75 < found < 0.87
    assert pairs_needed_against_coin(0.5) is None
    assert pairs_needed_for_difference(np.zeros(10)) is None


def scores(
    margins: list[float], chosen: int | list[int] = 10, rejected: int | list[int] = 10, topics: list[str] | None = None
) -> PairScores:
    count = len(margins)
    lengths = [np.broadcast_to(side, count).tolist() for side in (chosen, rejected)]
    return PairScores.from_rows(
        {
            "id": f"{i:03d}",
            "prompt": f"{i:03d}",
            "pair": str(i),
            "topic": topics[i] if topics else None,
            "policy_chosen": margin,
            "policy_rejected": 0.0,
            "reference_chosen": 0.0,
            "reference_rejected": 0.0,
            "tokens_chosen": lengths[0][i],
            "tokens_rejected": lengths[1][i],
        }
        for i, margin in enumerate(margins)
    )


def test_ties_count_one_half() -> None:
    found = figures(scores([1.0, 1.0, 1.0, -1.0, 0.0]), beta=0.1, confidence=0.95)
    assert found["accuracy"] == pytest.approx(0.7)
    assert found["ties"] == 1
    assert found["margin"] == pytest.approx(0.1 * 2 / 5)


def test_a_policy_that_likes_length_alone_gets_one_half_when_length_is_controlled() -> None:
    longer = [30] * 8 + [5] * 2
    found = figures(scores([1.0] * 8 + [-1.0] * 2, chosen=longer), beta=0.1, confidence=0.95)
    assert found["accuracy"] == pytest.approx(0.8)
    assert found["accuracy_length_controlled"] == pytest.approx(0.5)
    assert baselines(scores([1.0] * 10, chosen=longer), 0.95)["longer_wins"] == pytest.approx(0.8)
    assert figures(scores([1.0] * 4, chosen=30), 0.1, 0.95)["accuracy_length_controlled"] is None


def test_calibration_of_honest_margins_is_good_and_of_loud_ones_bad() -> None:
    rng = np.random.default_rng(5)
    margins = np.abs(rng.normal(0, 2, 4000))
    right = rng.random(4000) < 1 / (1 + np.exp(-margins))
    honest = np.where(right, margins, -margins)
    good = figures(scores((honest / 0.1).tolist()), 0.1, 0.95)
    loud = figures(scores((honest / 0.02).tolist()), 0.1, 0.95)
    assert good["calibration_error"] < 0.03
    assert loud["calibration_error"] > 0.08
    assert loud["brier"] > good["brier"]


def test_topics_and_lengths_are_told_apart() -> None:
    found = figures(
        scores([1.0, 1.0, -1.0, -1.0], chosen=[30, 30, 4, 10], topics=["a", "a", "b", "b"]), beta=0.1, confidence=0.95
    )
    assert [(g["name"], g["pairs"], g["accuracy"]) for g in found["by_topic"]] == [("a", 2, 1.0), ("b", 2, 0.0)]
    assert [g["name"] for g in found["by_length"]] == ["under 0.5", "0.8 to 1.25", "2 and over"]
