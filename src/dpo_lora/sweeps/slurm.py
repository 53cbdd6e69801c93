"""Jobs through SLURM, or through submitit's local executor, which behaves like it on one machine."""

from __future__ import annotations

import shutil
import signal
from dataclasses import dataclass
from typing import Any

import submitit

from dpo_lora.errors import UserError
from dpo_lora.sweeps import agent
from dpo_lora.sweeps.agent import Order
from dpo_lora.sweeps.cluster import ClusterProcesses
from dpo_lora.sweeps.directory import SweepDir

_LAST_CALL = 20  # seconds before the end at which submitit ends a job itself; by then an agent has stopped its trial


@dataclass(frozen=True)
class SlurmSettings:
    """What one trial asks of the cluster; the values lie in conf/hydra/launcher/slurm.yaml."""

    cluster: str  # slurm, or local
    jobs: int  # in the queue or running at a time
    partition: str | None
    gpus: int  # a trial
    cpus: int  # a trial
    memory_gb: int
    minutes: int  # after which SLURM ends the job; its trial goes on from its checkpoint in another
    parameters: dict[str, Any]  # further sbatch options


class SlurmProcesses(ClusterProcesses):
    """One SLURM job a trial."""

    def __init__(self, sweep: SweepDir, settings: SlurmSettings):
        if settings.cluster == "slurm" and shutil.which("sbatch") is None:
            raise UserError(
                "hydra/launcher=slurm, but there is no sbatch here. Start the sweep on a login node, or try it on this "
                "machine with hydra.launcher.cluster=local."
            )
        super().__init__(sweep, settings.jobs, settings.cpus, settings.minutes * 60.0)
        self._executor = submitit.AutoExecutor(folder=sweep.path / ".slurm" / "%j", cluster=settings.cluster)
        common: dict[str, Any] = {
            "timeout_min": settings.minutes,
            "name": "dpo-lora",
        }
        if settings.cluster == "slurm":
            common |= {
                "cpus_per_task": settings.cpus,
                "gpus_per_node": settings.gpus,
                "mem_gb": settings.memory_gb,
                "slurm_partition": settings.partition,
                "slurm_signal_delay_s": _LAST_CALL,
                "slurm_additional_parameters": dict(settings.parameters),
            }
        self._executor.update_parameters(**{k: v for k, v in common.items() if v is not None})

    def _submit(self, order: Order) -> submitit.Job[int]:
        return self._executor.submit(agent.run, order)

    def _code(self, handle: submitit.Job[int]) -> int | None:
        if not handle.done():
            return None
        try:
            return int(handle.result())
        except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError):
            return -signal.SIGKILL

    def _cancel(self, handle: submitit.Job[int]) -> None:
        handle.cancel(check=False)
