"""A run's tracker: checked and opened by us, linked in the manifest, closed as what the run became."""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_lora.choices import TrackerKind, TrackerMode
from dpo_lora.errors import Interrupted, UserError
from dpo_lora.rundir import RunDir
from dpo_lora.schema import TrackingSettings
from dpo_lora.trackers import NoTracker, TensorBoardTracker, Tracker, summary_writer

log = logging.getLogger(__name__)


class WandbTracker:
    def __init__(self, run: Any, mode: str):
        self.run, self.mode = run, mode

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.run.log({**metrics, "trainer/step": step})

    def table(self, name: str, rows: list[dict[str, Any]], step: int) -> None:
        import wandb

        table = wandb.Table(columns=[*rows[0]], data=[list(row.values()) for row in rows])
        self.run.log({name: table, "trainer/step": step})

    def adapter(self, folder: Path, name: str) -> None:
        import wandb

        artifact = wandb.Artifact(_taken(name), type="model")
        for file in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
            artifact.add_file(str(folder / file))
        self.run.log_artifact(artifact)

    def link(self) -> dict[str, Any]:
        online = self.mode == "online"
        return {
            "kind": "wandb",
            "mode": self.mode,
            "id": self.run.id,
            "url": self.run.url if online else None,
            "folder": str(Path(self.run.dir).parent),
        }


def check(tracking: TrackingSettings) -> None:
    """Refuse a tracker that cannot be opened, before a model is loaded for it.

    Raises:
        UserError: tensorboard is not installed, or W&B has no key or does not take it or the project's name.
    """
    if tracking.kind is TrackerKind.tensorboard:
        summary_writer()
    elif tracking.kind is TrackerKind.wandb:
        import wandb

        with _refusing(tracking):
            wandb.Settings(project=tracking.project, entity=tracking.entity)
            mode, said = _wandb_mode(tracking), os.environ.get("WANDB_MODE")
            if mode == "offline" and tracking.mode is TrackerMode.auto and said != mode:
                log.info("No W&B key is known: logging offline ('wandb sync' uploads it later).")
            # Where the environment says offline, wandb looks for no key before a run is opened.
            if mode == "online" and said not in ("offline", "disabled") and not wandb.login(prompt=False):
                raise UserError(
                    "The run is to be tracked online, and no key of W&B is known here. Run 'wandb login' or set "
                    f"WANDB_API_KEY; {_WITHOUT}."
                )


@contextlib.contextmanager
def open_tracker(
    tracking: TrackingSettings, run: RunDir, sweep: Path | None, settings: dict[str, Any]
) -> Iterator[Tracker]:
    """A tracker for one run, closed at the end as what the run became: finished, interrupted or crashed.

    Args:
        sweep: the sweep's directory for a trial: its trials share one folder of tracker files and one group.
        settings: the run's settings as plain containers; holds no secrets, since none are settings.

    Raises:
        UserError: as for :func:`check`, or W&B does not take the run.
    """
    folder = sweep or run.path
    varied = _varied(run)
    name = run.path.name if sweep is None else " ".join([*(f"{k}={v}" for k, v in varied.items()), run.path.name[:8]])
    if tracking.kind is TrackerKind.none:
        yield NoTracker()
    elif tracking.kind is TrackerKind.tensorboard:
        board = TensorBoardTracker(folder / "tensorboard" / run.path.name)
        with contextlib.closing(board.writer):
            yield board
    else:
        mode = _wandb_mode(tracking)
        # A resumed run goes on in the run it had, where the service can append to it.
        before = run.manifest().get("tracker", {}).get("id") if mode == "online" else None
        # Not as a context manager: wandb's prints the traceback of whatever passes through, a user's mistake too.
        wandb_run = _begin(
            tracking,
            folder,
            mode,
            group=tracking.group or (sweep.name if sweep else None),
            job_type="trial" if sweep else "train",
            name=name,
            config={"settings": settings, "varied": {name: _number(value) for name, value in varied.items()}},
            id=before,
            resume="allow" if before else None,
        )
        wandb_run.define_metric("trainer/step")
        wandb_run.define_metric("*", step_metric="trainer/step")
        try:
            yield WandbTracker(wandb_run, mode)
        except BaseException as error:
            wandb_run.finish(exit_code=_exit_code(error))
            raise
        # Closed here, so that the next trial of this process cannot write into it.
        wandb_run.finish(exit_code=0)


