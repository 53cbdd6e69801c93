"""Sweepers: which settings a sweep tries. Presets in conf/hydra/sweeper extend what is registered here."""

import importlib.util
from dataclasses import dataclass, field
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import MISSING

from hydra_plugins.dpo_lora_sweeps.launchers import PlanLauncher, TrialLauncher


class GridSweeper(BasicSweeper):
    """Hydra's own grid, whose failed trials end neither the sweep nor the batches after them.

    With one of our launchers it exits with the number of failed trials; with any other it is Hydra's.
    """

    def sweep(self, arguments: list[str]) -> Any:
        if not isinstance(self.launcher, TrialLauncher | PlanLauncher):
            return super().sweep(arguments)
        from dpo_lora.errors import UserError

        with self.launcher.sweep.refusing():
            overrides = _parsed(self, arguments)
            for endless in (o for o in overrides if o.is_sweep_override() and not o.is_discrete_sweep()):
                raise UserError(
                    f"{endless.input_line} has no end of values to try. List some, such as "
                    f"{endless.get_key_element()}=VALUE,VALUE, or let a study choose among them: hydra/sweeper=study"
                )
            batches = self.split_arguments(overrides, self.max_batch_size)
            if isinstance(self.launcher, PlanLauncher):
                return self.launcher.launch([words for batch in batches for words in batch], initial_job_idx=0)
            self.launcher.sweep.run_all(batches, self.launcher.processes)
        return _finish(self.launcher)


class StudySweeper(BasicSweeper):
    """Optuna chooses the settings, our launchers run them."""

    def __init__(self, params: Any, **settings: Any):
        super().__init__(max_batch_size=None, params=params)
        self.settings = settings

    def sweep(self, arguments: list[str]) -> Any:
        from dpo_lora.errors import UserError

        if not isinstance(self.launcher, TrialLauncher | PlanLauncher):
            raise UserError("A study runs on hydra/launcher=local, slurm or ray.")
        sweep = self.launcher.sweep
        with sweep.refusing():
            if importlib.util.find_spec("optuna") is None:
                raise UserError("A study needs optuna: pip install 'dpo-lora[study]'.")
            from dpo_lora.sweeps import search
            from dpo_lora.sweeps.study import Study

            # By name, so that a value on the command line beats the preset's.
            given = {o.get_key_element(): o for o in _parsed(self, arguments)}
            fixed = [str(o.input_line) for o in given.values() if not o.is_sweep_override()]
            settings = search.StudySettings(**self.settings)
            known = search.searched([o for o in given.values() if o.is_sweep_override()], settings, sweep)
            total = search.total(known, settings)
            if isinstance(self.launcher, PlanLauncher):
                return self.launcher.show([fixed], total)
            expected = total * sweep.settings.repeats
            with sweep.processes(self.launcher.processes, expected) as processes:
                study = Study(sweep, settings, fixed, known)
                try:
                    sweep.run(study, study.known(), expected, processes)
                finally:
                    sweep.extra["study"] = study.facts()
        return _finish(self.launcher)


def _parsed(sweeper: BasicSweeper, arguments: list[str]) -> list[Override]:
    """The sweeper's own parameters, then the command line's words."""
    assert sweeper.hydra_context is not None
    parser = OverridesParser.create(config_loader=sweeper.hydra_context.config_loader)
    return parser.parse_overrides([*sweeper._parse_config(), *arguments])


def _finish(launcher: TrialLauncher) -> None:
    """Close the sweep; its directory as the last line on stdout, and its exit code."""
    code = launcher.sweep.close()
    print(launcher.sweep.directory.path, flush=True)  # noqa: T201
    if code:
        raise SystemExit(code)


@dataclass
class GridConfig:
    _target_: str = "hydra_plugins.dpo_lora_sweeps.sweepers.GridSweeper"
    max_batch_size: int | None = None
    params: dict[str, str] | None = field(default_factory=dict)


ConfigStore.instance().store(group="hydra/sweeper", name="dpo_lora_grid", node=GridConfig, provider="dpo-lora")


@dataclass
class StudyConfig:
    _target_: str = "hydra_plugins.dpo_lora_sweeps.sweepers.StudySweeper"
    sampler: str = MISSING  # tpe, gp, cmaes, random or grid
    pruner: str = MISSING  # none, median, halving or hyperband
    trials: int = MISSING  # in all, over every time the study is started
    startup_trials: int = MISSING  # random ones before sampler and pruner act
    warmup_steps: int = MISSING  # optimizer steps before a trial may be pruned
    seed: int = MISSING
    warm_start: list[str] = MISSING  # earlier sweeps' directories
    params: dict[str, str] | None = MISSING  # name -> Hydra's sweep syntax


ConfigStore.instance().store(group="hydra/sweeper", name="dpo_lora_study", node=StudyConfig, provider="dpo-lora")
