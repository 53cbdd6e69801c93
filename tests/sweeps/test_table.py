"""What is said while a sweep runs."""

from __future__ import annotations

import io
import re
import time
from pathlib import Path

import pytest
from rich.console import Console

from dpo_lora.rundir import FAILED, FINISHED, RUNNING
from dpo_lora.sweeps import status, table
from dpo_lora.sweeps.directory import SweepDir
from dpo_lora.sweeps.trial import PRUNED, Outcome, Trial


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


def test_the_live_table_reads_what_changes_and_takes_nothing_for_running(tmp_path: Path) -> None:
    def trial(name: str, beta: str) -> Trial:
        found = Trial(
            name * 16, name * 16, 0, {"dpo.beta": beta}, [], {"train": {"max_steps": 9}}, tmp_path / (name * 16)
        )
        found.write()
        found.run.append_metrics({"step": 4, "epoch": 0.5, "loss": 0.5})
        return found

    over, killed, running = trial("a", "1"), trial("b", "2"), trial("c", "3")
    over.end(Outcome(PRUNED, "stopped early"))
    killed.run.write_manifest({"status": RUNNING})  # as a sweep that was killed leaves it
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    with table.Watch(console, SweepDir(tmp_path), slots=1) as watch:
        over.run.metrics_file.unlink()  # it is not asked again
        running.run.write_manifest({"status": RUNNING})
        watch.changed(running, [running])
        running.run.append_metrics({"step": 5, "epoch": 0.6, "loss": 0.4})
        watch.tick([running], now=True)
        rows = {line.split()[0][:1]: line.split()[2:5] for line in _last_table(console)}
    assert rows["a"] == ["0", "pruned", "4/9"]
    assert rows["b"] == ["0", "interrupted", "4/9"]
    assert rows["c"] == ["0", "running", "5/9"]


def _last_table(console: Console) -> list[str]:
    """The rows of what was drawn last."""
    assert isinstance(console.file, io.StringIO)
    lines = [line for line in console.file.getvalue().splitlines() if re.match(r"\W*(a{8}|b{8}|c{8}) ", line)]
    return [re.sub(r"^\W*", "", line).replace("│", "") for line in lines[-3:]]


def test_trials_that_ran_out_of_time_are_not_advised_to_do_so_again() -> None:
    late = {"status": FAILED, "reason": "ran past sweep.trial_timeout=5 s and was stopped"}
    other = {"status": FAILED, "reason": "RuntimeError: no"}
    fine = {"status": FINISHED, "reason": None}
    advice = "Run the failed again: dpo-lora resume S --retry"
    assert status.retry_advice("dpo-lora resume S", [fine, late]) == f"{advice} sweep.trial_timeout=SECONDS"
    assert status.retry_advice("dpo-lora resume S", [fine, late, other]) == advice
