"""`cpu_passes.py` in C++: what a decoder layer computes besides its products, each pass once through memory.

gelu is left to torch, and so are models of which some width does not fill whole vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpo_lora.engine import cpu_passes
from dpo_lora.engine.lanes import threads_are_bound
from dpo_lora.engine.lowrank import Projection
from dpo_lora.engine.native import attention, library

KERNEL = "native"
"""The attention's name."""

attend, attend_backward = attention.attend, attention.attend_backward
gathered, put_back = cpu_passes.gathered, cpu_passes.put_back


def serve(norms: list[Tensor], projections: list[list[Projection]], head_dims: list[int]) -> bool:
    """Whether there is a library here for layers of these norms, projections (the one to the gate is the fifth of a
    layer) and head sizes: all float32, all widths and halves of heads whole vectors.

    Not where threads are bound to fewer processors than they are (`OMP_PROC_BIND`), which new threads would inherit.
    """
    weights = [*norms, *(each.weight for of_layer in projections for each in of_layer)]
    if any(weight.dtype is not torch.float32 for weight in weights) or threads_are_bound():
        return False
    compiled = library.loaded()
    if compiled is None:
        return False
    widths = {*map(len, norms), *(len(of_layer[4].weight) for of_layer in projections), *(d // 2 for d in head_dims)}
    return all(width % compiled.vector_width() == 0 for width in widths)


def normalise(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """RMS norm: x [T, hidden] -> (x / rms * weight, 1 / rms [T, 1])."""
    x = x.contiguous()
    out, inverse = torch.empty_like(x), x.new_empty(len(x), 1)
    library.call("normalise", x, weight.contiguous(), out, inverse, *x.shape, float(epsilon))
    return out, inverse


def normalise_again(x: Tensor, inverse: Tensor, weight: Tensor) -> Tensor:
    """The norm's output from what its forward pass kept."""
    x = x.contiguous()
    out = torch.empty_like(x)
    library.call("normalise_again", x, inverse, weight.contiguous(), out, *x.shape)
    return out


def normalise_backward(grad: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, beside: Tensor | None) -> Tensor:
    """Gradient of `normalise` for its input, plus ``beside`` (the residual's), [T, hidden]."""
    grad, x = grad.contiguous(), x.contiguous()
    out = torch.empty_like(x)
    beside = None if beside is None else beside.contiguous()
    library.call("normalise_backward", grad, x, inverse, weight.contiguous(), beside, out, *x.shape)
    return out


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: float) -> tuple[Tensor, Tensor]:
    """Rotary embedding of q and k [T, heads, head_dim], in place; cos and sin [T, 1, head_dim / 2].

    sign -1 turns back (the gradient of sign 1).
    """
    assert len(q) == len(k) == len(cos) == len(sin) and 2 * cos.shape[-1] == q.shape[-1] == k.shape[-1]
    for x in (q, k):
        library.call("rotate", x, cos, sin, len(x), x.shape[1], cos.shape[2], float(sign))
    return q, k


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """silu(gate) * up, [T, intermediate]; with activation "gelu" its tanh form."""
    if activation != "silu":
        return cpu_passes.gated(gate, up, activation)
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    library.call("gated", gate, up, out, *gate.shape)
    return out


def gated_again(gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor | None]:
    """`gated` for the backward pass, and what `gated_backward` can use of it."""
    return (gated(gate, up, activation), None) if activation == "silu" else cpu_passes.gated_again(gate, up, activation)


def gated_backward(
    grad: Tensor, gate: Tensor, up: Tensor, slope: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """Gradients of `gated` for gate and up, the former made in place of ``grad``."""
    if slope is not None:
        return cpu_passes.gated_backward(grad, gate, up, slope, activation)
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    d_up = torch.empty_like(up)
    library.call("gated_backward", grad, gate, up, d_up, *grad.shape)
    return grad, d_up
