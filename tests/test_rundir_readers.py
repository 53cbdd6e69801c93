"""Readers of a run's directory: in nobody's way, and told the names that they can use."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from filelock import FileLock

from dpo_lora import rundir
from dpo_lora.errors import UserError
from dpo_lora.rundir import RunDir, find


def held_for(seconds: float, path: Path) -> threading.Timer:
    """The run's lock, held from now on as a reader's question holds it, if longer."""
    lock = FileLock(path / ".lock", timeout=0, thread_local=False)
    lock.acquire()
    timer = threading.Timer(seconds, lock.release)
    timer.start()
    return timer


def test_whoever_goes_on_with_a_run_waits_for_a_reader(tmp_path: Path) -> None:
    path = RunDir.create({}, outputs=tmp_path, name="x").path
    timer = held_for(0.3, path)
    run = RunDir.reopen(path)
    timer.join()
    assert RunDir(path).is_live()
    run.release()


def test_one_reader_does_not_take_another_for_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rundir, "_SECOND_LOOK", 2.0)  # a busy machine may hold the other reader up
    run = RunDir.create({}, outputs=tmp_path, name="x")
    run.release()
    timer = held_for(0.2, run.path)
    assert not RunDir(run.path).is_live()
    timer.join()


def test_the_newest_runs_are_named_by_when_they_began_and_no_trial_is(tmp_path: Path) -> None:
    days = {"a-9": 9, "b-8": 8, "c-7": 7, "d-6": 6, "e-5": 5, "z-1": 1}
    for name, day in days.items():
        run = RunDir.create({}, outputs=tmp_path, name="", path=tmp_path / name)
        run.write_manifest({"started": f"2026-01-0{day}T00:00:00Z"})
    RunDir.create({}, outputs=tmp_path, name="", path=tmp_path / "sweep" / "ffff")
    with pytest.raises(UserError) as refused:
        find("nothing", tmp_path)
    assert "e-5, d-6, c-7, b-8, a-9." in str(refused.value)
    assert "ffff" not in str(refused.value)
