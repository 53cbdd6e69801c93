"""Which drawings a run's page has."""

from __future__ import annotations

from typing import Any

from dpo_lora.reports.drawing import Drawing, Line, curves, histogram, intervals

MOST_TOPICS = 30


def training(metrics: list[dict[str, Any]], evaluation: dict[str, Any] | None) -> list[Drawing]:
    """Curves over the steps of metrics.jsonl, with the evaluations where they measure the same thing."""
    steps = [row for row in metrics if "loss" in row]
    history = evaluation["history"] if evaluation else []

    def line(label: str, name: str, rows: list[dict[str, Any]] = steps) -> Line:
        found = [row for row in rows if row.get(name) is not None]
        return Line(label, [row["step"] for row in found], [row[name] for row in found])

    accuracy = Line(
        "held out",
        [row["step"] for row in history],
        [row["accuracy"] for row in history],
        [row["accuracy_interval"][0] for row in history],
        [row["accuracy_interval"][1] for row in history],
    )
    found = [
        curves("Loss", [line("training", "loss"), line("held out", "loss", history)], unit="nats"),
        curves("Accuracy", [line("training", "rewards/accuracies"), accuracy], unit="share of pairs", level=0.5),
        curves(
            "Margin", [line("training", "rewards/margins"), line("held out", "margin", history)], unit="reward", level=0
        ),
        curves(
            "Rewards",
            [
                line("preferred, training", "rewards/chosen"),
                line("other, training", "rewards/rejected"),
                line("preferred, held out", "reward_chosen", history),
                line("other, held out", "reward_rejected", history),
            ],
            unit="reward",
            level=0,
        ),
        curves(
            "Distance to the reference",
            [
                line("log-ratio, preferred", "log_ratio_per_token_chosen", history),
                line("log-ratio, other", "log_ratio_per_token_rejected", history),
                line("KL estimate", "eval/kl_per_token", metrics),
            ],
            unit="nats a token",
            level=0,
        ),
        curves("Gradient norm", [line("norm", "grad_norm")], unit="norm before clipping"),
        curves("Learning rate", [line("rate", "learning_rate")], unit="rate"),
        curves("Throughput", [line("tokens", "tokens_per_second")], unit="tokens a second"),
    ]
    return [drawing for drawing in found if drawing is not None]


def heldout(pairs: list[dict[str, Any]], after: dict[str, Any] | None) -> list[Drawing]:
    """Histograms and groups of one evaluation's rows of eval_pairs.jsonl."""
    if not pairs or after is None:
        return []
    before = [row["reference_chosen"] - row["reference_rejected"] for row in pairs]
    now = [row["policy_chosen"] - row["policy_rejected"] for row in pairs]
    topics = [_row(row) for row in sorted(after["by_topic"], key=lambda row: -row["pairs"])[:MOST_TOPICS]]
    bins = [b for b in after["calibration"] if b["pairs"]]
    found = [
        histogram("Margins of the pairs", {"after": [row["margin"] for row in pairs]}, unit="reward", level=0),
        histogram(
            "Rewards of the answers",
            {"preferred": [row["reward_chosen"] for row in pairs], "other": [row["reward_rejected"] for row in pairs]},
            unit="reward",
            level=0,
        ),
        histogram("How much likelier the preferred answer is", {"before": before, "after": now}, unit="nats", level=0),
        intervals("Accuracy by topic", topics, unit="share of pairs", level=0.5),
        intervals(
            "Accuracy by length (preferred tokens / other)",
            [_row(row) for row in after["by_length"]],
            unit="share of pairs",
            level=0.5,
        ),
        curves(
            "Is sigma(margin) a probability?",
            [
                Line("share right", [b["confidence"] for b in bins], [b["accuracy"] for b in bins]),
                Line("if it were one", [0.5, 1.0], [0.5, 1.0]),
            ],
            unit="share right",
            x_label="the model's own probability",
        ),
    ]
    return [drawing for drawing in found if drawing is not None]


def _row(row: dict[str, Any]) -> tuple[str, float, float, float]:
    return f"{row['name']} ({row['pairs']})", row["accuracy"], *row["accuracy_interval"]
