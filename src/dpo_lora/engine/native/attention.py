"""Attention of a packed row by the compiled library, forward and backward: `flash_attention.py` in C++.

Torch's kernel is called run by run, computes a run's whole square in the backward pass, and returns gradients for each
query head, which have to be summed. Here a row is one call, without Python's lock, of about what a causal mask leaves.
And where a training has diverged so far that scores lose all their digits, gradients stay finite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpo_lora.engine.native import library
from dpo_lora.engine.packing import PairPlan


def attend(q: Tensor, k: Tensor, v: Tensor, plan: PairPlan, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
    """q [T, Hq, D], k/v [T, Hkv, D] -> ([T, Hq, D], stats [T, Hq, 2]); window: as in `ScoreRule`.

    stats: the highest score of each query, and one over the sum of e^(scale * (score - highest)).
    """
    q, k, v = (x.contiguous() for x in (q, k, v))
    out, stats = torch.empty_like(q), q.new_empty(*q.shape[:2], 2)
    _call("attend", [q, k, v, out, stats], q, k, plan, scale, window)
    return out, stats


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, plan: PairPlan, scale: float,
    window: int | None,
) -> list[Tensor]:  # fmt: skip
    """Gradients for q, k and v, shaped as they are; out and stats from `attend`."""
    grad, q, k, v = (x.contiguous() for x in (grad, q, k, v))
    into = [torch.empty_like(x) for x in (q, k, v)]
    _call("attend_backward", [grad, q, k, v, out, stats, *into], q, k, plan, scale, window)
    return into


def _call(
    name: str, tensors: list[Tensor], q: Tensor, k: Tensor, plan: PairPlan, scale: float, window: int | None
) -> None:
    shape = torch.tensor([k.shape[1], q.shape[1] // k.shape[1], q.shape[2]])
    library.call(name, *tensors, shape, _runs(plan), len(plan.runs), window or 0, float(scale))


def _runs(plan: PairPlan) -> Tensor:
    """The plan's runs as the library reads them: of each, how many pieces it sees, and their places and lengths."""
    if "native_runs" not in plan.notes:
        pieces = [[*run.before, (run.first, run.count)] for run in plan.runs]
        plan.notes["native_runs"] = torch.tensor(
            [x for of_run in pieces for x in (len(of_run), *sum(of_run, ()))], dtype=torch.int64
        )
    found: Tensor = plan.notes["native_runs"]
    return found
