"""One pre-norm decoder layer (Llama, Mistral, Qwen2) as one autograd function over a packed row.

    x2 = x + o_proj(attention(rope(qkv(norm(x)))))        x3 = x2 + down(silu(gate(n)) * up(n)),  n = norm(x2)

Eager autograd walks about sixty passes over [T, hidden] and [T, intermediate] a layer, each through memory.
Written out, what is not a matrix product shrinks to a dozen passes, and only what backward needs is
kept: the layer's input, the rotated q and k, v, the attention output, the middle residual, gate and up, and the
narrow LoRA products.

What lies before and after the attention is a function of tensors alone: on a CPU they run as they are, with passes that
work in place; on a GPU each is compiled, with its passes, to few kernels and one call from Python.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_lora.engine.lowrank import Group, project, project_backward, project_down
from dpo_lora.engine.packing import PairPlan


class Before(NamedTuple):
    """What a layer's part before the attention is made of: its norm's weight [hidden], q, k and v."""

    norm: Tensor
    qkv: Group


class After(NamedTuple):
    """What a layer's part after the attention is made of; the norm's weight [hidden]."""

    output: Group
    norm: Tensor
    gate_up: Group
    down: Group


@dataclass(frozen=True)
class LayerParts:
    """The parts of one layer.

    adapters: the trained LoRA weights, of every projection down and up; None where it has none. The groups hold them
        in the format that products are made in.
    passes: `cpu_passes` or `gpu_passes`.
    """

    before: Before
    after: After
    adapters: tuple[Tensor | None, ...]
    epsilon: float
    head_dim: int
    scale: float
    passes: ModuleType
    recompute: bool = False


@dataclass(frozen=True)
class Rotation:
    """cos and sin of the rotary embedding, [T, 1, head_dim / 2]."""

    cos: Tensor
    sin: Tensor


def run_layer(x: Tensor, parts: LayerParts, rotation: Rotation, plan: PairPlan) -> Tensor:
    """x [T, hidden] -> [T, hidden]."""
    return _Layer.apply(x, parts, rotation, plan, *parts.adapters)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, parts, rotation, plan, *adapters):
        out, kept = _forward(x.detach(), parts, rotation, plan)
        ctx.parts, ctx.rotation, ctx.plan = parts, rotation, plan
        ctx.save_for_backward(x, *(() if parts.recompute else kept))
        return out

    @staticmethod
    def backward(ctx, grad):
        x, *kept = ctx.saved_tensors
        x = x.detach()
        if not kept:
            _, kept = _forward(x, ctx.parts, ctx.rotation, ctx.plan, again=True)
        dx, grads = _backward(grad, x, kept, ctx.parts, ctx.rotation, ctx.plan, ctx.needs_input_grad[0])
        return (dx, None, None, None, *grads)


def _forward(x: Tensor, parts: LayerParts, rotation: Rotation, plan: PairPlan, again: bool = False):
    """The layer's output, and what the backward pass wants; again: that alone."""
    passes = parts.passes
    places = passes.places(plan)
    inverse, q, keys, values, low = passes.run(
        before, x, rotation.cos, rotation.sin, *places, parts.before, parts.epsilon, parts.head_dim, passes
    )
    attended, levels = passes.attend(q, keys, values, plan, parts.scale)
    out, *kept = passes.run(after, attended, x, parts.after, parts.epsilon, again, passes)
    return out, (inverse, q, keys, values, low, attended, levels, *kept)


def _backward(grad, x, kept, parts: LayerParts, rotation: Rotation, plan: PairPlan, need_input: bool):
    passes = parts.passes
    inverse, q, keys, values, low, attended, levels, *inner = kept
    d_attended, d_middle, *after_grads = passes.run(after_backward, grad, attended, *inner, parts.after, passes)
    d_q, d_keys, d_values = passes.attend_backward(d_attended, q, keys, values, attended, levels, plan, parts.scale)
    dx, *before_grads = passes.run(
        before_backward, d_q, d_keys, d_values, x, d_middle, inverse, low, rotation.cos, rotation.sin,
        *passes.places(plan), parts.before, need_input, passes,
    )  # fmt: skip
    return dx, [*before_grads, *after_grads]


