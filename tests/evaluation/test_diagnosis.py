"""Each finding on figures that show it, and none on figures that do not."""

from __future__ import annotations

import pytest

from dpo_lora.evaluation.diagnosis import diagnose
from dpo_lora.settings import defaults

GOOD = {
    "step": 40, "pairs": 200, "accuracy": 0.8, "accuracy_interval": [0.74, 0.85], "accuracy_length_controlled": 0.79,
    "margin": 0.5, "margin_interval": [0.4, 0.6], "reward_chosen": 0.3, "reward_rejected": -0.2,
    "log_ratio_per_token_chosen": 0.01, "log_ratio_per_token_rejected": -0.02, "loss": 0.5,
}  # fmt: skip
SIDE = {"tokens": 40.0, "ended": 1.0, "repetition": 0.02}
SAMPLES = {
    "prompts": 4, "kl_per_token": 0.01, "kl_per_token_interval": [0.005, 0.02],
    "greedy": {"reference": SIDE, "policy": SIDE, "unchanged": 1},
}  # fmt: skip


def names(after: dict | None = None, losses: list[float] | None = None, samples: dict | None = None, **train) -> list:
    losses = losses or [0.69, 0.65, 0.6, 0.55, 0.5, 0.45, 0.42, 0.4]
    metrics = [
        {
            "step": n + 1,
            "loss": loss,
            "rewards/accuracies": train.get("accuracy", 0.85),
            "rewards/margins": train.get("margins", [0.1 * k for k in range(len(losses))])[n],
            "grad_norm": 1.0,
        }
        for n, loss in enumerate(losses)
    ]
    evaluation = {
        "confidence": 0.95,
        "chosen_by": None,
        "after": {**GOOD, **(after or {})},
        "history": train.get("history", [{**GOOD, **(after or {})}]),
        "samples": {**SAMPLES, **(samples or {})},
    }
    return [finding.name for finding in diagnose(metrics, evaluation, defaults())]


def test_a_good_run_has_nothing_of_note() -> None:
    assert names() == []


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("preferred answers less likely", {"after": {"reward_chosen": -0.4, "reward_rejected": -0.9}}),
        ("length", {"after": {"accuracy_length_controlled": 0.6}}),
        ("too few held-out pairs", {"after": {"accuracy": 0.6, "accuracy_interval": [0.45, 0.74], "pairs": 40}}),
        ("overfit", {"accuracy": 1.0, "after": {"accuracy": 0.7, "accuracy_interval": [0.63, 0.76]}}),
        ("KL runaway", {"samples": {"kl_per_token": 0.9}}),
        ("learning rate too high", {"losses": [0.69, 0.8, 1.2, 1.9, 2.0, 2.2, 2.1, 2.4]}),
        ("learning rate too low", {"losses": [0.693] * 4 + [0.691] * 4}),
        ("no signal", {"losses": [0.6931] * 8, "margins": [0.001, -0.001] * 4}),
        (
            "longer answers",
            {"samples": {"greedy": {"reference": SIDE, "policy": {**SIDE, "tokens": 90.0}, "unchanged": 0}}},
        ),
        (
            "held-out loss rises",
            {"history": [{**GOOD, "step": s, "loss": x} for s, x in ((10, 0.55), (20, 0.5), (30, 0.7))]},
        ),
    ],
)
def test_each_sign_is_named(name: str, case: dict) -> None:
    assert name in names(**case)


def test_overfitting_says_since_when() -> None:
    history = [{**GOOD, "step": s, "loss": x} for s, x in ((10, 0.55), (20, 0.5), (30, 0.7))]
    after = {**GOOD, "accuracy": 0.7, "accuracy_interval": [0.63, 0.76]}
    metrics = [{"step": s, "loss": 0.3, "rewards/accuracies": 1.0} for s in range(1, 31)]
    evaluation = {"confidence": 0.95, "chosen_by": None, "after": after, "history": history}
    [finding] = [f for f in diagnose(metrics, evaluation, defaults()) if f.name == "overfit"]
    assert "step 20" in finding.evidence
    assert "1.000" in finding.evidence
