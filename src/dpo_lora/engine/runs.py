"""Runs: the parts of a packed row by what they see, the one thing that every attention kernel asks of the plan.

A run's keys are those of its sequence from the first position on, so the distance of a query and a key in the run is
their distance in the sequence, which a sliding window counts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ScoreRule(NamedTuple):
    """How a layer makes probabilities of its scores.

    scale: what q k^T is multiplied by; None: one over the root of a head's size.
    softcap: a score s becomes softcap * tanh(s / softcap); None: stays.
    window: how many tokens of its sequence a query sees, itself included; None: all before it.
    """

    scale: float | None
    softcap: float | None = None
    window: int | None = None


class Run(NamedTuple):
    """Neighbouring queries of the row that see some earlier pieces of it, all of them, and themselves causally.

    before: (first position, length) of each piece, in the order of their positions in the sequence.
    """

    before: tuple[tuple[int, int], ...]
    first: int
    count: int

    @property
    def seen(self) -> int:
        """Keys before the run's own."""
        return sum(length for _, length in self.before)

    def narrowed(self, window: int | None) -> bool:
        """Whether its last query sees less than all of its keys, since a query sees only so many, itself the last."""
        return window is not None and self.seen + self.count > window

    def visible(self, window: int | None, device: torch.device | None = None) -> Tensor:
        """[count, seen + count]: whether a query of the run sees a key."""
        query = torch.arange(self.seen, self.seen + self.count, device=device)[:, None]
        key = torch.arange(self.seen + self.count, device=device)
        causal = key <= query
        return causal if window is None else causal & (query - key < window)


def run_keys(x: Tensor, run: Run, dim: int) -> Tensor:
    """Keys or values that a run sees, cut from those of the whole row (T along ``dim``): a view where it can be."""
    own = x.narrow(dim, run.first, run.count)
    return torch.cat([*(x.narrow(dim, *piece) for piece in run.before), own], dim) if run.before else own
