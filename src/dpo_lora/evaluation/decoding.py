"""Answers of a model to several prompts at once: greedy and seeded, with the log-probability of each token."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Continuation:
    """What a model wrote after a prompt."""

    tokens: list[int]  # without the token that ended it
    logps: list[float]  # nats, of each written token, the one that ended it included
    ended: bool  # an end-of-turn token came within the limit


@torch.no_grad()
def continuations(
    model: Any,
    prompts: list[list[int]],
    *,
    sampled: list[bool],
    seed: int,
    max_new_tokens: int,
    ends: set[int],
    pad: int,
) -> list[Continuation]:
    """Continue every prompt in one batch.

    Args:
        prompts: N token id lists; padded on the left here.
        sampled: N; a draw from the model's whole distribution (temperature 1) where true, else its
            most likely token.
        seed: of the draws, which come from a generator of their own: training's is not moved.
        ends: token ids that end a turn.
    """
    device = next(model.parameters()).device
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    drawn = torch.tensor(sampled)
    generator = torch.Generator().manual_seed(seed)
    last_only = {"logits_to_keep": 1} if _keeps_logits(model) else {}
    tokens: list[list[int]] = [[] for _ in prompts]
    logps: list[list[float]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    cache, step = None, ids
    for _ in range(max_new_tokens):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -step.shape[1] :]
        output = model(
            input_ids=step,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **last_only,
        )
        cache = output.past_key_values
        # On the CPU, so that a seed draws the same there and on a GPU up to rounding of the logits.
        scores = torch.log_softmax(output.logits[:, -1].float().cpu(), dim=-1)
        chosen = scores.argmax(-1)
        chosen[drawn] = _draw(scores[drawn], generator)
        for row, token in enumerate(chosen.tolist()):
            if ended[row]:
                continue
            logps[row].append(float(scores[row, token]))
            if token in ends:
                ended[row] = True
            else:
                tokens[row].append(token)
        if all(ended):
            break
        step = chosen.unsqueeze(1).to(device)
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
    return [Continuation(*row) for row in zip(tokens, logps, ended, strict=True)]


def _draw(scores: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A token for each row of log-probabilities [N, vocabulary], by inversion of the cumulated probabilities.

    One uniform number a row instead of one a token of the vocabulary, as torch.multinomial takes; and two models
    that think nearly alike, asked with the same seed, mostly draw the same token.
    """
    cumulated = scores.double().exp().cumsum(-1)
    threshold = torch.rand(len(scores), 1, generator=generator, dtype=torch.float64) * cumulated[:, -1:]
    return torch.searchsorted(cumulated, threshold, right=True).squeeze(1).clamp(max=scores.shape[1] - 1)


@torch.no_grad()
def token_logps(model: Any, prompt: list[int], answer: list[int]) -> list[float]:
    """Log-probability (nats) of each token of ``answer`` after ``prompt``."""
    device = next(model.parameters()).device
    ids = torch.tensor([prompt + answer], device=device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    return torch.log_softmax(logits, dim=-1).gather(1, ids[0, len(prompt) :, None]).squeeze(1).tolist()


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Token ids that end a turn, by the tokenizer and by the model's generation settings."""
    configured = getattr(model, "generation_config", None)
    ids = None if configured is None else configured.eos_token_id
    return {tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])} - {None}


def _keeps_logits(model: Any) -> bool:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    # TRL replaces forward on the instance; the class still has the architecture's own signature.
    return "logits_to_keep" in inspect.signature(type(base).forward).parameters
