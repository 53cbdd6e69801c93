"""Pair packing: one flat row of tokens per micro-batch, every token of a pair computed once.

A preference pair is two token sequences that agree on a prefix (the prompt, and often the first words of both
answers). Causal attention makes the hidden states of that prefix identical in both, so a pair is laid out as

    [shared prefix][rest of chosen][rest of rejected]

where both rests start at the same position id, and each sees the shared prefix and itself only. What all pairs
of a micro-batch begin with (a system prompt, the template's first words, a prompt they have in common) lies once
before all of them, the row's *opening*, and every pair's prefix goes on from it. The last
token of either sequence predicts nothing and is left out. Nothing is padded. Every place of TRL's [2B, L-1]
layout that carries a label maps to exactly one *head entry* (hidden state, label); an entry inside the shared
prefix serves both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from dpo_lora.engine.runs import Run

IGNORED = -100
"""Label of a position that is not scored (the convention of torch and TRL)."""

LEAST_OPENING = 8
"""Tokens; a shorter opening is not worth the gathering of its keys."""


@dataclass(frozen=True)
class PairPlan:
    """How the pairs of one micro-batch lie in one row. T tokens, B pairs, N head entries, L padded length.

    segments:     per pair the number of (shared, chosen, rejected) positions after the opening; host integers,
                  for kernels that loop.
    input_ids:    [1, T].
    position_ids: [1, T]; the two rests of a pair carry the same positions.
    scored_rows:  [R] positions of the row that predict a label, ascending; the last layer goes on with these alone.
    entry_rows:   [N] which of the scored rows predicts the entry's label.
    head_labels:  [N] token id.
    slots:        [2B, L-1] entry number for each place of TRL's shifted layout (chosen rows first); N where
                  there is no label.
    keeps_last:   the last token of each sequence is in the row too. It predicts nothing, but the
                  load-balancing loss of a mixture of experts counts its routing.
    opening:      positions at the row's begin that belong to every sequence; none of them has a head entry.
    """

    segments: tuple[tuple[int, int, int], ...]
    input_ids: Tensor
    position_ids: Tensor
    scored_rows: Tensor
    entry_rows: Tensor
    head_labels: Tensor
    slots: Tensor
    keeps_last: bool = False
    opening: int = 0

    def to(self, device: torch.device | str, **_: object) -> PairPlan:
        """The same plan with its tensors on `device` (accelerate moves whatever has `.to`)."""
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **{k: sent(v, device) for k, v in tensors.items()})

    @property
    def tokens(self) -> int:
        """T: positions that are computed."""
        return self.input_ids.shape[1]

    @property
    def head_rows(self) -> Tensor:
        """[N] position in the row whose hidden state predicts the entry's label."""
        return self.scored_rows[self.entry_rows]

    @cached_property
    def runs(self) -> list[Run]:
        """What each part of the row sees, in the row's order; none is empty."""
        opening = (0, self.opening)
        runs, offset = [Run((), *opening)], self.opening
        for shared, chosen, rejected in self.segments:
            # [shared | chosen] lie side by side: one ordinary causal run
            runs.append(Run((opening,), offset, shared + chosen))
            runs.append(Run((opening, (offset, shared)), offset + shared + chosen, rejected))
            offset += shared + chosen + rejected
        filled = (Run(tuple(piece for piece in run.before if piece[1]), run.first, run.count) for run in runs)
        return [run for run in filled if run.count]

    @cached_property
    def notes(self) -> dict[str, Any]:
        """What a kernel has worked out of the plan, for all layers and both passes; it goes with the plan."""
        return {}

    def token_weights(self) -> Tensor:
        """[1, T] float: how many of the 2B sequences a row position belongs to (2 in shared prefixes, 2B in the
        opening)."""
        parts = [torch.full((self.opening,), 2.0 * len(self.segments))]
        parts += [torch.tensor([2.0, 1.0]).repeat_interleave(torch.tensor([s, c + r])) for s, c, r in self.segments]
        return torch.cat(parts)[None].to(self.input_ids.device)

    def scatter(self, values: Tensor) -> Tensor:
        """Per-entry values [N] -> [2B, L-1], zero where there is no label. Differentiable."""
        return torch.cat([values, values.new_zeros(1)])[self.slots]


def positions_needed(prompt: int, chosen: int, rejected: int) -> int:
    """Upper bound on the row positions of a pair from its lengths in tokens (shared answer prefixes
    unknown)."""
    return max(prompt, 1) - 1 + chosen + rejected + 1


def plan_pairs(
    pairs: Sequence[tuple[tuple[Sequence[int], int], tuple[Sequence[int], int]]],
    width: int | None = None,
    keep_last: bool = False,
) -> PairPlan:
    """Plan for pairs given as ((chosen ids, completion start), (rejected ids, completion start)).

    width is L of the [2B, L] batch the plan stands for (TRL pads to the longest, or to a multiple); None
    takes the longest sequence.
    """
    sides = []
    for (chosen, chosen_start), (rejected, rejected_start) in pairs:
        for ids, start in ((chosen, chosen_start), (rejected, rejected_start)):
            ids = np.asarray(ids, dtype=np.int64)
            scored = np.arange(len(ids)) >= start
            sides.append((ids, scored))
    return _plan(sides[0::2], sides[1::2], width, keep_last)


