"""A process that has imported the training stack and forks one child a trial.

Importing torch, transformers, TRL and PEFT takes most of a short trial's time. The server does it
once; each trial then starts as a copy of it, in a process, a process group and a log file of its own, so
whatever happens to a trial happens to it alone. The server starts no thread and touches no
accelerator: a copy of a process that has done either cannot be trusted.

Nothing outlives the sweep: the kernel kills the server when the process that started it dies, and
the children when the server dies; where the kernel cannot, the closed socket says so.

Run as ``python -m dpo_lora.sweeps.forkserver SOCKET_FD PARENT_PID``. One JSON object a line:

* in: ``{"keep": PATH}`` of settings whose base model every later child finds loaded,
  ``{"start": ID, "kind": "trial" | "shared", "path": PATH, "log": FILE, "threads": N, "env": {...}}``,
  ``{"signal": ID, "number": N}``
* out: ``{"ready": SECONDS}``, ``{"started": ID, "pid": N}``, ``{"ended": ID, "code": N}``
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

from dpo_lora.errors import UserError

_PR_SET_PDEATHSIG = 1
_TICK = 0.02  # seconds between looks at the children


def main() -> int:
    """Serve until the socket closes; in a forked child, run its trial and return its exit code."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    _die_with(int(sys.argv[2]))
    begun = time.monotonic()
    gc.disable()  # imports make a million objects that stay; looking for those that do not takes a tenth of the time
    _import_stack()
    gc.enable()
    gc.freeze()  # the collector would write into, and so copy, every shared page
    server = _Server(connection)
    server.say({"ready": round(time.monotonic() - begun, 3)})
    request = server.serve()
    return 0 if request is None else _child(request)


def _import_stack() -> None:
    import transformers.models.auto  # noqa: F401

    from dpo_lora import device, lifecycle, lineage, lora, model, settings, tracking, train, training  # noqa: F401
    from dpo_lora.preferences import pairs  # noqa: F401
    from dpo_lora.reports import drawing, report  # noqa: F401
    from dpo_lora.sweeps import shared, worker  # noqa: F401

    drawing.intervals("", [("", 0.0, 0.0, 0.0)], unit="")  # the first one loads matplotlib and its fonts
    settings.defaults()  # composed once, for every trial's report


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies (Linux); leave now if that has happened."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


class _Server:
    def __init__(self, connection: socket.socket):
        self.connection = connection
        self.buffer = b""
        self.children: dict[int, str] = {}

    def say(self, message: dict[str, Any]) -> None:
        self.connection.sendall(json.dumps(message).encode() + b"\n")

    def serve(self) -> dict[str, Any] | None:
        """None when the socket has closed; in a child, the request to carry out."""
        try:
            while True:
                readable, _, _ = select.select([self.connection], [], [], _TICK)
                if readable:
                    received = self.connection.recv(65536)
                    if not received:
                        break
                    *lines, self.buffer = (self.buffer + received).split(b"\n")
                    for line in lines:
                        request = json.loads(line)
                        if "signal" in request:
                            self._signal(request["signal"], request["number"])
                        elif "keep" in request:
                            self._keep(Path(request["keep"]))
                        elif self._start(request):
                            return dict(request)
                self._reap()
        except (BrokenPipeError, ConnectionResetError):
            pass
        self._close()
        return None

    def _keep(self, path: Path) -> None:
        from dpo_lora.sweeps import shared

        with contextlib.suppress(UserError):  # each trial says it in its own log
            shared.keep(path)
        gc.freeze()

    def _start(self, request: dict[str, Any]) -> bool:
        """Fork; True in the child."""
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            _die_with(server)
            self.connection.close()
            self.children.clear()
            return True
        os.setpgid(pid, pid)  # here and in the child: whichever comes first, a signal finds the group
        self.children[pid] = request["start"]
        self.say({"started": request["start"], "pid": pid})
        return False

    def _signal(self, name: str, number: int) -> None:
        for pid, child in self.children.items():
            if child == name:
                _signal_group(pid, number)

    def _reap(self) -> None:
        for pid in list(self.children):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                _signal_group(pid, signal.SIGKILL)  # what the trial started and left behind
                self.say({"ended": self.children.pop(pid), "code": os.waitstatus_to_exitcode(status)})

    def _close(self) -> None:
        for pid in self.children:
            _signal_group(pid, signal.SIGKILL)


def _signal_group(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # the group is empty
        os.killpg(pid, number)


def _child(request: dict[str, Any]) -> int:
    from dpo_lora import tracking
    from dpo_lora.sweeps import shared, worker

    tracking.after_fork()
    os.setpgid(0, 0)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    threads = str(request["threads"])
    os.environ.update(request["env"], OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads)
    import torch

    torch.set_num_threads(request["threads"])
    run = worker.run if request["kind"] == "trial" else shared.run
    return run(Path(request["path"]))


def _leave(code: int) -> NoReturn:
    """End this process after what the interpreter would do for others: threads, handlers, buffers.

    But without taking its modules apart: that would write into, and so copy, every page shared with the server.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # ends the workers of thread pools, too
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


if __name__ == "__main__":
    _leave(main())
