"""What a finished run says last: its numbers, and commands that work as they are printed."""

from __future__ import annotations

import io
import shlex
from pathlib import Path

from rich.console import Console

from dpo_lora.reports import closing
from dpo_lora.rundir import RunDir
from harness import CommandLine


def printed(run: RunDir) -> list[list[str]]:
    """The commands below "Next:", as a shell would part them."""
    said = io.StringIO()
    closing.show(run, Console(file=said, width=80))
    return [shlex.split(line) for line in said.getvalue().split("Next:")[1].strip().splitlines()]


def test_the_next_training_can_be_started_as_it_is_printed(cli: CommandLine, finished: Path) -> None:
    chat, again, sweep = printed(RunDir(finished))
    assert chat[:2] == ["dpo-lora", "chat"]
    assert sweep[:3] == ["dpo-lora", "train", "-m"]
    assert sweep[-1] == "dpo.beta=0.05,0.1,0.2"
    assert sweep[3:-1] == again[2:-1]
    outcome = cli(*again[1:])
    assert outcome.code == 0, outcome.err
    assert RunDir(outcome.run).manifest()["version"] == 2


def test_the_place_and_the_parent_of_a_run_are_not_those_of_the_next(own_run: Path) -> None:
    run = RunDir(own_run)
    run.write_manifest({"command": ["dpo-lora", "train", "run_dir=here", "parent=x", "dpo.beta=1", "data=mine"]})
    _, again, sweep = printed(run)
    assert again[2:-1] == ["dpo.beta=1", "data=mine"]
    assert Path(again[-1].removeprefix("parent=")).resolve() == own_run
    assert sweep[3:] == ["parent=x", "data=mine", "dpo.beta=0.05,0.1,0.2"]


def test_a_run_that_was_started_from_python_has_no_command_to_repeat(own_run: Path) -> None:
    run = RunDir(own_run)
    run.write_manifest({"command": []})
    assert [words[1] for words in printed(run)] == ["chat"]