def plan_batch(input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor, keep_last: bool = False) -> PairPlan:
    """Plan for a collated batch: input_ids, attention_mask, labels [2B, L], right-padded, chosen rows first.

    labels equal input_ids where scored and -100 elsewhere. On a GPU this copies the batch to the host;
    planning in the collator (`PairCollator`) avoids that.
    """
    ids, scored = input_ids.cpu().numpy(), (labels != IGNORED).cpu().numpy()
    if attention_mask is None:
        lengths = np.full(len(ids), ids.shape[1])
    else:
        mask = attention_mask.cpu().numpy().astype(bool)
        lengths = mask.sum(1)
        if not (mask == (np.arange(ids.shape[1]) < lengths[:, None])).all():
            raise ValueError("the batch is not padded on the right only, so it cannot be packed; use TRL's collator")
    sides = [(ids[i, :n], scored[i, :n]) for i, n in enumerate(lengths)]
    half = len(sides) // 2
    return _plan(sides[:half], sides[half:], ids.shape[1], keep_last).to(input_ids.device)


def _plan(chosen: list, rejected: list, width: int | None, keep_last: bool) -> PairPlan:
    pairs = len(chosen)
    width = width or max(len(ids) for ids, _ in (*chosen, *rejected))
    slots = np.full((2 * pairs, max(width - 1, 0)), -1, dtype=np.int64)
    opening = _opening([*chosen, *rejected]) if pairs > 1 else 0
    ids_parts, pos_parts = [chosen[0][0][:opening]], [np.arange(opening)]
    row_parts, label_parts, segments = [], [], []
    offset = entries = 0  # offset: where the pair's sequences would begin, had it an opening of its own
    for i, ((a, a_scored), (b, b_scored)) in enumerate(zip(chosen, rejected, strict=True)):
        a_in, b_in = (a, b) if keep_last else (a[:-1], b[:-1])
        n = min(len(a_in), len(b_in))
        differ = np.flatnonzero(a_in[:n] != b_in[:n])
        shared = int(differ[0]) if len(differ) else n
        segments.append((shared - opening, len(a_in) - shared, len(b_in) - shared))
        ids_parts += [a_in[opening:], b_in[shared:]]
        pos_parts += [np.arange(opening, len(a_in)), np.arange(shared, len(b_in))]

        # `at`: positions t whose next token t+1 is scored
        at = np.flatnonzero(a_scored[1:])
        slots[i, at] = entries + np.arange(len(at))
        row_parts.append(offset + at)
        label_parts.append(a[at + 1])
        entries += len(at)

        at = np.flatnonzero(b_scored[1:])
        # inside the shared prefix the entry of the chosen side is reused where it asks for the same token
        same = at < shared
        same[same] = (a_scored[at[same] + 1]) & (a[at[same] + 1] == b[at[same] + 1])
        slots[pairs + i, at[same]] = slots[i, at[same]]
        at = at[~same]
        slots[pairs + i, at] = entries + np.arange(len(at))
        row_parts.append(offset + np.where(at < shared, at, at + len(a_in) - shared))
        label_parts.append(b[at + 1])
        entries += len(at)
        offset += len(a_in) + len(b_in) - shared - opening
    slots[slots < 0] = entries

    head_rows = np.concatenate(row_parts) if row_parts else np.zeros(0)
    scored_rows, entry_rows = np.unique(head_rows, return_inverse=True)

    def flat(parts: list) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64))

    return PairPlan(
        segments=tuple(segments),
        input_ids=flat(ids_parts)[None],
        position_ids=flat(pos_parts)[None],
        scored_rows=flat([scored_rows]),
        entry_rows=flat([entry_rows]),
        head_labels=flat(label_parts),
        slots=torch.from_numpy(slots),
        keeps_last=keep_last,
        opening=opening,
    )


def _opening(sides: list) -> int:
    """Tokens that all sequences (ids, which are scored) begin with, the last of them before any head entry."""
    common = min(min((len(ids), *np.flatnonzero(scored)[:1])) - 1 for ids, scored in sides)
    first = sides[0][0]
    for ids, _ in sides[1:]:
        differ = np.flatnonzero(ids[: max(common, 0)] != first[: max(common, 0)])
        common = int(differ[0]) if len(differ) else common
    return common if common >= LEAST_OPENING else 0


Sent = TypeVar("Sent", Tensor, PairPlan)


def sent(x: Sent, device: torch.device | str) -> Sent:
    """x on the device. To a GPU it goes without waiting for what is still to be done there, so that the next row is
    launched while the backward pass of the one before it runs."""
    if isinstance(x, Tensor) and torch.device(device).type == "cuda" and not x.is_cuda:
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


class PairCollator:
    """TRL's preference collator, with the batch's plan beside it, made while the batch is still on the host.

    Adds "pair_plan" to the collated dict; `PackedForward` uses it, any other model must not see it.
    """

    def __init__(self, collator: Callable[[list[dict]], dict], keep_last: bool = False) -> None:
        self.collator = collator
        self.keep_last = keep_last

    def __call__(self, examples: list[dict]) -> dict:
        batch = self.collator(examples)
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)
        batch["pair_plan"] = plan_batch(batch["input_ids"], batch["attention_mask"], labels, self.keep_last)
        return batch
