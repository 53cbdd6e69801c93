"""One decoder layer (Llama, Mistral, Qwen2, Qwen3, Gemma 3) as one autograd function over a packed row.

    x2 = x + o_proj(attention(rope(qkv(norm(x)))))        x3 = x2 + down(act(gate(n)) * up(n)),  n = norm(x2)

Qwen3 and Gemma 3 have a norm of each head of q and k before the rotation; Gemma 3 has norms of o_proj's and down's
output before they are added, and gelu for act.

Eager autograd walks about sixty passes over [T, hidden] and [T, intermediate] a layer, each through memory.
Written out, what is not a matrix product shrinks to a dozen passes, and only what backward needs is
kept: the layer's input, the rotated q, keys and values, the attention output, the middle residual, gate and up, and the
narrow LoRA products; and what goes into the additional norms.

Those passes are `gpu_passes`, which are compiled, or on a CPU `native.passes` in C++ or `cpu_passes`, which work in
place.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from dpo_lora.engine.lowrank import Group, project, project_backward, project_down
from dpo_lora.engine.packing import PairPlan


@dataclass(frozen=True)
class LayerParts:
    """The parts of one layer. norm weights [hidden], what the normed values are multiplied by.

    head_norms: the weights [head_dim] of the norms of q's and of k's heads, where the layer has them.
    output_norm, down_norm: of the norms behind these projections; None where there is none.
    activation: of the gate, a name that the passes know.
    kind: the layer's attention where kinds rotate by other frequencies; None where all layers rotate alike.
    window: how many tokens of its sequence a token sees, itself included; None: all before it.
    adapters: the trained LoRA weights, of every projection down and up; None where it has none. The groups hold them
        in the format that products are made in.
    passes: `native.passes`, `cpu_passes` or `gpu_passes`.
    """

    attention_norm: Tensor
    qkv: Group
    output: Group
    mlp_norm: Tensor
    gate_up: Group
    down: Group
    adapters: tuple[Tensor | None, ...]
    epsilon: float
    head_dim: int
    scale: float
    passes: ModuleType
    activation: str = "silu"
    head_norms: tuple[Tensor, ...] = ()
    output_norm: Tensor | None = None
    down_norm: Tensor | None = None
    kind: str | None = None
    window: int | None = None
    recompute: bool = False


@dataclass(frozen=True)
class Rotation:
    """cos and sin of the rotary embedding, [T, 1, head_dim / 2]."""

    cos: Tensor
    sin: Tensor


def run_layer(x: Tensor, parts: LayerParts, rotation: Rotation, plan: PairPlan, rows: Tensor | None = None) -> Tensor:
    """x [T, hidden] -> [T, hidden], or [R, hidden] of the rows [R] that are asked for (each once): the others are
    keys and values only and skip what follows the attention."""
    return _Layer.apply(x, parts, rotation, plan, rows, *parts.adapters)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, parts, rotation, plan, rows, *adapters):
        out, kept = _forward(x, parts, rotation, plan, rows)
        ctx.parts, ctx.rotation, ctx.plan, ctx.rows = parts, rotation, plan, rows
        ctx.save_for_backward(x, *(() if parts.recompute else kept))
        return out

    @staticmethod
    def backward(ctx, grad):
        x, *kept = ctx.saved_tensors
        if not kept:
            _, kept = _forward(x, ctx.parts, ctx.rotation, ctx.plan, ctx.rows, for_backward=True)
        dx, grads = _backward(grad, x, kept, ctx.parts, ctx.rotation, ctx.plan, ctx.rows, ctx.needs_input_grad[0])
        return (dx, None, None, None, None, *grads)


def _forward(x, parts: LayerParts, rotation: Rotation, plan: PairPlan, rows: Tensor | None, for_backward: bool = False):
    """The layer's output, and what the backward pass wants; for_backward: that alone."""
    passes = parts.passes
    normed, inverse1 = passes.normalise(x, parts.attention_norm, parts.epsilon)
    qkv, low_qkv = project(normed, parts.qkv)
    q, k, v = (y.view(len(x), -1, parts.head_dim) for y in qkv)
    q, k, heads = normalise_heads(q, k, parts)
    q, k = passes.rotate(q, k, rotation.cos, rotation.sin, 1.0)
    keys, values = passes.gathered(k, v, plan)
    del qkv, k, v
    attended, levels = passes.attend(q, keys, values, plan, parts.scale, parts.window)
    read = _taken(attended.view(len(x), -1), rows)
    middle, low_out, out_normed = _added(_taken(x, rows), read, parts.output, parts.output_norm, parts)
    normed, inverse2 = passes.normalise(middle, parts.mlp_norm, parts.epsilon)
    (gate, up), low_gate_up = project(normed, parts.gate_up)
    del normed
    active = passes.gated(gate, up, parts.activation)
    if for_backward and parts.down_norm is None:
        out, low_down, down_normed = None, project_down(active, parts.down), (None, None)
    else:
        out, low_down, down_normed = _added(middle, active, parts.down, parts.down_norm, parts)
    lows = (low_qkv, low_out, low_gate_up, low_down)
    normed_again = (*out_normed, *down_normed, *heads)
    return out, (inverse1, q, keys, values, attended, levels, middle, inverse2, gate, up, *lows, *normed_again)


