"""May this model be scored by packed rows? Facts of the architecture first, then a check on real pairs.

Every answer of "no" is one line for people: what stands in the way. The caller then takes the stock path and
says so.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpo_lora.engine.batching import is_out_of_memory
from dpo_lora.engine.forward import PackedForward
from dpo_lora.engine.packing import IGNORED
from dpo_lora.engine.proofs import Proofs

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest accepted |packed - stock| of a sequence's log-probability, relative to the root of its summed
squares.

float32: a few hundred sums of different order. float16 and bfloat16: their rounding (2^-11, 2^-8) through
tens of layers; both paths are equally far from the exact value, so the check finds what is wrong with the
engine, and cannot tell rounding from rounding."""

_FULL = {"full_attention", "attention"}
_WINDOWED = {"gemma2", "gemma3_text", "mistral", "mixtral", "phi3", "qwen2", "qwen3"}
"""Model types whose layers hand their sliding window to the attention interface: tests/engine compares each of these
with stock at windows shorter than its pairs."""


@dataclass(frozen=True)
class Verdict:
    """Whether to pack; `reason` is None or one line; `difference` is the probe's, where it ran, now or (`known`)
    earlier."""

    eligible: bool
    reason: str | None = None
    difference: float | None = None
    known: bool = False


def read_facts(model: nn.Module, longest: int) -> str | None:
    """None if the architecture can be packed, else why not. longest: positions of the longest sequence in the
    data."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config
    text = config.get_text_config()
    name = type(base).__name__
    if getattr(config, "is_encoder_decoder", False):
        return f"{name} is an encoder-decoder: its decoder reads an encoder's states"
    if text is not config:
        return f"{name} is multimodal: image tokens and their features must stay together in a sequence"
    if not getattr(text, "is_causal", True) or getattr(text, "use_bidirectional_attention", False):
        return f"{name} attends to later tokens, so the prompt's states depend on the answer"
    if getattr(base, "_is_stateful", False):
        return f"{name} carries a recurrent state from token to token, which packed branches would mix"
    if not getattr(base, "_supports_attention_backend", False):
        return f"{name} does not take attention from transformers' attention interface"
    if "position_ids" not in inspect.signature(base.base_model.forward).parameters:
        return f"{name} takes no position_ids, so the two answers of a pair cannot share positions"
    if getattr(text, "alibi", False):
        return f"{name} uses ALiBi, which counts distances in the row and not in the sequence"
    return _layer_reason(name, text, longest) or _adapter_reason(model)


def sliding_window(text: object) -> int | None:
    """How many tokens of its sequence a token sees in some layer, by the model's config; None: all before it."""
    kinds = getattr(text, "layer_types", None)
    if not getattr(text, "use_sliding_window", True) or (kinds and "sliding_attention" not in kinds):
        return None
    return getattr(text, "sliding_window", None)


def _layer_reason(name: str, text: object, longest: int) -> str | None:
    kinds = set(getattr(text, "layer_types", None) or ())
    window = sliding_window(text)
    chunk = getattr(text, "attention_chunk_size", None)
    other = kinds - _FULL - {"sliding_attention", "chunked_attention"}
    if other:
        return f"{name} has layers of another kind than attention ({', '.join(sorted(other))})"
    known = getattr(text, "model_type", "") in _WINDOWED
    for label, size in (("sliding window", None if known else window), ("attention chunk", chunk)):
        if size is not None and longest > size:
            return f"{name} has a {label} of {size} tokens and the sequences have up to {longest}"
    ropes = getattr(text, "rope_parameters", None) or {}
    ropes = [ropes, *(rope for rope in ropes.values() if isinstance(rope, dict))]  # of all layers, or a kind's each
    for rope in (rope for rope in ropes if rope.get("rope_type") in ("dynamic", "longrope")):
        original = getattr(text, "original_max_position_embeddings", None) or rope.get(
            "original_max_position_embeddings"
        )
        limit = original or getattr(text, "max_position_embeddings", None)
        if limit is not None and longest > limit:
            return f"{name} changes its rotary frequencies beyond {limit} tokens with the longest row of a batch"
    if getattr(text, "model_type", "") == "gpt_oss":
        return f"{name} has attention sinks, which the packed kernels do not compute"
    if getattr(text, "attention_dropout", 0.0) or getattr(text, "attn_pdrop", 0.0):
        return f"{name} has attention dropout in its config; set it to 0 to pack pairs"
    return None


def _adapter_reason(model: nn.Module) -> str | None:
    for config in getattr(model, "peft_config", {}).values():
        if getattr(config, "is_prompt_learning", False):
            return f"the adapter ({config.peft_type.value}) prepends virtual tokens to every sequence"
    return None


def probe(model: nn.Module, batch: dict[str, Tensor], tolerance: float | None = None, **engine: object) -> Verdict:
    """Compare packed and stock log-probabilities of one collated batch (two real pairs are enough).

    model: as TRL's trainer holds it, with TRL's fused head added. batch: input_ids, attention_mask,
    completion_mask, [2B, L]. engine: arguments of `PackedForward`. Draws no random numbers and leaves the
    model's mode, gradients and attention as they were. Compared are each sequence's log-probability, as
    |difference| / sqrt(sum of squared token log-probabilities), and the largest counts.
    """
    weight = next(p for p in model.parameters() if p.is_floating_point())
    tolerance = TOLERANCE.get(weight.dtype, 3e-2) if tolerance is None else tolerance
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
    training = model.training
    model.eval()
    packed = None
    try:
        with torch.no_grad():
            stock = model(**inputs, fused_lm_head=True, use_cache=False).log_probs.double()
            packed = PackedForward(model, statistics=(), **engine)
            ours = packed(**inputs).log_probs.double()
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
        if is_out_of_memory(error):  # says nothing about the engine, and stock would take more
            raise
        line = " ".join(str(error).split())[:160]
        return Verdict(False, f"the packed trial pass failed: {type(error).__name__}: {line}")
    finally:
        if packed is not None:
            packed.detach()
        model.train(training)
    scale = stock.square().sum(1).sqrt().clamp_min(1e-6)
    difference = float(((ours - stock).sum(1).abs() / scale).max())
    if not difference <= tolerance or math.isnan(difference):
        return Verdict(
            False,
            f"packed and stock log-probabilities differ by {difference:.1e} (accepted: {tolerance:.0e})",
            difference,
        )
    return Verdict(True, None, difference)


def judge(
    model: nn.Module,
    batch: dict[str, Tensor],
    longest: int,
    proofs: Proofs | None = None,
    **engine: object,
) -> Verdict:
    """Facts, then probe. The one call a trainer needs.

    proofs: where passed probes are kept; one on these very bits, by this very code, is not run again.
    """
    reason = read_facts(model, longest)
    if reason:
        return Verdict(False, reason)
    key = None if proofs is None else proofs.key(model, batch, **engine)
    if proofs is None or key is None:
        return probe(model, batch, **engine)
    found = proofs.find(key)
    if found is not None:
        return Verdict(True, None, found, known=True)
    verdict = probe(model, batch, **engine)
    if verdict.eligible and verdict.difference is not None:
        proofs.note(key, verdict.difference)
    return verdict
