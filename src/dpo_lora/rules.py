"""The rules between settings that need nothing but the settings: checked once, before anything is written."""

from __future__ import annotations

import math

from dpo_lora.errors import UserError, nearest
from dpo_lora.evaluation.metrics import HIGHER_IS_BETTER
from dpo_lora.objectives import DIRECTIONS
from dpo_lora.preferences.lint.kinds import ROW_KINDS
from dpo_lora.preferences.parts import parts
from dpo_lora.schema import DataSource, ModelSource, Quantization, RunSettings, SweepSettings

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


def check(run: RunSettings) -> None:
    """Refuse settings that cannot train, with the name, the value and what would do.

    Raises:
        UserError: naming the first rule that is broken.
    """
    for rules in (_lora, _dpo, _train, _data, _eval, _model, _sweep):
        rules(run)


def _need(ok: bool, name: str, value: object, why: str) -> None:
    if not ok:
        raise UserError(f"{name}={value} cannot be: {why}")


def _lora(run: RunSettings) -> None:
    lora = run.lora
    _need(lora.r >= 1, "lora.r", lora.r, "the rank is the number of directions learned, at least 1.")
    _need(lora.alpha > 0, "lora.alpha", lora.alpha, "it scales the update and must be above 0.")
    _need(0 <= lora.dropout < 1, "lora.dropout", lora.dropout, "a probability in [0, 1).")
    _need(bool(lora.targets), "lora.targets", lora.targets, "name at least one module, or [all-linear].")


def _dpo(run: RunSettings) -> None:
    dpo = run.dpo
    _need(
        dpo.beta > 0 and math.isfinite(dpo.beta),
        "dpo.beta",
        dpo.beta,
        "it weighs the pull to the reference and must be above 0 (0.01 to 0.5 is usual).",
    )
    _need(bool(dpo.loss_type), "dpo.loss_type", dpo.loss_type, "name at least one loss.")
    for loss in dpo.loss_type:
        _need(
            loss in LOSSES, "dpo.loss_type", loss, f"TRL has no such loss.{nearest(loss, LOSSES)} {', '.join(LOSSES)}."
        )
    _need(
        dpo.f_divergence_type in DIVERGENCES,
        "dpo.f_divergence_type",
        dpo.f_divergence_type,
        f"choose from {', '.join(DIVERGENCES)}.{nearest(dpo.f_divergence_type, DIVERGENCES)}",
    )
    fixed = [loss for loss in dpo.loss_type if loss not in ANY_DIVERGENCE]
    _need(
        dpo.f_divergence_type == "reverse_kl" or not fixed,
        "dpo.f_divergence_type",
        dpo.f_divergence_type,
        f"{', '.join(fixed)} is defined with reverse_kl only.",
    )
    sorting = [loss for loss in dpo.loss_type if loss.startswith("aot")]
    _need(
        not (dpo.use_weighting and sorting),
        "dpo.use_weighting",
        dpo.use_weighting,
        f"{', '.join(sorting)} sorts log-ratios over pairs, so no pair has a weight of its own.",
    )
    if dpo.loss_weights is not None:
        _need(
            len(dpo.loss_weights) == len(dpo.loss_type),
            "dpo.loss_weights",
            dpo.loss_weights,
            f"one weight for each of the {len(dpo.loss_type)} losses {dpo.loss_type}.",
        )
    _need(0 <= dpo.label_smoothing < 0.5, "dpo.label_smoothing", dpo.label_smoothing, "a share in [0, 0.5).")
    if "exo_pair" in dpo.loss_type:
        _need(
            dpo.label_smoothing > 0,
            "dpo.label_smoothing",
            dpo.label_smoothing,
            "EXO takes the logarithm of it; its paper uses 1e-3.",
        )
    if dpo.ld_alpha is not None:
        _need(0 <= dpo.ld_alpha <= 1, "dpo.ld_alpha", dpo.ld_alpha, "a weight in [0, 1], or null for none.")


def _train(run: RunSettings) -> None:
    train = run.train
    positive: list[tuple[str, float]] = [
        ("pairs_per_step", train.pairs_per_step),
        ("reference_cache_gb", train.reference_cache_gb),
        ("learning_rate", train.learning_rate),
        ("epochs", train.epochs),
        ("log_every", train.log_every),
        ("keep_checkpoints", train.keep_checkpoints),
        ("max_grad_norm", train.max_grad_norm),
    ]
    for name, value in positive:
        _need(value > 0 and math.isfinite(value), f"train.{name}", value, "it must be above 0.")
    if train.max_steps is not None:
        _need(
            train.max_steps > 0,
            "train.max_steps",
            train.max_steps,
            "at least 1, or null to go by train.epochs.",
        )
    if train.micro_batch is not None:
        _need(train.micro_batch > 0, "train.micro_batch", train.micro_batch, "at least 1, or null.")
    tokens = train.tokens_per_batch
    _need(
        tokens == "auto" or (isinstance(tokens, int) and not isinstance(tokens, bool) and tokens > 0),
        "train.tokens_per_batch",
        tokens,
        "a number of tokens from 1, or auto.",
    )
    _need(
        train.gradient_checkpointing == "auto" or isinstance(train.gradient_checkpointing, bool),
        "train.gradient_checkpointing",
        train.gradient_checkpointing,
        "true, false, or auto: from when on a step does not fit in memory.",
    )
    _need(train.attention in KERNELS, "train.attention", train.attention, f"choose from {', '.join(KERNELS)}.")
    if train.threads is not None:
        _need(train.threads > 0, "train.threads", train.threads, "at least 1, or null for one a core.")
    _need(0 <= train.warmup < 1, "train.warmup", train.warmup, "a share of all steps in [0, 1).")
    _need(train.weight_decay >= 0, "train.weight_decay", train.weight_decay, "it must not be below 0.")
    _need(train.save_every >= 0, "train.save_every", train.save_every, "steps between checkpoints, or 0.")
    _keep_best(run)
    _need(run.seed >= 0, "seed", run.seed, "a whole number from 0.")


