"""The LM head where only log-probabilities of given labels are wanted: two matrix products a step, no logits
kept.

The gradient that reaches a per-token log-probability is one scalar a token, so everything else of the
backward pass can be done while the logits are still there:

    logp = z_y - logsumexp(z),   z = softcap(scale * (h W^T + b))
    d logp / d h = scale * sum_j ([j = y] - p_j) * (1 - (z_j / cap)^2) * W_j

The forward pass folds the vocabulary tile by tile (online logsumexp, as flash attention does for keys), and
accumulates sum_j exp(z_j) W_j beside it; backward is a multiplication. Stock: forward product, the same
product again, backward product, at every position on CPU. The frozen head of a LoRA run needs no weight
gradient; where the head is trained, TRL's own function is called.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpo_lora.engine.head_tile import Sums, fold_tile
from dpo_lora.engine.products import add_linear, linear

STATISTICS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
# 8 MiB of float32 stay in a CPU's last-level cache; on a GPU 256 MiB of bfloat16, half of them logits
_TILE_ELEMENTS = {"cpu": 2**21, "cuda": 2**26}
# Vocabulary ids a tile has at least: narrower products are slow. Where tokens are many, it outgrows the size above.
_LEAST_WIDTH = 1024
# Tiles are whole multiples of it wide: a GPU's products want rows that begin at multiples of 16 bytes.
_TILE_STEP = 64


@dataclass(frozen=True)
class HeadRule:
    """How a model turns hidden states into logits, besides the weight and bias of its head."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, text_config: object) -> HeadRule:
        """Read from a text config by the names TRL's `add_fused_lm_head` knows (trl/trainer/utils.py,
        1.16)."""
        scale = None
        for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
            if scale is None:
                scale = getattr(text_config, name, None)
        scaling = getattr(text_config, "logits_scaling", None)
        if scale is None and scaling is not None:
            scale = scaling if getattr(text_config, "model_type", "") == "hyperclovax" else 1 / scaling
        softcap = getattr(text_config, "final_logit_softcapping", None)
        return cls(1.0 if scale is None else scale, softcap)


