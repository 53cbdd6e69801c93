"""What the varied settings did to the objective: main effects, importance, pairs that act together.

Importance is the share of the objective's variance that a setting's levels explain, less what as many
levels would explain by chance (epsilon squared; T. L. Kelley, PNAS 21, 1935). Values that are all
different, as a search draws them, are cut into quarters first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, quantiles, stdev

MOST_LEVELS = 8  # more distinct values than this are a continuum


@dataclass(frozen=True)
class Effect:
    """One setting's main effect."""

    name: str
    importance: float | None  # share of variance in [0, 1]; None where there are too few trials to say
    levels: list[tuple[str, float, float, int]]  # level, mean, standard error (0 for one trial), trials


@dataclass(frozen=True)
class Pair:
    """What two settings explain together beyond the sum of both."""

    names: tuple[str, str]
    share: float


def levels_of(values: Sequence[str]) -> list[str]:
    """The level each value belongs to: itself, or its quarter of the range seen."""
    if len(set(values)) <= MOST_LEVELS:
        return list(values)
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        return list(values)
    cuts = quantiles(numbers, n=4)
    edges = [min(numbers), *cuts, max(numbers)]
    names = [f"{edges[n]:.3g} to {edges[n + 1]:.3g}" for n in range(4)]
    return [names[sum(number > cut for cut in cuts)] for number in numbers]


def main_effects(columns: dict[str, list[str]], objective: list[float]) -> list[Effect]:
    """Effects, the most important first.

    Args:
        columns: name -> the value of each trial, [N].
        objective: of each trial, [N].
    """
    found = []
    for name, values in columns.items():
        levels = levels_of(values)
        if len(set(levels)) < 2:
            continue
        groups = _groups(levels, objective)
        rows = [
            (level, fmean(part), stdev(part) / len(part) ** 0.5 if len(part) > 1 else 0.0, len(part))
            for level, part in groups.items()
        ]
        found.append(Effect(name, explained(levels, objective), sorted(rows, key=_order)))
    return sorted(found, key=lambda effect: -(effect.importance or 0.0))


def pairs(columns: dict[str, list[str]], objective: list[float]) -> list[Pair]:
    """Interactions, the strongest first; pairs whose every combination was tried once cannot be judged."""
    levels = {name: levels_of(values) for name, values in columns.items()}
    found = []
    for a, b in combinations(levels, 2):
        both = explained([f"{x} and {y}" for x, y in zip(levels[a], levels[b], strict=True)], objective)
        alone = [explained(levels[name], objective) for name in (a, b)]
        if both is not None and None not in alone:
            found.append(Pair((a, b), max(0.0, both - sum(share or 0.0 for share in alone))))
    return sorted(found, key=lambda pair: -pair.share)


def explained(levels: list[str], objective: list[float]) -> float | None:
    """Epsilon squared, floored at 0; None without trials to spare or without any variance."""
    groups = _groups(levels, objective)
    count, kinds = len(objective), len(groups)
    mean = fmean(objective)
    total = sum((value - mean) ** 2 for value in objective)
    if kinds < 2 or count <= kinds or total == 0:
        return None
    within = sum((value - fmean(part)) ** 2 for part in groups.values() for value in part)
    between = total - within
    return max(0.0, (between - (kinds - 1) * within / (count - kinds)) / total)


def _groups(levels: list[str], objective: list[float]) -> dict[str, list[float]]:
    groups: dict[str, list[float]] = {}
    for level, value in zip(levels, objective, strict=True):
        groups.setdefault(level, []).append(value)
    return groups


def _order(row: tuple[str, float, float, int]) -> tuple[float, str]:
    try:
        return float(row[0].split(" to ", maxsplit=1)[0]), row[0]
    except ValueError:
        return 0.0, row[0]
