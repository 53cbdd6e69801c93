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


@compiled(0, 1, vectors=True)
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
    z = logits.float()
    if scale != 1.0:
        z = z * scale
    if softcap is not None:
        z = torch.tanh(z / softcap) * softcap
    column, label = torch.arange(z.shape[1], device=z.device), local[:, None]
    label_logit = sums.label_logit + torch.where(column == label, z, 0.0).sum(1)
    before_label = torch.maximum(sums.before_label, torch.where(column < label, z, float("-inf")).amax(1))
    peak = torch.maximum(sums.peak, z.amax(1))
    moved = torch.where(torch.isinf(sums.peak), 0.0, sums.peak - peak)  # before the first tile there is nothing to move
    rescale = torch.exp(sums.peak - peak)
    shifted = z - peak[:, None]
    e = torch.exp(shifted)
    folded = Sums(
        peak,
        sums.total * rescale + e.sum(1),
        label_logit,
        before_label,
        sums.logit_sum + z.sum(1),
        (sums.entropy_sum + moved * sums.total) * rescale + (e * shifted).sum(1),
        sums.square_sum * rescale**2 + (e * e).sum(1),
    )
    if not gradient:
        return folded, None, rescale
    weights = e if softcap is None else e * (1 - (z / softcap) ** 2)
    return folded, weights.to(logits.dtype), rescale
