"""Attention of a packed row on a CPU by torch's own flash kernel, called run by run, forward and backward.

These are the operations behind torch's scaled_dot_product_attention on a CPU. Called from here they read the row where
it lies, share a key head among its query heads as a view, and write gradients where they belong. The backward one
computes the whole square of a causal mask; measured it is still faster than `block_attention.py`, which does not.
It makes probabilities again as exp(score - logsumexp). Where a training has diverged so far that scores pass about 1e8,
the rounding of a score alone is tens in that exponent, and gradients come out huge, infinite or NaN. Stock TRL gets
the same there, since its attention on a CPU is the same kernel.

Tensors are seen as [G, R, T, D]: G key heads, R query heads for each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpo_lora.engine.packing import PairPlan
from dpo_lora.engine.runs import Run, run_keys


def attend(q: Tensor, k: Tensor, v: Tensor, plan: PairPlan, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
    """q [T, Hq, D], k/v [T, Hkv, D] -> ([T, Hq, D], logsumexp of the scores [G, T, R]); window: as in `ScoreRule`."""
    out = torch.empty_like(q)
    levels = q.new_empty(k.shape[1], len(q), q.shape[1] // k.shape[1])
    queries, keys, values, into = (_grouped(x, k.shape[1]) for x in (q, k, v, out))
    for run, mask in _runs(plan, q.dtype, window):
        own = slice(run.first, run.first + run.count)
        seen = [_shared(x, run, queries.shape[1]) for x in (keys, values)]
        result, level = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries[:, :, own], *seen, 0.0, mask is None, attn_mask=mask, scale=scale
        )
        into[:, :, own] = result
        levels[:, own] = level.transpose(1, 2)
    return out, levels


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, levels: Tensor, plan: PairPlan, scale: float,
    window: int | None,
) -> list[Tensor]:  # fmt: skip
    """Gradients for q, k and v, shaped as they are; out and levels from `attend`."""
    into = [torch.empty_like(x) for x in (q, k, v)]
    groups = k.shape[1]
    upstream, queries, keys, values, outs = (_grouped(x, groups) for x in (grad, q, k, v, out))
    d_queries, d_keys, d_values = (_grouped(x, groups) for x in into)
    for run, mask in _runs(plan, q.dtype, window):
        own = slice(run.first, run.first + run.count)
        seen = [_shared(x, run, queries.shape[1]) for x in (keys, values)]
        level = levels[:, own].transpose(1, 2)
        d_query, *parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            upstream[:, :, own], queries[:, :, own], *seen, outs[:, :, own], level, 0.0, mask is None,
            attn_mask=mask, scale=scale,
        )  # fmt: skip
        d_queries[:, :, own] = d_query
        for part, total in zip(parts, (d_keys, d_values), strict=True):
            summed = part.sum(1, keepdim=True)
            # What a run sees lies before it in the row, so its own gradient was begun by then.
            total[:, :, own] = summed[:, :, run.seen :]
            at = 0
            for first, length in run.before:
                total[:, :, first : first + length] += summed[:, :, at : at + length]
                at += length
    return into


def _grouped(x: Tensor, groups: int) -> Tensor:
    """[T, H, D] -> [G, H / G, T, D], a view."""
    return x.view(len(x), groups, -1, x.shape[2]).permute(1, 2, 0, 3)


def _shared(x: Tensor, run: Run, repeat: int) -> Tensor:
    """Keys or values [G, 1, T, D] of a run, the same for every query head: [G, R, seen, D]."""
    return run_keys(x, run, 2).expand(-1, repeat, -1, -1)


def _runs(plan: PairPlan, dtype: torch.dtype, window: int | None) -> list[tuple[Run, Tensor | None]]:
    """The plan's runs with what is added to their scores, [count, seen + count]; None for a plain causal square."""
    note = f"masked_runs {window}"
    if note not in plan.notes:
        plan.notes[note] = [
            (run, _mask(run, dtype, window) if run.before or run.narrowed(window) else None) for run in plan.runs
        ]
    found: list[tuple[Run, Tensor | None]] = plan.notes[note]
    return found


def _mask(run: Run, dtype: torch.dtype, window: int | None) -> Tensor:
    hidden = ~run.visible(window)
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
