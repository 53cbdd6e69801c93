"""A run that has not finished: where it stopped, why, what its log said last, and how to go on."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from dpo_lora import checkpoints
from dpo_lora.reports.pages import shown
from dpo_lora.rundir import FAILED, FINISHED, RUNNING, RunDir

_LOG_LINES = 25
_VERBS = {FAILED: "Failed", RUNNING: "Running"}


@dataclass(frozen=True)
class Ending:
    headline: str
    reason: str
    ways: list[tuple[str, str]]  # what one may do, and the command for it
    log: str


def of_run(
    run: RunDir, status: str, manifest: dict[str, Any], settings: dict[str, Any], metrics: list[dict[str, Any]]
) -> Ending | None:
    """What became of ``run``; None where it finished.

    Args:
        status: as the run's directory gives it.
        metrics: rows of metrics.jsonl.
    """
    if status == FINISHED:
        return None
    last = max((row["step"] for row in metrics), default=0)
    return Ending(
        f"{_VERBS.get(status, 'Interrupted')} {_place(last, settings, metrics)}",
        _reason(status, manifest),
        _ways(run, status, manifest, last),
        _log_end(run),
    )


def _place(last: int, settings: dict[str, Any], metrics: list[dict[str, Any]]) -> str:
    if last == 0:
        return "before the first step had ended"
    train = settings["train"]
    epoch = max(row.get("epoch") or 0.0 for row in metrics)
    total = train["max_steps"] or (epoch and round(train["epochs"] * last / epoch))
    return f"after step {last}" + (f" of {total}" if total else "")


def _reason(status: str, manifest: dict[str, Any]) -> str:
    if status == RUNNING:
        return "This page shows what the run's files held when the page was written."
    said = manifest.get("reason")
    if said is None:
        return (
            "The process is gone and left no reason: it was killed (kill -9, or the system ran out of memory), "
            "or the machine stopped."
        )
    return shown(f"It received {said} and stopped." if said in ("SIGINT", "SIGTERM", "SIGHUP") else said)


def _ways(run: RunDir, status: str, manifest: dict[str, Any], last: int) -> list[tuple[str, str]]:
    if status == RUNNING:
        return [("Write the page again:", f"dpo-lora report {shlex.quote(str(run.path))}")]
    if (run.path.parent / "sweep.json").is_file():
        retry = " --retry" if status == FAILED else ""
        resume = f"dpo-lora resume {shlex.quote(str(run.path.parent))}{retry}"
        return [("This run is a trial; its sweep goes on with what is missing:", resume)]
    resume = f"dpo-lora resume {shlex.quote(str(run.path))}"
    again = shown(shlex.join(manifest.get("command", [])))
    if status == FAILED and last == 0:
        return [("Nothing was trained. Mend what is said above, then start again:", again)]
    whole = checkpoints.find_whole(run.checkpoints)
    if whole is None:
        ways = [("There is no checkpoint yet; resumed, it starts from the first step:", resume)]
    else:
        ways = [(f"The checkpoint of step {checkpoints.step_of(whole)} is whole; to go on from there:", resume)]
    if status == FAILED:
        ways.append(("A resumed run keeps its settings. If they are the cause, change them in a new run:", again))
    return ways


def _log_end(run: RunDir) -> str:
    if not run.log_file.exists():
        return ""
    lines = run.log_file.read_text(encoding="utf-8", errors="replace").splitlines()
    return shown("\n".join(lines[-_LOG_LINES:]), 10_000)
