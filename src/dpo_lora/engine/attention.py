"""Attention inside pairs, through transformers' public attention and mask interfaces.

`attach(model, kernel)` sets the model's attention to "dpo_pairs_<kernel>". The mask function hands the
current `PairPlan` to the layers in the place of a mask; the attention function computes each of the plan's
runs against what it sees and itself. A call outside a packed forward (generation, stock
evaluation) goes to the attention the model had before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dpo_lora.engine import block_attention, varlen_attention
from dpo_lora.engine.packing import PairPlan
from dpo_lora.engine.runs import ScoreRule, run_keys

PREFIX = "dpo_pairs_"
_plan: ContextVar[PairPlan | None] = ContextVar("pair_plan", default=None)


@contextmanager
def packed_rows(plan: PairPlan) -> Iterator[None]:
    """While active, masks made by an attached model are `plan`."""
    token = _plan.set(plan)
    try:
        yield
    finally:
        _plan.reset(token)


def sdpa_pairs(query: Tensor, key: Tensor, value: Tensor, plan: PairPlan, rule: ScoreRule) -> Tensor:
    """query [1, Hq, T, D], key/value [1, Hkv, T, D] -> [1, T, Hq, D] by torch's SDPA, a call for each run."""
    if rule.softcap is not None:
        raise ValueError("torch SDPA has no logit soft-capping; use the kernel 'block' or 'flex'")
    gqa = query.shape[1] != key.shape[1]
    outputs = []
    for run in plan.runs:
        own = slice(run.first, run.first + run.count)
        q, (k, v) = query[:, :, own], (run_keys(x, run, 2) for x in (key, value))
        mask = run.visible(rule.window, q.device) if run.before or run.narrowed(rule.window) else None
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=rule.scale, enable_gqa=gqa
        )
        outputs.append(out)
    return torch.cat(outputs, 2).transpose(1, 2)


KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor, PairPlan, ScoreRule], Tensor]] = {
    "sdpa": sdpa_pairs,
    "block": block_attention.block_pairs,
    "varlen": varlen_attention.varlen_pairs,
    "flex": varlen_attention.flex_pairs,
}


def default_kernel(device: torch.device, dtype: torch.dtype, softcap: float | None, head_dim: int) -> str:
    """Name of the kernel that serves this device, format and head size; a caller may force any other of `KERNELS`."""
    if device.type == "cuda":
        half = dtype in (torch.bfloat16, torch.float16)
        if half and softcap is None and head_dim <= 256 and varlen_attention.available():
            return "varlen"
        if head_dim >= 16:  # FlexAttention takes no less
            return "flex"
        return "sdpa" if softcap is None else "block"
    if softcap is not None or (device.type == "cpu" and dtype == torch.float32):
        return "block"
    return "sdpa"


def attach(model: nn.Module, kernel: str) -> Callable[[], None]:
    """Set `model` (a transformers PreTrainedModel) to pair attention with `kernel`; returns the undo."""
    if kernel not in KERNELS:
        raise ValueError(f"attention kernel {kernel!r} is not known; choose one of {', '.join(KERNELS)}")
    before = model.config._attn_implementation
    if before.startswith(PREFIX):
        raise ValueError("the model already has pair attention; detach the first engine before making a second")
    name = f"{PREFIX}{kernel}_{before}"
    AttentionInterface.register(name, _attention(kernel, before))
    AttentionMaskInterface.register(name, _mask(before))
    model.set_attn_implementation(name)
    return lambda: model.set_attn_implementation(before)


def _mask(before: str) -> Callable:
    def pair_mask(*args, **kwargs):
        plan = _plan.get()
        if plan is not None:
            return plan
        return ALL_MASK_ATTENTION_FUNCTIONS[before](*args, **kwargs)

    return pair_mask


def _attention(kernel: str, before: str) -> Callable:
    run = KERNELS[kernel]

    def pair_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
        if not isinstance(attention_mask, PairPlan):
            if before in ALL_ATTENTION_FUNCTIONS:
                stock = ALL_ATTENTION_FUNCTIONS[before]
            else:  # "eager" is a function of each modeling file, not of the interface
                stock = sys.modules[type(module).__module__].eager_attention_forward
            return stock(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
        if dropout:
            raise ValueError("attention dropout is not supported by pair packing; set attention_dropout=0")
        rule = ScoreRule(scaling, kwargs.get("softcap"), kwargs.get("sliding_window"))
        return run(query, key, value, attention_mask, rule), None

    return pair_attention
