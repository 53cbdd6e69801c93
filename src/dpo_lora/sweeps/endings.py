"""From the way a process ended to what happened to its trial, in words."""

from __future__ import annotations

import signal
from pathlib import Path

from dpo_lora.rundir import FAILED, FINISHED, INTERRUPTED, ended
from dpo_lora.sweeps.trial import PRUNED, Outcome, Trial

LOG_LINES = 15
_TAIL_BYTES = 16384
_LINE = 300  # characters; a crash dump lists all loaded libraries in one line

# Why the sweep itself told a trial to stop.
TIMEOUT, STOPPED, PRUNE = "timeout", "stopped", "prune"
TOLD = "dpo-lora: "  # how a worker begins what the user got wrong
_PAST = "ran past sweep.trial_timeout="


def outcome(trial: Trial, code: int, seconds: float, told: str | None, limit: float | None) -> Outcome:
    """What became of a trial whose process is gone.

    Args:
        code: exit code, or minus the number of the signal that killed it.
        told: why the sweep had told it to stop, if it had.
        limit: ``sweep.trial_timeout``, for the reason.
    """
    run = trial.run
    manifest = run.manifest() if run.manifest_file.exists() else {}
    said, reason = manifest.get("status"), manifest.get("reason")
    log = last_lines(trial.output_file)
    if said == FINISHED:
        return Outcome(FINISHED, code=code, seconds=seconds)
    if told == PRUNE:
        status, why = PRUNED, "stopped early: it lay behind the others at this step"
    elif told == TIMEOUT:
        status, why = FAILED, f"{_PAST}{limit:g} s and was stopped"
    elif told == STOPPED:
        status, why = INTERRUPTED, "the sweep was stopped"
    elif said == INTERRUPTED:
        status, why = INTERRUPTED, f"stopped by {reason} from outside"
    else:
        status, why = FAILED, _why(code, reason if said == FAILED else None, log)
    # Its own last word is out of date: a killed process leaves "running" behind. Where another process holds
    # the run by now, the word is that one's.
    if said is not None and (said, reason) != (status, why) and not run.is_live():
        run.write_manifest(ended(status, reason=why))
    return Outcome(status, why, code, seconds, log)


def ran_out_of_time(reason: str | None) -> bool:
    """Whether this is the reason of a trial that was stopped for its time."""
    return reason is not None and reason.startswith(_PAST)


def _why(code: int, reason: str | None, log: list[str]) -> str:
    if code < 0:
        number = signal.Signals(-code)
        hint = {
            signal.SIGKILL: " (out of memory, or by hand)",
            signal.SIGSEGV: " (segmentation fault)",
            signal.SIGABRT: " (aborted by a library)",
        }.get(number, "")
        return f"killed by {number.name}{hint}"
    if reason:
        return reason
    if code == 1 and log:
        return log[-1].strip()
    if code == 2 and (told := [line for line in log if line.startswith(TOLD)]):  # refused before it was a run
        return told[-1].removeprefix(TOLD)
    return f"left with exit code {code} before it had finished"


def last_lines(file: Path, count: int = LOG_LINES) -> list[str]:
    """The last lines of a text file; none where there is no file."""
    try:
        with file.open("rb") as stream:
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - _TAIL_BYTES))
            text = stream.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return []
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return [line[:_LINE] for line in lines[-count:]]
