"""Which setting is best, and which cannot be told from it.

Two kinds of noise stand between a held-out score and a setting's worth: which pairs happen to be
held out, and the seed. The seed's is pooled over all settings that ran with several, as if it were
the same for all: two seeds of one setting alone would say next to nothing. The half-widths are added
in quadrature, which overstates a little where the two overlap. Settings are compared pair by pair, on
the same held-out pairs: most of that noise is common to both and drops out. The intervals of the
comparisons against the best are widened for their number (Bonferroni), since the best of many is
partly luck.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist, fmean, stdev

from dpo_lora import objectives
from dpo_lora.evaluation.statistics import sign_test
from dpo_lora.files import read_jsonl
from dpo_lora.sweeps.trial import Trial

Interval = tuple[float, float]


@dataclass(frozen=True)
class SeedNoise:
    """Spread of the objective between seeds of one setting, pooled over settings."""

    deviation: float
    freedom: int  # 0: no setting ran with several seeds

    @classmethod
    def pooled(cls, groups: Iterable[list[float]]) -> SeedNoise:
        several = [values for values in groups if len(values) > 1]
        freedom = sum(len(values) - 1 for values in several)
        squares = sum((len(values) - 1) * stdev(values) ** 2 for values in several)
        return cls(math.sqrt(squares / freedom) if freedom else 0.0, freedom)

    def half_width(self, counts: Sequence[int], confidence: float) -> list[float]:
        """Of a mean over ``counts[0]`` seeds, or of the difference of two means; empty where nothing is known."""
        if not self.freedom:
            return []
        error = self.deviation * math.sqrt(sum(1 / count for count in counts))
        return [t_quantile(0.5 + confidence / 2, self.freedom) * error]


@dataclass
class Score:
    """One finished trial's figures."""

    trial: Trial
    figures: dict[str, float]
    interval: Interval | None  # of the objective over held-out pairs
    confidence: float  # of the interval, as the run chose it
    wins: dict[tuple[str, str], float] = field(default_factory=dict)  # (prompt, pair) -> 1, 0.5 or 0


@dataclass
class Ranked:
    """One setting, over its seeds."""

    setting: str
    varied: dict[str, str]
    trials: list[str]
    seeds: list[int]
    value: float
    interval: Interval | None
    behind: float | None = None  # the best's value minus this one's, over what both scored
    behind_interval: Interval | None = None  # widened for the number of comparisons
    paired: int = 0  # held-out pairs the comparison rests on; 0: it is not paired
    distinguishable: bool = True  # from the best


def score(trial: Trial, objective: str) -> Score | None:
    """A finished trial's score; None where the objective is not a finite number."""
    figures = objectives.read(trial.run)
    if objective not in figures:
        return None
    evaluation = json.loads(trial.run.eval_file.read_text(encoding="utf-8"))
    after = evaluation["after"]
    bounds = after.get(f"{objective}_interval")
    known = bounds and all(b is not None and math.isfinite(b) for b in bounds)
    interval = (bounds[0], bounds[1]) if known else None
    wins = _wins(trial, after["step"]) if objective == "accuracy" else {}
    return Score(trial, figures, interval, evaluation["confidence"], wins)


def rank(scores: list[Score], objective: str, confidence: float) -> list[Ranked]:
    """Settings from best to worst, each compared with the best.

    Args:
        confidence: of every interval, in (0, 1).
    """
    groups: dict[str, list[Score]] = {}
    for one in scores:
        groups.setdefault(one.trial.setting, []).append(one)
    sign = 1.0 if objectives.DIRECTIONS[objective] == objectives.MAXIMIZE else -1.0
    noise = SeedNoise.pooled([one.figures[objective] for one in group] for group in groups.values())
    ranked = {name: _ranked(group, objective, noise, confidence) for name, group in groups.items()}
    # Ties are broken by the margin, then by name, so that equal sweeps rank equally.
    order = sorted(ranked, key=lambda name: (-sign * ranked[name].value, -_margin(groups[name]), name))
    for name in order[1:]:
        widened = 1 - (1 - confidence) / (len(order) - 1)
        _compare(ranked[name], groups[order[0]], groups[name], objective, sign, noise, widened)
    if order:
        ranked[order[0]].distinguishable = False
    return [ranked[name] for name in order]


def _ranked(group: list[Score], objective: str, noise: SeedNoise, confidence: float) -> Ranked:
    values = [one.figures[objective] for one in group]
    mean = fmean(values)
    return Ranked(
        group[0].trial.setting,
        group[0].trial.varied,
        [one.trial.id for one in group],
        sorted(one.trial.seed for one in group),
        mean,
        _interval(group, objective, mean, noise, confidence),
    )


