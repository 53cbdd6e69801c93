"""How a sweep stands, and the command that goes on with it, from its directory alone."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console

from dpo_lora.errors import UserError
from dpo_lora.rundir import FAILED, FINISHED, INTERRUPTED
from dpo_lora.sweeps import summary, table
from dpo_lora.sweeps.directory import SweepDir
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
        console.print(f"Run the failed again: {again} --retry", highlight=False, soft_wrap=True)


def command_again(sweep: SweepDir, *, retry: bool) -> list[str]:
    """The words after ``dpo-lora train`` that go on with ``sweep``, and the change into the folder they were typed in.

    Raises:
        UserError: it was not started from a command line, or that folder is gone.
    """
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
    kept = [w for w in words if not w.startswith(("hydra.sweep.dir=", "sweep.retry="))]
    return [*kept, f"hydra.sweep.dir={sweep.path}", *(["sweep.retry=failed"] if retry else [])]
