"""Linear layers with LoRA, by hand: several that read the same input are computed together, in the buffers
given.

    y_i = x W_i^T + b_i + (x (s_i A_i)^T) B_i^T

Only W's product and narrow ones remain; the scaled A's are stacked to one product; the sums happen inside the
matrix products (beta = 1), so no intermediate [T, out] tensor is made. Weights and biases are frozen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from dpo_lora.engine.products import add_linear, linear, outer


@dataclass(frozen=True)
class Projection:
    """One linear layer: weight [out, in], bias [out] or None; LoRA down [r, in], up [out, r] and scale, or
    None."""

    weight: Tensor
    bias: Tensor | None
    down: Tensor | None = None
    up: Tensor | None = None
    scale: float = 1.0


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
    return Projection(base.weight, base.bias, down.weight, up.weight, float(module.scaling[name]))


def _frozen(linear: nn.Linear) -> Projection | None:
    trained = linear.weight.requires_grad or (linear.bias is not None and linear.bias.requires_grad)
    return None if trained or watched(linear) else Projection(linear.weight, linear.bias)


def watched(*modules: nn.Module) -> bool:
    """Someone hooked or replaced the module's forward and would be bypassed."""
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks or "forward" in vars(m)
        for m in modules
    )


class Group(NamedTuple):
    """Projections that read the same input, their LoRA weights as products want them.

    weights [out, in] and biases [out] of each; down: the LoRA A's, each times its scale, [sum of ranks, in], None
    without LoRA; ups: the B's [out, r], None for a projection without LoRA; scales; trained: the format that the LoRA
    weights are trained in and their gradients come in.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    down: Tensor | None
    ups: tuple[Tensor | None, ...]
    scales: tuple[float, ...]
    trained: torch.dtype | None

    def ranks(self) -> list[slice | None]:
        """Each projection's rows in `down`."""
        found: list[slice | None] = []
        at = 0
        for up in self.ups:
            rank = 0 if up is None else up.shape[1]
            found.append(slice(at, at + rank) if rank else None)
            at += rank
        return found


@torch.no_grad()
def prepared(groups: list[tuple[Projection, ...]]) -> list[Group]:
    """The groups with their LoRA weights as products want them: A's scaled and stacked, all in the weights' format.

    All are copied, scaled and cast together, in a few operations however many there are.
    """
    adapted = [p for group in groups for p in group if p.down is not None]
    if not adapted:
        return [_group(group, None, iter(())) for group in groups]
    dtype = adapted[0].weight.dtype
    downs = torch.cat([p.down.reshape(-1) for p in adapted])
    if len({p.scale for p in adapted}) == 1:
        downs.mul_(adapted[0].scale)
    else:
        for piece, p in zip(downs.split([p.down.numel() for p in adapted]), adapted, strict=True):
            piece.mul_(p.scale)
    downs = downs.to(dtype)
    ups = [p.up.detach() for p in adapted]
    if any(up.dtype != dtype for up in ups):
        flat = torch.cat([up.reshape(-1) for up in ups]).to(dtype)
        ups = [piece.view_as(up) for piece, up in zip(flat.split([up.numel() for up in ups]), ups, strict=True)]
    made, at, up = [], 0, iter(ups)
    for group in groups:
        ranks = sum(len(p.down) for p in group if p.down is not None)
        size = ranks * group[0].weight.shape[1]
        made.append(_group(group, downs[at : at + size].view(ranks, -1) if ranks else None, up))
        at += size
    return made


def _group(members: tuple[Projection, ...], down: Tensor | None, ups: Iterator[Tensor]) -> Group:
    return Group(
        weights=tuple(p.weight for p in members),
        biases=tuple(p.bias for p in members),
        down=down,
        ups=tuple(None if p.down is None else next(ups) for p in members),
        scales=tuple(p.scale for p in members),
        trained=next((p.up.dtype for p in members if p.up is not None), None),
    )


def project_down(x: Tensor, group: Group) -> Tensor | None:
    """x [T, in] -> s x A^T [T, sum of ranks]; None without LoRA."""
    return None if group.down is None else linear(x, group.down)


def project(x: Tensor, group: Group, start: Tensor | None = None) -> tuple[list[Tensor], Tensor | None]:
    """x [T, in] -> (y_i [T, out_i] of each, `project_down`'s); `start` [T, out] is added (a single projection)."""
    low = project_down(x, group)
    outs: list[Tensor] = []
    for weight, bias, up, ranks in zip(group.weights, group.biases, group.ups, group.ranks(), strict=True):
        y = linear(x, weight, start)
        if bias is not None:
            y.add_(bias)
        if ranks is not None:
            y.addmm_(low[:, ranks], up.t())
        outs.append(y)
    return outs, low


def project_backward(
    grads: list[Tensor], x: Tensor, low: Tensor | None, group: Group, need_input: bool = True
) -> tuple[Tensor | None, list[Tensor | None]]:
    """grads [T, out_i] of each, x [T, in], low from `project` -> (dx [T, in], [dA_1, dB_1, dA_2, ...])."""
    dx: Tensor | None = None
    if need_input:
        for grad, weight in zip(grads, group.weights, strict=True):
            dx = linear(grad, weight.t()) if dx is None else add_linear(dx, grad, weight.t())
    if low is None:
        return dx, [None] * (2 * len(grads))
    adapted = [(grad, up) for grad, up in zip(grads, group.ups, strict=True) if up is not None]
    parts = [linear(grad, up.t()) for grad, up in adapted]
    low_grad = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    if dx is not None:
        dx.addmm_(low_grad, group.down)
    downs = outer(low_grad, x, group.trained)
    weights: list[Tensor | None] = []
    for grad, scale, ranks in zip(grads, group.scales, group.ranks(), strict=True):
        if ranks is None:
            weights += [None, None]
        else:
            weights += [downs[ranks] * scale, outer(grad, low[:, ranks], group.trained)]
    return dx, weights
