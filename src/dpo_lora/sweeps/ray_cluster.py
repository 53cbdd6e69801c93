"""Jobs on a Ray cluster, with whole or fractional GPUs."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Any

import ray

from dpo_lora.sweeps import agent
from dpo_lora.sweeps.agent import Order
from dpo_lora.sweeps.cluster import ClusterProcesses
from dpo_lora.sweeps.directory import SweepDir


@dataclass(frozen=True)
class RaySettings:
    """What one trial asks of the cluster; the values lie in conf/hydra/launcher/ray.yaml."""

    address: str | None  # of a running cluster; None: RAY_ADDRESS, else a cluster of this machine alone
    jobs: int  # handed to Ray at a time; Ray runs as many as its resources allow
    gpus: float  # a trial: 0.5 puts two on one GPU
    cpus: float  # a trial
    resources: dict[str, float]  # custom resources of the cluster


class RayProcesses(ClusterProcesses):
    """One Ray task a trial."""

    def __init__(self, sweep: SweepDir, settings: RaySettings):
        super().__init__(sweep, settings.jobs, max(1, int(settings.cpus)))
        self._begun_here = not ray.is_initialized()
        if self._begun_here:
            ray.init(address=settings.address, log_to_driver=False, configure_logging=False, include_dashboard=False)
        # Ray would run a lost task again by itself; whether a trial is retried is the sweep's to say.
        self._task = ray.remote(
            num_cpus=settings.cpus, num_gpus=settings.gpus, resources=dict(settings.resources), max_retries=0
        )(agent.run)

    def _submit(self, order: Order) -> Any:
        return self._task.remote(order)

    def _code(self, handle: Any) -> int | None:
        done, _ = ray.wait([handle], timeout=0)
        if not done:
            return None
        try:
            return int(ray.get(handle))
        except ray.exceptions.RayError:
            return -signal.SIGKILL

    def _cancel(self, handle: Any) -> None:
        ray.cancel(handle, force=True)

    def close(self) -> None:
        super().close()
        if self._begun_here:
            ray.shutdown()
