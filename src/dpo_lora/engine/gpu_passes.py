"""What a decoder layer computes besides its matrix products, on a GPU in bfloat16.

Each pass is written in plain torch with float32 inside and compiled to one kernel where its tensors are on a GPU, so
every [T, hidden] and [T, intermediate] goes through memory once a pass; elsewhere (tests) it runs as written. One that
this machine cannot compile (no C compiler) runs as written too, slower, with a warning. Compiling a layer's parts
whole, products and all, takes twice as long at the start and was no faster (docs/performance.md). Attention is torch's
variable-length flash kernel over keys gathered by segment. `cpu_passes.py` has the same functions for a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from dpo_lora.engine.compiled import compiled
from dpo_lora.engine.packing import PairPlan
from dpo_lora.engine.varlen_attention import Segments, segments_of

KERNEL = "varlen"
"""The attention's name."""


def gathered(k: Tensor, v: Tensor, plan: PairPlan) -> tuple[Tensor, Tensor]:
    """k, v [T, Hkv, D] -> [K, Hkv, D], each run's keys behind what it sees."""
    rows = segments_of(plan).key_rows
    return k.index_select(0, rows), v.index_select(0, rows)


def put_back(d_keys: Tensor, d_values: Tensor, plan: PairPlan) -> tuple[Tensor, Tensor]:
    """Gradients of gathered keys and values [K, Hkv, D] summed where they were gathered from, [T, Hkv, D]."""
    segments = segments_of(plan)
    if len(segments.opening):  # every run sees it: summed in its own places first
        for part in (d_keys, d_values):
            own = part[: plan.opening]
            own.copy_(own.float() + part[segments.opening].float().sum(0))
    return _put_back(d_keys, d_values, segments.own, segments.second)


@compiled(0, vectors=True)
def _put_back(d_keys: Tensor, d_values: Tensor, own: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    twice = (second >= 0).unsqueeze(1).unsqueeze(1)
    other = second.clamp(0)

    def total(part: Tensor) -> Tensor:
        twofold = torch.where(twice, part.index_select(0, other).float(), 0.0)
        return (part.index_select(0, own).float() + twofold).to(part.dtype)

    return total(d_keys), total(d_values)


@compiled(0, few=True)
def normalise(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """RMS norm: x [T, hidden] -> (x / rms * weight, 1 / rms [T, 1] in float32)."""
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(1, keepdim=True) + epsilon)
    return (wide * inverse * weight.float()).to(x.dtype), inverse


@compiled(0, few=True)
def normalise_again(x: Tensor, inverse: Tensor, weight: Tensor) -> Tensor:
    """The norm's output from what its forward pass kept."""
    return (x.float() * inverse * weight.float()).to(x.dtype)


@compiled(0, few=True)
def normalise_backward(grad: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, beside: Tensor | None) -> Tensor:
    """Gradient of `normalise` for its input, plus ``beside`` (the residual's), [T, hidden]."""
    wide, scaled = x.float(), grad.float() * weight.float()
    along = (scaled * wide).mean(1, keepdim=True) * inverse**3
    out = scaled * inverse - wide * along
    return (out if beside is None else out + beside.float()).to(grad.dtype)


@compiled(0)
def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: float) -> tuple[Tensor, Tensor]:
    """Rotary embedding of q and k [T, heads, head_dim]; cos and sin [T, 1, head_dim / 2].

    sign -1 turns back (the gradient of sign 1).
    """
    c, s = cos.float(), sin.float() * sign

    def turned(x: Tensor) -> Tensor:
        a, b = x.float().chunk(2, -1)
        return torch.cat([a * c - b * s, b * c + a * s], -1).to(x.dtype)

    return turned(q), turned(k)


@compiled(0)
def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """silu(gate) * up, [T, intermediate]; with activation "gelu" its tanh form."""
    wide = gate.float()
    active = gelu(wide, approximate="tanh") if activation == "gelu" else silu(wide)
    return (active * up.float()).to(gate.dtype)


def gated_again(gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor | None]:
    """`gated` for the backward pass; nothing of it is kept for `gated_backward`."""
    return gated(gate, up, activation), None


def gated_backward(grad: Tensor, gate: Tensor, up: Tensor, _: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    """Gradients of `gated` for gate and up."""
    return (_gelu_backward if activation == "gelu" else _silu_backward)(grad, gate, up)


@compiled(0)
def _silu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    g, wide = grad.float(), gate.float()
    sigmoid = torch.sigmoid(wide)
    d_gate = g * up.float() * sigmoid * (1 + wide * (1 - sigmoid))
    return d_gate.to(grad.dtype), (g * wide * sigmoid).to(grad.dtype)


@compiled(0)
def _gelu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    g, wide = grad.float(), gate.float()
    d_gate = torch.ops.aten.gelu_backward(g * up.float(), wide, approximate="tanh")
    return d_gate.to(grad.dtype), (g * gelu(wide, approximate="tanh")).to(grad.dtype)


def attend(
    q: Tensor, keys: Tensor, values: Tensor, plan: PairPlan, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """q [T, Hq, D], keys/values [K, Hkv, D] -> ([T, Hq, D], logsumexp of the scores [Hq, T]).

    window: how many tokens of its sequence a query sees, itself included; None: all before it.
    """
    segments = segments_of(plan)
    return flash(q, keys, values, segments, scale, segments.narrowing(window))


def attend_backward(
    grad: Tensor, q: Tensor, keys: Tensor, values: Tensor, out: Tensor, levels: Tensor, plan: PairPlan, scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients for q, keys and values; out and levels from `attend`."""
    segments = segments_of(plan)
    return flash_backward(grad, q, keys, values, out, levels, segments, scale, segments.narrowing(window))


def flash(
    q: Tensor, keys: Tensor, values: Tensor, s: Segments, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """The operation behind torch's varlen_attn, which takes fewer key heads than query heads as they are."""
    out, levels, *_ = torch.ops.aten._flash_attention_forward(
        q, keys, values, s.cu_q, s.cu_k, s.max_q, s.max_k, 0.0, True, False, scale=scale, **_kept(window)
    )
    return out, levels


def _kept(window: int | None) -> dict[str, int]:
    """How many keys before its own a query sees; behind it, causality says none."""
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


def flash_backward(
    grad, q, keys, values, out, levels, s: Segments, scale: float, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for q [T, Hq, D], keys and values [K, Hkv, D]."""
    unused = torch.empty((), dtype=torch.uint64, device=q.device)  # the state of dropout, which there is none of
    return torch.ops.aten._flash_attention_backward(
        grad, q, keys, values, out, levels, s.cu_q, s.cu_k, s.max_q, s.max_k, 0.0, True, unused, unused,
        scale=scale, **_kept(window),
    )  # fmt: skip
