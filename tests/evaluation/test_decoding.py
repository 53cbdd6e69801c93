"""Answers are drawn from the model's own distribution, or are its most likely tokens, by seed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dpo_lora.evaluation.decoding import continuations

LOGITS = torch.tensor([0.0, 2.0, -1.0, 1.0, -30.0, 0.5])
END = 5


class Fixed(torch.nn.Module):
    """A model that says the same of every next token, whatever came before."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=LOGITS.expand(*input_ids.shape, -1), past_key_values=None)


def ask(count: int, *, sampled: bool, seed: int, length: int = 1, ends: set[int] | None = None) -> list:
    prompts = [[1, 2], [1]] * (count // 2)
    options = {"seed": seed, "max_new_tokens": length, "ends": ends or set(), "pad": 0}
    return continuations(Fixed(), prompts, sampled=[sampled] * len(prompts), **options)


def test_draws_come_from_the_models_distribution() -> None:
    count = 20_000
    found = torch.bincount(torch.tensor([one.tokens[0] for one in ask(count, sampled=True, seed=3)]), minlength=6)
    expected = LOGITS.double().softmax(0)
    spread = (expected * (1 - expected) / count).sqrt()
    assert ((found / count - expected).abs() <= 4.5 * spread + 1e-12).all()


def test_greedy_answers_are_the_most_likely_tokens_with_their_log_probability() -> None:
    for one in ask(4, sampled=False, seed=0, length=3):
        assert one.tokens == [1, 1, 1]
        assert one.logps == pytest.approx([float(LOGITS.log_softmax(0)[1])] * 3)
        assert not one.ended


def test_a_seed_repeats_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    first = ask(40, sampled=True, seed=7, length=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == ask(40, sampled=True, seed=7, length=5)
    assert first != ask(40, sampled=True, seed=8, length=5)


def test_an_answer_ends_at_its_end_of_turn() -> None:
    answers = ask(200, sampled=True, seed=1, length=8, ends={END})
    assert any(one.ended for one in answers)
    for one in answers:
        assert END not in one.tokens
        assert len(one.logps) == len(one.tokens) + one.ended