def before(
    x: Tensor, cos: Tensor, sin: Tensor, key_rows: Tensor, _own: Tensor, _again: Tensor, parts: Before,
    epsilon: float, head_dim: int, passes: ModuleType,
) -> tuple[Tensor, ...]:  # fmt: skip
    """x [T, hidden] -> (1 / rms [T, 1], q [T, Hq, D] and keys, values [K, Hkv, D] for the attention, LoRA's narrow
    product)."""
    normed, inverse = passes.normalise(x, parts.norm, epsilon)
    qkv, low = project(normed, parts.qkv)
    q, k, v = (y.view(len(x), -1, head_dim) for y in qkv)
    q, k = passes.rotate(q, k, cos, sin, 1.0)
    return inverse, q, *passes.gathered(k, v, key_rows), low


def before_backward(
    d_q: Tensor, d_keys: Tensor, d_values: Tensor, x: Tensor, d_middle: Tensor, inverse: Tensor, low: Tensor,
    cos: Tensor, sin: Tensor, _key_rows: Tensor, own: Tensor, again: Tensor, parts: Before, need_input: bool,
    passes: ModuleType,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients that reach q, keys, values and, past the attention, x -> (x's or None, the adapters' in order)."""
    d_k, d_v = passes.put_back(d_keys, d_values, own, again)
    d_q, d_k = passes.rotate(d_q, d_k, cos, sin, -1.0)
    normed = passes.normalise_again(x, inverse, parts.norm)
    flat = [d.reshape(len(x), -1) for d in (d_q, d_k, d_v)]
    d_normed, grads = project_backward(flat, normed, low, parts.qkv, need_input)
    dx = None
    if d_normed is not None:
        dx = passes.normalise_backward(d_normed, x, inverse, parts.norm, d_middle)
    return dx, *grads


def after(
    attended: Tensor, x: Tensor, parts: After, epsilon: float, again: bool, passes: ModuleType
) -> tuple[Tensor | None, ...]:
    """attended [T, Hq, D], x [T, hidden] -> (the layer's output, and what is kept); again: without the output."""
    attended = attended.reshape(len(x), -1)
    [middle], low_out = project(attended, parts.output, start=x)
    normed, inverse = passes.normalise(middle, parts.norm, epsilon)
    (gate, up), low_gate_up = project(normed, parts.gate_up)
    active = passes.gated(gate, up)
    if again:
        out, low_down = None, project_down(active, parts.down)
    else:
        [out], low_down = project(active, parts.down, start=middle)
    return out, low_out, middle, inverse, gate, up, low_gate_up, low_down


def after_backward(
    grad: Tensor, attended: Tensor, low_out: Tensor, middle: Tensor, inverse: Tensor, gate: Tensor, up: Tensor,
    low_gate_up: Tensor, low_down: Tensor, parts: After, passes: ModuleType,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """grad [T, hidden] -> (attended's gradient, the middle residual's, the adapters' in order)."""
    # the MLP's inside is made again, it costs one pass and is as wide as gate
    active, slope = passes.gated_again(gate, up)
    d_active, down_grads = project_backward([grad], active, low_down, parts.down)
    del active
    d_gate, d_up = passes.gated_backward(d_active, gate, up, slope)
    del d_active, slope
    normed = passes.normalise_again(middle, inverse, parts.norm)
    d_normed, gate_up_grads = project_backward([d_gate, d_up], normed, low_gate_up, parts.gate_up)
    del d_gate, d_up
    d_middle = passes.normalise_backward(d_normed, middle, inverse, parts.norm, grad)
    d_attended, out_grads = project_backward([d_middle], attended.reshape(len(grad), -1), low_out, parts.output)
    return d_attended.view(attended.shape), d_middle, *out_grads, *gate_up_grads, *down_grads
