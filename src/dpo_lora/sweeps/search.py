"""How a study searches: its settings, their rules, and Optuna's samplers and pruners by name."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution

from dpo_lora import objectives
from dpo_lora.errors import UserError
from dpo_lora.sweeps.sweep import Sweep
from dpo_lora.sweeps.trial import Trial

SAMPLERS = ("tpe", "gp", "cmaes", "random", "grid")
PRUNERS = ("none", "median", "halving", "hyperband")


@dataclass(frozen=True)
class StudySettings:
    """How a study searches; the values lie in conf/hydra/sweeper/study.yaml."""

    sampler: str
    pruner: str
    trials: int  # in all: a resumed study goes on to this number
    startup_trials: int  # drawn at random before the sampler learns, finished before the pruner judges
    warmup_steps: int  # optimizer steps in which no trial is pruned
    seed: int
    warm_start: list[str]  # directories of earlier sweeps whose finished trials are known from the start


def params_of(trial: Trial, known: dict[str, BaseDistribution]) -> dict[str, Any] | None:
    """A trial's values for the names searched; None where one is not in the space."""
    params = {}
    for name, dist in known.items():
        value: Any = trial.settings
        for part in name.split("."):
            value = value[part] if isinstance(value, dict) and part in value else None
        if isinstance(value, dict) or value is None:  # a group's preset: known by the name it was given
            value = trial.varied.get(name)
        if isinstance(dist, optuna.distributions.CategoricalDistribution):
            value = None if value is None else str(value)
            if value not in dist.choices:
                return None
        elif value is None or not dist._contains(value):
            return None
        params[name] = value
    return params


def check(known: dict[str, BaseDistribution], settings: StudySettings, sweep: Sweep) -> None:
    """Refuse a study that has nothing to search or could not prune.

    Raises:
        UserError: naming the setting.
    """
    if not known:
        raise UserError(
            "A study needs something to search: name a space such as hydra/sweeper=beta-lr, or give "
            "dpo.beta=interval(0.01,1) or dpo=sigmoid,ipo on the command line."
        )
    for name, value, allowed in (
        ("sampler", settings.sampler, SAMPLERS),
        ("pruner", settings.pruner, PRUNERS),
    ):
        if value not in allowed:
            raise UserError(f"hydra.sweeper.{name}={value} is unknown; there are {', '.join(allowed)}.")
    if settings.pruner == "none":
        return
    if len(sweep.settings.objectives) > 1 or sweep.settings.objectives[0] not in objectives.EVALUATED:
        raise UserError(
            f"A pruner judges by one of {', '.join(objectives.EVALUATED)}, and "
            f"sweep.objectives={sweep.settings.objectives}. Set hydra.sweeper.pruner=none, or that one objective."
        )
    if sweep.settings.repeats > 1:
        raise UserError("A pruner judges single trials: set sweep.repeats=1 or hydra.sweeper.pruner=none.")
    if sweep.config.eval.every == 0:
        raise UserError("A pruner judges at evaluations during training: set eval.every to a number of steps.")


def combinations(known: dict[str, BaseDistribution]) -> list[dict[str, Any]]:
    """Every combination of the values searched, the last name's changing fastest.

    Raises:
        UserError: a continuous interval, which has no last value.
    """
    lists = []
    for name, dist in known.items():
        if isinstance(dist, optuna.distributions.CategoricalDistribution):
            lists.append(list(dist.choices))
        elif isinstance(dist, optuna.distributions.IntDistribution) and not dist.log:
            lists.append(list(range(dist.low, dist.high + 1, dist.step)))
        else:
            raise UserError(
                f"hydra.sweeper.sampler=grid cannot try every {name} of an interval: list values, such as "
                f"{name}=0.05,0.1, or choose another sampler."
            )
    return [dict(zip(known, values, strict=True)) for values in itertools.product(*lists)]


def sampler(settings: StudySettings, seed: int) -> optuna.samplers.BaseSampler:
    """The sampler that draws one trial: seeded for it alone, so that a resumed study draws the same."""
    seed %= 2**32
    startup = settings.startup_trials
    if settings.sampler == "tpe":
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)
    if settings.sampler == "gp":
        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup)
    if settings.sampler == "cmaes":
        return optuna.samplers.CmaEsSampler(seed=seed, n_startup_trials=startup, warn_independent_sampling=False)
    # A grid's trials are laid out beforehand: nothing is left to draw.
    return optuna.samplers.RandomSampler(seed=seed)


def pruner(settings: StudySettings) -> optuna.pruners.BasePruner:
    """The pruner by its name in the settings."""
    if settings.pruner == "median":
        return optuna.pruners.MedianPruner(settings.startup_trials, settings.warmup_steps)
    if settings.pruner == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=max(1, settings.warmup_steps))
    if settings.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=max(1, settings.warmup_steps))
    return optuna.pruners.NopPruner()