def _keep_best(run: RunSettings) -> None:
    train = run.train
    if train.keep_best is not None:
        _need(
            train.keep_best in HIGHER_IS_BETTER,
            "train.keep_best",
            train.keep_best,
            f"name one of {', '.join(HIGHER_IS_BETTER)}.",
        )
        _need(
            run.eval.every > 0, "train.keep_best", train.keep_best, "there is nothing to choose from: set eval.every."
        )
    if train.patience is not None:
        _need(train.keep_best is not None, "train.patience", train.patience, "set train.keep_best to say what for.")
        _need(train.patience > 0, "train.patience", train.patience, "at least one evaluation.")


def _data(run: RunSettings) -> None:
    data = run.data
    _need(
        0 < data.heldout_share < 1,
        "data.heldout_share",
        data.heldout_share,
        "a share of the prompts between 0 and 1, both left out.",
    )
    _need(data.max_length >= 2, "data.max_length", data.max_length, "room for one prompt and one answer token.")
    for name in ("max_pairs", "max_heldout"):
        value = getattr(data, name)
        _need(value is None or value > 0, f"data.{name}", value, "at least 1, or null for all.")
    _need(
        bool(data.name) and all(c.isalnum() or c in "-_." for c in data.name) and not data.name.startswith("."),
        "data.name",
        data.name,
        "it becomes part of a folder's name: letters, digits, '-', '_' and '.' only.",
    )
    _need(
        bool(data.path) or bool(data.mix),
        "data.path",
        repr(data.path),
        "name the file or hub data set: data.path=PAIRS.jsonl.",
    )
    _need(
        data.near_duplicate is None or 0 < data.near_duplicate <= 1,
        "data.near_duplicate",
        data.near_duplicate,
        "a similarity in (0, 1], or null to look for equal texts only.",
    )
    _lint(run)
    if data.source is not DataSource.hub:
        _need(data.revision is None, "data.revision", data.revision, "only a hub data set has revisions.")


def _lint(run: RunSettings) -> None:
    drop, lint = run.data.drop, run.data.lint
    kinds = [kind.name for kind in ROW_KINDS]
    for name in (*drop, *lint.limits):
        _need(
            name in kinds,
            "data.drop" if name in drop else "data.lint.limits",
            name,
            f"no kind of finding that rows have; there are {', '.join(kinds)}.{nearest(name, kinds)}",
        )
    for name, limit in lint.limits.items():
        _need(
            limit is None or 0 <= limit <= 1, f"data.lint.limits.{name}", limit, "a share in [0, 1], or null for none."
        )
    _need(0.5 <= lint.length_bias <= 1, "data.lint.length_bias", lint.length_bias, "an accuracy in [0.5, 1].")
    _need(lint.outlier > 0, "data.lint.outlier", lint.outlier, "a number of standard deviations above 0.")
    parts(run.data)


def _eval(run: RunSettings) -> None:
    _need(run.eval.every >= 0, "eval.every", run.eval.every, "steps between evaluations, or 0.")
    _need(run.eval.batch >= 1, "eval.batch", run.eval.batch, "at least one pair at a time.")
    _need(0 < run.eval.confidence < 1, "eval.confidence", run.eval.confidence, "a probability such as 0.95.")
    _need(run.eval.samples >= 0, "eval.samples", run.eval.samples, "a number of prompts, or 0 for none.")
    _need(run.eval.sample_tokens >= 1, "eval.sample_tokens", run.eval.sample_tokens, "at least one token.")


def _model(run: RunSettings) -> None:
    if run.model.source is ModelSource.embedded:
        _need(
            run.model.quantization is Quantization.none,
            "model.quantization",
            run.model.quantization.value,
            "the embedded model is small enough as it is; quantise a hub model instead.",
        )


def _sweep(run: RunSettings) -> None:
    check_sweep(run.sweep)


def check_sweep(sweep: SweepSettings) -> None:
    """The rules of how trials are run; a sweep asks before any trial is composed."""
    _need(sweep.slots is None or sweep.slots >= 1, "sweep.slots", sweep.slots, "at least 1, or null to choose.")
    _need(sweep.per_gpu >= 1, "sweep.per_gpu", sweep.per_gpu, "at least one trial a GPU.")
    _need(sweep.repeats >= 1, "sweep.repeats", sweep.repeats, "at least one trial a setting.")
    _need(sweep.grace >= 0, "sweep.grace", sweep.grace, "seconds, from 0.")
    limit = sweep.trial_timeout
    _need(limit is None or limit > 0, "sweep.trial_timeout", limit, "seconds above 0, or null for no limit.")
    _need(bool(sweep.objectives), "sweep.objectives", sweep.objectives, "name at least one.")
    for name in sweep.objectives:
        _need(name in DIRECTIONS, "sweep.objectives", name, f"there are {', '.join(DIRECTIONS)}.")
