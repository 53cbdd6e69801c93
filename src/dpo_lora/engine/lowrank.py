"""Linear layers with LoRA, by hand: several that read the same input are computed together, in the buffers
given.

    y_i = x W_i^T + b_i + s_i (x A_i^T) B_i^T

Only W's product and four narrow ones remain; the A's are stacked to one product; the sums happen inside the
matrix products (beta = 1), so no intermediate [T, out] tensor is made. Weights and biases are frozen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from dpo_lora.engine.products import linear, outer


@dataclass(frozen=True)
class Projection:
    """One linear layer: weight [out, in], bias [out] or None; LoRA down [r, in], up [out, r] and scale, or
    None.

    trained: the format that the LoRA weights are trained in and their gradients come in.
    """

    weight: Tensor
    bias: Tensor | None
    down: Tensor | None = None
    up: Tensor | None = None
    scale: float = 1.0
    trained: torch.dtype | None = None


def read_projection(module: nn.Module, mixed: bool = False) -> Projection | None:
    """The module as a `Projection` in its present state, or None if it is anything but what is written
    above.

    mixed: the LoRA weights may be float32 where the layer's weight is not, as PEFT makes them.
    """
    if type(module) is nn.Linear:
        return _frozen(module)
    if type(module) is not LoraLinear or type(module.base_layer) is not nn.Linear or module.merged:
        return None
    base = _frozen(module.base_layer)
    if base is None or module.disable_adapters:
        return base
    names = [name for name in module.active_adapters if name in module.lora_A]
    if not names:
        return base
    if len(names) > 1:
        return None
    (name,) = names
    down, up, dropout = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
    plain = type(down) is nn.Linear and type(up) is nn.Linear and down.bias is None and up.bias is None
    dropped = isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0
    dropped |= not isinstance(dropout, nn.Dropout | nn.Identity)
    accepted = {base.weight.dtype, torch.float32} if mixed else {base.weight.dtype}
    same = down.weight.dtype == up.weight.dtype and up.weight.dtype in accepted
    if not plain or dropped or not same or name in module.lora_variant or watched(module, down, up, dropout):
        return None
    return Projection(base.weight, base.bias, down.weight, up.weight, float(module.scaling[name]), up.weight.dtype)


def _frozen(linear: nn.Linear) -> Projection | None:
    trained = linear.weight.requires_grad or (linear.bias is not None and linear.bias.requires_grad)
    return None if trained or watched(linear) else Projection(linear.weight, linear.bias)


def watched(*modules: nn.Module) -> bool:
    """Someone hooked or replaced the module's forward and would be bypassed."""
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks or "forward" in vars(m)
        for m in modules
    )


def stacked_down(group: tuple[Projection, ...]) -> Tensor | None:
    """The group's LoRA A's, [sum of ranks, in]; None without LoRA."""
    downs = [p.down for p in group if p.down is not None]
    if not downs:
        return None
    return downs[0] if len(downs) == 1 else torch.cat(downs)


def project_down(x: Tensor, group: tuple[Projection, ...]) -> Tensor | None:
    """x [T, in] -> x A^T [T, sum of ranks]; None without LoRA."""
    down = stacked_down(group)
    return None if down is None else linear(x, down)


def project(
    x: Tensor, group: tuple[Projection, ...], start: Tensor | None = None
) -> tuple[list[Tensor], Tensor | None]:
    """x [T, in] -> (y_i [T, out_i] of each, x A^T [T, sum of ranks]); `start` [T, out] is added (a single
    projection)."""
    low = project_down(x, group)
    outs: list[Tensor] = []
    rank_at = 0
    for p in group:
        y = linear(x, p.weight, start)
        if p.bias is not None:
            y.add_(p.bias)
        if p.down is not None:
            rank = len(p.down)
            y.addmm_(low[:, rank_at : rank_at + rank], p.up.t(), alpha=p.scale)
            rank_at += rank
        outs.append(y)
    return outs, low


def project_backward(
    grads: list[Tensor], x: Tensor, low: Tensor | None, group: tuple[Projection, ...], need_input: bool = True
) -> tuple[Tensor | None, list[Tensor | None]]:
    """grads [T, out_i] of each, x [T, in], low from `project` -> (dx [T, in], [dA_1, dB_1, dA_2, ...])."""
    down = stacked_down(group)
    low_grad = None if low is None else torch.empty_like(low)
    dx: Tensor | None = None
    ups: list[Tensor | None] = []
    rank_at = 0
    for grad, p in zip(grads, group, strict=True):
        if need_input:
            dx = linear(grad, p.weight.t(), dx)
        if p.down is None:
            ups.append(None)
            continue
        ranks = slice(rank_at, rank_at + len(p.down))
        torch.mul(linear(grad, p.up.t()), p.scale, out=low_grad[:, ranks])
        ups.append(outer(low[:, ranks], grad, p.trained).t().mul(p.scale))
        rank_at += len(p.down)
    if low is None:
        return dx, [None] * (2 * len(group))
    if dx is not None:
        dx.addmm_(low_grad, down)
    trained = next(p.trained for p in group if p.down is not None)
    down_grad = outer(low_grad, x, trained)
    weights: list[Tensor | None] = []
    rank_at = 0
    for p, up in zip(group, ups, strict=True):
        if p.down is None:
            weights += [None, None]
        else:
            weights += [down_grad[rank_at : rank_at + len(p.down)], up]
            rank_at += len(p.down)
    return dx, weights
