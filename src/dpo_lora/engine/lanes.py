"""Halves of a row side by side on a CPU, each on half of the threads, forward and backward.

A layer is some eighty operations of a millisecond or less. Spread over all threads, each waits for its slowest part and
for Python before the next begins, and passes that are bound by memory run at the same time on every core. Two rows of
their own, each in a thread that goes through all layers by itself, meet twice a step instead (docs/performance.md).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_lora.engine.packing import PairPlan
from dpo_lora.engine.partition import evenly

Given = TypeVar("Given")
Result = TypeVar("Result")
Score = Callable[[PairPlan], tuple[Tensor, ...]]

LANES = 2
"""Rows at once: what was measured, on two cores."""
LEAST_TOKENS = 256
"""Positions of a row that is worth a lane of its own."""
MOST_WAITING = 1.1
"""Lanes times the longest of their rows, over the whole row: the lanes give back a little more than that."""


def lanes_here(device: torch.device) -> int:
    """How many lanes this device has, by the threads that torch may use now.

    New threads inherit the processors of the one that makes them: a caller that is bound to a few (`OMP_PROC_BIND`)
    has no lanes.
    """
    threads = torch.get_num_threads()
    return LANES if device.type == "cpu" and threads % LANES == 0 and not threads_are_bound() else 1


def threads_are_bound() -> bool:
    """Whether the calling thread, and so each that it starts, may use fewer processors than torch has threads."""
    return hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) < torch.get_num_threads()


@dataclass(frozen=True)
class Lane:
    """A row of some of a plan's pairs, and the numbers [N] that its head entries have in the plan."""

    row: PairPlan
    entries: Tensor


def lanes_for(plan: PairPlan) -> int:
    """How many lanes pay for this row, here and now: none where one pair is most of it, or the opening, which each lane
    computes."""
    lanes = lanes_here(plan.input_ids.device)
    lengths = [sum(segment) for segment in plan.segments]
    longest = plan.opening + max(sum(lengths[i] for i in pairs) for pairs in evenly(lengths, lanes))
    pays = plan.tokens >= lanes * LEAST_TOKENS and lanes * longest <= MOST_WAITING * plan.tokens
    return lanes if pays else 1


def divided(plan: PairPlan, lanes: int) -> list[Lane]:
    """The plan's pairs in up to that many rows as equal in length as can be, each with the opening."""
    lengths = np.array([sum(segment) for segment in plan.segments])
    begins = plan.opening + lengths.cumsum() - lengths
    pieces = [np.arange(begin, begin + length) for begin, length in zip(begins, lengths, strict=True)]
    return [_lane(plan, pairs, pieces) for pairs in evenly(lengths.tolist(), lanes)]


def _lane(plan: PairPlan, pairs: list[int], pieces: list[NDArray[np.int64]]) -> Lane:
    """These pairs of the plan; pieces: the positions of each pair."""
    positions = torch.from_numpy(np.concatenate([np.arange(plan.opening), *(pieces[i] for i in pairs)]))
    moved = _numbered(positions, plan.tokens)[plan.head_rows]
    entries = (moved < len(positions)).nonzero()[:, 0]
    scored_rows, entry_rows = moved[entries].unique(return_inverse=True)
    sides = torch.tensor([*pairs, *(len(plan.segments) + i for i in pairs)])
    row = replace(
        plan,
        segments=tuple(plan.segments[i] for i in pairs),
        input_ids=plan.input_ids[:, positions],
        position_ids=plan.position_ids[:, positions],
        scored_rows=scored_rows,
        entry_rows=entry_rows,
        head_labels=plan.head_labels[entries],
        slots=_numbered(entries, len(plan.head_labels) + 1)[plan.slots[sides]],
    )
    return Lane(row, entries)


def _numbered(chosen: Tensor, count: int) -> Tensor:
    """[count]: where each of so many numbers stands in ``chosen``; len(chosen) where it does not."""
    places = torch.full((count,), len(chosen))
    places[chosen] = torch.arange(len(chosen))
    return places


def score_in_lanes(score: Score, plan: PairPlan, lanes: int, parameters: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """What ``score`` says of the row's head entries, found in as many rows as there are lanes, at once.

    Args:
        score: row -> tensors [N] of its head entries, the first of them with a gradient. Called in several threads.
        parameters: all that a gradient can reach.
    """
    if min(lanes, len(plan.segments)) == 1:
        return score(plan)
    parts = divided(plan, lanes)
    trained = [p for p in parameters if p.requires_grad] if torch.is_grad_enabled() else []
    if trained:
        results: tuple[Tensor, ...] = _Lanes.apply(score, parts, *trained)
        return results
    return _joined(_at_once(score, [lane.row for lane in parts]), parts)


class _Lanes(torch.autograd.Function):
    """Autograd goes through a CPU's operations in one thread. So each lane records a graph of its own, and the backward
    pass starts all of them."""

    @staticmethod
    def forward(ctx: Any, score: Score, lanes: list[Lane], *trained: Tensor) -> tuple[Tensor, ...]:
        def recorded(row: PairPlan) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                return score(row)

        results = _at_once(recorded, [lane.row for lane in lanes])
        ctx.scored = [result[0] for result in results]
        ctx.lanes, ctx.trained = lanes, trained
        joined = _joined([tuple(value.detach() for value in result) for result in results], lanes)
        ctx.mark_non_differentiable(*joined[1:])
        return joined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        scored, ctx.scored = ctx.scored, None

        def gradients(number: int) -> tuple[Tensor | None, ...]:
            value, scored[number] = scored[number], None  # a lane's graph goes when its backward pass is through
            own = grad[ctx.lanes[number].entries]
            found: tuple[Tensor | None, ...] = torch.autograd.grad(value, ctx.trained, own, allow_unused=True)
            return found

        found = _at_once(gradients, range(len(scored)))
        return (None, None, *map(_total, zip(*found, strict=True)))


def _total(grads: tuple[Tensor | None, ...]) -> Tensor | None:
    """A parameter's gradients of all lanes, summed in their order whichever was done first."""
    there = [grad for grad in grads if grad is not None]
    total = there[0] if there else None
    for grad in there[1:]:
        total = total + grad
    return total


def _joined(results: list[tuple[Tensor, ...]], lanes: list[Lane]) -> tuple[Tensor, ...]:
    """The lanes' values as those of all entries, [N]."""
    place = torch.cat([lane.entries for lane in lanes]).argsort()
    return tuple(torch.cat(values)[place] for values in zip(*results, strict=True))


def _at_once(work: Callable[[Given], Result], given: Sequence[Given]) -> list[Result]:
    """The work on each of what is given, at once, each on an equal share of torch's threads.

    Threads are new each time: a process that forks in between has none to miss, and a start takes a tenth of a
    millisecond. What is raised in one of them, or meanwhile by a signal, is raised here once all are done.
    """
    threads, recording = torch.get_num_threads(), torch.is_grad_enabled()

    def start() -> None:
        torch.set_num_threads(max(1, threads // len(given)))
        torch.set_grad_enabled(recording)

    try:
        with ThreadPoolExecutor(len(given), "lane", start) as pool:
            return list(pool.map(work, given))
    finally:
        torch.set_num_threads(threads)  # a lane's share had become the default of new threads
