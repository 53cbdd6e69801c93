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

from dpo_lora import rules
from dpo_lora.errors import UserError
from dpo_lora.provenance import command
from dpo_lora.rundir import FAILED, FINISHED, INTERRUPTED, now
from dpo_lora.schema import Device, SweepSettings, TrackingSettings
from dpo_lora.settings import from_hydra
from dpo_lora.sweeps import summary, table
from dpo_lora.sweeps.directory import Identity, SweepDir, same
from dpo_lora.sweeps.placement import Slot, slots
from dpo_lora.sweeps.processes import Processes
from dpo_lora.sweeps.queue import Listed, Queue, Source
from dpo_lora.sweeps.status import retry_advice
from dpo_lora.sweeps.trial import Trial, read_all
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
    extra: dict[str, Any] = field(default_factory=dict)  # a sweeper's own part of the summary
    stopped: int | None = None  # exit code of the signal that stopped the sweep

    @classmethod
    def open(cls, config: DictConfig, loader: ConfigLoader, *, only_plan: bool = False) -> Sweep:
        """Claim the directory of the sweep that ``config`` describes and tell Hydra about it.

        Args:
            config: composed for multirun, ``hydra`` node included; ``hydra.sweep.dir`` is set.
            only_plan: write nothing and hold nothing; the directory may not exist.

        Raises:
            UserError: it is running already, or sweeps over something that is the same for all trials.
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
        identity = Identity({str(k): v for k, v in base.items()}, varied, kind)
        if only_plan:
            known = target or same(outputs, identity.digest())
            return cls(SweepDir(known or outputs / "new"), settings, varied, config, loader)
        facts = {
            "command": command(),
            "objectives": settings.objectives,
            "confidence": float(config.eval.confidence),
        }
        directory = SweepDir.claim(outputs, f"dpo-{_name(config)}-lora-sweep", identity, target, facts)
        config.hydra.sweep.dir = str(directory.path)
        return cls(directory, settings, varied, config, loader)

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
            settings = from_hydra(cfg)
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(explain(error)) from error
        if settings.run_dir is not None:
            raise UserError(f"run_dir={settings.run_dir} is one directory, and a sweep's trials need one each.")
        values = dict(o.split("=", 1) for o in overrides if "=" in o)
        varied = {name: values[name] for name in self.varied if name in values}
        return [
            Trial.of(
                replace(settings, seed=settings.seed + repeat),
                self.directory.path,
                [*overrides, f"seed={settings.seed + repeat}"] if repeat else list(overrides),
                {name: value for name, value in varied.items() if name != "seed"},
            )
            for repeat in range(self.settings.repeats)
        ]

    def run_all(self, jobs: Sequence[Sequence[str]], start: StartProcesses) -> list[list[Trial]]:
        """Run the trials of a list of settings; the trials, by setting."""
        with self.processes(start, len(jobs) * self.settings.repeats) as processes:
            try:
                groups = [self.compose(overrides) for overrides in jobs]
            except UserError:
                self.directory.abandon()
                raise
            trials = list({trial.id: trial for group in groups for trial in group}.values())
            for trial in trials:
                trial.write()
            self.run(Listed(trials), trials, len(trials), processes)
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
        console = table.terminal()
        places = processes.free()
        started, begun = now(), time.monotonic()
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
                sittings.append({**sitting, "slots": places, "energy_joules": processes.energy()})
        if queue.stopped is not None:
            self.stopped = 128 + queue.stopped

    def plan(self, jobs: Sequence[Sequence[str]], settings: int) -> None:
        """Say what the sweep would do; ``settings`` in all, of which ``jobs`` are known."""
        from dpo_lora.sweeps import plan

        trials = list({t.id: t for overrides in jobs for t in self.compose(overrides)}.values())
        is_listed = settings == len(jobs)
        expected = len(trials) if is_listed else settings * self.settings.repeats
        begun = trials if is_listed else read_all(self.directory.path)
        room = slots(self.settings, Device(self.config.train.device), expected)
        known = self.directory.path if self.directory.summary_file.exists() else None
        plan.show(trials, expected, begun, room, Path(self.config.outputs), known)

    def summarise(self) -> dict[str, Any]:
        """Write sweep.json, trials.csv, ``best`` and the report; returns the summary."""
        confidence = float(self.config.eval.confidence)
        facts = summary.build(self.directory, self.settings.objectives, confidence, live=False)
        counts = facts["counts"]
        is_cut_off = self.stopped is not None or set(counts) - {FINISHED, FAILED, "pruned"}
        status = INTERRUPTED if is_cut_off else FAILED if FAILED in counts else FINISHED
        return summary.write(self.directory, {**facts, **self.extra, "status": status, "ended": now()})

    def close(self) -> int:
        """Show the ranking and what failed, let go of the directory; the exit code.

        0: every trial has finished or was pruned. Else the number of failed trials, at most 100; for
        a sweep that was stopped, 128 and the signal's number.
        """
        from dpo_lora.reports import sweep as report

        facts = self.summarise()
        page = report.write(self.directory.path)
        console = table.terminal()
        tracking = OmegaConf.to_object(self.config.tracking)
        assert isinstance(tracking, TrackingSettings)
        sweep_run(tracking, self.directory.path, summary.table_rows(facts), page)
        if facts["ranking"]:
            console.print()
            console.print(table.ranking_table(facts))
        failed = [line for line in facts["trials"] if line["status"] == FAILED]
        for line in failed:
            console.print(f"\nfailed: {line['id']}  {table.label(line)}", highlight=False, soft_wrap=True)
            console.print(f"  {line['reason']}", highlight=False, markup=False, soft_wrap=True)
            for said in line["log"][-3:]:
                console.print(f"  | {said}", highlight=False, markup=False, soft_wrap=True)
        again = f"dpo-lora resume {self.directory.path}"
        if self.stopped is not None:
            counts = ", ".join(f"{number} {name}" for name, number in facts["counts"].items())
            console.print(f"\nStopped: {counts}. Go on: {again}", highlight=False, soft_wrap=True)
        if failed:
            console.print(f"\n{retry_advice(again, failed)}", highlight=False, soft_wrap=True)
        self.directory.release()
        return self.stopped if self.stopped is not None else min(len(failed), MAX_FAILED_CODE)


def objective(trials: list[Trial], names: list[str]) -> list[float] | None:
    """The objectives of one setting, meaned over its seeds; None where a trial has none."""
    from dpo_lora import objectives

    if any(trial.status(live=False) != FINISHED for trial in trials):
        return None
    figures = [objectives.read(trial.run) for trial in trials]
    if any(name not in one for one in figures for name in names):
        return None
    return [sum(one[name] for one in figures) / len(figures) for name in names]


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
