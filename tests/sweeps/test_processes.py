"""The server that trials are forked from: up before they are known, gone at once where none came."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from dpo_lora.sweeps.placement import Slot
from dpo_lora.sweeps.processes import LocalProcesses
from harness import CommandLine
from sweeps.instant import World


def test_processes_get_ready_before_the_trials_are_composed(
    cli: CommandLine, world: World, sweep_words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpo_lora.sweeps.sweep import Sweep

    compose = Sweep.compose
    monkeypatch.setattr(Sweep, "compose", lambda *args: world.places.append("composed") or compose(*args))
    assert cli(*sweep_words, "dpo.beta=0.05,0.1").code == 0
    assert world.places == ["open", "composed", "composed", "closed"]


def test_processes_close_where_there_is_no_such_trial(cli: CommandLine, world: World, sweep_words: list[str]) -> None:
    outcome = cli(*sweep_words, "dpo.beta=0.1,-1")
    assert outcome.code == 2
    assert "dpo.beta=-1" in outcome.err
    assert (world.places, world.started, world.shared) == (["open", "closed"], [], [])


def test_a_server_that_is_still_importing_is_not_waited_for() -> None:
    processes = LocalProcesses([Slot(0, None, 1)])
    processes.open()
    server = processes._server
    assert server is not None
    processes.open()
    assert processes._server is server, "one is enough"
    processes.close()
    assert server.returncode == -signal.SIGKILL


def test_a_process_that_leaves_loses_nothing() -> None:
    script = """
import atexit, threading, time
from concurrent.futures import ThreadPoolExecutor
from dpo_lora.sweeps.forkserver import _leave
atexit.register(print, "handler")
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
pool = ThreadPoolExecutor(1)  # its worker waits for more work for as long as it is let
pool.submit(int)
print("buffered")
_leave(3)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout.split(), done.stderr) == (3, ["buffered", "thread", "handler"], "")