def sweep_run(tracking: TrackingSettings, sweep: Path, rows: list[dict[str, Any]], page: Path) -> None:
    """A sweep's summary as a run of its own in the trials' group: a table with a row a trial, and the report.

    The table's numbers are numbers, so that parallel coordinates can be drawn of it. A sweep that goes
    on writes into the same run, online as after ``wandb sync``. Without W&B as the tracker, nothing.

    Args:
        rows: one a trial, all with the same names.
        page: the sweep's report.html.

    Raises:
        UserError: W&B does not take the run.
    """
    if tracking.kind is not TrackerKind.wandb or not rows:
        return
    import wandb

    with _begin(
        tracking,
        sweep,
        _wandb_mode(tracking),
        group=tracking.group or sweep.name,
        job_type="sweep",
        name=sweep.name,
        id=f"{_taken(sweep.name)}-summary",
        resume="allow",
    ) as run:
        data = [[_number(value) for value in row.values()] for row in rows]
        run.log({"trials": wandb.Table(columns=[*rows[0]], data=data, allow_mixed_types=True)})
        run.log({"report": wandb.Html(page.read_text(encoding="utf-8"), inject=False)})


def after_fork() -> None:
    """In a child of a process that has wandb imported: the child gets a folder of its own for tables it logs.

    wandb makes that folder when it is imported and removes it at exit, so the first child to end would
    take it from all the others.
    """
    private = sys.modules.get("wandb.sdk.data_types._private")
    if private is not None:
        private.MEDIA_TMP.name = tempfile.mkdtemp("wandb-media")
        atexit.register(private.MEDIA_TMP.cleanup)  # and not the one it was imported with


_WITHOUT = "tracking.mode=offline keeps it here for 'wandb sync', and tracking=none leaves W&B out"


def _begin(tracking: TrackingSettings, folder: Path, mode: str, **said: Any) -> Any:
    """A W&B run of these settings, its files below ``folder``; ``said``: what else it is told of itself."""
    import wandb

    with _refusing(tracking):
        return wandb.init(
            project=tracking.project,
            entity=tracking.entity,
            tags=list(tracking.tags),
            dir=str(folder),
            mode=mode,  # type: ignore[arg-type]  # one of its words
            settings=wandb.Settings(silent=True, console="off"),
            **said,
        )


@contextlib.contextmanager
def _refusing(tracking: TrackingSettings) -> Iterator[None]:
    """What W&B does not take, as the user's to put right: its key, project, entity or tags, or the network."""
    import wandb

    try:
        yield
    except wandb.errors.Error as error:
        raise UserError(
            f"W&B does not take the run (tracking.project={tracking.project}, tracking.entity={tracking.entity}): "
            f"{str(error).strip().rstrip('.')}. Correct these settings or the key ('wandb login'), or check the "
            f"network; {_WITHOUT}."
        ) from error


def _exit_code(error: BaseException) -> int:
    """What W&B is told of a run that did not finish: a signal's code where one stopped it, 1 for a crash."""
    if isinstance(error, Interrupted):
        return error.exit_code
    return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1


def _taken(name: str) -> str:
    """A folder's name as W&B takes names of artifacts and runs: these characters, not too many of them."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name)[:100]


def _varied(run: RunDir) -> dict[str, str]:
    """What a sweep varies in this trial; empty for a run of its own."""
    try:
        return dict(json.loads((run.path / "trial.json").read_text(encoding="utf-8"))["varied"])
    except FileNotFoundError:
        return {}


def _number(value: Any) -> Any:
    """A number for text that is one: an axis needs numbers."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def _wandb_mode(tracking: TrackingSettings) -> Any:
    """online or offline, never unset: without a mode and a login wandb raises, or blocks on a menu."""
    if tracking.mode is not TrackerMode.auto:
        return tracking.mode.value
    from_environment = os.environ.get("WANDB_MODE")
    if from_environment in ("online", "offline", "disabled"):
        return from_environment
    import wandb

    with _refusing(tracking):
        return "online" if os.environ.get("WANDB_API_KEY") or wandb.login(prompt=False) else "offline"
