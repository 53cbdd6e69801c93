"""Pair attention by blocks of matrix products, forward and backward, for CPUs (any float type, soft-capping
and sliding windows too).

Torch's CPU flash kernel computes the whole square of a causal mask in its backward pass and wants key heads
repeated or copies of slices from autograd. Here each block of queries meets the keys it can see and no
others, the query heads that share a key head are rows of one product, and gradients are written where they
belong.

Inside, tensors are grouped by key head G: queries [G, T * R, D] with R query heads a key head (row t * R +
r), keys and values [G, T, D]. A block of neighbouring positions is then a view.
"""

from __future__ import annotations

import itertools
from functools import lru_cache

import torch
from torch import Tensor

from dpo_lora.engine.packing import PairPlan
from dpo_lora.engine.runs import ScoreRule, run_keys

_BLOCK = 96  # queries a block: fewer calls than 64, less computed in vain than 128 (measured, SmolLM2-135M)


def block_pairs(query: Tensor, key: Tensor, value: Tensor, plan: PairPlan, rule: ScoreRule) -> Tensor:
    """query [1, Hq, T, D], key/value [1, Hkv, T, D] -> [1, T, Hq, D]."""
    scale = query.shape[-1] ** -0.5 if rule.scale is None else rule.scale
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return PairAttention.apply(q, k, v, plan, rule._replace(scale=scale))[None]


class PairAttention(torch.autograd.Function):
    """q [T, Hq, D], k/v [T, Hkv, D] -> [T, Hq, D]. Probabilities are computed again in backward."""

    @staticmethod
    def forward(ctx, q, k, v, plan, rule):
        out = attend(q, k, v, plan, *rule)
        ctx.save_for_backward(q, k, v, out)
        ctx.plan, ctx.rule = plan, rule
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out = ctx.saved_tensors
        into = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
        attend_backward(grad, q, k, v, out, ctx.plan, *ctx.rule, into=into)
        return *into, None, None


