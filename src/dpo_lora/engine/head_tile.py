"""One tile of the vocabulary folded into the LM head's running sums, written to be compiled for a GPU.

The logits of a tile are read twice and their exponentials written once; nothing else of their size exists. On a CPU
`head.py` works in place instead, and looks only where something is to be seen.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dpo_lora.engine.compiled import compiled


class Sums(NamedTuple):
    """Running sums over the tiles so far, [N] float32 each: the best logit, sum e^(z - peak), the label's logit, the
    best logit of a token with a smaller id, sum z, sum e^(z - peak) (z - peak), sum e^(2 (z - peak))."""

    peak: Tensor
    total: Tensor
    label_logit: Tensor
    before_label: Tensor
    logit_sum: Tensor
    entropy_sum: Tensor
    square_sum: Tensor


def fold_tile(
    logits: Tensor, local: Tensor, sums: Sums, scale: float, softcap: float | None, gradient: bool
) -> tuple[Sums, Tensor | None, Tensor]:
    """Fold a tile in.

    Args:
        logits: [N, W], as the head's product left them.
        local: [N], the label's id less the tile's first.
        gradient: whether the weights of the tile's rows in the gradient are wanted.

    Returns:
        The new sums, e^(z - peak) [N, W] in the logits' format (times the slope of the soft cap), and what earlier
        such weights are to be multiplied by [N].
    """
    tile_peak, *read = _read(logits, local, scale, softcap)
    peak = torch.maximum(sums.peak, tile_peak)
    weights, *weighed = _weigh(logits, peak, scale, softcap, gradient)
    *folded, rescale = _merge(*sums, peak, *read, *weighed)
    return Sums(*folded), weights, rescale


def _capped(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    z = logits.float()
    if scale != 1.0:
        z = z * scale
    return z if softcap is None else torch.tanh(z / softcap) * softcap


# Three kernels and not one: with the sums' own arithmetic between its reductions Triton 3.6 does not compile it.
@compiled(0, 1, vectors=True)
def _read(logits: Tensor, local: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, ...]:
    z = _capped(logits, scale, softcap)
    column, label = torch.arange(z.shape[1], device=z.device), local.unsqueeze(1)
    label_logit = torch.where(column == label, z, 0.0).sum(1)
    before_label = torch.where(column < label, z, float("-inf")).amax(1)
    return z.amax(1), label_logit, before_label, z.sum(1)


@compiled(0, 1, vectors=True)
def _weigh(
    logits: Tensor, peak: Tensor, scale: float, softcap: float | None, gradient: bool
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    z = _capped(logits, scale, softcap)
    shifted = z - peak.unsqueeze(1)
    e = torch.exp(shifted)
    weights = None
    if gradient:
        weights = (e if softcap is None else e * (1 - (z / softcap) ** 2)).to(logits.dtype)
    return weights, e.sum(1), (e * shifted).sum(1), (e * e).sum(1)


@compiled(0, vectors=True)
def _merge(
    earlier_peak: Tensor, totals: Tensor, labels: Tensor, befores: Tensor, sums: Tensor, entropies: Tensor,
    squares: Tensor, peak: Tensor, label: Tensor, before: Tensor, logits: Tensor, total: Tensor, entropy: Tensor,
    square: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    moved = torch.where(torch.isinf(earlier_peak), 0.0, earlier_peak - peak)  # at the first tile nothing is moved
    rescale = torch.exp(earlier_peak - peak)
    return (
        peak,
        totals * rescale + total,
        labels + label,
        torch.maximum(befores, before),
        sums + logits,
        (entropies + moved * totals) * rescale + entropy,
        squares * rescale**2 + square,
        rescale,
    )
