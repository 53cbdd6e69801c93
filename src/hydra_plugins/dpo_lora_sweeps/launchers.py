"""Launchers: where a sweep's trials run. Presets in conf/hydra/launcher extend what is registered here."""

# No postponed annotations: Hydra executes a plugin's module before sys.modules has it, where dataclasses would
# look their names up.

import importlib.util
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import MISSING, DictConfig

if TYPE_CHECKING:
    from dpo_lora.sweeps.directory import SweepDir
    from dpo_lora.sweeps.placement import Slot
    from dpo_lora.sweeps.processes import Processes
    from dpo_lora.sweeps.sweep import Sweep


class TrialLauncher(Launcher):
    """Runs jobs as trials: named by what they compute, each in its own process, resumed or skipped."""

    sweep: "Sweep"

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Claim the sweep's directory; from here on ``config.hydra.sweep.dir`` names it."""
        from dpo_lora.sweeps.sweep import Sweep

        self.sweep = Sweep.open(config, hydra_context.config_loader)

    @abstractmethod
    def processes(self, slots: "list[Slot]", sweep: "SweepDir") -> "Processes":
        """What runs the trials."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run a batch; a setting's return value is its first objective, over its seeds."""
        from dpo_lora.errors import UserError
        from dpo_lora.sweeps.trial import objective

        with self.sweep.refusing():
            groups = self.sweep.run_all([job_overrides], self.processes)
        self.sweep.summarise()
        if self.sweep.stopped is not None:
            raise SystemExit(self.sweep.close())
        results = []
        for overrides, trials in zip(job_overrides, groups, strict=True):
            value = objective(trials, self.sweep.settings.objectives)
            job = JobReturn(overrides=list(overrides), working_dir=str(self.sweep.directory.path))
            job.status = JobStatus.FAILED if value is None else JobStatus.COMPLETED
            reasons = [o.reason for t in trials if (o := t.outcome()) and o.reason]
            job.return_value = UserError("; ".join(reasons)) if value is None else value[0]
            results.append(job)
        return results


class LocalLauncher(TrialLauncher):
    """Trials on this machine."""

    def processes(self, slots: "list[Slot]", sweep: "SweepDir") -> "Processes":
        from dpo_lora.sweeps.processes import LocalProcesses

        return LocalProcesses(slots)


class SlurmLauncher(TrialLauncher):
    """One SLURM job a trial, through submitit."""

    def __init__(self, **settings: Any):
        self.settings = settings

    def processes(self, slots: "list[Slot]", sweep: "SweepDir") -> "Processes":
        _need("submitit", "slurm")
        from dpo_lora.sweeps.slurm import SlurmProcesses, SlurmSettings

        return SlurmProcesses(sweep, SlurmSettings(**self.settings))


class RayLauncher(TrialLauncher):
    """One Ray task a trial."""

    def __init__(self, **settings: Any):
        self.settings = settings

    def processes(self, slots: "list[Slot]", sweep: "SweepDir") -> "Processes":
        _need("ray", "ray")
        from dpo_lora.sweeps.ray_cluster import RayProcesses, RaySettings

        return RayProcesses(sweep, RaySettings(**self.settings))


class PlanLauncher(Launcher):
    """Runs nothing: says what a sweep would do."""

    sweep: "Sweep"

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from dpo_lora.sweeps.sweep import Sweep

        self.sweep = Sweep.open(config, hydra_context.config_loader, only_plan=True)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        self.show(job_overrides)
        return []

    def show(self, jobs: Sequence[Sequence[str]], settings: int | None = None) -> None:
        """Say it of the settings ``jobs``; or of that many, which ``jobs`` is like."""
        from dpo_lora.sweeps import plan

        plan.show(self.sweep, jobs, settings)


def _need(package: str, extra: str) -> None:
    from dpo_lora.errors import UserError

    if importlib.util.find_spec(package) is None:
        raise UserError(f"hydra/launcher={extra} needs {package}: pip install 'dpo-lora[{extra}]'.")


@dataclass
class LocalConfig:
    _target_: str = "hydra_plugins.dpo_lora_sweeps.launchers.LocalLauncher"


@dataclass
class PlanConfig:
    _target_: str = "hydra_plugins.dpo_lora_sweeps.launchers.PlanLauncher"


@dataclass
class SlurmConfig:
    _target_: str = "hydra_plugins.dpo_lora_sweeps.launchers.SlurmLauncher"
    cluster: str = MISSING  # slurm, or local: the same path on this machine
    jobs: int = MISSING
    partition: str | None = MISSING
    gpus: int = MISSING  # a trial
    cpus: int = MISSING  # a trial
    memory_gb: int = MISSING
    minutes: int = MISSING
    parameters: dict[str, Any] = MISSING  # further sbatch options


@dataclass
class RayConfig:
    _target_: str = "hydra_plugins.dpo_lora_sweeps.launchers.RayLauncher"
    address: str | None = MISSING
    jobs: int = MISSING
    gpus: float = MISSING  # a trial; 0.5 puts two on one
    cpus: float = MISSING  # a trial
    resources: dict[str, float] = MISSING


def _register(name: str, node: Any) -> None:
    ConfigStore.instance().store(group="hydra/launcher", name=name, node=node, provider="dpo-lora")


_register("dpo_lora_local", LocalConfig)
_register("dpo_lora_slurm", SlurmConfig)
_register("dpo_lora_ray", RayConfig)
_register("dpo_lora_plan", PlanConfig)
