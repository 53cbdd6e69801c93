"""A job on a cluster whose time is up: its trial stops with a checkpoint and goes on in another job."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from dpo_lora.rundir import RunDir
from dpo_lora.sweeps import agent
from dpo_lora.sweeps.agent import OUT_OF_TIME, Order
from dpo_lora.sweeps.cluster import ClusterProcesses
from dpo_lora.sweeps.directory import SweepDir
from dpo_lora.sweeps.processes import Job
from harness import dpo_lora

# In place of a trial: seals a checkpoint when it is told to stop, or not.
WORKER = """
import signal, sys, time
from pathlib import Path
from dpo_lora import checkpoints

def stop(*_):
    if {saves}:
        staged = Path(sys.argv[1]) / "checkpoints" / "staged" / "checkpoint-7"
        staged.mkdir(parents=True)
        (staged / "weights").write_text("7")
        checkpoints.seal(staged, Path(sys.argv[1]) / "checkpoints", {{}})
    sys.exit(143)

signal.signal(signal.SIGTERM, stop)
(Path(sys.argv[1]) / "up").touch()
time.sleep({sleeps})
"""


@pytest.fixture
def order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Order:
    """A trial that takes an hour, in a job of a few seconds."""
    monkeypatch.setattr(agent, "spare", lambda seconds: seconds - 3.0)
    (tmp_path / "heartbeat").write_text("token")
    return Order("trial", str(tmp_path), str(tmp_path / "log"), str(tmp_path), str(tmp_path / "heartbeat"), "token", 1)


def carry_out(order: Order, monkeypatch: pytest.MonkeyPatch, saves: bool, sleeps: float, seconds: float | None) -> int:
    module = Path(order.path) / "stand_in.py"
    module.write_text(WORKER.format(saves=saves, sleeps=sleeps))
    monkeypatch.setitem(agent._MODULES, "trial", "stand_in")
    monkeypatch.setenv("PYTHONPATH", f"{module.parent}:{Path(agent.__file__).parents[2]}")
    code = agent.run(Order(**{**vars(order), "seconds": seconds}))
    assert (module.parent / "up").exists(), (module.parent / "log").read_text()
    return code


@pytest.mark.parametrize(("saves", "code"), [(True, OUT_OF_TIME), (False, 143)])
def test_a_trial_out_of_time_goes_on_where_it_came_further(
    order: Order, monkeypatch: pytest.MonkeyPatch, saves: bool, code: int
) -> None:
    assert carry_out(order, monkeypatch, saves, 3600, seconds=60.0) == code


def test_a_trial_that_ends_in_time_is_left_alone(order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    assert carry_out(order, monkeypatch, True, 0.1, seconds=None) == 0


def test_some_of_a_jobs_time_is_spared_for_the_checkpoint() -> None:
    day, hour, minute = 86400.0, 3600.0, 60.0
    assert [agent.spare(seconds) for seconds in (day, hour / 2, 5 * minute, minute)] == [240.0, 180.0, 60.0, 30.0]


class Scripted(ClusterProcesses):
    """Jobs that end with the codes of a list, one a job."""

    def __init__(self, sweep: SweepDir, codes: list[int]):
        super().__init__(sweep, jobs=1, threads=1, seconds=60.0)
        self.codes = codes
        self.submitted: list[Order] = []

    def _submit(self, order: Order) -> Any:
        self.submitted.append(order)
        (Path(order.control) / "begun").touch()
        return self.codes.pop(0)

    def _code(self, handle: int) -> int | None:
        return handle

    def _cancel(self, handle: int) -> None:
        raise AssertionError


def test_a_job_out_of_time_is_submitted_again(tmp_path: Path) -> None:
    processes = Scripted(SweepDir(tmp_path), [OUT_OF_TIME, OUT_OF_TIME, 0])
    processes.start(Job("a", tmp_path / "a", tmp_path / "log"))
    ended: list[tuple[str, int]] = []
    while not ended:
        ended = processes.poll(0.0)
    assert ended == [("a", 0)]
    assert len(processes.submitted) == 3
    assert set(processes.submitted) == {processes.submitted[0]}
    assert processes.submitted[0].seconds == 60.0


def test_a_job_that_was_told_to_stop_stays_stopped(tmp_path: Path) -> None:
    processes = Scripted(SweepDir(tmp_path), [OUT_OF_TIME])
    processes.start(Job("a", tmp_path / "a", tmp_path / "log"))
    processes.signal("a", signal.SIGTERM)
    assert processes.poll(0.0) == [("a", OUT_OF_TIME)]


@pytest.mark.cluster
@pytest.mark.timeout(960)
def test_a_trial_longer_than_its_jobs(tiny_overrides: list[str]) -> None:
    words = [
        w
        for w in tiny_overrides
        if not w.startswith(("train.max_steps", "train.save_every", "train.pairs_per_step", "tracking="))
    ]
    words += [
        "hydra/launcher=slurm",
        "hydra.launcher.cluster=local",
        "hydra.launcher.cpus=1",
        "hydra.launcher.minutes=2",
    ]
    words += [
        "train.max_steps=1500",
        "train.save_every=0",
        "train.pairs_per_step=32",
        "eval.samples=0",
        "tracking=none",
    ]
    done = dpo_lora("train", "-m", *words, "seed=1", timeout=900)
    assert done.returncode == 0, done.stderr
    sweep = Path(done.stdout.strip().splitlines()[-1])
    (trial,) = [p.parent for p in sweep.glob("*/trial.json") if not p.parent.is_symlink()]  # "best" is a link
    assert RunDir(trial).manifest()["status"] == "finished"
    jobs = [folder for folder in (sweep / ".slurm").iterdir() if folder.name.isdigit()]
    assert len(jobs) > 1, "it ended within its first job: give it more steps"
