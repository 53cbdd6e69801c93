"""From pair scores to the figures of eval.json; docs/evaluation.md defines each of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from dpo_lora.evaluation.scores import Array, PairScores
from dpo_lora.evaluation.statistics import bootstrap_intervals, mean_interval, weighted_mean, wilson_interval

# Chosen tokens over rejected tokens: bucket edges that read the same either way round.
LENGTH_EDGES = (0.5, 0.8, 1.25, 2.0)
LENGTH_NAMES = ("under 0.5", "0.5 to 0.8", "0.8 to 1.25", "1.25 to 2", "2 and over")
CALIBRATION_BINS = 5  # over confidences from 0.5 to 1
# Headline figures: what a history entry and a tracker hold.
HEADLINE = (
    "pairs", "prompts", "ties", "accuracy", "accuracy_interval", "accuracy_bootstrap",
    "accuracy_length_controlled", "accuracy_length_controlled_bootstrap",
    "margin", "margin_interval", "margin_bootstrap", "reward_chosen", "reward_rejected",
    "loss", "brier", "calibration_error", "log_ratio_per_token_chosen", "log_ratio_per_token_rejected",
)  # fmt: skip


def figures(scores: PairScores, beta: float, confidence: float) -> dict[str, Any]:
    """Every figure of one evaluation, as plain numbers, lists and None where a figure does not exist."""
    wins = scores.wins
    chosen, rejected = scores.rewards(beta)
    margins = chosen - rejected
    shorter, longer = _length_strata(scores)

    def resampled(weights: Array) -> list[float]:
        controlled = (weighted_mean(wins, weights * shorter) + weighted_mean(wins, weights * longer)) / 2
        return [weighted_mean(wins, weights), weighted_mean(margins, weights), controlled]

    each = np.ones(len(scores))
    accuracy, margin, controlled = resampled(each)
    by_accuracy, by_margin, by_controlled = bootstrap_intervals(resampled, scores.prompts, confidence)
    return {
        "pairs": len(scores),
        "prompts": len(set(scores.prompts)),
        "ties": int(np.sum(wins == 0.5)),
        "accuracy": accuracy,
        "accuracy_interval": list(wilson_interval(accuracy, len(scores), confidence)),
        "accuracy_bootstrap": list(by_accuracy),
        "accuracy_length_controlled": _number(controlled),
        "accuracy_length_controlled_bootstrap": [_number(b) for b in by_controlled],
        "margin": margin,
        "margin_interval": [_number(b) for b in mean_interval(margins, confidence)],
        "margin_bootstrap": list(by_margin),
        "reward_chosen": float(np.mean(chosen)),
        "reward_rejected": float(np.mean(rejected)),
        "loss": float(np.mean(np.logaddexp(0, -margins))),
        "log_ratio_per_token_chosen": float(np.sum(chosen) / beta / np.sum(scores.tokens_chosen)),
        "log_ratio_per_token_rejected": float(np.sum(rejected) / beta / np.sum(scores.tokens_rejected)),
        **_calibration(margins, wins),
        "by_topic": _groups(scores.topics, wins, margins, confidence) if scores.topics else [],
        "by_length": _by_length(scores, wins, margins, confidence),
    }


def headline(found: dict[str, Any]) -> dict[str, Any]:
    """The figures without their tables."""
    return {name: found[name] for name in HEADLINE}


def flat(found: dict[str, Any]) -> dict[str, float]:
    """The same figures as single numbers named ``eval/...``, for metrics.jsonl and the tracker."""
    numbers: dict[str, float] = {}
    for name in HEADLINE:
        value = found[name]
        if isinstance(value, list):
            label = name.removesuffix("_interval")
            numbers |= {
                f"eval/{label}_{end}": v for end, v in zip(("low", "high"), value, strict=True) if v is not None
            }
        elif value is not None:
            numbers[f"eval/{name}"] = value
    for table in ("topic", "length"):
        numbers |= {f"eval/{table}/{row['name']}/accuracy": row["accuracy"] for row in found[f"by_{table}"]}
    return numbers


def baselines(scores: PairScores, confidence: float) -> dict[str, Any]:
    """What needs no training: a coin, and always preferring the answer with more tokens."""
    longer = np.sign(scores.tokens_chosen - scores.tokens_rejected) / 2 + 0.5
    share = float(np.mean(longer))
    return {
        "coin": 0.5,
        "longer_wins": share,
        "longer_wins_interval": list(wilson_interval(share, len(scores), confidence)),
    }


def _length_strata(scores: PairScores) -> tuple[Array, Array]:
    """Weight of each pair among those whose chosen answer is the shorter, and the longer, one; [N] each."""
    longer = np.sign(scores.tokens_chosen - scores.tokens_rejected) / 2 + 0.5
    return 1 - longer, longer


def _calibration(margins: Array, wins: Array) -> dict[str, Any]:
    """Is sigma(margin), the model's own probability that chosen is the better answer, one?"""
    probability = 1 / (1 + np.exp(-np.clip(margins, -700, 700)))
    confident = np.maximum(probability, 1 - probability)
    place = np.minimum(((confident - 0.5) * 2 * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    bins, gap = [], 0.0
    for number in range(CALIBRATION_BINS):
        inside = place == number
        count = int(np.sum(inside))
        expected, right = (float(np.mean(confident[inside])), float(np.mean(wins[inside]))) if count else (None, None)
        if expected is not None and right is not None:
            gap += count * abs(right - expected)
        low = 0.5 + number / (2 * CALIBRATION_BINS)
        high = 0.5 + (number + 1) / (2 * CALIBRATION_BINS)
        bins.append({"from": low, "to": high, "pairs": count, "confidence": expected, "accuracy": right})
    return {
        "brier": float(np.mean((1 - probability) ** 2)),
        "calibration_error": gap / len(wins),
        "calibration": bins,
    }


def _groups(names: list[str], wins: Array, margins: Array, confidence: float) -> list[dict[str, Any]]:
    labels = np.asarray(names)
    rows = []
    for name in sorted(set(names)):
        inside = labels == name
        count, share = int(np.sum(inside)), float(np.mean(wins[inside]))
        rows.append(
            {
                "name": name,
                "pairs": count,
                "accuracy": share,
                "accuracy_interval": list(wilson_interval(share, count, confidence)),
                "margin": float(np.mean(margins[inside])),
            }
        )
    return rows


def _by_length(scores: PairScores, wins: Array, margins: Array, confidence: float) -> list[dict[str, Any]]:
    bucket = np.digitize(scores.tokens_chosen / scores.tokens_rejected, LENGTH_EDGES)
    rows = _groups([LENGTH_NAMES[b] for b in bucket], wins, margins, confidence)
    return sorted(rows, key=lambda row: LENGTH_NAMES.index(row["name"]))


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value
