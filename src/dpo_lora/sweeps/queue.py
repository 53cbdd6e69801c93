"""Runs a sweep's trials: fills free slots, watches clocks, notes how each trial ends, stops in order."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Protocol

from dpo_lora.choices import Retry
from dpo_lora.rundir import FAILED, FINISHED
from dpo_lora.schema import SweepSettings
from dpo_lora.sweeps import endings, shared
from dpo_lora.sweeps.directory import SweepDir
from dpo_lora.sweeps.processes import Job, Processes
from dpo_lora.sweeps.trial import PRUNED, Outcome, Trial

_TICK = 0.1  # seconds between looks at clocks and questions


class Source(Protocol):
    """Which trials to run: a list that is known, or a study that decides as results come in."""

    def next(self) -> Trial | None:
        """The next trial, or None while there is none to start."""

    def is_done(self) -> bool:
        """Whether no trial will come any more."""

    def ended(self, trial: Trial, outcome: Outcome) -> None: ...

    def looked(self, running: list[Trial]) -> list[Trial]:
        """Called each tick; the running trials that have been told that they are hopeless, and stop by themselves."""


class Listed:
    """Trials known from the start, in order."""

    def __init__(self, trials: list[Trial]):
        self.trials = trials
        self._left: Iterator[Trial] = iter(trials)
        self._given = 0

    def next(self) -> Trial | None:
        self._given += 1
        return next(self._left, None)

    def is_done(self) -> bool:
        return self._given >= len(self.trials)

    def ended(self, trial: Trial, outcome: Outcome) -> None:
        pass

    def looked(self, running: list[Trial]) -> list[Trial]:
        return []


class Watcher(Protocol):
    """Whoever shows a sweep's progress."""

    def changed(self, trial: Trial, running: list[Trial]) -> None:
        """``trial`` began, or has ended, or has nothing left to do."""

    def tick(self, running: list[Trial]) -> None: ...

    def say(self, line: str) -> None: ...


@dataclass
class _Running:
    trial: Trial
    begun: float | None = None  # when its process started
    told: str | None = None  # why it was told to stop
    told_at: float = 0.0
    killed: bool = False


