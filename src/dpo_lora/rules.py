"""The rules between settings that need nothing but the settings: checked once, before anything is written."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

from dpo_lora.choices import DataSource, ModelSource, Quantization
from dpo_lora.errors import UserError, nearest
from dpo_lora.evaluation.metrics import HIGHER_IS_BETTER
from dpo_lora.objectives import DIRECTIONS
from dpo_lora.preferences.lint.kinds import ROW_KINDS
from dpo_lora.preferences.parts import parts
from dpo_lora.schema import RunSettings, SweepSettings

# Attention kernels of the packed engine; named here so that a typo answers before torch is imported.
KERNELS = ("auto", "sdpa", "block", "varlen", "flex")

# TRL's names, here for the same reason; a test compares them with TRL.
ANY_DIVERGENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
LOSSES = (
    *ANY_DIVERGENCE,
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
)
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


Check = Callable[[Any], bool]


def _above(low: float) -> Check:
    return lambda x: x > low and math.isfinite(x)


def _from(low: float) -> Check:
    return lambda x: x >= low


def _or_null(check: Check) -> Check:
    return lambda x: x is None or check(x)


def _whole(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


# What a setting's value must be whatever the others are, in the order in which they are looked at.
RULES: tuple[tuple[str, Check, str], ...] = (
    ("lora.r", _from(1), "the rank must be at least 1"),
    ("lora.alpha", _above(0), "it scales the update and must be above 0"),
    ("lora.dropout", lambda x: 0 <= x < 1, "it must be a probability in [0, 1)"),
    ("lora.targets", bool, "name at least one module, or [all-linear]"),
    ("dpo.beta", _above(0), "it must be above 0; 0.01 to 0.5 is usual"),
    ("dpo.loss_type", bool, "name at least one loss"),
    ("dpo.label_smoothing", lambda x: 0 <= x < 0.5, "it must be in [0, 0.5)"),
    ("dpo.ld_alpha", _or_null(lambda x: 0 <= x <= 1), "it must be in [0, 1], or null for no length correction"),
    ("train.pairs_per_step", _above(0), "it must be at least 1"),
    ("train.reference_cache_gb", _above(0), "it must be above 0"),
    ("train.learning_rate", _above(0), "it must be above 0"),
    ("train.epochs", _above(0), "it must be above 0"),
    ("train.log_every", _above(0), "it must be at least 1 step"),
    ("train.keep_checkpoints", _above(0), "it must be at least 1"),
    ("train.max_grad_norm", _above(0), "it must be above 0"),
    ("train.max_steps", _or_null(_above(0)), "it must be at least 1, or null to go by train.epochs"),
    ("train.micro_batch", _or_null(_above(0)), "it must be at least 1, or null to go by train.tokens_per_batch"),
    ("train.tokens_per_batch", lambda x: x == "auto" or (_whole(x) and x > 0), "it must be at least 1, or auto"),
    (
        "train.gradient_checkpointing",
        lambda x: x == "auto" or isinstance(x, bool),
        "it must be true, false, or auto (from the first step on that does not fit in memory)",
    ),
    ("train.attention", lambda x: x in KERNELS, f"choose from {', '.join(KERNELS)}"),
    ("train.threads", _or_null(_above(0)), "it must be at least 1, or null for one per core"),
    ("train.warmup", lambda x: 0 <= x < 1, "it must be a share of all steps in [0, 1)"),
    ("train.weight_decay", _from(0), "it must not be below 0"),
    ("train.save_every", _from(0), "it must be a number of steps, or 0 to save at the end only"),
    ("train.keep_best", _or_null(lambda x: x in HIGHER_IS_BETTER), f"choose from {', '.join(HIGHER_IS_BETTER)}"),
    ("train.patience", _or_null(_above(0)), "it must be at least one evaluation"),
    ("seed", _from(0), "it must be a whole number from 0"),
    ("data.heldout_share", lambda x: 0 < x < 1, "it must be a share of the prompts between 0 and 1, neither of them"),
    ("data.max_length", _from(2), "there must be room for a token of the prompt and one of the answer"),
    ("data.max_pairs", _or_null(_above(0)), "it must be at least 1, or null for all"),
    ("data.max_heldout", _or_null(_above(0)), "it must be at least 1, or null for all"),
    (
        "data.name",
        lambda x: bool(x) and all(c.isalnum() or c in "-_." for c in x) and not x.startswith("."),
        "it becomes part of a folder's name: use letters, digits, '-', '_' and '.' only",
    ),
    (
        "data.near_duplicate",
        _or_null(lambda x: 0 < x <= 1),
        "it must be a similarity in (0, 1], or null to look for equal texts only",
    ),
    ("data.lint.length_bias", lambda x: 0.5 <= x <= 1, "it must be an accuracy in [0.5, 1]"),
    ("data.lint.outlier", _above(0), "it must be a number of standard deviations above 0"),
    ("eval.every", _from(0), "it must be a number of steps, or 0 to evaluate before and after only"),
    ("eval.batch", _from(1), "it must be at least one pair"),
    ("eval.confidence", lambda x: 0 < x < 1, "it must be a probability such as 0.95"),
    ("eval.samples", _from(0), "it must be a number of prompts, or 0 for none"),
    ("eval.sample_tokens", _from(1), "it must be at least one token"),
)
SWEEP_RULES: tuple[tuple[str, Check, str], ...] = (
    ("sweep.slots", _or_null(_from(1)), "it must be at least 1, or null to choose"),
    ("sweep.per_gpu", _from(1), "it must be at least one trial per GPU"),
    ("sweep.repeats", _from(1), "it must be at least one trial per setting"),
    ("sweep.grace", _from(0), "it must be a number of seconds from 0"),
    ("sweep.trial_timeout", _or_null(_above(0)), "it must be a number of seconds above 0, or null for no limit"),
    ("sweep.objectives", bool, "name at least one"),
)


def check(run: RunSettings) -> None:
    """Refuse settings that cannot train, with the name, the value and what would do.

    Raises:
        UserError: naming the first rule that is broken.
    """
    for name, holds, why in RULES:
        value = reduce(getattr, name.split("."), run)
        _need(holds(value), name, value, f"{why}.")
    for rules in (_dpo, _keep_best, _data, _lint, _model):
        rules(run)
    check_sweep(run.sweep)


def check_sweep(sweep: SweepSettings) -> None:
    """The rules of how trials are run; a sweep asks before any trial is composed."""
    for name, holds, why in SWEEP_RULES:
        value = getattr(sweep, name.removeprefix("sweep."))
        _need(holds(value), name, value, f"{why}.")
    for name in sweep.objectives:
        _need(name in DIRECTIONS, "sweep.objectives", name, f"choose from {', '.join(DIRECTIONS)}.")


def _need(ok: bool, name: str, value: object, why: str) -> None:
    if not ok:
        raise UserError(f"{name}={value} is not valid: {why}")


def _dpo(run: RunSettings) -> None:
    dpo = run.dpo
    for loss in dpo.loss_type:
        known = f"TRL has no such loss.{nearest(loss, LOSSES)} {', '.join(LOSSES)}."
        _need(loss in LOSSES, "dpo.loss_type", loss, known)
    divergence = dpo.f_divergence_type
    known = f"choose from {', '.join(DIVERGENCES)}.{nearest(divergence, DIVERGENCES)}"
    _need(divergence in DIVERGENCES, "dpo.f_divergence_type", divergence, known)
    fixed = [loss for loss in dpo.loss_type if loss not in ANY_DIVERGENCE]
    why = f"{', '.join(fixed)} is defined with reverse_kl only."
    _need(divergence == "reverse_kl" or not fixed, "dpo.f_divergence_type", divergence, why)
    sorting = [loss for loss in dpo.loss_type if loss.startswith("aot")]
    why = f"{', '.join(sorting)} sorts log-ratios over pairs, so no pair has a weight of its own."
    _need(not (dpo.use_weighting and sorting), "dpo.use_weighting", dpo.use_weighting, why)
    if dpo.loss_weights is not None:
        why = f"give one weight for each of the {len(dpo.loss_type)} losses {dpo.loss_type}."
        _need(len(dpo.loss_weights) == len(dpo.loss_type), "dpo.loss_weights", dpo.loss_weights, why)
    if "exo_pair" in dpo.loss_type:
        why = "EXO takes the logarithm of it, so it must be above 0; its paper uses 1e-3."
        _need(dpo.label_smoothing > 0, "dpo.label_smoothing", dpo.label_smoothing, why)


def _keep_best(run: RunSettings) -> None:
    best, patience = run.train.keep_best, run.train.patience
    if best is not None:
        _need(run.eval.every > 0, "train.keep_best", best, "there is nothing to choose from: set eval.every.")
    if patience is not None:
        _need(best is not None, "train.patience", patience, "set train.keep_best to say which metric must improve.")


def _data(run: RunSettings) -> None:
    data = run.data
    has_path = bool(data.path) or bool(data.mix)
    _need(has_path, "data.path", repr(data.path), "name the file or hub data set: data.path=PAIRS.jsonl.")
    if data.source is not DataSource.hub:
        _need(data.revision is None, "data.revision", data.revision, "only a hub data set has revisions.")


def _lint(run: RunSettings) -> None:
    drop, lint = run.data.drop, run.data.lint
    kinds = [kind.name for kind in ROW_KINDS]
    for name in (*drop, *lint.limits):
        where = "data.drop" if name in drop else "data.lint.limits"
        why = f"no kind of finding that rows have; there are {', '.join(kinds)}.{nearest(name, kinds)}"
        _need(name in kinds, where, name, why)
    for name, limit in lint.limits.items():
        why = "it must be a share in [0, 1], or null to never refuse."
        _need(limit is None or 0 <= limit <= 1, f"data.lint.limits.{name}", limit, why)
    parts(run.data)


def _model(run: RunSettings) -> None:
    if run.model.source is ModelSource.embedded:
        chosen = run.model.quantization
        why = "the embedded model is small enough as it is; quantise a hub model instead."
        _need(chosen is Quantization.none, "model.quantization", chosen.value, why)
