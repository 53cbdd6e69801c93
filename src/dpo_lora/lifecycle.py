"""A run from first line to last: its log, its signals, and the status it ends with, whatever happens."""

from __future__ import annotations

import contextlib
import errno
import logging
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.logging import RichHandler

from dpo_lora.callbacks import NotFiniteError, StopSignal
from dpo_lora.errors import UserError
from dpo_lora.provenance import command, git_state, machine, package_versions
from dpo_lora.rundir import FAILED, FINISHED, INTERRUPTED, RUNNING, RunDir, ended
from dpo_lora.settings import from_plain

log = logging.getLogger(__name__)

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class Interrupted(SystemExit):
    """The run stopped on a signal with a checkpoint on disk; carries the shell's exit code for it."""


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
    if "command" in (known := run.manifest()):
        facts["resumed"] = [*known.get("resumed", []), command()]
    else:
        facts["command"] = command()
    run.write_manifest(facts)
    status, reason = FAILED, ""
    with _logging(run.log_file, console), StopSignal() as stop:
        try:
            quiet_libraries()
            yield stop
            status = FINISHED
            if stop.received is not None:
                status, reason = INTERRUPTED, stop.received.name
                raise Interrupted(stop.exit_code)
        except KeyboardInterrupt as interrupt:
            status, reason = INTERRUPTED, "stopped before the step ended"
            raise Interrupted(stop.exit_code) from interrupt
        except Interrupted:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            explained = _explain(error, run)
            if explained is None:
                # console=False: the file gets the traceback; the terminal gets it once, from whoever called.
                log.error("The run failed.\n%s", traceback.format_exc(), extra={"console": False})
                raise
            log.error("%s", explained, extra={"console": False})
            raise explained from error
        finally:
            with contextlib.suppress(OSError):  # a full disk: the reason is already on its way up
                seconds = round(time.monotonic() - begun, 3)
                run.write_manifest(ended(status, reason=reason or None, timings={"total_seconds": seconds}))
                if from_plain(run.settings()).eval.report:
                    from dpo_lora.reports import report

                    report.write(run)
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
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return UserError(
            f"Out of memory: {text.splitlines()[0]} Lower train.micro_batch (the result does not depend on it) or "
            "data.max_length, or set train.gradient_checkpointing=true."
        )
    return None


@contextlib.contextmanager
def _logging(file: Path, console: Console) -> Iterator[None]:
    """Our log and the libraries' warnings into ``file``; ours, short, to the terminal as well."""
    root, ours = logging.getLogger(), logging.getLogger("dpo_lora")
    levels = root.level, ours.level
    to_file = logging.FileHandler(file, encoding="utf-8", delay=True)
    to_file.setFormatter(logging.Formatter(_FORMAT))
    terminal: logging.Handler
    if console.is_terminal:
        terminal = RichHandler(console=console, show_time=False, show_path=False, show_level=False)
    else:
        terminal = logging.StreamHandler(sys.stderr)
        terminal.setFormatter(logging.Formatter("%(message)s"))
    terminal.addFilter(lambda record: getattr(record, "console", True))
    # Ours reach the file and the terminal once, whatever a caller (Hydra, a notebook) hung on the root.
    ours.propagate = False
    for logger, handler in ((root, to_file), (ours, to_file), (ours, terminal)):
        logger.addHandler(handler)
    root.setLevel(logging.WARNING)
    ours.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        logging.captureWarnings(False)
        for logger, handler in ((root, to_file), (ours, to_file), (ours, terminal)):
            logger.removeHandler(handler)
        ours.propagate = True
        to_file.close()
        root.setLevel(levels[0])
        ours.setLevel(levels[1])


def quiet_libraries() -> None:
    """Silence progress bars and notes of libraries that would break into our own progress line."""
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_warning()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
