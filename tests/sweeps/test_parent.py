"""Trials that go on from an adapter: the same one in every attempt, from whichever folder it is made."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpo_lora import composition
from dpo_lora.rundir import FINISHED, RunDir
from dpo_lora.settings import fingerprint, from_plain
from dpo_lora.sweeps import pruning, worker
from dpo_lora.sweeps.trial import Trial
from harness import CommandLine
from sweeps.instant import Killed, World


@pytest.fixture
def earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run that is named from the folder it lies in, and the links that point to it."""
    monkeypatch.chdir(tmp_path)
    run = RunDir.create({}, outputs=tmp_path / "outputs", name="x", path=tmp_path / "outputs" / "earlier")
    run.write_manifest({"status": FINISHED, "ended": "2026-01-01T00:00:00Z"})
    run.release()
    (tmp_path / "outputs" / "newest").symlink_to("earlier")
    return run.path


def test_a_trial_is_named_by_the_parent_that_its_checkpoints_are_bound_to(
    cli: CommandLine, world: World, sweep_words: list[str], earlier: Path, tmp_path: Path
) -> None:
    done = cli(*sweep_words, "dpo.beta=0.05,0.1", "parent=outputs/earlier")
    assert done.code == 0, done.err
    assert [trial.settings["parent"] for trial in world.started] == [str(earlier)] * 2
    trial = world.started[0]
    run, settings = composition.open_run(
        from_plain(trial.settings), trial=tmp_path / "fresh", overrides=[], resume=None
    )
    run.release()
    assert fingerprint(settings) == trial.id


@pytest.mark.parametrize("sweeper", ["grid", "study"])
@pytest.mark.parametrize("name", ["latest", "newest", "outputs/newest"])
def test_a_name_that_is_another_run_tomorrow_is_refused_once(
    cli: CommandLine, world: World, sweep_words: list[str], earlier: Path, name: str, sweeper: str
) -> None:
    done = cli(*sweep_words, f"hydra/sweeper={sweeper}", "dpo.beta=0.05,0.1", f"parent={name}")
    assert (done.code, world.started) == (2, [])
    assert f"parent={earlier}" in done.err
    assert not list(earlier.parent.glob("*/sweep.json"))


def test_parents_can_be_swept_over(cli: CommandLine, world: World, sweep_words: list[str], earlier: Path) -> None:
    refused = cli(*sweep_words, "parent=outputs/earlier,latest")
    assert (refused.code, world.started) == (2, [])
    assert cli(*sweep_words, "parent=outputs/earlier,OWNER/NAME,null").code == 0
    assert [trial.settings["parent"] for trial in world.started] == [str(earlier), "OWNER/NAME", None]


@pytest.mark.timeout(300)
def test_a_trial_that_was_cut_off_goes_on_from_its_checkpoint(
    cli: CommandLine, world: World, tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*tiny_overrides, "eval.samples=0"]
    parent = cli("train", *words, "eval.before=false").run
    world.kill_after = 0  # its trial is composed, and never begins
    with pytest.raises(Killed):
        cli("train", "-m", *words, "eval.every=2", "seed=1", f"parent={parent.relative_to(tmp_path)}")
    (file,) = (tmp_path / "outputs").glob("*/*/trial.json")
    trial = Trial.read(file.parent)
    pruning.open_for(trial)  # so that it waits at step 2, and can be stopped there
    with trial.output_file.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "dpo_lora.sweeps.worker", str(trial.path)], stdout=log, stderr=log
        )
    while not (asked := pruning.questions(trial)):
        assert process.poll() is None, trial.output_file.read_text()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.5)
    pruning.answer(trial, asked[0], stop=True)  # on top of it: the trial is not to be told twice
    assert process.wait(timeout=60) == 143, trial.output_file.read_text()
    assert [f.name for f in trial.run.checkpoints.glob("checkpoint-3")] == ["checkpoint-3"]
    assert worker.run(trial.path) == 0
    manifest = trial.run.manifest()
    assert (manifest["status"], manifest["parent"]["name"]) == (FINISHED, parent.name)
    assert [json.loads(line)["step"] for line in trial.run.metrics_file.read_text().splitlines()][-1] == 4
