"""A real study prunes, is killed, goes on to its total, and comes out as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness import dpo_lora
from sweeps.instant import facts

pytestmark = pytest.mark.slow

TRIALS = 12


def _finished(outputs: Path) -> int:
    return len(list(outputs.glob("*/*/eval.json")))


@pytest.mark.timeout(900)
def test_killed_and_resumed_equals_undisturbed(tiny_overrides: list[str], tmp_path: Path) -> None:
    words = [
        "train", "-m", *(o for o in tiny_overrides if not o.startswith("outputs=")),
        "hydra/sweeper=study-pruned", f"hydra.sweeper.trials={TRIALS}", "hydra.sweeper.startup_trials=3",
        "sweep.slots=1", "sweep.objectives=[margin]", "eval.every=2", "train.max_steps=6", "eval.samples=0",
        "dpo.beta=tag(log,interval(0.01,1))", "train.learning_rate=tag(log,interval(1e-5,1e-2))",
    ]  # fmt: skip

    def start(name: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", "dpo_lora", *words, f"outputs={tmp_path / name}"])

    calm, outputs = start("calm"), tmp_path / "rough"
    for wanted in (1, 6):  # finished trials; then it is killed in the middle of the next
        rough = start("rough")
        while _finished(outputs) < wanted:
            assert rough.poll() is None
            time.sleep(0.05)
        below = psutil.Process(rough.pid).children(recursive=True)
        os.kill(rough.pid, signal.SIGKILL)
        rough.wait()
        _, alive = psutil.wait_procs(below, timeout=10)
        assert not alive
    (sweep,) = outputs.glob("dpo-*")
    resumed = dpo_lora("resume", str(sweep))
    assert resumed.returncode == 0, resumed.stderr
    assert calm.wait() == 0
    (undisturbed,) = (tmp_path / "calm").glob("dpo-*")
    here, there = facts(sweep), facts(undisturbed)
    assert _told(here) == _told(there)
    assert here["best"] == there["best"]
    states = [t["state"] for t in here["study"]["trials"]]
    assert len(states) == TRIALS
    assert set(states) == {"complete", "pruned"}
    assert here["counts"] == {"finished": states.count("complete"), "pruned": states.count("pruned")}


def _told(found: dict[str, Any]) -> list[Any]:
    return [(t["number"], t["state"], t["params"], t["values"]) for t in found["study"]["trials"]]
