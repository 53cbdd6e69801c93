"""The reference model's log-probabilities of pairs: which weights it is, and the pass that computes them."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from trl.trainer.utils import use_adapter

from dpo_lora.engine.batching import TokenBudget, common_opening
from dpo_lora.engine.cache_files import LogProbs
from dpo_lora.engine.forward import PackedForward
from dpo_lora.engine.packing import plan_pairs, positions_needed
from dpo_lora.engine.reference_cache import Tokens

_REFERENCE = "ref"  # the name TRL gives to the copy of a continued adapter
_VOLATILE = {
    "_name_or_path", "transformers_version", "use_cache", "torch_dtype", "dtype", "architectures",
    "output_router_logits", "quantization_config",
}  # fmt: skip


def fingerprint_config(model: nn.Module) -> str:
    """sha256 of what the base model's config computes by: equal weights with another rotary scaling, window or
    epsilon are another reference."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = {k: v for k, v in base.config.to_dict().items() if k not in _VOLATILE and not k.startswith("_attn")}
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()


def fingerprint_adapter(model: nn.Module) -> str | None:
    """sha256 of the reference adapter (TRL's "ref", a continued adapter's start), None where the base is
    reference."""
    if _REFERENCE not in getattr(model, "peft_config", {}):
        return None
    digest = hashlib.sha256()
    config = model.peft_config[_REFERENCE]
    facts = {
        k: str(getattr(config, k, None)) for k in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
    }
    digest.update(json.dumps(facts, sort_keys=True).encode())
    _update(digest, {k: v for k, v in model.state_dict().items() if f".{_REFERENCE}." in k})
    return digest.hexdigest()


def _update(digest, state: dict[str, torch.Tensor]) -> None:
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            digest.update(memoryview(flat.view(torch.uint8).numpy()))


@contextlib.contextmanager
def reference_active(model: nn.Module) -> Iterator[None]:
    """The model as the reference: without its adapter, or with TRL's "ref" adapter; gradients off, RNG
    untouched."""
    adapters = getattr(model, "peft_config", None)
    context = contextlib.nullcontext()
    if adapters is not None:
        context = use_adapter(model, _REFERENCE if _REFERENCE in adapters else None)
    cuda = list(range(torch.cuda.device_count()))
    training = model.training
    with torch.random.fork_rng(devices=cuda), torch.no_grad(), context:
        model.eval()
        try:
            yield
        finally:
            model.train(training)


def reference_pass(packed: PackedForward, budget: TokenBudget) -> Callable[[Sequence[Tokens]], list[LogProbs]]:
    """A function for `ReferenceCache.visit`: rows -> per-token log-probs, by packed rows within the
    budget."""

    def compute(rows: Sequence[Tokens]) -> list[LogProbs]:
        sizes = [positions_needed(min(a[1], b[1]), len(a[0]) - a[1], len(b[0]) - b[1]) for a, b in rows]

        def step(batches) -> list[LogProbs]:
            with reference_active(packed.model):
                # Read when all are launched: a GPU need not wait for the host between two of them.
                scored = [(batch.pairs, *_score(packed, [rows[i] for i in batch.pairs])) for batch in batches]
            values: dict[int, LogProbs] = {}
            for pairs, scores, places in scored:
                values |= zip(pairs, _sides(scores.float().cpu(), places), strict=True)
            return [values[i] for i in range(len(rows))]

        opening = common_opening([list(ids[:start]) for (ids, start), _ in rows])
        return budget.run(sizes, step, lambda: None, opening)

    return compute


def _score(packed: PackedForward, rows: Sequence[Tokens]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [2B, L-1] on the model's device, and on the host which of them are there."""
    planned = plan_pairs(rows)
    plan = planned.to(next(packed.base.parameters()).device)
    scores, _ = packed.entry_scores(plan)
    return plan.scatter(scores["log_probs"]), planned.slots < len(planned.head_labels)


def _sides(scores: torch.Tensor, places: torch.Tensor) -> list[LogProbs]:
    sides = [row[there].numpy() for row, there in zip(scores, places, strict=True)]
    half = len(sides) // 2
    return list(zip(sides[:half], sides[half:], strict=True))
