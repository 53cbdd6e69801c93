"""Sweepers: which settings a sweep tries. Presets in conf/hydra/sweeper extend what is registered here."""

from dataclasses import dataclass, field
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from hydra_plugins.dpo_lora_sweeps.launchers import TrialLauncher


class GridSweeper(BasicSweeper):
    """Hydra's own grid, whose failed trials end neither the sweep nor the batches after them.

    With one of our launchers it exits with the number of failed trials; with any other it is Hydra's.
    """

    def sweep(self, arguments: list[str]) -> Any:
        if not isinstance(self.launcher, TrialLauncher):
            return super().sweep(arguments)
        assert self.config is not None and self.hydra_context is not None
        OmegaConf.save(self.config, self.launcher.sweep.directory.path / "multirun.yaml")
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides([*self._parse_config(), *arguments])
        first = 0
        for batch in self.split_arguments(overrides, self.max_batch_size):
            self.launcher.launch(batch, initial_job_idx=first)
            first += len(batch)
        print(self.launcher.sweep.directory.path, flush=True)  # noqa: T201
        if code := self.launcher.sweep.close():
            raise SystemExit(code)
        return None


@dataclass
class GridConfig:
    _target_: str = "hydra_plugins.dpo_lora_sweeps.sweepers.GridSweeper"
    max_batch_size: int | None = None
    params: dict[str, str] | None = field(default_factory=dict)


ConfigStore.instance().store(group="hydra/sweeper", name="dpo_lora_grid", node=GridConfig, provider="dpo-lora")
