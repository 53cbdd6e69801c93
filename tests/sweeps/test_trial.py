"""An attempt at a trial: what it takes over from the last one, and what is said of its end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dpo_lora import composition
from dpo_lora.choices import TrackerKind
from dpo_lora.rundir import FAILED, INTERRUPTED, RUNNING, RunDir, ended
from dpo_lora.settings import composed, plain
from dpo_lora.sweeps import endings
from dpo_lora.sweeps.trial import Trial, read_all


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    """A trial whose last attempt has failed."""
    found = Trial("0" * 16, "1" * 16, 0, {"dpo.beta": "0.1"}, [], {"tracking": "wandb"}, tmp_path / ("0" * 16))
    found.write()
    found.run.write_manifest({"started": "then", **ended(FAILED, reason="RuntimeError: of the last attempt")})
    return found


def test_an_attempt_that_dies_at_once_does_not_tell_the_last_ones_reason(trial: Trial) -> None:
    trial.begin()
    assert (trial.run.manifest()["status"], trial.run.manifest()["started"]) == (RUNNING, "then")
    outcome = endings.outcome(trial, 7, 0.1, None, None)
    assert (outcome.status, outcome.reason) == (FAILED, "left with exit code 7 before it had finished")
    assert trial.run.manifest()["reason"] == outcome.reason


def test_a_run_that_another_process_holds_is_left_to_it(trial: Trial) -> None:
    other = RunDir.reopen(trial.path)
    other.write_manifest({"status": RUNNING, "reason": None, "held by": "another"})
    told = trial.run.manifest()
    trial.begin()
    trial.output_file.write_text(f"dpo-lora: {trial.path} is in use by another process; wait for it to end.\n")
    outcome = endings.outcome(trial, 2, 0.1, None, None)
    assert (outcome.status, outcome.reason) == (
        FAILED,
        f"{trial.path} is in use by another process; wait for it to end.",
    )
    assert trial.run.manifest() == told
    other.release()
    assert endings.outcome(trial, -9, 0.1, endings.STOPPED, None).status == INTERRUPTED
    assert trial.run.manifest()["status"] == INTERRUPTED  # nobody holds it any more


def test_an_attempt_begins_as_it_is_to_be_run_now(trial: Trial, tmp_path: Path) -> None:
    later = replace(trial, id="2" * 16, path=tmp_path / ("2" * 16))
    later.write()
    changed = replace(trial, settings={"tracking": "none"}, varied={"dpo.beta": "1e-1"}, overrides=["tracking=none"])
    changed.write()
    assert Trial.read(trial.path) == trial  # until it begins
    changed.begin()
    assert Trial.read(trial.path) == replace(changed, varied=trial.varied)
    assert [found.id for found in read_all(tmp_path)] == [trial.id, later.id]  # in the order they came up


def test_a_resumed_runs_settings_say_how_it_goes_on(tmp_path: Path) -> None:
    begun = composed(["tracking=wandb", f"outputs={tmp_path}"])
    run, _ = composition.open_run(begun, trial=tmp_path / "trial", overrides=[], resume=None)
    run.release()
    tracking = replace(begun.tracking, kind=TrackerKind.none)
    other = replace(begun, seed=1, tracking=tracking)  # another result: its checkpoints will refuse it
    composition.open_run(other, trial=None, overrides=[], resume=run.path)[0].release()
    assert run.settings() == plain(begun)
    elsewhere = replace(begun, tracking=tracking)
    composition.open_run(elsewhere, trial=None, overrides=[], resume=run.path)[0].release()
    assert run.settings() == plain(elsewhere)