def _blocks(queries: int) -> list[tuple[int, int]]:
    count = -(-queries // _BLOCK)
    edges = [round(queries * i / count) for i in range(count + 1)]
    return list(itertools.pairwise(edges))


def _group(x: Tensor, groups: int, factor: float = 1.0) -> Tensor:
    """[T, H, D] -> x * factor as [G, T * H / G, D]; always a new tensor."""
    t, heads, d = x.shape
    out = torch.empty(groups, t, heads // groups, d, dtype=x.dtype, device=x.device)
    torch.mul(x.reshape(t, groups, heads // groups, d).transpose(0, 1), factor, out=out)
    return out.view(groups, -1, d)


def _ungroup(x: Tensor, out: Tensor) -> None:
    """The inverse of `_group`, into out [T, H, D]."""
    groups, (t, heads, d) = len(x), out.shape
    out.view(t, groups, heads // groups, d).copy_(x.view(groups, t, heads // groups, d).transpose(0, 1))


@lru_cache(maxsize=256)
def _later(count: int, device: torch.device) -> Tensor:
    """[count, 1, count] True where the key comes after the query."""
    return torch.ones(count, count, dtype=torch.bool, device=device).triu_(1)[:, None]


@lru_cache(maxsize=256)
def _beyond(count: int, keys: int, window: int, device: torch.device) -> Tensor:
    """[count, 1, keys] True where the key lies before the window of the query; the queries are the last of the keys."""
    query = torch.arange(keys - count, keys, device=device)[:, None]
    return (query - torch.arange(keys, device=device) >= window)[:, None]


def _first_seen(before: int, window: int | None) -> int:
    """The first key that a query with so many keys before it sees."""
    return 0 if window is None else max(0, before + 1 - window)


def _probabilities(
    q: Tensor, k: Tensor, count: int, softcap: float | None, window: int | None
) -> tuple[Tensor, Tensor | None]:
    """Softmax of a block: q [G, count * R, D] already scaled, k [G, keys, D]; the last `count` keys are its
    own.

    Returns p [G, count * R, keys] and, with soft-capping, the slope 1 - tanh^2.
    """
    scores = torch.bmm(q, k.transpose(1, 2))
    slope = None
    if softcap is not None:
        t = scores.tanh_()
        slope, scores = 1 - t * t, t * softcap
    own = scores.view(len(q), count, -1, k.shape[1])[..., k.shape[1] - count :]
    own.masked_fill_(_later(count, q.device), float("-inf"))
    if window is not None and k.shape[1] > window:
        every = scores.view(len(q), count, -1, k.shape[1])
        every.masked_fill_(_beyond(count, k.shape[1], window, q.device), float("-inf"))
    wide = scores.float() if scores.dtype in (torch.bfloat16, torch.float16) else scores
    return torch.softmax(wide, -1).to(q.dtype), slope


def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: PairPlan, scale: float, softcap: float | None, window: int | None
) -> Tensor:
    """Forward pass; shapes as in `PairAttention`."""
    groups = k.shape[1]
    repeat = q.shape[1] // groups
    rows = _group(q, groups, scale if softcap is None else scale / softcap)
    keys, values = _group(k, groups), _group(v, groups)
    result = torch.empty_like(rows)
    for run in plan.runs:
        k_run, v_run = (run_keys(x, run, 1) for x in (keys, values))
        for a, b in _blocks(run.count):
            block = slice((run.first + a) * repeat, (run.first + b) * repeat)
            seen = slice(_first_seen(run.seen + a, window), run.seen + b)
            p, _ = _probabilities(rows[:, block], k_run[:, seen], b - a, softcap, window)
            torch.bmm(p, v_run[:, seen], out=result[:, block])
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _ungroup(result, out)
    return out


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, plan: PairPlan, scale: float,
    softcap: float | None, window: int | None, into: list[Tensor],
) -> None:  # fmt: skip
    """Write the gradients into `into` = [dq, dk, dv], shaped as q, k, v."""
    groups = k.shape[1]
    repeat = q.shape[1] // groups
    inner = scale if softcap is None else scale / softcap
    rows, upstream = _group(q, groups, inner), _group(grad, groups)
    keys, values = _group(k, groups), _group(v, groups)
    # sum_j p_j dp_j of each row: what the softmax's own normalisation takes off
    level = torch.linalg.vecdot(upstream, _group(out, groups))[..., None]
    d_rows, d_keys, d_values = (torch.empty_like(x) for x in (rows, keys, values))
    for run in plan.runs:
        k_run, v_run = (run_keys(x, run, 1) for x in (keys, values))
        dk_run, dv_run = torch.zeros_like(k_run), torch.zeros_like(v_run)
        for a, b in _blocks(run.count):
            seen = slice(_first_seen(run.seen + a, window), run.seen + b)
            block = slice((run.first + a) * repeat, (run.first + b) * repeat)
            p, slope = _probabilities(rows[:, block], k_run[:, seen], b - a, softcap, window)
            dv_run[:, seen].baddbmm_(p.transpose(1, 2), upstream[:, block])
            ds = torch.bmm(upstream[:, block], v_run[:, seen].transpose(1, 2))
            ds.sub_(level[:, block]).mul_(p)
            if slope is not None:
                ds.mul_(slope).mul_(softcap)
            torch.bmm(ds, k_run[:, seen], out=d_rows[:, block])
            dk_run[:, seen].baddbmm_(ds.transpose(1, 2), rows[:, block])
        for part, total in ((dk_run, d_keys), (dv_run, d_values)):
            # What a run sees lies before it in the row, so its own gradient was begun by then.
            total[:, run.first : run.first + run.count] = part[:, run.seen :]
            at = 0
            for first, length in run.before:
                total[:, first : first + length] += part[:, at : at + length]
                at += length
    for grouped, target in zip((d_rows.mul_(inner), d_keys, d_values), into, strict=True):
        _ungroup(grouped, target)
