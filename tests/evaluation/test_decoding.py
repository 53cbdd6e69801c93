"""Answers are drawn from the model's own distribution, or are its most likely tokens, by seed."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dpo_lora.dpo.engines import EngineChoice
from dpo_lora.engine.continuing import CachedSteps
from dpo_lora.evaluation import samples
from dpo_lora.evaluation.decoding import continuations, token_logps
from dpo_lora.evaluation.samples import Prompt

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


@pytest.mark.parametrize("lora", ["lora.dora=false", "lora.dora=true"])
def test_policy_and_reference_answer_the_same_together_and_one_by_one(
    pairs: list[dict], make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, lora: str
) -> None:
    trainer = make_trainer(pairs, lora)
    tokenizer = trainer.processing_class
    wanted = [Prompt(str(n), [{"role": "user", "content": "Why? " * n}], None) for n in (1, 7)]
    assert (trainer.adapter_names() is None) == ("true" in lora), "PEFT does not mix DoRA"
    settings = trainer.run.eval
    steps: list[int] = []
    read_on = CachedSteps.__call__
    monkeypatch.setattr(CachedSteps, "__call__", lambda *given: (steps.append(1), read_on(*given))[1])
    together = samples.take(trainer, tokenizer, wanted, settings, seed=3)
    monkeypatch.setattr(trainer, "adapter_names", lambda: None)
    assert steps and trainer.engine.packed is not None, "by the engine's layers; of DoRA the reference alone"
    monkeypatch.setattr(trainer, "engine", EngineChoice(None, "for once", None))
    steps.clear()
    apart = samples.take(trainer, tokenizer, wanted, settings, seed=3)
    assert not steps
    assert any(row["policy"]["text"] != row["reference"]["text"] for row in apart)
    for a, b in zip(together, apart, strict=True):
        assert a["kl"] == (None if b["kl"] is None else pytest.approx(b["kl"], rel=1e-3, abs=1e-4))
        assert {k: v for k, v in a.items() if k != "kl"} == {k: v for k, v in b.items() if k != "kl"}


def test_log_probabilities_of_answers_are_those_of_each_alone(
    pairs: list[dict], make_trainer: Callable[..., Any]
) -> None:
    model = make_trainer(pairs).model.eval()
    prompts, answers = [[5, 6, 7], [8]], [[9, 10], [11, 12, 13, 14]]
    found = token_logps(model, [*prompts, [5]], [*answers, []], pad=0)
    for prompt, answer, mine in zip(prompts, answers, found, strict=False):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        assert mine == pytest.approx([float(logits[len(prompt) - 1 + n, t]) for n, t in enumerate(answer)], abs=1e-4)
    assert found[2] == []
