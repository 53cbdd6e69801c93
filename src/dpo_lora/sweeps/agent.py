"""Runs one job on a cluster's node: a process of its own, told what to do through files that all nodes see.

The sweep's process writes a token into ``.heartbeat`` and touches the file while it lives. An agent
whose sweep has fallen silent, or whose token is no longer the one there, stops its trial with a
checkpoint: nobody waits for it any more, and the next sweep wants its directory. It does the same
shortly before its job's time is up; the sweep then submits another job, which goes on from there.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from dpo_lora import checkpoints
from dpo_lora.rundir import RunDir

SILENCE = 60.0  # seconds without a heartbeat after which a sweep counts as dead
_TICK = 0.2
_GRACE = 30.0  # seconds for a checkpoint when the sweep is gone
OUT_OF_TIME = 75  # exit code: the job's time was up, and its trial came further (EX_TEMPFAIL of sysexits.h)
_MODULES = {"trial": "dpo_lora.sweeps.worker", "shared": "dpo_lora.sweeps.shared"}


@dataclass(frozen=True)
class Order:
    """What an agent is sent; paths are the same on every node."""

    kind: str
    path: str
    log: str
    control: str  # folder of this job's messages: ``begun`` from the agent, ``signal`` to it
    heartbeat: str
    token: str
    threads: int
    seconds: float | None = None  # after which the cluster ends the job


def spare(seconds: float) -> float:
    """Seconds of a job's time that are left for the step at hand and its checkpoint."""
    return min(max(60.0, seconds / 10), 240.0, seconds / 2)


def run(order: Order) -> int:
    """Carry out ``order``; the exit code, minus the signal's number for a killed process, or `OUT_OF_TIME`."""
    left = math.inf if order.seconds is None else order.seconds - spare(order.seconds)
    deadline = time.monotonic() + left
    watch = _Heartbeat(Path(order.heartbeat), order.token)
    if order.kind == "trial":
        _wait_for_predecessor(Path(order.path))
    before = _step(order)
    control = Path(order.control)
    threads = str(order.threads)
    with open(order.log, "ab") as log:  # noqa: PTH123
        child = subprocess.Popen(
            [sys.executable, "-m", _MODULES[order.kind], order.path],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
            start_new_session=True,
        )
    (control / "begun").touch()
    kill_at = math.inf
    is_late = False
    try:
        while child.poll() is None:
            time.sleep(_TICK)
            if (control / "signal").exists():
                number = int((control / "signal").read_text())
                (control / "signal").unlink()
                _signal(child, number)
            elif kill_at == math.inf:
                is_late = time.monotonic() > deadline
                if is_late or watch.is_lost():
                    _signal(child, signal.SIGTERM)
                    kill_at = time.monotonic() + (spare(order.seconds or 0.0) / 2 if is_late else _GRACE)
            if time.monotonic() > kill_at:
                _signal(child, signal.SIGKILL)
    finally:
        _signal(child, signal.SIGKILL)  # what the trial left behind; all of it, where this agent is stopped
    code = child.wait()
    return OUT_OF_TIME if is_late and code != 0 and _step(order) > before else code


def _step(order: Order) -> int:
    """How far the trial has come: the step of its newest checkpoint."""
    found = checkpoints.find_whole(RunDir(Path(order.path)).checkpoints) if order.kind == "trial" else None
    return 0 if found is None else checkpoints.step_of(found)


def _signal(child: subprocess.Popen[bytes], number: int) -> None:
    try:
        os.killpg(child.pid, number)
    except ProcessLookupError:
        return


def _wait_for_predecessor(path: Path) -> None:
    """An agent of an earlier sweep may still be writing its checkpoint."""
    deadline = time.monotonic() + SILENCE
    while RunDir(path).is_live() and time.monotonic() < deadline:
        time.sleep(_TICK)


class _Heartbeat:
    """Changes of a file, timed by this node's own clock: those of other nodes may differ."""

    def __init__(self, file: Path, token: str):
        self.file, self.token = file, token
        self.seen, self.at = 0, time.monotonic()

    def is_lost(self) -> bool:
        try:
            if self.file.read_text(encoding="utf-8") != self.token:
                return True
            changed = self.file.stat().st_mtime_ns
        except FileNotFoundError:
            return True
        if changed != self.seen:
            self.seen, self.at = changed, time.monotonic()
        return time.monotonic() - self.at > SILENCE
