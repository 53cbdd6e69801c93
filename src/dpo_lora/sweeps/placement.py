"""How many trials run at a time, and what of the machine each one gets."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass

import psutil

from dpo_lora.choices import Device
from dpo_lora.schema import SweepSettings

# A trial on a CPU keeps the base model, gradients and the imported libraries: a slot without this much
# memory free would end in the kernel killing trials.
_BYTES_PER_CPU_SLOT = 4 * 2**30


@dataclass(frozen=True)
class Slot:
    """Room for one trial at a time."""

    number: int
    gpu: str | None  # as CUDA_VISIBLE_DEVICES names it
    threads: int  # CPU threads a trial in it may use

    @property
    def environment(self) -> dict[str, str]:
        """What a trial's process is told: its GPU alone."""
        return {} if self.gpu is None else {"CUDA_VISIBLE_DEVICES": self.gpu}


def slots(sweep: SweepSettings, device: Device, trials: int) -> list[Slot]:
    """The slots for ``trials`` trials on this machine, no more than can be used.

    With GPUs, ``sweep.per_gpu`` a GPU; without, one a physical core as far as memory allows: several
    small trainings on a thread each finish sooner than one after the other on all threads.
    ``sweep.slots`` beats both; on GPUs its slots take them in turn.
    """
    gpus = [] if device is Device.cpu else visible_gpus()
    cores = _cores()
    if sweep.slots is not None:
        count = sweep.slots
    elif gpus:
        count = len(gpus) * sweep.per_gpu
    else:
        count = min(cores, psutil.virtual_memory().available // _BYTES_PER_CPU_SLOT)
    count = max(1, min(count, trials))
    threads = max(1, cores // count)
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked) > 0:  # what people set for one process holds for each trial
        threads = min(threads, int(asked))
    return [Slot(n, gpus[n % len(gpus)] if gpus else None, threads) for n in range(count)]


def visible_gpus() -> list[str]:
    """The GPUs this process may use, without starting CUDA: a process that has done so cannot be forked."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [gpu for gpu in named.split(",") if gpu.strip() and gpu.strip() != "-1"]
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in listed.stdout.splitlines() if line.strip().isdigit()]


def _cores() -> int:
    """Physical cores this process may run on."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))
