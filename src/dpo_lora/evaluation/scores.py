"""Exact scores over pairs: no mean of batch means, ties one half, every pair counted once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Two sums of the same log-probabilities in another batch shape differ by rounding alone; a margin
# this small (nats, per token of both answers) is a tie.
TIE_PER_TOKEN = 1e-6
LOGPS = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")


def tokens_hash(*parts: Sequence[int]) -> str:
    """16 hex digits of token id lists (XXH3, 64 bit): tells equal prompts, and equal pairs, by content."""
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(np.asarray([len(part), *part], dtype=np.int64).tobytes())
    return digest.hexdigest()


def pair_hash(row: dict[str, Any]) -> str:
    """The pair as it is scored; ids come from people and may repeat."""
    return tokens_hash(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"])


@dataclass(frozen=True)
class PairScores:
    """Log-probabilities (nats, summed over answer tokens) of N pairs."""

    ids: list[str]
    prompts: list[str]  # hash of each prompt's tokens; pairs that share one are not independent
    pairs: list[str]  # hash of each pair's tokens
    topics: list[str] | None
    policy_chosen: Array  # [N]
    policy_rejected: Array  # [N]
    reference_chosen: Array  # [N]
    reference_rejected: Array  # [N]
    tokens_chosen: NDArray[np.int64]  # [N], answer tokens that were scored
    tokens_rejected: NDArray[np.int64]  # [N]

    @classmethod
    def of(cls, rows: Any, logps: Array) -> PairScores:
        """Scores of tokenised rows.

        Args:
            rows: N rows with id, prompt_ids, chosen_ids, rejected_ids and, where the source has one, topic.
            logps: [N, 4] in the order of :data:`LOGPS`.
        """
        return cls.from_rows(
            {
                "id": str(row["id"]),
                "prompt": tokens_hash(row["prompt_ids"]),
                "pair": pair_hash(row),
                "topic": row.get("topic"),
                **dict(zip(LOGPS, values, strict=True)),
                "tokens_chosen": len(row["chosen_ids"]),
                "tokens_rejected": len(row["rejected_ids"]),
            }
            for row, values in zip(rows, logps.tolist(), strict=True)
        )

    @classmethod
    def from_rows(cls, rows: Iterable[dict[str, Any]]) -> PairScores:
        """The inverse of :meth:`rows`, in the order of ids: nothing said of them depends on the data's order."""
        ordered = sorted(rows, key=lambda row: (row["id"], row["pair"]))
        topics = [row.get("topic") for row in ordered]
        return cls(
            ids=[row["id"] for row in ordered],
            prompts=[row["prompt"] for row in ordered],
            pairs=[row["pair"] for row in ordered],
            topics=None if all(t is None for t in topics) else [str(t or "none") for t in topics],
            policy_chosen=np.asarray([row["policy_chosen"] for row in ordered], dtype=np.float64),
            policy_rejected=np.asarray([row["policy_rejected"] for row in ordered], dtype=np.float64),
            reference_chosen=np.asarray([row["reference_chosen"] for row in ordered], dtype=np.float64),
            reference_rejected=np.asarray([row["reference_rejected"] for row in ordered], dtype=np.float64),
            tokens_chosen=np.asarray([row["tokens_chosen"] for row in ordered], dtype=np.int64),
            tokens_rejected=np.asarray([row["tokens_rejected"] for row in ordered], dtype=np.int64),
        )

    def rows(self, beta: float) -> list[dict[str, Any]]:
        """One plain row a pair, for eval_pairs.jsonl; rewards are beta times the log-ratio to the reference."""
        chosen, rejected, wins = self.rewards(beta)[0], self.rewards(beta)[1], self.wins
        return [
            {
                "id": self.ids[i],
                "prompt": self.prompts[i],
                "pair": self.pairs[i],
                "topic": None if self.topics is None else self.topics[i],
                **{name: float(getattr(self, name)[i]) for name in LOGPS},
                "tokens_chosen": int(self.tokens_chosen[i]),
                "tokens_rejected": int(self.tokens_rejected[i]),
                "reward_chosen": float(chosen[i]),
                "reward_rejected": float(rejected[i]),
                "margin": float(chosen[i] - rejected[i]),
                "win": float(wins[i]),
            }
            for i in range(len(self))
        ]

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

    def rewards(self, beta: float) -> tuple[Array, Array]:
        """DPO's implicit rewards of chosen and rejected answers, [N] each (arXiv 2305.18290, eq. 5)."""
        return (
            beta * (self.policy_chosen - self.reference_chosen),
            beta * (self.policy_rejected - self.reference_rejected),
        )