def token_scores(
    hidden: Tensor, head: nn.Module, labels: Tensor, rule: HeadRule, statistics: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """Log-probability of each label, and the asked statistics without gradient, as TRL defines them.

    hidden [N, H], labels [N]; returns {"log_probs": [N], ...} in float32 ("is_top1" is bool).
    """
    assert set(statistics) <= set(STATISTICS), statistics
    weight, bias = head.weight, getattr(head, "bias", None)
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return _trl_scores(hidden, weight, bias, labels, rule, statistics)
    out = _LabelLogProbs.apply(hidden, weight, bias, labels, rule, statistics)
    return dict(zip(("log_probs", *statistics), out, strict=True))


def _trl_scores(hidden, weight, bias, labels, rule, statistics) -> dict[str, Tensor]:
    from trl.kernels import ChunkedLogProbFunction

    values = ChunkedLogProbFunction.apply(
        hidden, weight, bias, labels, 1.0, 32768, rule.softcap, rule.scale, ("log_probs", *statistics)
    )
    named = dict(zip(("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"), values, strict=True))
    return {k: v for k, v in named.items() if v is not None}


class _LabelLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, rule, statistics):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        fold = _Fold(hidden.to(dtype), labels, rule, statistics, ctx.needs_input_grad[0], bias is not None)
        vocabulary = weight.shape[0]
        budget = _TILE_ELEMENTS.get(device, _TILE_ELEMENTS["cpu"])
        width = min(vocabulary, max(_LEAST_WIDTH, budget // max(len(labels), 1) // _TILE_STEP * _TILE_STEP))
        for start in range(0, vocabulary, width):
            stop = min(start + width, vocabulary)
            fold.add(weight[start:stop].to(dtype), None if bias is None else bias[start:stop].to(dtype), start)
        ctx.save_for_backward(fold.hidden_gradient(weight))
        ctx.dtype = hidden.dtype
        results = (fold.log_probs(), *(fold.statistic(name, vocabulary) for name in statistics))
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    def backward(ctx, grad_log_probs, *_):
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_log_probs[:, None]).to(ctx.dtype), None, None, None, None, None


class _Fold:
    """Running sums over vocabulary tiles for N tokens; everything [N] and float32 except `weighted` [N,
    H]."""

    def __init__(
        self, hidden: Tensor, labels: Tensor, rule: HeadRule, statistics: tuple, gradient: bool, bias: bool
    ) -> None:
        count = len(labels)

        def start(value: float = 0.0) -> Tensor:
            return torch.full((count,), value, device=hidden.device, dtype=torch.float32)

        self.hidden, self.labels, self.rule, self.wanted = hidden, labels, rule, set(statistics)
        self.peak, self.total, self.label_logit = start(float("-inf")), start(), start()
        self.before_label = start(float("-inf"))  # best logit among tokens with a smaller id than the label
        self.logit_sum, self.entropy_sum, self.square_sum = start(), start(), start()
        self.weighted = None
        if gradient:
            self.weighted = torch.zeros(hidden.shape, device=hidden.device, dtype=torch.float32)
        # Where logits are linear in h, sum_j p_j z_j = scale * h . sum_j p_j W_j, which the gradient has anyway, and
        # the entropy takes no pass over the tiles. On a GPU it takes none of its own, and these sums are rounded.
        by_gradient = gradient and not bias and rule.softcap is None and hidden.dtype is torch.float32
        self.sums_entropy = "entropy" in self.wanted and (hidden.is_cuda or not by_gradient)
        self.mean_logit: Tensor | None = None  # sum_j p_j z_j, where it comes from the gradient

    def add(self, weight: Tensor, bias: Tensor | None, first: int) -> None:
        """Fold the tile of vocabulary ids first ... first + len(weight) - 1; weight [V_tile, H]."""
        if weight.is_cuda:
            self._add_compiled(weight, bias, first)
            return
        width = len(weight)
        z = self._logits(weight, bias)
        here = (self.labels >= first) & (self.labels < first + width)
        local = (self.labels - first).clamp(0, width - 1)
        self.label_logit = torch.where(here, z.gather(1, local[:, None])[:, 0], self.label_logit)
        if "mean_logits" in self.wanted:
            self.logit_sum += z.sum(1)
        tile_peak = z.amax(1)
        if "is_top1" in self.wanted:
            self._note_earlier(z, tile_peak, here, first)
        peak = torch.maximum(self.peak, tile_peak)
        rescale = torch.exp(self.peak - peak)
        keep = None
        if self.rule.softcap is not None:
            keep = 1 - (z / self.rule.softcap) ** 2
        z.sub_(peak[:, None])
        e = z.exp() if self.sums_entropy else z.exp_()
        if self.sums_entropy:
            # sum_j e^(z_j - peak) (z_j - peak); the clamp is for the first tile, whose earlier peak is -inf
            moved = self.entropy_sum + (self.peak - peak).clamp_min(-1e30) * self.total
            self.entropy_sum = moved * rescale + torch.linalg.vecdot(e, z)
        self.total = self.total * rescale + e.sum(1)
        if "log_sum_sq_probs" in self.wanted:
            self.square_sum = self.square_sum * rescale**2 + torch.linalg.vecdot(e, e)
        if self.weighted is not None:
            if keep is not None:
                e.mul_(keep)
            self.weighted.mul_(rescale[:, None])
            self.weighted = _accumulate(self.weighted, e.to(weight.dtype), weight)
        self.peak = peak

    def _add_compiled(self, weight: Tensor, bias: Tensor | None, first: int) -> None:
        logits = linear(self.hidden, weight)
        if bias is not None:
            logits.add_(bias)
        sums = Sums(*(getattr(self, name) for name in Sums._fields))
        local, rule = self.labels - first, self.rule
        sums, e, rescale = fold_tile(logits, local, sums, rule.scale, rule.softcap, self.weighted is not None)
        for name, value in sums._asdict().items():
            setattr(self, name, value)
        if e is not None:
            self.weighted = _accumulate(self.weighted.mul_(rescale[:, None]), e, weight)

    def _logits(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        tile = linear(self.hidden, weight)
        if bias is not None:
            tile.add_(bias)
        z = tile.float()  # the tile itself where it is float32
        if self.rule.scale != 1.0:
            z.mul_(self.rule.scale)
        if self.rule.softcap is not None:
            z.div_(self.rule.softcap).tanh_().mul_(self.rule.softcap)
        return z

    def _note_earlier(self, z: Tensor, tile_peak: Tensor, here: Tensor, first: int) -> None:
        # argmax returns the first maximum: a label that ties with a smaller id is not the top choice. Only
        # the tile that holds the label needs a look at single columns.
        earlier = torch.where(self.labels >= first + z.shape[1], tile_peak, float("-inf"))
        rows = here.nonzero()[:, 0]
        if len(rows):
            columns = torch.arange(z.shape[1], device=z.device)
            before = columns < (self.labels[rows] - first)[:, None]
            earlier[rows] = z[rows].masked_fill(~before, float("-inf")).amax(1)
        self.before_label = torch.maximum(self.before_label, earlier)

    def log_probs(self) -> Tensor:
        return self.label_logit - self.peak - self.total.log()

    def statistic(self, name: str, vocabulary: int) -> Tensor:
        if name == "entropy":
            if self.mean_logit is not None:
                return self.peak + self.total.log() - self.mean_logit
            return self.total.log() - self.entropy_sum / self.total
        if name == "log_sum_sq_probs":
            return self.square_sum.log() - 2 * self.total.log()
        if name == "mean_logits":
            return self.logit_sum / vocabulary
        return (self.label_logit >= self.peak) & (self.label_logit > self.before_label)

    def hidden_gradient(self, weight: Tensor) -> Tensor | None:
        """d log_prob / d hidden, [N, H] float32."""
        if self.weighted is None:
            return None
        gradient = self.weighted.div_(-self.total[:, None])
        if "entropy" in self.wanted and not self.sums_entropy:
            self.mean_logit = torch.linalg.vecdot(self.hidden, gradient).mul_(-self.rule.scale)
        label_rows = weight[self.labels].to(self.hidden.dtype).float()
        if self.rule.softcap is not None:
            label_rows = label_rows * (1 - (self.label_logit / self.rule.softcap) ** 2)[:, None]
        gradient += label_rows
        return gradient.mul_(self.rule.scale) if self.rule.scale != 1.0 else gradient


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total + left @ right, in float32: rounding each tile's product to bfloat16 first biases training."""
    if left.dtype == torch.float32:
        return add_linear(total, left, right.t())
    if total.is_cuda:
        return total.add_(torch.mm(left, right, out_dtype=torch.float32))
    return total.add_(torch.mm(left.float(), right.float()))
