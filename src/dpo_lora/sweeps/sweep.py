"""One sweep from its first trial to its summary: what Hydra's launchers and sweepers hand over to."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from dpo_lora import composition, rules
from dpo_lora.choices import Device
from dpo_lora.errors import UserError
from dpo_lora.provenance import command
from dpo_lora.rundir import FAILED, FINISHED, INTERRUPTED, now
from dpo_lora.schema import RunSettings, SweepSettings, TrackingSettings
from dpo_lora.settings import from_hydra
from dpo_lora.sweeps import status, summary, table
from dpo_lora.sweeps.directory import Identity, SweepDir, same
from dpo_lora.sweeps.placement import Slot, slots
from dpo_lora.sweeps.processes import Processes
from dpo_lora.sweeps.queue import Listed, Queue, Source
from dpo_lora.sweeps.trial import PRUNED, Trial, distinct
from dpo_lora.tracking import sweep_run
from dpo_lora.typos import explain

MAX_FAILED_CODE = 100  # exit codes beyond it mean other things to shells

StartProcesses = Callable[[list[Slot], SweepDir], Processes]


@dataclass
class Sweep:
    """A claimed sweep directory and the way to compose trials for it."""

    directory: SweepDir
    settings: SweepSettings
    varied: list[str]
    config: DictConfig
    loader: ConfigLoader
    only_plan: bool = False  # the directory is not held and may not exist
    extra: dict[str, Any] = field(default_factory=dict)  # a sweeper's own part of the summary
    begun: bool = False  # trials have been given to run
    asked: set[str] = field(default_factory=set)  # trials that were composed: an earlier call's may lie there, too
    stopped: int | None = None  # exit code of the signal that stopped the sweep
    _parents: dict[str | None, str | None] = field(default_factory=dict)  # as typed -> as pinned

    @classmethod
    def open(cls, config: DictConfig, loader: ConfigLoader, *, only_plan: bool = False) -> Sweep:
        """Claim the directory of the sweep that ``config`` describes and tell Hydra about it.

        Args:
            config: composed for multirun, ``hydra`` node included; ``hydra.sweep.dir`` is set.
            only_plan: write nothing and hold nothing; the directory may not exist.

        Raises:
            UserError: it is running already, sweeps over something that is the same for all trials, or goes on from
                a run that may be another one tomorrow.
        """
        settings = OmegaConf.to_object(config.sweep)
        assert isinstance(settings, SweepSettings)
        rules.check_sweep(settings)
        varied = _varied(config, loader)
        base = OmegaConf.to_container(config, resolve=False, enum_to_str=True)
        assert isinstance(base, dict)
        given = [o for o in config.hydra.overrides.hydra if str(o).startswith("hydra.sweep.dir=")]
        kind = str(config.hydra.sweeper._target_).rpartition(".")[2]
        outputs, target = Path(config.outputs), Path(config.hydra.sweep.dir) if given else None
        composition.pinned(config.parent, outputs, in_sweep=True)
        identity = Identity({str(k): v for k, v in base.items()}, varied, kind)
        if only_plan:
            known = target or same(outputs, identity.digest())
            return cls(SweepDir(known or outputs / "new"), settings, varied, config, loader, only_plan)
        facts = {
            "command": command(),
            "objectives": settings.objectives,
            "confidence": float(config.eval.confidence),
        }
        directory = SweepDir.claim(outputs, f"dpo-{_name(config)}-lora-sweep", identity, target, facts)
        config.hydra.sweep.dir = str(directory.path)
        return cls(directory, settings, varied, config, loader)

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """Let go of the directory where the user's mistake ends the sweep.

        One that no trial has begun in is left as it was: nothing says that it runs, or can be gone on with.
        """
        try:
            yield
        except (UserError, HydraException, OmegaConfBaseException):
            if self.begun:
                self.summarise()
                self.directory.release()
            elif not self.only_plan:
                self.directory.abandon()
            raise

    def compose(self, overrides: Sequence[str]) -> list[Trial]:
        """One setting's trials, one a seed.

        Raises:
            UserError: there is no such setting, or a rule is broken.
        """
        try:
            cfg = self.loader.load_sweep_config(self.config, list(overrides))
            HydraConfig.instance().set_config(cfg)
            with open_dict(cfg):
                del cfg["hydra"]
            settings = self._pinned(from_hydra(cfg))
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(explain(error)) from error
        if settings.run_dir is not None:
            raise UserError(f"run_dir={settings.run_dir} is one directory, and a sweep's trials need one each.")
        values = dict(o.split("=", 1) for o in overrides if "=" in o)
        varied = {name: values[name] for name in self.varied if name in values}
        trials = [
            Trial.of(
                replace(settings, seed=settings.seed + repeat),
                self.directory.path,
                [*overrides, f"seed={settings.seed + repeat}"] if repeat else list(overrides),
                {name: value for name, value in varied.items() if name != "seed"},
            )
            for repeat in range(self.settings.repeats)
        ]
        self.asked |= {trial.id for trial in trials}
        return trials

    def _pinned(self, settings: RunSettings) -> RunSettings:
        """With the parent that every attempt at the trial has, from whichever folder it is made."""
        name = settings.parent
        if name not in self._parents:
            self._parents[name] = composition.pinned(name, Path(settings.outputs), in_sweep=True)
        return replace(settings, parent=self._parents[name])

    def run_all(self, batches: Sequence[Sequence[Sequence[str]]], start: StartProcesses) -> list[list[Trial]]:
        """Run the trials of lists of settings, one list after the other; the trials, by setting.

        All are composed before any starts: a value that cannot be is told at once, not after hours.
        """
        with self.processes(start, max(map(len, batches)) * self.settings.repeats) as processes:
            composed = [[self.compose(overrides) for overrides in batch] for batch in batches]
            groups = [group for batch in composed for group in batch]
            trials = distinct(groups)
            for trial in trials:
                trial.write()
            for batch in composed:
                if self.stopped is None:
                    self.run(Listed(distinct(batch)), trials, len(trials), processes)
        return groups

    @contextlib.contextmanager
    def processes(self, start: StartProcesses, expected: int) -> Iterator[Processes]:
        """Where ``expected`` trials will run, getting ready at once: they can be composed meanwhile."""
        processes = start(slots(self.settings, Device(self.config.train.device), expected), self.directory)
        try:
            processes.open()
            yield processes
        finally:
            processes.close()

    def run(self, source: Source, known: list[Trial], expected: int, processes: Processes) -> None:
        """Run what ``source`` gives until it is done or a signal stops the sweep.

        Args:
            known: trials to prepare shared work for before any starts.
            expected: trials in all, for the estimate of what is left.
        """
        self.begun = True
        OmegaConf.save(self.config, self.directory.path / "multirun.yaml")
        console = table.terminal()
        places = processes.free()
        started, begun, joules = now(), time.monotonic(), processes.energy()
        with table.Watch(console, self.directory, places) as watch:
            watch.expected = expected
            watch.say(f"Sweep {self.directory.path}: {expected} trials, {places} at a time")
            try:
                queue = Queue(self.directory, self.settings, processes, watch)
                queue.prepare(known, expected)
                queue.run(source)
            finally:
                sitting = {"started": started, "seconds": round(time.monotonic() - begun, 1)}
                sittings = self.extra.setdefault("sittings", list(self.directory.summary().get("sittings", [])))
                after = processes.energy()
                energy = None if joules is None or after is None else round(after - joules, 1)
                sittings.append({**sitting, "slots": places, "energy_joules": energy})
        if queue.stopped is not None:
            self.stopped = 128 + queue.stopped

    def summarise(self) -> dict[str, Any]:
        """Write sweep.json, trials.csv, ``best`` and the report; returns the summary."""
        confidence = float(self.config.eval.confidence)
        facts = summary.build(self.directory, self.settings.objectives, confidence, live=False)
        is_cut_off = self.stopped is not None or self._unfinished(facts)
        became = INTERRUPTED if is_cut_off else FAILED if FAILED in facts["counts"] else FINISHED
        return summary.write(self.directory, {**facts, **self.extra, "status": became, "ended": now()})

    def _unfinished(self, facts: dict[str, Any]) -> list[dict[str, Any]]:
        """Trials of this call that came to no end: stopped from outside, or never begun."""
        ends = (FINISHED, FAILED, PRUNED)
        return [line for line in facts["trials"] if line["id"] in self.asked and line["status"] not in ends]

    def close(self) -> int:
        """Show the ranking and what did not finish, let go of the directory; the exit code.

        0: every trial has finished or was pruned. Else the number of those that have not, at most 100; for
        a sweep that was stopped, 128 and the signal's number.
        """
        from dpo_lora.reports import sweep as report

        facts = self.summarise()
        page = report.write(self.directory.path)
        tracking = OmegaConf.to_object(self.config.tracking)
        assert isinstance(tracking, TrackingSettings)
        sweep_run(tracking, self.directory.path, summary.table_rows(facts), page)
        unfinished = self._unfinished(facts)
        status.show_end(self.directory.path, facts, unfinished, stopped=self.stopped is not None)
        self.directory.release()
        failed = sum(line["status"] == FAILED for line in facts["trials"])
        return self.stopped if self.stopped is not None else min(failed + len(unfinished), MAX_FAILED_CODE)


def _varied(config: DictConfig, loader: ConfigLoader) -> list[str]:
    """Names that the command line or the sweeper's own parameters sweep over."""
    given = list(config.hydra.overrides.task)
    swept = OmegaConf.select(config, "hydra.sweeper.params") or {}
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(given)
    names = [o.get_key_element().lstrip("+") for o in parsed if o.is_sweep_override()]
    names = list(dict.fromkeys([*(str(name) for name in swept), *names]))
    for name in names:
        top = name.split(".", 1)[0]
        if top in ("sweep", "outputs", "run_dir", "tracking"):
            raise UserError(
                f"{name} cannot be swept over: it does not change what a trial computes. Give it one value."
            )
    return names


def _name(config: DictConfig) -> str:
    """The data's name for the directory's; the base of a sweep over data sets may have none."""
    return "sweep" if OmegaConf.is_missing(config.data, "name") else str(config.data.name)
