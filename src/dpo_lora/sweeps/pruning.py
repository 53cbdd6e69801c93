"""What passes between a trial and the pruner: a question at each evaluation, and the answer: go on, or stop.

The trial waits for the answer. That costs it milliseconds and buys the same decisions every time: a
sweep that is killed and resumed, or runs on a slower machine, prunes the same trials at the same
steps. Question and answer are files in the trial's directory, so they also pass between machines and
outlive both sides.
"""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_lora.files import write_atomic, write_json
from dpo_lora.sweeps.trial import Trial

_GO, _STOP = "go", "stop"
_TICK = 0.02  # seconds


@dataclass(frozen=True)
class Question:
    """Held-out figures of a trial at a step, still without an answer."""

    step: int
    figures: dict[str, float | None]  # None, or no entry, where a figure does not exist


def folder(trial: Path) -> Path:
    """Its presence tells the worker of the trial in this directory that a pruner looks on."""
    return trial / ".pruner"


def open_for(trial: Trial) -> None:
    folder(trial.path).mkdir(parents=True, exist_ok=True)


def questions(trial: Trial) -> list[Question]:
    """What the trial asks now, by step."""
    found = []
    for file in folder(trial.path).glob("*.question"):
        if not file.with_suffix(".answer").exists():
            found.append(Question(int(file.stem), json.loads(file.read_text(encoding="utf-8"))))
    return sorted(found, key=lambda question: question.step)


def answer(trial: Trial, question: Question, *, stop: bool) -> None:
    write_atomic(folder(trial.path) / f"{question.step}.answer", _STOP if stop else _GO)


def was_stopped(trial: Trial) -> bool:
    """Whether some answer was to stop; true even where its trial had no time to act on it."""
    return any(file.read_text(encoding="utf-8") == _STOP for file in folder(trial.path).glob("*.answer"))


def asking(path: Path) -> list[Any]:
    """The callbacks of the trainer of the trial in ``path``; none where no pruner looks on."""
    if not folder(path).is_dir():
        return []
    from transformers import TrainerCallback

    class AskPruner(TrainerCallback):
        def on_evaluate(
            self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
        ) -> None:
            if not 0 < state.global_step < state.max_steps:
                return
            question = folder(path) / f"{state.global_step}.question"
            write_json(question, {name.removeprefix("eval/"): value for name, value in (metrics or {}).items()})
            verdict = question.with_suffix(".answer")
            while not verdict.exists():
                time.sleep(_TICK)
            if verdict.read_text(encoding="utf-8") == _STOP and not _is_stopping():
                os.kill(os.getpid(), signal.SIGTERM)  # as anyone would stop it: at the step's end, with a checkpoint

    return [AskPruner()]


def _is_stopping() -> bool:
    """Whether this run was told to stop while it waited: a second signal would end it at once, in mid-step."""
    from dpo_lora.callbacks import StopSignal

    receiver = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return isinstance(receiver, StopSignal) and receiver.received is not None