class Queue:
    """One sweep's trials on one set of slots."""

    def __init__(self, sweep: SweepDir, settings: SweepSettings, processes: Processes, watcher: Watcher):
        self.sweep, self.settings, self.processes, self.watcher = sweep, settings, processes, watcher
        self.stopped: signal.Signals | None = None
        self._running: dict[str, _Running] = {}
        self._tried: set[str] = set()  # trials that this call has run: a failed one is retried once, not for ever
        self._hurry = False

    def prepare(self, trials: list[Trial], expected: int) -> None:
        """Do the work that several trials share, once, before any starts; its failure is for the trials to tell.

        Args:
            trials: those known now.
            expected: trials in all; a study's later ones share with the first.
        """
        groups: dict[str, list[Trial]] = {}
        for trial in trials:
            if self._kept(trial) is None:
                groups.setdefault(shared.key(trial.settings), []).append(trial)
        unknown = expected - len(trials)
        several = {name: group for name, group in groups.items() if len(group) + unknown > 1}
        jobs = [self._shared(name, group) for name, group in several.items()]
        missing = [replace(job, alone=len(jobs) == 1) for job in jobs if not _is_done(job)]
        if missing:
            self.watcher.say("Preparing once what the trials share: base model, pairs, reference ...")
        with self._listening():
            self._prepare(missing)
        if len(jobs) == 1 and _is_done(jobs[0]):
            self.processes.keep(jobs[0].path)

    def _shared(self, name: str, group: list[Trial]) -> Job:
        folder = self.sweep.path / ".shared"
        folder.mkdir(exist_ok=True)
        job = Job(f"shared-{name}", folder / f"{name}.json", folder / "output.log", kind="shared")
        settings = [trial.settings for trial in group]
        if not (_is_done(job) and shared.covers(job.path, settings)):
            _done_file(job).unlink(missing_ok=True)  # the sweep has grown by seeds or steps
            shared.write(job.path, settings)
        return job

    def _prepare(self, waiting: list[Job]) -> None:
        running: dict[str, Job] = {}
        begun: dict[str, float] = {}
        while running or (waiting and self.stopped is None):
            while waiting and self.stopped is None and self.processes.free() > 0:
                job = waiting.pop(0)
                running[job.id] = job
                self.processes.start(job)
            for name, code in self.processes.poll(_TICK):
                job = running.pop(name)
                if code == 0:
                    _done_file(job).touch()
                elif self.stopped is None:
                    self.watcher.say("\n".join(["Preparing failed:", *endings.last_lines(job.log, 3)]))
            for name in running:
                if self.processes.has_begun(name):
                    begun.setdefault(name, time.monotonic())
                limit = self.settings.trial_timeout
                is_late = limit is not None and time.monotonic() - begun.get(name, math.inf) > limit
                if self.stopped is not None or is_late:  # caches are whole or absent: nothing to finish in order
                    self.processes.signal(name, signal.SIGKILL)

    def run(self, source: Source) -> None:
        """Run trials until the source is done or a signal stops the sweep; every slot is empty then."""
        with self._listening():
            while self._running or not (self.stopped or source.is_done()):
                if self.stopped is None:
                    self._fill(source)
                self._step(source)

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """Signals stop the sweep in order."""
        handlers = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._hurry = self.stopped is not None
        self.stopped = signal.Signals(number)

    def _fill(self, source: Source) -> None:
        while self.stopped is None and self.processes.free() > 0 and not source.is_done():
            trial = source.next()
            if trial is None:
                return
            kept = self._kept(trial)
            if kept is not None:
                source.ended(trial, kept)
                self.watcher.changed(trial, self._trials())
            elif trial.id not in self._running:
                self._start(trial)

    def _kept(self, trial: Trial) -> Outcome | None:
        """The outcome of a trial that needs no further attempt."""
        status = trial.status(live=False)
        again = trial.id not in self._tried and self.settings.retry is Retry.failed
        if status in (FINISHED, PRUNED) or (status == FAILED and not again):
            return trial.outcome() or Outcome(status)
        return None

    def _start(self, trial: Trial) -> None:
        trial.begin()
        self._tried.add(trial.id)
        self._running[trial.id] = _Running(trial)
        self.processes.start(Job(trial.id, trial.path, trial.output_file))
        self.watcher.changed(trial, self._trials())

    def _step(self, source: Source) -> None:
        ended = self.processes.poll(_TICK)
        for name, code in ended:
            entry = self._running.pop(name)
            seconds = 0.0 if entry.begun is None else round(time.monotonic() - entry.begun, 3)
            outcome = endings.outcome(entry.trial, code, seconds, entry.told, self.settings.trial_timeout)
            entry.trial.end(outcome)
            source.ended(entry.trial, outcome)
            self.watcher.changed(entry.trial, self._trials())
        for trial in source.looked(self._trials()):
            # The answer is all that it needs: a second word, by a signal, would cut its last step off.
            self._note(self._running[trial.id], endings.PRUNE)
        for entry in self._running.values():
            self._mind(entry)
        self.watcher.tick(self._trials())

    def _mind(self, entry: _Running) -> None:
        """Stop a trial that is due to stop: politely first, so that it can write a checkpoint, then for good."""
        now = time.monotonic()
        if entry.begun is None and self.processes.has_begun(entry.trial.id):
            entry.begun = now
        limit = self.settings.trial_timeout
        if self.stopped is not None:
            self._tell(entry, endings.STOPPED)
        elif limit is not None and entry.begun is not None and now - entry.begun > limit:
            self._tell(entry, endings.TIMEOUT)
        late = entry.told is not None and now - entry.told_at > self.settings.grace
        if (late or (entry.told and self._hurry)) and not entry.killed:
            entry.killed = True
            self.processes.signal(entry.trial.id, signal.SIGKILL)

    def _tell(self, entry: _Running, why: str) -> None:
        if self._note(entry, why):
            self.processes.signal(entry.trial.id, signal.SIGTERM)

    def _note(self, entry: _Running, why: str) -> bool:
        """From now on the trial has ``sweep.grace`` to end; False where it has been told before."""
        if entry.told is not None:
            return False
        entry.told, entry.told_at = why, time.monotonic()
        return True

    def _trials(self) -> list[Trial]:
        return [entry.trial for entry in self._running.values()]


def _done_file(job: Job) -> Path:
    return job.path.with_suffix(".done")


def _is_done(job: Job) -> bool:
    return _done_file(job).exists()
