"""One pre-norm decoder layer (Llama, Mistral, Qwen2, Qwen3) as one autograd function over a packed row.

    x2 = x + o_proj(attention(rope(qkv(norm(x)))))        x3 = x2 + down(silu(gate(n)) * up(n)),  n = norm(x2)

Eager autograd walks about sixty passes over [T, hidden] and [T, intermediate] a layer, each through memory.
Written out, what is not a matrix product shrinks to a dozen passes in place, and only what backward needs is
kept: the layer's input, the rotated q, k, v, the attention output, the middle residual, gate and up, and the
narrow LoRA products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_lora.engine.flash_attention import attend, attend_backward
from dpo_lora.engine.lowrank import Projection, project, project_backward
from dpo_lora.engine.packing import PairPlan


@dataclass(frozen=True)
class LayerParts:
    """The parts of one layer. norm weights [hidden]; qk norms [head_dim] (Qwen3) or None."""

    attention_norm: Tensor
    mlp_norm: Tensor
    epsilon: float
    qkv: tuple[Projection, Projection, Projection]
    output: Projection
    gate_up: tuple[Projection, Projection]
    down: Projection
    head_dim: int
    scale: float
    recompute: bool = False

    def adapters(self) -> list[Tensor | None]:
        """LoRA weights in the order the autograd function takes and returns them."""
        projections = (*self.qkv, self.output, *self.gate_up, self.down)
        return [w for p in projections for w in (p.down, p.up)]


@dataclass(frozen=True)
class Rotation:
    """cos and sin of the rotary embedding, [T, 1, head_dim / 2]."""

    cos: Tensor
    sin: Tensor

    def turn(self, x: Tensor, sign: float) -> None:
        """Rotate x [T, heads, head_dim] in place; sign -1 turns back (the gradient of sign 1)."""
        a, b = x.chunk(2, -1)
        kept = a * self.sin
        a.mul_(self.cos).addcmul_(b, self.sin, value=-sign)
        b.mul_(self.cos).add_(kept, alpha=sign)


def run_layer(x: Tensor, parts: LayerParts, rotation: Rotation, plan: PairPlan) -> Tensor:
    """x [T, hidden] -> [T, hidden]."""
    return _Layer.apply(x, parts, rotation, plan, *parts.adapters())


def normalise(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """RMS norm: x [T, hidden] -> (x / rms * weight, 1 / rms [T, 1])."""
    inverse = torch.linalg.vecdot(x, x).div_(x.shape[1]).add_(epsilon).rsqrt_()[:, None]
    return (x * inverse).mul_(weight), inverse


def normalise_backward(grad: Tensor, x: Tensor, inverse: Tensor, weight: Tensor) -> Tensor:
    """Gradient of `normalise` for its input, made in place of `grad` [T, hidden]."""
    grad.mul_(weight)
    along = torch.linalg.vecdot(grad, x)[:, None] * inverse**3 / x.shape[1]
    return grad.mul_(inverse).addcmul_(x, along, value=-1)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, parts, rotation, plan, *adapters):
        out, kept = _forward(x, parts, rotation, plan)
        ctx.parts, ctx.rotation, ctx.plan = parts, rotation, plan
        ctx.save_for_backward(x, *(() if parts.recompute else kept))
        return out

    @staticmethod
    def backward(ctx, grad):
        x, *kept = ctx.saved_tensors
        if not kept:
            _, kept = _forward(x, ctx.parts, ctx.rotation, ctx.plan)
        dx, grads = _backward(grad, x, kept, ctx.parts, ctx.rotation, ctx.plan, ctx.needs_input_grad[0])
        return (dx, None, None, None, *grads)


def _heads(flat: list[Tensor], parts: LayerParts) -> list[Tensor]:
    """[T, heads * head_dim] each, as [T, heads, head_dim] views."""
    return [x.view(len(x), -1, parts.head_dim) for x in flat]


def _forward(x: Tensor, parts: LayerParts, rotation: Rotation, plan: PairPlan):
    normed, inverse1 = normalise(x, parts.attention_norm, parts.epsilon)
    qkv, low_qkv = project(normed, parts.qkv)
    q, k, v = _heads(qkv, parts)
    for rotated in (q, k):
        rotation.turn(rotated, 1.0)
    attended, levels = attend(q, k, v, plan, parts.scale)
    attended = attended.view(len(x), -1)
    [middle], low_out = project(attended, (parts.output,), start=x)
    normed, inverse2 = normalise(middle, parts.mlp_norm, parts.epsilon)
    (gate, up), low_gate_up = project(normed, parts.gate_up)
    active = torch.nn.functional.silu(gate).mul_(up)
    [out], low_down = project(active, (parts.down,), start=middle)
    empty = x.new_empty(0)
    lows = (empty if low is None else low for low in (low_qkv, low_out, low_gate_up, low_down))
    return out, (inverse1, *qkv, attended, levels, middle, inverse2, gate, up, *lows)


def _backward(grad, x, kept, parts: LayerParts, rotation: Rotation, plan: PairPlan, need_input: bool):
    inverse1, *qkv, attended, levels, middle, inverse2, gate, up, low_qkv, low_out, low_gate_up, low_down = kept
    low_qkv, low_out, low_gate_up, low_down = (
        low if low.numel() else None for low in (low_qkv, low_out, low_gate_up, low_down)
    )
    # the MLP: active = silu(gate) * up is made again, it costs one pass and is as wide as gate
    slope = torch.nn.functional.silu(gate)
    d_active, down_grads = project_backward([grad], slope * up, low_down, (parts.down,))
    d_up = slope.mul_(d_active)
    d_gate = torch.ops.aten.silu_backward(d_active.mul_(up), gate)
    del d_active, slope
    normed = (middle * inverse2).mul_(parts.mlp_norm)
    d_normed, gate_up_grads = project_backward([d_gate, d_up], normed, low_gate_up, parts.gate_up)
    del d_gate, d_up
    d_middle = normalise_backward(d_normed, middle, inverse2, parts.mlp_norm).add_(grad)

    d_attended, out_grads = project_backward([d_middle], attended, low_out, (parts.output,))
    d_qkv = [torch.empty_like(each) for each in qkv]
    q, k, v = _heads(qkv, parts)
    into = _heads(d_qkv, parts)
    attend_backward(d_attended.view(q.shape), q, k, v, attended.view(q.shape), levels, plan, parts.scale, into)
    for rotated in into[:2]:
        rotation.turn(rotated, -1.0)
    normed = (x * inverse1).mul_(parts.attention_norm)
    d_normed, qkv_grads = project_backward(d_qkv, normed, low_qkv, parts.qkv, need_input)
    dx = None
    if d_normed is not None:
        dx = normalise_backward(d_normed, x, inverse1, parts.attention_norm).add_(d_middle)
    return dx, [*qkv_grads, *out_grads, *gate_up_grads, *down_grads]