def _interval(group: list[Score], objective: str, mean: float, noise: SeedNoise, confidence: float) -> Interval | None:
    """Below and above apart: an interval of a share is not symmetric."""
    values = [one.figures[objective] for one in group]
    seeds = noise.half_width([len(values)], confidence)
    bounds = [(v - one.interval[0], one.interval[1] - v) for v, one in zip(values, group, strict=True) if one.interval]
    if not bounds and not seeds:
        return None
    below, above = ([fmean(b[side] for b in bounds)] if bounds else [] for side in (0, 1))
    low, high = mean - math.hypot(*below, *seeds), mean + math.hypot(*above, *seeds)
    return (max(0.0, low), min(1.0, high)) if objective == "accuracy" else (low, high)


def _compare(
    other: Ranked,
    best_group: list[Score],
    group: list[Score],
    objective: str,
    sign: float,
    noise: SeedNoise,
    confidence: float,
) -> None:
    best_by_seed = {one.trial.seed: one for one in best_group}
    matched = [(best_by_seed[one.trial.seed], one) for one in group if one.trial.seed in best_by_seed]
    per_seed = [sign * (a.figures[objective] - b.figures[objective]) for a, b in matched]
    z = _z(confidence)
    common = set.intersection(*(set(a.wins) & set(b.wins) for a, b in matched)) if matched else set()
    parts: list[float] = []
    chance = 0.0  # the sign test's p-value: where few pairs differ, the interval is too sure of itself
    if len(common) > 1:
        by_pair = {key: fmean(a.wins[key] - b.wins[key] for a, b in matched) for key in sorted(common)}
        other.paired, other.behind = len(by_pair), fmean(by_pair.values())
        parts.append(z * clustered_error(by_pair))
        chance = sign_test(sum(d > 0 for d in by_pair.values()), sum(d < 0 for d in by_pair.values()))
    else:
        best_value = fmean(one.figures[objective] for one in best_group)
        other.behind = fmean(per_seed) if per_seed else sign * (best_value - other.value)
        # Not paired: the runs' own intervals, brought from their confidence to this one.
        for side in (best_group, group):
            errors = [(one.interval[1] - one.interval[0]) / 2 / _z(one.confidence) for one in side if one.interval]
            parts += [z * fmean(errors)] if errors else []
    parts += noise.half_width([len(best_group), len(group)], confidence)
    if parts:
        half = math.hypot(*parts)
        other.behind_interval = (other.behind - half, other.behind + half)
        other.distinguishable = other.behind_interval[0] > 0 and chance < 1 - confidence
    else:
        other.distinguishable = other.behind > 0


def _z(confidence: float) -> float:
    """Standard errors on each side of a normal estimate."""
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def _margin(group: list[Score]) -> float:
    return fmean(one.figures.get("margin", 0.0) for one in group)


def _wins(trial: Trial, step: int) -> dict[tuple[str, str], float]:
    """(prompt, pair) -> win of the adapter that was kept; by content, since ids come from people."""
    file = trial.run.eval_pairs_file
    if not file.exists():
        return {}
    return {(row["prompt"], row["pair"]): float(row["win"]) for row in read_jsonl(file) if row["step"] == step}


def clustered_error(by_pair: dict[tuple[str, str], float]) -> float:
    """Standard error of the mean over pairs, whose prompts are independent but whose pairs of one prompt are not."""
    mean = fmean(by_pair.values())
    residuals: dict[str, float] = {}
    for (prompt, _), value in by_pair.items():
        residuals[prompt] = residuals.get(prompt, 0.0) + value - mean
    groups = len(residuals)
    if groups < 2:
        return math.inf
    return math.sqrt(sum(r * r for r in residuals.values()) * groups / (groups - 1)) / len(by_pair)


def t_quantile(probability: float, freedom: int) -> float:
    """The quantile of Student's t distribution above the median, by bisection of its integral."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)

    def mass(angle: float) -> float:
        """P(0 < T < sqrt(freedom) tan(angle)), by Simpson's rule in the angle, where the integrand is smooth."""
        steps = 200
        width = angle / steps
        heights = [math.cos(i * width) ** (freedom - 1) for i in range(steps + 1)]
        inner = 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2])
        return scale * math.sqrt(freedom) * width / 3 * (heights[0] + inner + heights[-1])

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mass(middle) < probability - 0.5 else (low, middle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)
