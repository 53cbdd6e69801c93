"""Answers of a model to several prompts at once: greedy and seeded, with the log-probability of each token."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from dpo_lora.engine.continuing import CachedSteps


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
    adapters: tuple[str, ...] = (),
    by_engine: bool = False,
) -> list[Continuation]:
    """Continue every prompt in one batch.

    A step of decoding reads every weight once, whatever the number of rows, so two adapters of one model in one
    batch cost little more than one of them.

    Args:
        prompts: N token id lists; padded on the left here.
        sampled: N; a draw from the model's whole distribution (temperature 1) where true, else its
            most likely token.
        seed: of the draws, which come from a generator of their own: training's is not moved.
        ends: token ids that end a turn.
        adapters: names of PEFT adapters ("__base__": none) that continue every prompt in turn, with the same noise:
            the first one's N continuations come first. Without any, the model as it is continues them.
        by_engine: the pair engine's layers may be used, where they are those of the model.
    """
    copies = max(1, len(adapters))
    prompts, sampled = prompts * copies, sampled * copies
    device = next(model.parameters()).device
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    drawn = torch.tensor(sampled)
    generator = torch.Generator().manual_seed(seed)
    room = width + max_new_tokens
    by_hand = CachedSteps.of(model, adapters, room) if by_engine else None
    read_on = by_hand or _OwnSteps(model, adapters, len(prompts))
    tokens: list[list[int]] = [[] for _ in prompts]
    logps: list[list[float]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    step = ids
    for _ in range(max_new_tokens):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -step.shape[1] :]
        # On the CPU, so that a seed draws the same there and on a GPU up to rounding of the logits.
        scores = torch.log_softmax(read_on(step, mask, positions).float().cpu(), dim=-1)
        chosen = scores.argmax(-1)
        noise = torch.rand(int(drawn.sum()) // copies, 1, generator=generator, dtype=torch.float64)
        chosen[drawn] = _draw(scores[drawn], noise.repeat(copies, 1))
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


class _OwnSteps:
    """The model's own cached forward pass, read like `CachedSteps`."""

    def __init__(self, model: Any, adapters: tuple[str, ...], rows: int) -> None:
        self.model, self.cache = model, None
        self.options: dict[str, Any] = {"use_cache": True}
        if adapters:
            self.options["adapter_names"] = [name for name in adapters for _ in range(rows // len(adapters))]
        if _keeps_logits(model):
            self.options["logits_to_keep"] = 1

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        output = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache, **self.options
        )
        self.cache = output.past_key_values
        last: torch.Tensor = output.logits[:, -1]
        return last


def _draw(scores: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """A token for each row of log-probabilities [N, vocabulary], by inversion of the cumulated probabilities.

    One uniform number a row, [N, 1], instead of one a token of the vocabulary, as torch.multinomial takes; and two
    models that think nearly alike, given the same, mostly draw the same token.
    """
    cumulated = scores.double().exp().cumsum(-1)
    drawn = torch.searchsorted(cumulated, noise * cumulated[:, -1:], right=True)
    return drawn.squeeze(1).clamp(max=scores.shape[1] - 1)


@torch.no_grad()
def token_logps(model: Any, prompts: list[list[int]], answers: list[list[int]], pad: int) -> list[list[float]]:
    """Log-probability (nats) of each token of each answer after its prompt, all in one batch."""
    device = next(model.parameters()).device
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    found = []
    for row, prompt, answer in zip(logits, prompts, answers, strict=True):
        spoken = torch.log_softmax(row[len(prompt) - 1 : len(prompt) - 1 + len(answer)].float(), dim=-1)
        found.append(spoken.gather(1, torch.tensor(answer, device=device, dtype=torch.long)[:, None])[:, 0].tolist())
    return found


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Token ids that end a turn, by the tokenizer and by the model's generation settings."""
    configured = getattr(model, "generation_config", None)
    ids = None if configured is None else configured.eos_token_id
    return {tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])} - {None}


def _keeps_logits(model: Any) -> bool:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    # TRL replaces forward on the instance; the class still has the architecture's own signature.
    return "logits_to_keep" in inspect.signature(type(base).forward).parameters
