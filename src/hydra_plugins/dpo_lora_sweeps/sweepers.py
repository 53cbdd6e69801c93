"""Sweepers: which settings a sweep tries. Presets in conf/hydra/sweeper extend what is registered here."""

import importlib.util
from dataclasses import dataclass, field
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import MISSING, OmegaConf

from hydra_plugins.dpo_lora_sweeps.launchers import PlanLauncher, TrialLauncher


class GridSweeper(BasicSweeper):
    """Hydra's own grid, whose failed trials end neither the sweep nor the batches after them.

    With one of our launchers it exits with the number of failed trials; with any other it is Hydra's.
    """

    def sweep(self, arguments: list[str]) -> Any:
        assert self.config is not None and self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides([*self._parse_config(), *arguments])
        if isinstance(self.launcher, PlanLauncher):
            return self.launcher.launch(self.split_arguments(overrides, None)[0], initial_job_idx=0)
        if not isinstance(self.launcher, TrialLauncher):
            return super().sweep(arguments)
        OmegaConf.save(self.config, self.launcher.sweep.directory.path / "multirun.yaml")
        first = 0
        for batch in self.split_arguments(overrides, self.max_batch_size):
            self.launcher.launch(batch, initial_job_idx=first)
            first += len(batch)
        return _finish(self.launcher)


class StudySweeper(BasicSweeper):
    """Optuna chooses the settings, our launchers run them."""

    def __init__(self, params: Any, **settings: Any):
        super().__init__(max_batch_size=None, params=params)
        self.settings = settings

    def sweep(self, arguments: list[str]) -> Any:
        from dpo_lora.errors import UserError

        assert self.config is not None and self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        # By name, so that a value on the command line beats the preset's.
        given = {o.get_key_element(): o for o in parser.parse_overrides([*self._parse_config(), *arguments])}
        fixed = [str(o.input_line) for o in given.values() if not o.is_sweep_override()]
        swept = [o for o in given.values() if o.is_sweep_override()]
        if isinstance(self.launcher, PlanLauncher):
            return self.launcher.sweep.plan([fixed], int(self.settings["trials"]))
        if not isinstance(self.launcher, TrialLauncher):
            raise UserError("A study runs on hydra/launcher=local, slurm or ray.")
        if importlib.util.find_spec("optuna") is None:
            raise UserError("A study needs optuna: pip install 'dpo-lora[study]'.")
        from dpo_lora.sweeps.search import StudySettings
        from dpo_lora.sweeps.study import Study

        sweep = self.launcher.sweep
        OmegaConf.save(self.config, sweep.directory.path / "multirun.yaml")
        study = Study(sweep, StudySettings(**self.settings), fixed, swept)
        expected = study.settings.trials * sweep.settings.repeats
        try:
            with sweep.processes(self.launcher.processes, expected) as processes:
                sweep.run(study, study.known(), expected, processes)
        finally:
            sweep.extra["study"] = study.facts()
        return _finish(self.launcher)


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
