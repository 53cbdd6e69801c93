"""What is said while a sweep runs."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dpo_lora.rundir import FINISHED, RUNNING
from dpo_lora.sweeps import table
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
