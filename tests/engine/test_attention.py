"""Every kernel computes the masked attention of the pair layout, forward and backward; also the GPU key
gathering."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dpo_lora.engine import flash_attention
from dpo_lora.engine.attention import KERNELS
from dpo_lora.engine.packing import PairPlan, plan_pairs
from dpo_lora.engine.runs import ScoreRule
from dpo_lora.engine.varlen_attention import Segments, call_for, run_segments, segments_of, visible_pairs


def plan_of(*segments: tuple[int, int, int], opening: int = 0) -> PairPlan:
    """A plan with the given (shared, chosen, rejected) counts; token ids only make the branches differ."""
    rows = []
    for number, (shared, chosen, rejected) in enumerate(segments):
        prefix = [2] * opening + [100 + number] * shared
        start = len(prefix) + 1 if opening and chosen and rejected else len(prefix)
        rows.append(((prefix + [4] * (chosen + 1), start), (prefix + [5] * (rejected + 1), start)))
    plan = plan_pairs(rows)
    assert plan.segments == segments and plan.opening == opening
    return plan


PLANS = [((5, 3, 4),), ((0, 4, 2), (7, 1, 1)), ((1, 5, 0), (4, 0, 3)), ((150, 70, 90), (3, 130, 2))]
OPENED = [((5, 3, 4), (0, 4, 2)), ((2, 5, 0), (4, 0, 3), (1, 1, 1)), ((90, 70, 90), (3, 130, 2))]
ALL = [*((segments, 0) for segments in PLANS), *((segments, opening) for segments in OPENED for opening in (8, 120))]


def dense(q, k, v, plan, rule):
    """The definition: one [T, T] mask over the whole row."""
    scale, softcap, window = rule
    pair, branch = visible_pairs(plan)
    t = torch.arange(plan.tokens)
    own = (branch[None] == 0) | (branch[None] == branch[:, None])
    visible = ((pair[None] == pair[:, None]) | (pair[None] == -1)) & own & (t[None] <= t[:, None])
    if window is not None:
        visible &= plan.position_ids[0][:, None] - plan.position_ids[0][None] < window
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v).transpose(1, 2)


def emulated_flash(
    q: Tensor, k: Tensor, v: Tensor, s: Segments, scale: float | None, window: int | None = None
) -> Tensor:
    """What the flash kernel computes, in plain torch on any device."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    outputs = []
    for i in range(len(s.cu_q) - 1):
        qi = q[s.cu_q[i] : s.cu_q[i + 1]]
        ki, vi = (x[s.cu_k[i] : s.cu_k[i + 1]].repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", qi, ki) * scale
        queries, keys = scores.shape[1:]
        visible = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        if window is not None:
            visible = visible.triu(keys - queries - (window - 1))
        scores = scores.masked_fill(~visible, float("-inf"))
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), vi))
    return torch.cat(outputs)


def inputs(plan, heads=4, key_heads=2):
    torch.manual_seed(0)
    shapes = ((1, h, plan.tokens, 8) for h in (heads, key_heads, key_heads))
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize("segments, opening", ALL, ids=str)
@pytest.mark.parametrize("kernel, softcap", [("sdpa", None), ("block", None), ("block", 2.0)])
def test_forward_and_backward(kernel, softcap, segments, opening, window):
    plan = plan_of(*segments, opening=opening)
    results = []
    for run in (KERNELS[kernel], dense):
        tensors = inputs(plan)
        out = run(*tensors, plan, ScoreRule(0.3, softcap, window))
        torch.manual_seed(1)
        out.backward(torch.randn(out.shape, dtype=out.dtype))
        results.append([out, *(x.grad for x in tensors)])
    for ours, expected in zip(*results, strict=True):
        assert torch.allclose(ours, expected, atol=1e-12)


@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize("segments, opening", ALL, ids=str)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_layers_own_attention(dtype, tolerance, segments, opening, window):
    plan = plan_of(*segments, opening=opening)
    tensors = [x.detach().to(dtype).requires_grad_() for x in inputs(plan)]
    expected = dense(*tensors, plan, ScoreRule(0.3, window=window))[0]
    torch.manual_seed(1)
    upstream = torch.randn(expected.shape, dtype=dtype)
    expected.backward(upstream)
    q, k, v = (x.detach()[0].transpose(0, 1).contiguous() for x in tensors)
    out, levels = flash_attention.attend(q, k, v, plan, 0.3, window)
    assert torch.allclose(out, expected, atol=tolerance)
    grads = flash_attention.attend_backward(upstream, q, k, v, out, levels, plan, 0.3, window)
    for ours, right in zip(grads, tensors, strict=True):
        assert torch.allclose(ours, right.grad[0].transpose(0, 1), atol=tolerance)


