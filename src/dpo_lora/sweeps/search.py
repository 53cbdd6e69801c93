"""How a study searches: its settings, their rules, Optuna's samplers and pruners by name, and the journal it keeps."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from hydra.core.override_parser.types import Override
from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.study import StudyDirection

from dpo_lora import objectives
from dpo_lora.errors import UserError
from dpo_lora.sweeps import space
from dpo_lora.sweeps.sweep import Sweep
from dpo_lora.sweeps.trial import Trial, read_all

SAMPLERS = ("tpe", "gp", "cmaes", "random", "grid")
PRUNERS = ("none", "median", "halving", "hyperband")
_SPACE, _OBJECTIVES = "space", "objectives"  # kept beside the study


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


def searched(swept: list[Override], settings: StudySettings, sweep: Sweep) -> dict[str, BaseDistribution]:
    """What a study draws from, by name.

    Raises:
        UserError: there is nothing to search, nothing to learn from, or the study could not prune; names the setting.
    """
    known = {override.get_key_element(): space.distribution(override) for override in swept}
    _check(known, settings, sweep)
    return known


def _check(known: dict[str, BaseDistribution], settings: StudySettings, sweep: Sweep) -> None:
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
    for folder in settings.warm_start:
        if not read_all(Path(folder)):
            raise UserError(
                f"hydra.sweeper.warm_start names {folder}, which holds no trials: name a sweep's directory."
            )
    if settings.sampler == "grid":
        combinations(known)
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


def total(known: dict[str, BaseDistribution], settings: StudySettings) -> int:
    """Settings that the study tries in all."""
    return min(settings.trials, len(combinations(known))) if settings.sampler == "grid" else settings.trials


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


def open_study(
    folder: Path, settings: StudySettings, names: list[str], known: dict[str, BaseDistribution]
) -> optuna.Study:
    """The study whose journal lies in ``folder``, begun or gone on with.

    Args:
        names: of the objectives.

    Raises:
        UserError: it searches another space, or by other objectives.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    lock: Any = _KernelLock(folder / ".study.lock")  # its base class is not public
    directions = [StudyDirection[objectives.DIRECTIONS[name].upper()] for name in names]
    study = optuna.create_study(
        study_name="study",
        storage=JournalStorage(JournalFileBackend(str(folder / "study.journal"), lock_obj=lock)),
        directions=directions,
        pruner=pruner(settings),
        load_if_exists=True,
    )
    if changed := _changes(study, names, known):
        raise UserError(
            f"{folder} holds a study of {'; '.join(changed)}. It cannot go on with another space or other objectives: "
            "what it has learnt does not hold there. Give the earlier ones again, or start a new study that knows what "
            f"these trials came to: hydra.sweep.dir=FOLDER 'hydra.sweeper.warm_start=[{folder}]'"
        )
    if _SPACE not in study.user_attrs:
        study.set_user_attr(_SPACE, {name: distribution_to_json(dist) for name, dist in known.items()})
        study.set_user_attr(_OBJECTIVES, names)
    return study


def _changes(study: optuna.Study, names: list[str], known: dict[str, BaseDistribution]) -> list[str]:
    """What ``study`` searched otherwise before, in words; a new study says nothing."""
    # A study of before its space was kept: as its trials were drawn.
    before = {name: dist for trial in study.get_trials(deepcopy=False) for name, dist in trial.distributions.items()}
    before |= {name: json_to_distribution(text) for name, text in study.user_attrs.get(_SPACE, {}).items()}
    changed = [
        f"{name}={space.words(before[name])}, and now {space.words(dist)}"
        for name, dist in known.items()
        if name in before and before[name] != dist
    ]
    by = study.user_attrs.get(_OBJECTIVES, names)
    directions = [objectives.DIRECTIONS[name] for name in names]
    if by != names or [direction.name.lower() for direction in study.directions] != directions:
        was = f"[{','.join(by)}]" if by != names else "others"
        changed.append(f"sweep.objectives={was}, and now [{','.join(names)}]")
    return changed


class _KernelLock:
    """Optuna's own lock files outlive a killed process by 30 s; the kernel lets go of this one at once."""

    def __init__(self, file: Path):
        self._lock = FileLock(file)

    def acquire(self) -> bool:
        self._lock.acquire()
        return True

    def release(self) -> None:
        self._lock.release()
