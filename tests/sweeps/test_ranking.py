"""Ranking, its intervals, and what it dares to say."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from dpo_lora.reports import effects
from dpo_lora.sweeps.ranking import Score, SeedNoise, clustered_error, rank, t_quantile
from dpo_lora.sweeps.table import behind
from dpo_lora.sweeps.trial import Trial


def _score(name: str, seed: int, wins: list[float]) -> Score:
    accuracy = sum(wins) / len(wins)
    trial = Trial(f"{name}-{seed}", name, seed, {"dpo.beta": name}, [], {}, Path(name))
    half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / len(wins))
    pairs = {(f"prompt-{n}", f"pair-{n}"): win for n, win in enumerate(wins)}
    return Score(trial, {"accuracy": accuracy, "margin": 0.0}, (accuracy - half, accuracy + half), 0.95, pairs)


@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),
    [(0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.975, 10, 2.22814), (0.995, 3, 5.84091)],  # printed tables
)
def test_student_quantiles(probability: float, freedom: int, expected: float) -> None:
    assert t_quantile(probability, freedom) == pytest.approx(expected, rel=1e-5)


def test_pairing_sees_what_the_intervals_alone_do_not() -> None:
    """Two settings whose intervals overlap widely, one of which wins every pair on which they differ."""
    coin = random.Random(0)
    weak = [float(coin.random() < 0.6) for _ in range(300)]
    lost = [n for n, win in enumerate(weak) if not win]
    strong = [1.0 if n in lost[:20] else win for n, win in enumerate(weak)]
    best, other = rank([_score("weak", 0, weak), _score("strong", 0, strong)], "accuracy", 0.95)
    assert best.setting == "strong"
    assert best.interval is not None and other.interval is not None
    assert other.interval[1] > best.interval[0]
    assert other.paired == 300
    assert other.distinguishable


def test_intervals_are_compared_at_the_confidence_that_they_were_made_at() -> None:
    def one(name: str, margin: float) -> Score:
        return Score(_score(name, 0, [1.0]).trial, {"margin": margin}, (margin - 0.3, margin + 0.3), confidence=0.8)

    _, other = rank([one("a", 1.0), one("b", 0.5)], "margin", 0.8)
    assert (other.behind, other.paired) == (0.5, 0)
    half = math.hypot(0.3, 0.3)  # a single comparison: nothing is widened
    assert other.behind_interval == pytest.approx((0.5 - half, 0.5 + half))
    assert other.distinguishable


def test_noise_is_not_called_a_winner() -> None:
    """Ten settings of equal worth: in nearly all repetitions none is told from the best."""
    false_alarms = 0
    for repetition in range(40):
        coin = random.Random(repetition)
        scores = [_score(f"s{n}", 0, [float(coin.random() < 0.6) for _ in range(100)]) for n in range(10)]
        false_alarms += any(entry.distinguishable for entry in rank(scores, "accuracy", 0.95)[1:])
    assert false_alarms <= 16  # the best of ten is chosen after the fact; unwidened intervals give 35 and more


def test_seeds_widen_the_interval() -> None:
    wins = [1.0] * 70 + [0.0] * 30
    one = rank([_score("a", 0, wins)], "accuracy", 0.95)[0]
    shifted = [_score("a", seed, [1.0] * (70 + 5 * seed) + [0.0] * (30 - 5 * seed)) for seed in (-1, 0, 1)]
    several = rank(shifted, "accuracy", 0.95)[0]
    assert several.seeds == [-1, 0, 1]
    assert several.value == pytest.approx(one.value)
    assert one.interval is not None and several.interval is not None
    assert several.interval[0] < one.interval[0]


def test_pooled_noise() -> None:
    noise = SeedNoise.pooled([[1.0, 3.0], [10.0, 12.0], [5.0]])
    assert noise.freedom == 2
    assert noise.deviation == pytest.approx(math.sqrt(2))
    assert SeedNoise.pooled([[1.0], [2.0]]).half_width([1], 0.95) == []


def test_pairs_of_one_prompt_count_as_one() -> None:
    alone = {(f"p{n}", "x"): float(n % 2) for n in range(100)}
    doubled = {(f"p{n}", side): float(n % 2) for n in range(100) for side in "xy"}
    assert clustered_error(doubled) == pytest.approx(clustered_error(alone))


def test_effects_find_the_setting_that_matters() -> None:
    coin = random.Random(1)
    strong = [str(n % 3) for n in range(36)]
    idle = [str(n // 3 % 2) for n in range(36)]
    objective = [float(level) + coin.gauss(0, 0.1) for level in strong]
    first, second = effects.main_effects({"idle": idle, "strong": strong}, objective)
    assert first.name == "strong" and first.importance is not None and first.importance > 0.9
    assert second.importance is not None and second.importance < 0.1


def test_effects_see_settings_that_act_together() -> None:
    a = [str(n % 2) for n in range(40)]
    b = [str(n // 2 % 2) for n in range(40)]
    objective = [float(x == y) + 0.01 * n for n, (x, y) in enumerate(zip(a, b, strict=True))]
    (pair,) = effects.pairs({"a": a, "b": b}, objective)
    assert pair.share > 0.5


def test_no_difference_is_no_interval_of_no_width() -> None:
    assert behind({"behind": 0.0, "behind_interval": (0.0, 0.0)}) == "no pair differs"
    assert behind({"behind": 0.1, "behind_interval": (-0.05, 0.25)}) == "+0.1 (-0.05 to +0.25)"
    assert behind({"behind": None, "behind_interval": None}) == ""
