"""Exact scores over pairs: no mean of batch means, ties one half, every pair counted once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_lora.evaluation.statistics import mean_interval, wilson_interval

Array = NDArray[np.float64]

# Two sums of the same log-probabilities in another batch shape differ by rounding alone; a margin
# this small (nats, per token of both answers) is a tie.
TIE_PER_TOKEN = 1e-6


@dataclass(frozen=True)
class PairScores:
    """Log-probabilities (nats, summed over answer tokens) of N pairs, in the order of the data."""

    ids: list[str]
    policy_chosen: Array  # [N]
    policy_rejected: Array  # [N]
    reference_chosen: Array  # [N]
    reference_rejected: Array  # [N]
    tokens_chosen: NDArray[np.int64]  # [N], answer tokens that were scored
    tokens_rejected: NDArray[np.int64]  # [N]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def margins(self) -> Array:
        """Policy's log-ratio of chosen over rejected, minus the reference's; nats, [N]."""
        return (self.policy_chosen - self.reference_chosen) - (self.policy_rejected - self.reference_rejected)

    @property
    def wins(self) -> Array:
        """1 where the policy moved towards the chosen answer, 0 where away, 0.5 for a tie; [N]."""
        margins = self.margins
        tie = np.abs(margins) <= TIE_PER_TOKEN * (self.tokens_chosen + self.tokens_rejected)
        return np.where(tie, 0.5, (margins > 0).astype(np.float64))

    def summary(self, beta: float, confidence: float) -> dict[str, Any]:
        """The figures of eval.json; rewards are beta times the log-ratio to the reference."""
        count = len(self)
        accuracy = float(np.mean(self.wins))
        chosen = beta * (self.policy_chosen - self.reference_chosen)
        rejected = beta * (self.policy_rejected - self.reference_rejected)
        return {
            "pairs": count,
            "accuracy": accuracy,
            "accuracy_interval": list(wilson_interval(accuracy, count, confidence)),
            "margin": float(np.mean(chosen - rejected)),
            "margin_interval": list(mean_interval(chosen - rejected, confidence)),
            "reward_chosen": float(np.mean(chosen)),
            "reward_rejected": float(np.mean(rejected)),
            "ties": int(np.sum(self.wins == 0.5)),
        }

    def baselines(self, confidence: float) -> dict[str, Any]:
        """What needs no training: a coin, and always preferring the answer with more tokens."""
        longer = np.sign(self.tokens_chosen - self.tokens_rejected) / 2 + 0.5
        share = float(np.mean(longer))
        return {
            "coin": 0.5,
            "longer_wins": share,
            "longer_wins_interval": list(wilson_interval(share, len(self), confidence)),
        }
