"""Where trials' processes run: the interface the queue drives, and this machine's answer to it."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dpo_lora.energy import Meter, meter
from dpo_lora.sweeps.placement import Slot

_READ_EVERY = 60.0  # seconds; a processor's counter of energy wraps in minutes


@dataclass(frozen=True)
class Job:
    """One process to run: a trial, or work that trials share."""

    id: str
    path: Path
    log: Path
    kind: str = "trial"  # or "shared"
    alone: bool = False  # nothing else runs meanwhile: it may take the threads of every slot


class Processes(Protocol):
    """Runs jobs somewhere, each in a process that can die alone."""

    def open(self) -> None:
        """Get ready: jobs will come."""

    def free(self) -> int:
        """Jobs that could start now."""

    def start(self, job: Job) -> None: ...

    def keep(self, path: Path) -> None:
        """Later trials share the base model of the plain settings in ``path``; where that can be, it is loaded once."""

    def has_begun(self, job: str) -> bool:
        """Whether the job's process runs: until then it waits for a machine or for imports, and no clock runs."""

    def poll(self, seconds: float) -> list[tuple[str, int]]:
        """Wait up to ``seconds``; the jobs that ended, with exit codes (minus the signal for a killed one)."""

    def signal(self, job: str, number: int) -> None:
        """Tell a job's processes; one that has ended is left in peace."""

    def energy(self) -> float | None:
        """Joules that the devices have taken since this was made; None where they do not say."""

    def close(self) -> None:
        """Leave nothing running."""


@dataclass
class LocalProcesses:
    """Jobs on this machine, forked from one process that has the training stack imported."""

    slots: list[Slot]
    _taken: dict[str, Slot] = field(default_factory=dict)
    _begun: set[str] = field(default_factory=set)
    _server: subprocess.Popen[bytes] | None = None
    _connection: socket.socket | None = None
    _buffer: bytes = b""
    _is_ready: bool = False  # the server has imported the stack
    _kept: Path | None = None
    _meter: Meter = field(init=False)
    _read: float = field(default_factory=time.monotonic)  # when the meter was last read

    def __post_init__(self) -> None:
        self._meter = meter(list(dict.fromkeys(slot.gpu for slot in self.slots if slot.gpu is not None)))

    def open(self) -> None:
        """Start the server, whose imports take seconds; jobs that come meanwhile wait for it."""
        if self._connection is not None:
            return
        ours, theirs = socket.socketpair()
        # One thread: a process whose OpenMP pool has started cannot be forked. Each child sets its own number.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "dpo_lora.sweeps.forkserver", str(theirs.fileno()), str(os.getpid())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the sweep alone, which tells its trials in order
        )
        theirs.close()
        self._connection, self._buffer = ours, b""
        if self._kept is not None:
            self._send({"keep": str(self._kept)})

    def free(self) -> int:
        return len(self.slots) - len(self._taken)

    def start(self, job: Job) -> None:
        slot = next(s for s in self.slots if s not in self._taken.values())
        self._taken[job.id] = slot
        request = {
            "start": job.id,
            "kind": job.kind,
            "path": str(job.path),
            "log": str(job.log),
            "threads": slot.threads,
            "env": slot.environment,
        }
        if job.alone:
            request["threads"] = sum(s.threads for s in self.slots)
        self._send(request)

    def keep(self, path: Path) -> None:
        # A process that has used CUDA cannot be forked: on a GPU each trial loads for itself.
        if all(slot.gpu is None for slot in self.slots):
            self._kept = path
            self._send({"keep": str(path)})

    def has_begun(self, job: str) -> bool:
        return job in self._begun

    def poll(self, seconds: float) -> list[tuple[str, int]]:
        if time.monotonic() - self._read > _READ_EVERY:
            self.energy()
        if self._connection is None:
            return []
        readable, _, _ = select.select([self._connection], [], [], seconds)
        if not readable:
            return []
        try:
            received = self._connection.recv(65536)
        except ConnectionResetError:
            received = b""
        if not received:
            return self._server_died()
        *lines, self._buffer = (self._buffer + received).split(b"\n")
        messages = [json.loads(line) for line in lines]
        self._is_ready |= any("ready" in m for m in messages)
        self._begun |= {m["started"] for m in messages if "started" in m}
        ended = [(m["ended"], int(m["code"])) for m in messages if "ended" in m]
        for job, _ in ended:
            del self._taken[job]
            self._begun.discard(job)
        return ended

    def signal(self, job: str, number: int) -> None:
        if job in self._taken:
            self._send({"signal": job, "number": number})

    def energy(self) -> float | None:
        self._read = time.monotonic()
        return self._meter.joules()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._server is not None:
            if (
                not self._is_ready and not self._taken
            ):  # still importing: it has nothing to end, and would not hear for seconds
                self._server.kill()
            try:
                self._server.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait()
            self._server, self._is_ready = None, False

    def _send(self, message: dict[str, Any]) -> None:
        self.open()
        assert self._connection is not None
        try:
            self._connection.sendall(json.dumps(message).encode() + b"\n")
        except (BrokenPipeError, ConnectionResetError):
            return  # the next poll reads the end of the stream and says what was lost

    def _server_died(self) -> list[tuple[str, int]]:
        """Its children died with it; the next job gets a new server."""
        lost = [(job, -signal.SIGKILL) for job in self._taken]
        self._taken.clear()
        self._begun.clear()
        self.close()
        return lost
