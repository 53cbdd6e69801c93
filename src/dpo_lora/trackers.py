"""What a tracker does, and those that need no service: none at all, and TensorBoard's files in the run's directory."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Protocol

from dpo_lora.errors import UserError

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
        self.folder = folder
        self.writer = summary_writer()(str(folder))

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


def summary_writer() -> Any:
    """torch's writer of event files.

    Raises:
        UserError: tensorboard, which torch does not bring, is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("tracking=tensorboard needs tensorboard: pip install 'dpo-lora[tensorboard]'.") from error
    return SummaryWriter
