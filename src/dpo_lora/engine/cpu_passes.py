"""What a decoder layer computes besides its matrix products, on a CPU: in place wherever a tensor is not needed again.

`gpu_passes.py` has the same functions for a GPU, `native/passes.py` in C++; `layer.py` puts one of them between the
products. Here the attention reads keys and values where they lie, so that nothing is gathered and put back.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from dpo_lora.engine.flash_attention import attend, attend_backward
from dpo_lora.engine.packing import PairPlan

__all__ = [
    "KERNEL",
    "attend",
    "attend_backward",
    "gated",
    "gated_again",
    "gated_backward",
    "gathered",
    "normalise",
    "normalise_again",
    "normalise_backward",
    "put_back",
    "rotate",
]


KERNEL = "flash"
"""The attention's name."""


def gathered(k: Tensor, v: Tensor, plan: PairPlan) -> tuple[Tensor, Tensor]:
    """Keys and values as the attention takes them: where they lie."""
    return k, v


def put_back(d_k: Tensor, d_v: Tensor, plan: PairPlan) -> tuple[Tensor, Tensor]:
    """The inverse of `gathered`, for gradients."""
    return d_k, d_v


def normalise(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """RMS norm: x [T, hidden] -> (x / rms * weight, 1 / rms [T, 1])."""
    inverse = torch.linalg.vector_norm(x, dim=1, keepdim=True).square_().div_(x.shape[1]).add_(epsilon).rsqrt_()
    return normalise_again(x, inverse, weight), inverse


def normalise_again(x: Tensor, inverse: Tensor, weight: Tensor) -> Tensor:
    """The norm's output from what its forward pass kept."""
    return (x * inverse).mul_(weight)


def normalise_backward(grad: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, beside: Tensor | None) -> Tensor:
    """Gradient of `normalise` for its input, plus ``beside`` (the residual's), [T, hidden]."""
    grad = grad * weight
    along = torch.linalg.vecdot(grad, x)[:, None] * inverse**3 / x.shape[1]
    grad.mul_(inverse).addcmul_(x, along, value=-1)
    return grad if beside is None else grad.add_(beside)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: float) -> tuple[Tensor, Tensor]:
    """Rotary embedding of q and k [T, heads, head_dim]; cos and sin [T, 1, head_dim / 2].

    sign -1 turns back (the gradient of sign 1).
    """
    for x in (q, k):
        a, b = x.chunk(2, -1)
        kept = a * sin
        a.mul_(cos).addcmul_(b, sin, value=-sign)
        b.mul_(cos).add_(kept, alpha=sign)
    return q, k


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """silu(gate) * up, [T, intermediate]; with activation "gelu" its tanh form."""
    return _activated(gate, activation).mul_(up)


def gated_again(gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor | None]:
    """`gated` for the backward pass, and what `gated_backward` can use of it."""
    slope = _activated(gate, activation)
    return slope * up, slope


def gated_backward(grad: Tensor, gate: Tensor, up: Tensor, slope: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Gradients of `gated` for gate and up, made in place of ``grad`` and ``slope``."""
    d_up = slope.mul_(grad)
    grad.mul_(up)
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad, gate, approximate="tanh"), d_up
    return torch.ops.aten.silu_backward(grad, gate), d_up


def _activated(gate: Tensor, activation: str) -> Tensor:
    return gelu(gate, approximate="tanh") if activation == "gelu" else silu(gate)
