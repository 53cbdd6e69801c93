"""What is said while a sweep runs."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dpo_lora.rundir import FAILED, FINISHED, RUNNING
from dpo_lora.sweeps import status, table
from dpo_lora.sweeps.directory import SweepDir


def test_the_time_left_goes_down_between_two_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    watch = table.Watch(table.terminal(), SweepDir(tmp_path), slots=2)
    watch.expected = 6
    said = []
    for seconds, ended in ((10, 0), (30, 2), (40, 2), (60, 4), (89, 4), (90, 4), (95, 5), (110, 6)):
        clock[0] = 100.0 + seconds
        watch._told = {str(n): FINISHED if n < ended else RUNNING for n in range(6)}
        said.append(watch._left())
    assert said == [
        "", "about 60 s left", "about 50 s left", "about 30 s left", "about 1 s left", "", "about 19 s left", "",
    ]  # fmt: skip


def test_trials_that_ran_out_of_time_are_not_advised_to_do_so_again() -> None:
    late = {"status": FAILED, "reason": "ran past sweep.trial_timeout=5 s and was stopped"}
    other = {"status": FAILED, "reason": "RuntimeError: no"}
    fine = {"status": FINISHED, "reason": None}
    advice = "Run the failed again: dpo-lora resume S --retry"
    assert status.retry_advice("dpo-lora resume S", [fine, late]) == f"{advice} sweep.trial_timeout=SECONDS"
    assert status.retry_advice("dpo-lora resume S", [fine, late, other]) == advice
