"""What happens at each step besides training: metrics to disk first, finite guard, signals, progress."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import time
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dpo_lora.evaluation.record import Record
from dpo_lora.rundir import RunDir
from dpo_lora.trackers import Tracker

log = logging.getLogger(__name__)


class NotFiniteError(RuntimeError):
    """A loss or a gradient that is NaN or infinite: stopped before the optimizer could take it."""


class StopSignal:
    """Turns Ctrl-C, SIGTERM and a closed terminal into "stop after this step"; a second Ctrl-C stops at once.

    Outside a training loop there is no step to end, so the first one stops at once.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.in_training = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # nohup has SIGHUP ignored: the run is meant to go on without its terminal.
            if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        repeated = self.received is not None
        if repeated and number == signal.SIGHUP:
            return  # a terminal that closes says it twice, by the kernel and by the shell: nobody is impatient
        self.received = signal.Signals(number)
        if repeated or not self.in_training:
            raise KeyboardInterrupt
        log.warning("%s: stopping after this step with a checkpoint (again: at once).", self.received.name)

    @property
    def exit_code(self) -> int:
        return 128 + (self.received or signal.SIGINT)


class StopAtStepEnd(TrainerCallback):
    """Acts on a :class:`StopSignal` where the state is whole: after the optimizer's step."""

    def __init__(self, stop: StopSignal):
        self.stop = stop

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop.in_training = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop.in_training = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # The last step is saved always: what follows it (scores, samples, an upload) may be cut off, too.
        if self.stop.received is not None or state.global_step >= state.max_steps:
            control.should_save = True
            control.should_training_stop = True


class FiniteGuard(TrainerCallback):
    """Stops a run whose gradient is NaN or infinite before the optimizer writes it into every weight."""

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        assert optimizer is not None
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        # The sum of norms is finite only if every element is; one transfer from the device, not one a tensor.
        if grads and not torch.stack(torch._foreach_norm(grads)).sum().isfinite():
            raise NotFiniteError(
                f"The gradient of step {state.global_step + 1} is not finite. The optimizer did not take it: "
                "the last checkpoint is good. Lower train.learning_rate, or look for broken pairs."
            )


class BestCheckpoint(TrainerCallback):
    """Saves at each evaluation that is the best so far by train.keep_best; stops after ``patience`` that were not."""

    def __init__(self, record: Record, patience: int | None):
        self.record, self.patience = record, patience

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        best = self.record.best_step()
        if best is None:
            return
        if best == state.global_step:
            control.should_save = True
        elif self.patience is not None and self.record.evaluations_since_best() >= self.patience:
            log.info("Stopped at step %d: %s was best at step %d.", state.global_step, self.record.metric, best)
            control.should_training_stop = True


class MetricsLog(TrainerCallback):
    """metrics.jsonl first, flushed; only then the tracker."""

    def __init__(self, run: RunDir, tracker: Tracker):
        self.run, self.tracker = run, tracker
        self._begun: float | None = None  # known at the first row: a resumed run's clock goes on

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._begun is None:
            self._begun = time.monotonic() - self.run.logged_seconds()
        row = {
            "step": state.global_step,
            "epoch": round(state.epoch or 0.0, 6),
            "seconds": round(time.monotonic() - self._begun, 3),
            **(logs or {}),
        }
        row.pop("total_flos", None)
        self.run.append_metrics(row)
        self.tracker.log({k: v for k, v in row.items() if isinstance(v, int | float)}, state.global_step)


class ProgressLine(TrainerCallback):
    """One live line in a terminal; elsewhere one plain line each tenth of the run."""

    def __init__(self, console: Console):
        self.console = console
        self.shown = -1
        self.progress: Progress | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.console.is_terminal:
            self.progress = Progress(
                TextColumn("training"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.task = self.progress.add_task(
                "training", total=state.max_steps, completed=state.global_step, figures=""
            )
            self.progress.start()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if "loss" not in logs:
            return
        figures = (
            f"pairs {logs['pairs']}"
            f"  loss {logs['loss']:.4f}  margin {logs.get('rewards/margins', 0):+.3f}"
            f"  acc {logs.get('rewards/accuracies', 0):.2f}  {logs.get('tokens_per_second', 0):.0f} tok/s"
        )
        if self.progress is not None:
            self.progress.update(self.task, completed=state.global_step, figures=figures)
        elif (tenth := 10 * state.global_step // max(1, state.max_steps)) > self.shown:
            self.shown = tenth
            with contextlib.suppress(OSError):  # nobody reads any more; the training goes on
                print(f"step {state.global_step}/{state.max_steps}  {figures}", file=sys.stderr, flush=True)  # noqa: T201

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        if self.progress is not None:
            with contextlib.suppress(OSError):  # the terminal has closed: that is no reason to lose the run
                self.progress.stop()
            self.progress = None
