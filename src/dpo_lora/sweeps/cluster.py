"""Jobs on other machines: what SLURM and Ray share."""

from __future__ import annotations

import os
import shutil
import signal
import time
import uuid
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from dpo_lora.sweeps.agent import OUT_OF_TIME, Order
from dpo_lora.sweeps.directory import SweepDir
from dpo_lora.sweeps.processes import Job

_BEAT = 5.0  # seconds
_TICK = 0.2


class ClusterProcesses(ABC):
    """Hands orders to agents and hears from them; the sweep's directory lies on a file system all nodes see.

    Args:
        seconds: that the cluster gives a job; None: as long as it takes.
    """

    def __init__(self, sweep: SweepDir, jobs: int, threads: int, seconds: float | None = None):
        self.jobs, self.threads, self.seconds = jobs, threads, seconds
        self._folder = sweep.path / ".cluster"
        self._heartbeat = sweep.path / ".heartbeat"
        self._token = uuid.uuid4().hex
        self._beaten = 0.0
        self._handles: dict[str, Any] = {}
        self._orders: dict[str, Order] = {}
        self._told: set[str] = set()  # jobs that were sent a signal
        self._folder.mkdir(exist_ok=True)
        self._heartbeat.write_text(self._token, encoding="utf-8")

    @abstractmethod
    def _submit(self, order: Order) -> Any:
        """Queue ``agent.run(order)``; a handle."""

    @abstractmethod
    def _code(self, handle: Any) -> int | None:
        """None while it waits or runs; the agent's return value; -9 where the agent itself was lost."""

    @abstractmethod
    def _cancel(self, handle: Any) -> None:
        """Take it out of the cluster's queue, or off its node."""

    def open(self) -> None:
        return  # an agent starts with its job

    def free(self) -> int:
        return self.jobs - len(self._handles)

    def start(self, job: Job) -> None:
        control = self._control(job.id)
        shutil.rmtree(control, ignore_errors=True)
        control.mkdir(parents=True)
        self._orders[job.id] = Order(
            kind=job.kind,
            path=str(job.path),
            log=str(job.log),
            control=str(control),
            heartbeat=str(self._heartbeat),
            token=self._token,
            threads=self.threads,
            seconds=self.seconds if job.kind == "trial" else None,  # shared work has no checkpoints to go on from
        )
        self._told.discard(job.id)
        self._handles[job.id] = self._submit(self._orders[job.id])

    def keep(self, path: Path) -> None:
        return  # every job is a process of its own, from its first import on

    def has_begun(self, job: str) -> bool:
        return (self._control(job) / "begun").exists()

    def poll(self, seconds: float) -> list[tuple[str, int]]:
        deadline = time.monotonic() + seconds
        while True:
            if time.monotonic() - self._beaten > _BEAT:
                os.utime(self._heartbeat)
                self._beaten = time.monotonic()
            ended = [(job, code) for job, handle in self._handles.items() if (code := self._code(handle)) is not None]
            again = [job for job, code in ended if code == OUT_OF_TIME and job not in self._told]
            for job in again:
                (self._control(job) / "begun").unlink(missing_ok=True)  # it waits for a machine again
                self._handles[job] = self._submit(self._orders[job])
            ended = [(job, code) for job, code in ended if job not in again]
            for job, _ in ended:
                del self._handles[job]
            if ended or time.monotonic() >= deadline:
                return ended
            time.sleep(min(_TICK, max(0.0, deadline - time.monotonic())))

    def signal(self, job: str, number: int) -> None:
        if job not in self._handles:
            return
        self._told.add(job)
        if not self.has_begun(job):
            self._cancel(self._handles[job])
        else:
            message = self._control(job) / ".signal"
            message.write_text(str(int(number)), encoding="utf-8")
            message.replace(self._control(job) / "signal")

    def energy(self) -> float | None:
        return None  # of other machines, this one knows nothing

    def close(self) -> None:
        for job in self._handles:
            self.signal(job, signal.SIGKILL)
        self._heartbeat.unlink(missing_ok=True)  # agents that have not heard stop by themselves
        self._handles.clear()

    def _control(self, job: str) -> Path:
        return self._folder / job
