"""What the numbers of a run say, in plain words, each with its evidence.

Every threshold is named here; docs/evaluation.md says why it is what it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_lora.evaluation.statistics import pairs_needed_against_coin
from dpo_lora.files import read_jsonl
from dpo_lora.rundir import RunDir

LENGTH_GAP = 0.05  # accuracy lost when long and short answers count the same
LONGER_ANSWERS = 1.5  # policy's tokens over the reference's
SATURATED = 0.95  # training accuracy
OVERFIT_GAP = 0.10  # training accuracy above the held-out interval's upper end
RUNAWAY_KL = 0.2  # nats a token: a 64-token answer is then e^13 times likelier than it was
STILL = 0.005  # nats between the training loss and ln 2
BLOWN_UP = 1.5  # times ln 2
SPIKE = 10.0  # times the median gradient norm
REPEATED = 0.15  # share of repeated word triples above the reference's


@dataclass(frozen=True)
class Finding:
    """One sentence for people, and the figures it rests on."""

    name: str
    level: str  # "warning" or "note"
    says: str
    evidence: str


def of_run(run: RunDir) -> list[Finding]:
    """What the files of a run say so far."""
    metrics = list(read_jsonl(run.metrics_file)) if run.metrics_file.exists() else []
    evaluation = json.loads(run.eval_file.read_text(encoding="utf-8")) if run.eval_file.exists() else None
    return diagnose(metrics, evaluation, run.settings())


def diagnose(
    metrics: list[dict[str, Any]], evaluation: dict[str, Any] | None, settings: dict[str, Any]
) -> list[Finding]:
    """Findings of a run, warnings first.

    Args:
        metrics: rows of metrics.jsonl.
        evaluation: eval.json; None where the run did not come so far.
        settings: the run's plain settings.
    """
    steps = [row for row in metrics if "loss" in row]
    found = list(_training(steps, settings))
    after = None if evaluation is None else evaluation["after"]
    if evaluation is not None and after is not None and after["step"] > 0:
        found += _heldout(after, evaluation["confidence"])
        found += _overfit(steps, after, evaluation["history"])
        if evaluation["chosen_by"]:
            found.append(_chosen(evaluation, after))
        if evaluation.get("samples"):
            found += _answers(evaluation["samples"])
    return sorted(found, key=lambda finding: finding.level != "warning")


def _heldout(after: dict[str, Any], confidence: float) -> Iterator[Finding]:
    low, high = after["accuracy_interval"]
    if low <= 0.5 <= high:
        needed = pairs_needed_against_coin(after["accuracy"], confidence)
        more = (
            "No number of pairs tells 0.5 from 0.5."
            if needed is None
            else f"If {after['accuracy']:.3f} is the truth, about {needed} pairs tell it from 0.5 four times in five."
        )
        yield Finding(
            "too few held-out pairs",
            "warning",
            "The held-out pairs are too few to tell this accuracy from a coin; data.heldout_share and "
            "data.heldout_path hold out more.",
            f"Accuracy {after['accuracy']:.3f}, interval {low:.3f} to {high:.3f}, pairs {after['pairs']}. {more}",
        )
    rises = after["margin_interval"][0] is not None and after["margin_interval"][0] > 0
    if rises and after["reward_chosen"] < 0:
        yield Finding(
            "preferred answers less likely",
            "warning",
            "The margin rises, and yet the preferred answers became less likely: the model mostly learned what "
            "not to say. A lower learning rate, a higher beta or fewer steps keep them likely.",
            f"Reward of the preferred {after['reward_chosen']:+.4f}, of the other {after['reward_rejected']:+.4f}; "
            f"log-ratio {after['log_ratio_per_token_chosen']:+.4f} nats a token on the preferred answers.",
        )
    controlled = after["accuracy_length_controlled"]
    if controlled is not None and after["accuracy"] - controlled > LENGTH_GAP:
        yield Finding(
            "length",
            "warning",
            "Part of the accuracy comes from the length of the answers, not from what they say.",
            f"Accuracy {after['accuracy']:.3f}; {controlled:.3f} when pairs with a longer and with a shorter "
            "preferred answer count the same.",
        )


def _overfit(steps: list[dict[str, Any]], after: dict[str, Any], history: list[dict[str, Any]]) -> Iterator[Finding]:
    trained = [row for row in history if row["step"] > 0]
    best = min(trained, key=lambda row: row["loss"]) if trained else None
    last = _tail(steps, "rewards/accuracies")
    if last is None or last < SATURATED or last - after["accuracy_interval"][1] <= OVERFIT_GAP:
        if best is not None and len(trained) > 2 and trained[-1]["loss"] > best["loss"] + STILL:
            yield Finding(
                "held-out loss rises",
                "warning",
                f"From step {best['step']} on the held-out loss rises: more steps made it worse. "
                "train.keep_best=eval/loss keeps the best adapter.",
                f"Held-out loss {best['loss']:.4f} at step {best['step']}, {trained[-1]['loss']:.4f} at "
                f"step {trained[-1]['step']}.",
            )
        return
    if best is not None and len(trained) > 1 and best["step"] < trained[-1]["step"]:
        since = (
            f"The held-out loss was lowest at step {best['step']} ({best['loss']:.4f}; {trained[-1]['loss']:.4f} last)."
        )
    else:
        from_step = next((row["step"] for row in steps if row.get("rewards/accuracies", 0) >= SATURATED), None)
        since = (
            f"Training accuracy first reached {SATURATED} at step {from_step}; eval.every would show where it turned."
        )
    yield Finding(
        "overfit",
        "warning",
        "The training pairs are learned by heart: held-out pairs did not follow.",
        f"Training accuracy {last:.3f} in the last quarter, held-out {after['accuracy']:.3f} "
        f"(up to {after['accuracy_interval'][1]:.3f}). {since}",
    )


def _training(steps: list[dict[str, Any]], settings: dict[str, Any]) -> Iterator[Finding]:
    norms = [row["grad_norm"] for row in steps if row.get("grad_norm") is not None]
    if len(norms) >= 10 and max(norms) > SPIKE * float(np.median(norms)):
        place = max((row for row in steps if row.get("grad_norm") is not None), key=lambda row: row["grad_norm"])
        yield Finding(
            "gradient spike",
            "note",
            "One step's gradient stands far above the others: look at its pairs, or lower train.learning_rate.",
            f"Norm {place['grad_norm']:.3g} at step {place['step']}, median {float(np.median(norms)):.3g}.",
        )
    loss = _tail(steps, "loss")
    if settings["dpo"]["loss_type"] != ["sigmoid"] or loss is None or len(steps) < 4:
        return
    evidence = f"Mean loss {loss:.4f} in the last quarter; ln 2 = {math.log(2):.4f} is where it starts."
    rate = settings["train"]["learning_rate"]
    if loss > BLOWN_UP * math.log(2):
        yield Finding(
            "learning rate too high",
            "warning",
            f"The loss ended above where it began: train.learning_rate={rate:g} is too high for these pairs.",
            evidence,
        )
    elif abs(loss - math.log(2)) < STILL:
        margins = [row["rewards/margins"] for row in steps if row.get("rewards/margins") is not None]
        half = len(margins) // 2
        rising = half > 0 and np.mean(margins[half:]) > 2 * abs(np.mean(margins[:half])) + 1e-6
        if rising:
            yield Finding(
                "learning rate too low",
                "warning",
                f"It learns, but hardly moved: raise train.learning_rate={rate:g}, or train longer.",
                f"{evidence} Mean margin {np.mean(margins[half:]):+.5f} in the second half, "
                f"{np.mean(margins[:half]):+.5f} in the first.",
            )
        else:
            yield Finding(
                "no signal",
                "warning",
                "Nothing was learned: the pairs carry no common preference, or train.learning_rate is far too low. "
                "experiment=overfit tells which.",
                evidence,
            )


def _answers(samples: dict[str, Any]) -> Iterator[Finding]:
    kl = samples["kl_per_token"]
    if kl is not None and kl > RUNAWAY_KL:
        yield Finding(
            "KL runaway",
            "warning",
            "The policy has gone far from its reference: a higher dpo.beta or a lower learning rate holds it.",
            f"{kl:.3f} nats a token on {samples['prompts']} sampled answers "
            f"({samples['kl_per_token_interval'][0]:.3f} to {samples['kl_per_token_interval'][1]:.3f}).",
        )
    before, now = samples["greedy"]["reference"], samples["greedy"]["policy"]
    if before["tokens"] and now["tokens"] > LONGER_ANSWERS * before["tokens"]:
        yield Finding(
            "longer answers",
            "warning",
            "Answers have become much longer.",
            f"{now['tokens']:.0f} tokens on average, {before['tokens']:.0f} before.",
        )
    if now["repetition"] > before["repetition"] + REPEATED:
        yield Finding(
            "repetition",
            "warning",
            "Answers repeat themselves.",
            f"{now['repetition']:.0%} of word triples repeat, {before['repetition']:.0%} before.",
        )
    if samples["greedy"]["unchanged"] == samples["prompts"]:
        yield Finding(
            "same answers",
            "note",
            "The most likely answer to every sample prompt is word for word what it was before training.",
            f"{samples['prompts']} of {samples['prompts']} greedy answers unchanged.",
        )


def _chosen(evaluation: dict[str, Any], after: dict[str, Any]) -> Finding:
    return Finding(
        "chosen on the held-out pairs",
        "note",
        "The checkpoint was chosen by the same pairs it is measured on, so its figure is a little too good; "
        "'dpo-lora score' on other pairs gives a clean one.",
        f"Best {evaluation['chosen_by']} of {sum(r['step'] > 0 for r in evaluation['history'])} evaluations, at "
        f"step {after['step']}.",
    )


def _tail(steps: list[dict[str, Any]], name: str) -> float | None:
    """Mean over the last quarter of the logged steps."""
    values = [row[name] for row in steps if row.get(name) is not None]
    return float(np.mean(values[-max(1, len(values) // 4) :])) if values else None
