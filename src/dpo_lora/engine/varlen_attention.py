"""Pair attention on GPUs: torch's variable-length flash attention, and FlexAttention where flash does not
serve.

Flash aligns a causal mask at the bottom right when a segment has fewer queries than keys, which is exactly
what a run needs: its n queries against [what it sees | itself] of s + n keys, query i seeing keys 0 ... s + i. So
the queries stay where they are, cut in the plan's runs, and each run's keys are gathered behind what it sees.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpo_lora.engine.packing import PairPlan, sent
from dpo_lora.engine.runs import ScoreRule


class Segments(NamedTuple):
    """Cumulative lengths for the flash kernel and where each key comes from. S segments, K gathered keys.

    cu_q, cu_k: [S + 1] int32; max_q, max_k: longest segment; key_rows: [K] row position of each gathered key.
    Where each of the row's T positions went: own: [T] its key among the gathered ones in its own run; second: [T] the
    same in the other answer's run, for what a pair shares, else -1; opening: [runs, positions] for the opening's.
    """

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    key_rows: Tensor
    own: Tensor
    second: Tensor
    opening: Tensor

    def narrowing(self, window: int | None) -> int | None:
        """The window, where a run is longer."""
        return window if window is not None and self.max_k > window else None


def segments_of(plan: PairPlan) -> Segments:
    """The plan's flash segments, on the plan's device; made once a plan (all layers and both passes share
    them)."""
    if "segments" in plan.notes:
        known: Segments = plan.notes["segments"]
        return known
    queries = [run.count for run in plan.runs]
    keys = [run.seen + run.count for run in plan.runs]
    rows, own, second = [], np.empty(plan.tokens, np.int64), np.full(plan.tokens, -1)
    opening = []
    at = 0
    for run in plan.runs:
        for first, length in (*run.before, (run.first, run.count)):
            rows.append(np.arange(first, first + length))
            places = np.arange(at, at + length)
            if first == run.first:
                own[first : first + length] = places
            elif first < plan.opening:
                opening.append(places)
            else:
                second[first : first + length] = places
            at += length
    device = plan.input_ids.device

    def cumulative(lengths: list[int]) -> Tensor:
        return sent(torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32), device)

    opened = np.stack(opening) if opening else np.empty((0, plan.opening), np.int64)
    places_of = (sent(torch.from_numpy(each), device) for each in (np.concatenate(rows), own, second, opened))
    made = Segments(cumulative(queries), cumulative(keys), max(queries), max(keys), *places_of)
    plan.notes["segments"] = made
    return made


@cache
def available() -> bool:
    """Whether this torch has the public variable-length attention (2.10 and later)."""
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError:
        return False
    return True


@cache
def _accepted() -> frozenset[str]:
    """The arguments of this torch's `varlen_attn`."""
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def varlen_pairs(query: Tensor, key: Tensor, value: Tensor, plan: PairPlan, rule: ScoreRule) -> Tensor:
    """query [1, Hq, T, D], key/value [1, Hkv, T, D] in bf16 or fp16 on CUDA -> [1, T, Hq, D]."""
    if rule.softcap is not None:
        raise ValueError("torch's varlen attention has no logit soft-capping; use the kernel 'flex'")
    segments = segments_of(plan)
    if segments.narrowing(rule.window) is not None and "window_size" not in _accepted():
        return flex_pairs(query, key, value, plan, rule)
    return run_segments(query, key, value, segments, rule.scale, _flash, rule.window)


def run_segments(query, key, value, segments: Segments, scale: float | None, kernel, window: int | None) -> Tensor:
    """Gather keys and call kernel(q [T, Hq, D], k [K, Hkv, D], v, segments, scale, window) -> [T, Hq, D]."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = kernel(q, k[segments.key_rows], v[segments.key_rows], segments, scale, segments.narrowing(window))
    return out[None]


def _flash(q: Tensor, k: Tensor, v: Tensor, s: Segments, scale: float | None, window: int | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v, options = call_for(_accepted(), q, k, v, scale, window)
    return varlen_attn(q.contiguous(), k, v, s.cu_q, s.cu_k, s.max_q, s.max_k, **options)


def call_for(
    accepted: frozenset[str], q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None = None
) -> tuple[Tensor, Tensor, Tensor, dict[str, object]]:
    """Tensors and options for a `varlen_attn` that takes the `accepted` arguments (they grew with torch).

    Causality is `is_causal` in the first version and `window_size` (-1, 0) later, keys before and behind the query's
    own; without `enable_gqa` keys are repeated, without `scale` the queries carry it. The first has no window.
    """
    options: dict[str, object] = {"is_causal": True}
    if "window_size" in accepted:
        options = {"window_size": (-1 if window is None else window - 1, 0)}
    else:
        assert window is None, "flex computes what is narrowed"
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in accepted:
            options["enable_gqa"] = True
        else:
            group = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    if scale is not None:
        if "scale" in accepted:
            options["scale"] = scale
        else:
            q = q * (scale * q.shape[-1] ** 0.5)
    return q, k, v, options


def visible_pairs(plan: PairPlan) -> tuple[Tensor, Tensor]:
    """Per row position: number of its pair [T] (-1 in the opening), and its branch [T] (0 shared, 1 chosen, 2
    rejected)."""
    pair, branch = [-1] * plan.opening, [0] * plan.opening
    for number, segment in enumerate(plan.segments):
        pair += [number] * sum(segment)
        branch += [0] * segment[0] + [1] * segment[1] + [2] * segment[2]
    device = plan.input_ids.device
    return torch.tensor(pair, device=device), torch.tensor(branch, device=device)


def flex_pairs(query: Tensor, key: Tensor, value: Tensor, plan: PairPlan, rule: ScoreRule) -> Tensor:
    """query [1, Hq, T, D], key/value [1, Hkv, T, D] -> [1, T, Hq, D] by FlexAttention with a block mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    scale, softcap, window = rule
    window = window if any(run.narrowed(window) for run in plan.runs) else None
    note = f"block_mask {window}"
    if note not in plan.notes:
        pair, branch = visible_pairs(plan)
        places = plan.position_ids[0]
        limit = None if window is None else torch.tensor(window, device=query.device)

        def visible(b, h, q, k):
            own = (branch[k] == 0) | (branch[k] == branch[q])
            return ((pair[q] == pair[k]) | (pair[k] < 0)) & own & (k <= q)

        def visible_near(b, h, q, k):
            return visible(b, h, q, k) & (places[q] - places[k] < limit)

        seen, tokens = visible if window is None else visible_near, plan.tokens
        plan.notes[note] = create_block_mask(seen, None, None, tokens, tokens, device=str(query.device))

    def cap(score, b, h, q, k):
        return softcap * torch.tanh(score / softcap)

    # It is compiled again for rows of one block and of several, with and without an opening, for each format.
    with torch._dynamo.config.patch(recompile_limit=64):
        out = _flex(softcap is None)(
            query, key, value, score_mod=None if softcap is None else cap, block_mask=plan.notes[note],
            scale=scale, enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
    return out.transpose(1, 2)


@cache
def _flex(dynamic: bool):
    """FlexAttention compiled; dynamic: for every row's size at once, which torch 2.11 refuses for a capped score."""
    from torch.nn.attention.flex_attention import flex_attention

    # uncompiled FlexAttention materialises the scores; on CPU (tests) that is what is wanted, on CUDA never
    return torch.compile(flex_attention, dynamic=dynamic or None) if torch.cuda.is_available() else flex_attention