def _backward(grad, x, kept, parts: LayerParts, rotation: Rotation, plan: PairPlan, rows, need_input: bool):
    passes = parts.passes
    inverse1, q, keys, values, attended, levels, middle, inverse2, gate, up, *rest = kept
    low_qkv, low_out, low_gate_up, low_down, *rest = rest
    out_normed, down_normed, heads = rest[:2], rest[2:4], rest[4:]
    # the MLP's inside is made again, it costs one pass and is as wide as gate
    active, slope = passes.gated_again(gate, up, parts.activation)
    d_down = _before_norm(grad, down_normed, parts.down_norm, parts)
    d_active, down_grads = project_backward([d_down], active, low_down, parts.down)
    del active, d_down
    d_gate, d_up = passes.gated_backward(d_active, gate, up, slope, parts.activation)
    del d_active, slope
    normed = passes.normalise_again(middle, inverse2, parts.mlp_norm)
    d_normed, gate_up_grads = project_backward([d_gate, d_up], normed, low_gate_up, parts.gate_up)
    del d_gate, d_up
    d_middle = passes.normalise_backward(d_normed, middle, inverse2, parts.mlp_norm, grad)

    read = _taken(attended.view(len(x), -1), rows)
    d_out = _before_norm(d_middle, out_normed, parts.output_norm, parts)
    d_attended, out_grads = project_backward([d_out], read, low_out, parts.output)
    del d_out
    d_attended, d_middle = (_given_back(each, rows, len(x)) for each in (d_attended, d_middle))
    d_attended = d_attended.view(attended.shape)
    d_q, d_keys, d_values = passes.attend_backward(
        d_attended, q, keys, values, attended, levels, plan, parts.scale, parts.window
    )
    d_k, d_v = passes.put_back(d_keys, d_values, plan)
    d_q, d_k = passes.rotate(d_q, d_k, rotation.cos, rotation.sin, -1.0)
    d_q, d_k = _heads_backward(d_q, d_k, heads, parts)
    normed = passes.normalise_again(x, inverse1, parts.attention_norm)
    d_qkv = [d.reshape(len(x), -1) for d in (d_q, d_k, d_v)]
    d_normed, qkv_grads = project_backward(d_qkv, normed, low_qkv, parts.qkv, need_input)
    dx = None
    if d_normed is not None:
        dx = passes.normalise_backward(d_normed, x, inverse1, parts.attention_norm, d_middle)
    return dx, [*qkv_grads, *out_grads, *gate_up_grads, *down_grads]


def _added(
    x: Tensor, inner: Tensor, group: Group, norm: Tensor | None, parts: LayerParts
) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, Tensor | None]]:
    """x [R, hidden] + norm(group(inner)); the narrow LoRA product; and what `_before_norm` wants."""
    if norm is None:
        [out], low = project(inner, group, start=x)
        return out, low, (None, None)
    [y], low = project(inner, group)
    normed, inverse = parts.passes.normalise(y, norm, parts.epsilon)
    return normed.add_(x), low, (y, inverse)


def _before_norm(grad: Tensor, normed: list[Tensor], norm: Tensor | None, parts: LayerParts) -> Tensor:
    """The gradient of what `_added` adds, at the group's output."""
    return grad if norm is None else parts.passes.normalise_backward(grad, *normed, norm, None)


def normalise_heads(q: Tensor, k: Tensor, parts: LayerParts) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """q and k [T, heads, head_dim] after the norm of each head, where the layer has one; and what `_heads_backward`
    wants."""
    if not parts.head_norms:
        return q, k, ()
    normed, kept = [], []
    for heads, weight in zip((q, k), parts.head_norms, strict=True):
        x = heads.reshape(-1, parts.head_dim)
        out, inverse = parts.passes.normalise(x, weight, parts.epsilon)
        normed.append(out.view(heads.shape))
        kept += [x, inverse]
    return normed[0], normed[1], tuple(kept)


def _heads_backward(d_q: Tensor, d_k: Tensor, kept: list[Tensor], parts: LayerParts) -> tuple[Tensor, Tensor]:
    """Gradients of `normalise_heads` for its q and k."""
    if not parts.head_norms:
        return d_q, d_k
    grads = [
        parts.passes.normalise_backward(grad.reshape(x.shape), x, inverse, weight, None).view(grad.shape)
        for grad, x, inverse, weight in zip((d_q, d_k), kept[::2], kept[1::2], parts.head_norms, strict=True)
    ]
    return grads[0], grads[1]


def _taken(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)


def _given_back(grad: Tensor, rows: Tensor | None, count: int) -> Tensor:
    """The gradient of `_taken` for all rows [count, ...]; what was taken, was taken once."""
    return grad if rows is None else grad.new_zeros(count, grad.shape[1]).index_copy_(0, rows, grad)
