"""A sweep whose next settings follow from the results so far: Optuna's samplers and pruners over our trials.

The study lives in ``study.journal`` in the sweep's directory. Each trial is drawn with a generator
seeded by the study's seed and the trial's number, and waits at each evaluation for the pruner: so a
study that runs one trial at a time comes out the same however often it is killed and resumed.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from dpo_lora import objectives
from dpo_lora.choices import Retry
from dpo_lora.errors import UserError
from dpo_lora.rundir import FAILED, FINISHED, INTERRUPTED
from dpo_lora.sweeps import pruning, search, space
from dpo_lora.sweeps.sweep import Sweep
from dpo_lora.sweeps.trial import PRUNED, Outcome, Trial, objective, read_all

# Kept beside an Optuna trial: why it does not count, why it failed, where it came from, which one it replaces.
_VOID, _REASON, _FROM, _INSTEAD_OF = "void", "reason", "from", "instead of"


class Study:
    """The source of a sweep's trials."""

    def __init__(
        self, sweep: Sweep, settings: search.StudySettings, fixed: list[str], known: dict[str, BaseDistribution]
    ):
        self.sweep, self.settings, self.fixed, self.space = sweep, settings, fixed, known
        self.names = sweep.settings.objectives
        self.study = search.open_study(sweep.directory.path, settings, self.names, known)
        self._settings_of: dict[int, list[Trial]] = {}  # Optuna's number -> the trials of that setting
        self._waiting: list[Trial] = []
        self.total = search.total(known, settings)
        if settings.sampler == "grid":
            self._lay_out(search.combinations(self.space))
        self._import(settings.warm_start)
        if sweep.settings.retry is Retry.failed:
            self._retry()

    # -- a source of trials

    def next(self) -> Trial | None:
        while not self._waiting:
            number = begun if (begun := self._begun()) is not None else self._draw()
            if number is None:
                return None
            self._compose(number)
        return self._waiting.pop(0)

    def is_done(self) -> bool:
        open_numbers = {t.number for t in self._counted() if t.state is TrialState.RUNNING}
        enough = len(self._counted()) >= self.total
        return enough and not self._waiting and open_numbers <= set(self._settings_of)

    def ended(self, trial: Trial, outcome: Outcome) -> None:
        """Tell the study about every setting whose last trial this was."""
        if outcome.status == INTERRUPTED:
            return
        for number, trials in list(self._settings_of.items()):
            if trial.id in {t.id for t in trials} and self._state(number) is TrialState.RUNNING:
                self._tell(number, trials, outcome)

    def looked(self, running: list[Trial]) -> list[Trial]:
        """Answer what running trials ask; those that were told to stop."""
        hopeless = []
        for trial in running:
            for question in pruning.questions(trial):
                stop = self._is_hopeless(trial, question)
                pruning.answer(trial, question, stop=stop)
                if stop:
                    hopeless.append(trial)
        return hopeless

    def known(self) -> list[Trial]:
        """Trials to prepare shared work for: the fixed settings, where all trials have their model and data."""
        if any(name.split(".", 1)[0] in ("model", "data", "parent", "seed") for name in self.space):
            return []
        try:
            return self.sweep.compose(self.fixed)[:1]
        except UserError:
            return []

    def facts(self) -> dict[str, Any]:
        """For the summary: every counted trial in the order it was drawn, and the Pareto front."""
        rows = [
            {
                "number": ordinal,
                "state": t.state.name.lower(),
                "params": t.params,
                "values": t.values,
                "reason": t.user_attrs.get(_REASON),
            }
            for ordinal, t in enumerate(self._counted())
        ]
        front = [{"params": t.params, "values": t.values} for t in self.study.best_trials]
        return {"sampler": self.settings.sampler, "pruner": self.settings.pruner, "trials": rows, "front": front}

    # -- drawing

    def _counted(self) -> list[FrozenTrial]:
        """Trials of this study's own total: none that was replaced, cut off unborn, or imported."""
        known = self.study.get_trials(deepcopy=False)
        replaced = {t.user_attrs.get(_INSTEAD_OF) for t in known}
        return [
            t
            for t in known
            if t.state is not TrialState.WAITING
            and t.number not in replaced
            and _VOID not in t.user_attrs
            and _FROM not in t.user_attrs
        ]

    def _state(self, number: int) -> TrialState:
        return self.study.get_trials(deepcopy=False)[number].state

    def _begun(self) -> int | None:
        """A trial that a killed process had drawn; one that it had not finished drawing is void."""
        for t in self._counted():
            if t.state is TrialState.RUNNING and t.number not in self._settings_of:
                if set(t.params) == set(self.space):
                    return t.number
                self._set(t.number, _VOID, "the process was killed while it drew this trial")
                self.study.tell(t.number, state=TrialState.FAIL)
        return None

    def _draw(self) -> int | None:
        ordinal = len(self._counted())
        if ordinal >= self.total:
            return None
        self.study.sampler = search.sampler(self.settings, self.settings.seed + 1_000_003 * ordinal)
        return self.study.ask(fixed_distributions=self.space).number

    def _compose(self, number: int) -> None:
        """From sampled values to trials; a setting that cannot be is a failed trial, not the study's end."""
        params = self.study.get_trials(deepcopy=False)[number].params
        overrides = [*self.fixed, *(space.typed(name, value) for name, value in params.items())]
        try:
            trials = self.sweep.compose(overrides)
        except UserError as error:
            self._set(number, _REASON, str(error))
            self.study.tell(number, state=TrialState.FAIL)
            return
        self._settings_of[number] = trials
        for trial in trials:
            trial.write()
            if self.settings.pruner != "none":
                pruning.open_for(trial)
            if trial.status(live=False) == INTERRUPTED and pruning.was_stopped(trial):
                trial.end(Outcome(PRUNED, "stopped early: it lay behind the others at this step"))
        self._waiting += trials

    # -- results

    def _is_hopeless(self, trial: Trial, question: pruning.Question) -> bool:
        value = question.figures.get(self.names[0])
        if value is None or not math.isfinite(value):
            return False  # nothing to judge by: the trial goes on, and its end tells
        numbers = [n for n, trials in self._settings_of.items() if trial.id == trials[0].id]
        view = optuna.trial.Trial(self.study, self.study.get_trials(deepcopy=False)[numbers[0]]._trial_id)
        view.report(value, question.step)
        return view.should_prune()

    def _tell(self, number: int, trials: list[Trial], outcome: Outcome) -> None:
        states = [t.status(live=False) for t in trials]
        if outcome.status == PRUNED:
            self.study.tell(number, state=TrialState.PRUNED)
        elif outcome.status == FAILED:
            self._set(number, _REASON, outcome.reason or "")
            self.study.tell(number, state=TrialState.FAIL)
        elif all(state == FINISHED for state in states):
            values, lacking = objectives.mean([t.run for t in trials], self.names)
            if lacking:  # it may never win
                self._set(number, _REASON, f"{' and '.join(lacking)}: not a finite number, or there is none")
                self.study.tell(number, state=TrialState.FAIL)
            else:
                self.study.tell(number, values)

    def _set(self, number: int, key: str, value: Any) -> None:
        known = self.study.get_trials(deepcopy=False)[number]
        self.study._storage.set_trial_user_attr(known._trial_id, key, value)

    def _retry(self) -> None:
        """Queue the failed settings again; what replaces a failed trial counts in its stead."""
        for t in self._counted():
            if t.state is TrialState.FAIL:
                self.study.enqueue_trial(t.params, user_attrs={_INSTEAD_OF: t.number})

    def _lay_out(self, combinations: list[dict[str, Any]]) -> None:
        """Queue every combination, in order, once for good."""
        known = [t.system_attrs.get("fixed_params", t.params) for t in self.study.get_trials(deepcopy=False)]
        for params in combinations:
            if params not in known:
                self.study.enqueue_trial(params)

    def _import(self, folders: list[str]) -> None:
        """Finished trials of earlier sweeps, as far as their values lie in the space, once each."""
        known = {t.user_attrs.get(_FROM) for t in self.study.get_trials(deepcopy=False)}
        for folder in folders:
            for trial in read_all(Path(folder)):
                source = str(trial.path.resolve())
                params = search.params_of(trial, self.space)
                values = objective([trial], self.names)
                if source in known or params is None or values is None:
                    continue
                self.study.add_trial(
                    optuna.trial.create_trial(
                        params=params, distributions=self.space, values=values, user_attrs={_FROM: source}
                    )
                )
