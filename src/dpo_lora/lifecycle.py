"""A run from first line to last: its log, its signals, and the status it ends with, whatever happens."""

from __future__ import annotations

import contextlib
import errno
import logging
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.logging import RichHandler

from dpo_lora import tracking
from dpo_lora.callbacks import NotFiniteError, StopSignal
from dpo_lora.errors import Interrupted, UserError
from dpo_lora.provenance import command, git_state, machine, package_versions
from dpo_lora.rundir import FAILED, FINISHED, INTERRUPTED, RUNNING, RunDir, ended
from dpo_lora.settings import from_plain

log = logging.getLogger(__name__)
_NO_MEMORY = ("can't allocate memory", "CUDA error: out of memory")  # as engine/batching.py knows them; no torch here

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@contextlib.contextmanager
def running(run: RunDir, console: Console) -> Iterator[StopSignal]:
    """Log, catch signals and write the closing status of ``run``; release it at the end.

    An ordinary exit is ``finished``, a signal ``interrupted``, everything else ``failed`` with the
    reason in run.json and, unless it is the user's mistake, the traceback in train.log.
    """
    begun = time.monotonic()
    facts: dict[str, Any] = {
        "status": RUNNING,
        "packages": package_versions(),
        "machine": machine(),
        "git": git_state(),
    }
    known = run.manifest()
    before = known.get("timings", {}).get("total_seconds", 0.0)  # of the legs before this one, when it is resumed
    if "command" in known:
        facts["resumed"] = [*known.get("resumed", []), command()]
    else:
        facts |= {"command": command(), "cwd": str(Path.cwd())}  # where the paths among its settings hold
    run.write_manifest(facts)
    status, reason = FAILED, ""
    with _logging(run.log_file, console), StopSignal() as stop:
        try:
            quiet_libraries()
            tracking.check(from_plain(run.settings()).tracking)  # the model and the pairs are still to be loaded
            yield stop
            status = FINISHED
        except KeyboardInterrupt as interrupt:
            status, reason = INTERRUPTED, "stopped before the step ended"
            raise Interrupted(stop.exit_code) from interrupt
        except Interrupted:
            status, reason = INTERRUPTED, (stop.received or signal.SIGINT).name
            raise
        except Exception as error:
            explained = _explain(error, run)
            reason = str(explained or f"{type(error).__name__}: {error}")
            if explained is None:
                # console=False: the file gets the traceback; the terminal gets it once, from whoever called.
                log.error("The run failed.\n%s", traceback.format_exc(), extra={"console": False})
                raise
            log.error("%s", explained, extra={"console": False})
            raise explained from error
        finally:
            seconds = round(before + time.monotonic() - begun, 3)
            try:
                with contextlib.suppress(OSError):  # a full disk: the reason is already on its way up
                    run.write_manifest(ended(status, reason=reason or None, timings={"total_seconds": seconds}))
                    if from_plain(run.settings()).eval.report:
                        from dpo_lora.reports import report

                        report.write(run)
            finally:
                run.release()


def _explain(error: Exception, run: RunDir) -> UserError | None:
    """The user's words for what went wrong, or None for a crash of ours."""
    if isinstance(error, UserError):
        return error
    text = str(error)
    if (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or "No space left" in text:
        return UserError(
            f"The disk is full: {run.path} could not be written. Earlier checkpoints are whole; free some space, "
            f"then 'dpo-lora resume {run.path}'."
        )
    if isinstance(error, NotFiniteError):
        return UserError(text)
    if type(error).__name__ == "OutOfMemoryError" or any(told in text for told in _NO_MEMORY):
        return UserError(
            f"Out of memory: {text.splitlines()[0]} Lower train.micro_batch or data.max_length, or use a smaller model."
        )
    return None


@contextlib.contextmanager
def _logging(file: Path, console: Console) -> Iterator[None]:
    """Our log and the libraries' warnings into ``file``; ours, short, to the terminal as well."""
    root = logging.getLogger()
    level = root.level
    to_file = logging.FileHandler(file, encoding="utf-8", delay=True)
    to_file.setFormatter(logging.Formatter(_FORMAT))
    ours = logging.getLogger("dpo_lora")  # does not reach the root while the terminal has it
    for logger in (root, ours):
        logger.addHandler(to_file)
    root.setLevel(logging.WARNING)
    logging.captureWarnings(True)
    try:
        with terminal_log(console), warnings.catch_warnings():
            yield
    finally:
        logging.captureWarnings(False)
        for logger in (root, ours):
            logger.removeHandler(to_file)
        to_file.close()
        root.setLevel(level)


@contextlib.contextmanager
def terminal_log(console: Console) -> Iterator[None]:
    """Our own log, short, on the terminal."""
    ours = logging.getLogger("dpo_lora")
    level = ours.level
    terminal: logging.Handler
    if console.is_terminal:
        terminal = RichHandler(console=console, show_time=False, show_path=False, show_level=False)
    else:
        terminal = logging.StreamHandler(sys.stderr)
        terminal.setFormatter(logging.Formatter("%(message)s"))
    terminal.addFilter(lambda record: getattr(record, "console", True))
    # Ours reach the terminal once, whatever a caller (Hydra, a notebook) hung on the root.
    ours.propagate = False
    ours.addHandler(terminal)
    ours.setLevel(logging.INFO)
    try:
        yield
    finally:
        ours.removeHandler(terminal)
        ours.propagate = True
        ours.setLevel(level)


def quiet_libraries() -> None:
    """Silence progress bars and notes of libraries that would break into our own progress line."""
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_warning()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