@pytest.mark.parametrize(("size", "is_finite"), [(1e3, True), (1e5, False)], ids=str)
def test_scores_of_a_diverged_training_overflow_where_torchs_own_attention_does(size, is_finite):
    plan = plan_of((20, 30, 0))
    tensors = [x.detach().float() * by for x, by in zip(inputs(plan), (size, size, 1.0), strict=True)]
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = functional.scaled_dot_product_attention(*leaves, is_causal=True, scale=0.3, enable_gqa=True)
    out.backward(torch.ones_like(out))
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in tensors)
    out, levels = flash_attention.attend(q, k, v, plan, 0.3, None)
    grads = flash_attention.attend_backward(torch.ones_like(out), q, k, v, out, levels, plan, 0.3, None)
    for ours, stock in zip(grads, leaves, strict=True):
        assert bool(ours.isfinite().all()) is bool(stock.grad.isfinite().all()) is is_finite


@pytest.mark.parametrize("segments, opening", ALL, ids=str)
def test_flex_block_mask(segments, opening):
    plan = plan_of(*segments, opening=opening)
    tensors = [x.detach().float() for x in inputs(plan)]
    for softcap, window in ((None, None), (2.0, None), (None, 7), (2.0, 100)):
        rule = ScoreRule(0.3, softcap, window)
        out = KERNELS["flex"](*tensors, plan, rule)
        assert torch.allclose(out, dense(*tensors, plan, rule), atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize("segments, opening", ALL, ids=str)
def test_varlen_key_gathering(segments, opening, window):
    """The flash kernel itself needs CUDA; its arguments are checked by a plain emulation of what it
    computes."""
    plan = plan_of(*segments, opening=opening)
    results = []
    for gathered in (True, False):
        tensors = inputs(plan)
        if gathered:
            out = run_segments(*tensors, segments_of(plan), 0.3, emulated_flash, window)
        else:
            out = dense(*tensors, plan, ScoreRule(0.3, window=window))
        torch.manual_seed(1)
        out.backward(torch.randn(out.shape, dtype=out.dtype))
        results.append([out, *(x.grad for x in tensors)])
    for ours, expected in zip(*results, strict=True):
        assert torch.allclose(ours, expected, atol=1e-12)


def test_varlen_segments_match_torch_rules():
    s = segments_of(plan_of((5, 3, 4), (0, 4, 2)))
    assert s.cu_q.tolist() == [0, 8, 12, 16, 18]
    assert s.cu_k.tolist() == [0, 8, 17, 21, 23]
    assert s.cu_q.dtype == s.cu_k.dtype == torch.int32 and (s.max_q, s.max_k) == (8, 9)
    assert s.key_rows.tolist() == [*range(8), *range(5), *range(8, 12), *range(12, 16), 16, 17]


def test_what_all_pairs_begin_with_is_gathered_for_each():
    plan = plan_of((2, 3, 4), (0, 4, 2), opening=8)
    assert [tuple(run) for run in plan.runs] == [
        ((), 0, 8),
        (((0, 8),), 8, 5),
        (((0, 8), (8, 2)), 13, 4),
        (((0, 8),), 17, 4),
        (((0, 8),), 21, 2),
    ]
    s = segments_of(plan)
    assert s.cu_q.tolist() == [0, 8, 13, 17, 21, 23]
    assert s.key_rows.tolist() == [
        *range(8), *range(8), *range(8, 13), *range(8), 8, 9,
        *range(13, 17), *range(8), *range(17, 21), *range(8), 21, 22,
    ]  # fmt: skip


def test_older_varlen_signatures_compute_the_same():
    q, k, v = (x[0].transpose(0, 1) for x in inputs(plan_of((5, 3, 4))))
    q1, k1, v1, options = call_for(frozenset({"window_size", "scale", "enable_gqa"}), q, k, v, 0.3)
    assert options == {"window_size": (-1, 0), "scale": 0.3, "enable_gqa": True} and q1 is q and k1 is k
    assert call_for(frozenset({"window_size"}), q, k, v, 0.3, 7)[3] == {"window_size": (6, 0)}
    q2, k2, v2, options = call_for(frozenset({"is_causal"}), q, k, v, 0.3)
    assert options == {"is_causal": True}
    s = segments_of(plan_of((5, 3, 4)))
    runs = [
        emulated_flash(a, b[s.key_rows], c[s.key_rows], s, x) for a, b, c, x in ((q1, k1, v1, 0.3), (q2, k2, v2, None))
    ]
    assert torch.allclose(*runs, atol=1e-12)
