"""How a sweep stands, and the command that goes on with it, from its directory alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.console import Console

from dpo_lora.errors import UserError
from dpo_lora.rundir import FAILED, FINISHED, INTERRUPTED
from dpo_lora.sweeps import summary, table
from dpo_lora.sweeps.directory import SweepDir
from dpo_lora.sweeps.endings import ran_out_of_time
from dpo_lora.sweeps.trial import PRUNED


def show(sweep: SweepDir) -> None:
    """Print every trial, the ranking so far and what can be done, to stdout; writes nothing."""
    known = sweep.summary()
    live = sweep.is_live()
    facts = summary.build(sweep, known["objectives"], known["confidence"], live=live)
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table.trials_table(facts["trials"], f"{sweep.path.name} ({'running' if live else 'not running'})"))
    if facts["ranking"]:
        console.print()
        console.print(table.ranking_table(facts))
    counts = ", ".join(f"{number} {name}" for name, number in facts["counts"].items())
    console.print(f"\n{counts or 'no trials yet'}", highlight=False)
    again = f"dpo-lora resume {sweep.path}"
    if not live and (known["status"] == INTERRUPTED or set(facts["counts"]) - {FINISHED, PRUNED, FAILED}):
        console.print(f"Go on: {again}", highlight=False, soft_wrap=True)
    if not live and FAILED in facts["counts"]:
        console.print(retry_advice(again, facts["trials"]), highlight=False, soft_wrap=True)


def show_end(sweep: Path, facts: dict[str, Any], unfinished: list[dict[str, Any]], *, stopped: bool) -> None:
    """Print the ranking, what did not finish and how to go on, to stderr.

    Args:
        facts: the sweep's summary.
        unfinished: its trials that came to no end.
        stopped: a signal ended the sweep, so that any trial may be unfinished.
    """
    console = table.terminal()
    if facts["ranking"]:
        console.print()
        console.print(table.ranking_table(facts))
    failed = [line for line in facts["trials"] if line["status"] == FAILED]
    for line in [*failed, *([] if stopped else unfinished)]:
        became = "failed" if line["status"] == FAILED else "not finished"
        console.print(f"\n{became}: {line['id']}  {table.label(line)}", highlight=False, soft_wrap=True)
        console.print(f"  {line['reason'] or line['status']}", highlight=False, markup=False, soft_wrap=True)
        for said in line.get("log", [])[-3:]:
            console.print(f"  | {said}", highlight=False, markup=False, soft_wrap=True)
    again = f"dpo-lora resume {sweep}"
    if stopped:
        counts = ", ".join(f"{number} {name}" for name, number in facts["counts"].items())
        console.print(f"\nStopped: {counts}. Go on: {again}", highlight=False, soft_wrap=True)
    elif unfinished:
        console.print(f"\n{len(unfinished)} not finished. Go on: {again}", highlight=False, soft_wrap=True)
    if failed:
        console.print(f"\n{retry_advice(again, failed)}", highlight=False, soft_wrap=True)


def retry_advice(again: str, trials: list[dict[str, Any]]) -> str:
    """How the failed trials are run again; where all of them ran out of time, that they need more of it."""
    failed = [trial for trial in trials if trial["status"] == FAILED]
    more_time = all(ran_out_of_time(trial["reason"]) for trial in failed)
    return f"Run the failed again: {again} --retry{' sweep.trial_timeout=SECONDS' if more_time else ''}"


def command_again(sweep: SweepDir, *, retry: bool, changes: list[str]) -> list[str]:
    """The words after ``dpo-lora train`` that go on with ``sweep``, and the change into the folder they were typed in.

    Args:
        changes: overrides of how the sweep is run.

    Raises:
        UserError: it was not started from a command line, that folder is gone, or a change is to what trials compute.
    """
    for word in changes:
        if not word.startswith("sweep."):
            raise UserError(
                f"{word}: with other values than it has this would be another sweep. What can change is how it is run "
                "(sweep.NAME=VALUE); for more trials give its whole command again, grown by them."
            )
    known = sweep.summary()
    words = [str(word) for word in known["command"][2:]]
    if not words:
        raise UserError(f"{sweep.path} was started from Python; go on with it there, by the same call.")
    folder = Path(known["cwd"])
    if not folder.is_dir():
        raise UserError(
            f"{sweep.path} was started in {folder}, which is not there any more, and its paths may be relative to it. "
            f"Start it again where its files are: dpo-lora train {' '.join(words)} hydra.sweep.dir={sweep.path}"
        )
    os.chdir(folder)
    changes = [*changes, f"hydra.sweep.dir={sweep.path}", *(["sweep.retry=failed"] if retry else [])]
    replaced = ("sweep.retry=", *(f"{word.split('=')[0]}=" for word in changes))
    return [*(word for word in words if not word.lstrip("+").startswith(replaced)), *changes]
