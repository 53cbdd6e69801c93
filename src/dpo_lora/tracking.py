"""Experiment trackers: opened by us, linked in the manifest, closed as what the run became."""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from dpo_lora.errors import Interrupted, UserError
from dpo_lora.rundir import RunDir
from dpo_lora.schema import TrackerKind, TrackerMode, TrackingSettings

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Where metrics also go; metrics.jsonl is the truth."""

    def log(self, metrics: dict[str, float], step: int) -> None: ...

    def table(self, name: str, rows: list[dict[str, Any]], step: int) -> None: ...

    def adapter(self, folder: Path, name: str) -> None: ...

    def link(self) -> dict[str, Any]: ...


class NoTracker:
    def log(self, metrics: dict[str, float], step: int) -> None:
        pass

    def table(self, name: str, rows: list[dict[str, Any]], step: int) -> None:
        pass

    def adapter(self, folder: Path, name: str) -> None:
        pass

    def link(self) -> dict[str, Any]:
        return {"kind": "none", "url": None}


class TensorBoardTracker:
    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError("tracking=tensorboard needs tensorboard: pip install 'dpo-lora[tensorboard]'.") from error
        self.folder = folder
        self.writer = SummaryWriter(str(folder))

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def table(self, name: str, rows: list[dict[str, Any]], step: int) -> None:
        for number, row in enumerate(rows):
            text = "\n".join(f"{key}: {value}" for key, value in row.items())
            # Indented lines are code to Markdown: what a model said is not rendered.
            self.writer.add_text(f"{name}/{number}", "".join(f"    {line}\n" for line in text.split("\n")), step)

    def adapter(self, folder: Path, name: str) -> None:
        log.warning("TensorBoard keeps no artifacts; tracking.log_adapter=true had no effect.")

    def link(self) -> dict[str, Any]:
        return {"kind": "tensorboard", "url": None, "folder": str(self.folder)}


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

        artifact = wandb.Artifact(name, type="model")
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


@contextlib.contextmanager
def open_tracker(
    tracking: TrackingSettings, run: RunDir, sweep: Path | None, settings: dict[str, Any]
) -> Iterator[Tracker]:
    """A tracker for one run, closed at the end as finished or, on an exception, as crashed.

    Args:
        sweep: the sweep's directory for a trial: its trials share one folder of tracker files and one group.
        settings: the run's settings as plain containers; holds no secrets, since none are settings.
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
        import wandb

        mode = _wandb_mode(tracking.mode)
        group = tracking.group or (sweep.name if sweep else None)
        # A resumed run goes on in the run it had, where the service can append to it.
        before = run.manifest().get("tracker", {}).get("id") if mode == "online" else None
        # Not as a context manager: wandb's prints the traceback of whatever passes through, a user's mistake too.
        wandb_run = wandb.init(
            project=tracking.project,
            entity=tracking.entity,
            group=group,
            job_type="trial" if sweep else "train",
            name=name,
            tags=list(tracking.tags),
            dir=str(folder),
            config={"settings": settings, "varied": {name: _number(value) for name, value in varied.items()}},
            mode=mode,
            id=before,
            resume="allow" if before else None,
            settings=wandb.Settings(silent=True, console="off"),
        )
        wandb_run.define_metric("trainer/step")
        wandb_run.define_metric("*", step_metric="trainer/step")
        try:
            yield WandbTracker(wandb_run, mode)
        except BaseException as error:
            # The code of a signal for an interrupted run, 1 for a crash: never the green of a finished one.
            wandb_run.finish(exit_code=error.exit_code if isinstance(error, Interrupted) else 1)
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
    """
    if tracking.kind is not TrackerKind.wandb or not rows:
        return
    import wandb

    with wandb.init(
        project=tracking.project,
        entity=tracking.entity,
        group=tracking.group or sweep.name,
        job_type="sweep",
        name=sweep.name,
        id=f"{sweep.name}-summary",
        resume="allow",
        tags=list(tracking.tags),
        dir=str(sweep),
        mode=_wandb_mode(tracking.mode),
        settings=wandb.Settings(silent=True, console="off"),
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


def _wandb_mode(wanted: TrackerMode) -> Any:
    """online or offline, never unset: without a mode and a login wandb raises, or blocks on a menu."""
    if wanted is not TrackerMode.auto:
        return wanted.value
    from_environment = os.environ.get("WANDB_MODE")
    if from_environment in ("online", "offline", "disabled"):
        return from_environment
    import wandb

    if os.environ.get("WANDB_API_KEY") or wandb.login(prompt=False):
        return "online"
    log.info("No W&B key is known: logging offline ('wandb sync' uploads it later).")
    return "offline"
