"""Trials that take no time: everything of a sweep is real but the processes and what they compute."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any

from dpo_lora.rundir import FAILED, FINISHED, INTERRUPTED, RunDir, ended, now
from dpo_lora.sweeps import pruning
from dpo_lora.sweeps.processes import Job
from dpo_lora.sweeps.trial import Trial

PAIRS = 200


class Killed(BaseException):
    """The sweep's own process is gone: nothing after this line runs."""


@dataclass
class World:
    """What the trials of a test do, and what was seen of them; shared by all sweeps of the test."""

    started: list[Trial] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)  # jobs of work that trials share
    places: list[str] = field(default_factory=list)  # "open" and "closed", each time they were
    signals: list[int] = field(default_factory=list)  # that the sweep sent to trials
    fails: Callable[[dict[str, Any]], bool] = lambda settings: False
    cut_off: Callable[[dict[str, Any]], bool] = lambda settings: False  # by somebody else's SIGTERM
    lacks: Callable[[dict[str, Any]], set[str]] = lambda settings: set()  # figures that do not exist
    stop_after: int | None = None  # trials; then Ctrl-C
    kill_after: int | None = None  # trials; then the sweep's process is gone

    def worth(self, settings: dict[str, Any], step: int) -> float:
        """Best at beta 0.1 and learning rate 1e-4; grows with the steps, and noise depends on the seed."""
        beta, rate = settings["dpo"]["beta"], settings["train"]["learning_rate"]
        noise = 0.02 * math.sin(17.0 * settings["seed"])
        return math.exp(-abs(math.log10(beta / 0.1)) - abs(math.log10(rate / 1e-4))) * step / 10 + noise


@dataclass
class InstantProcesses:
    """Ends each trial as :class:`World` says, after the evaluations its settings ask for."""

    world: World
    slots: list[Any]
    running: dict[str, Any] = field(default_factory=dict)
    joules: float = 0.0

    def open(self) -> None:
        self.world.places.append("open")

    def free(self) -> int:
        return len(self.slots) - len(self.running)

    def start(self, job: Job) -> None:
        if job.kind == "shared":
            self.world.shared.append(job.id)
            self.running[job.id] = iter([0])
        else:
            trial = Trial.read(job.path)
            if self.world.kill_after is not None and len(self.world.started) >= self.world.kill_after:
                raise Killed
            self.world.started.append(trial)
            if self.world.stop_after is not None and len(self.world.started) >= self.world.stop_after:
                os.kill(os.getpid(), signal.SIGINT)
                self.running[job.id] = itertools.repeat(None)  # until it is told to stop
            else:
                self.running[job.id] = self._life(trial)

    def keep(self, path: Path) -> None:
        pass

    def has_begun(self, job: str) -> bool:
        return True

    def poll(self, seconds: float) -> list[tuple[str, int]]:
        codes = {name: next(life) for name, life in list(self.running.items())}
        for name, code in codes.items():
            if code is not None:
                del self.running[name]
        return [(name, code) for name, code in codes.items() if code is not None]

    def signal(self, job: str, number: int) -> None:
        self.world.signals.append(number)
        if job in self.running and number == signal.SIGTERM:
            self.running[job] = iter([128 + number])

    def energy(self) -> float | None:
        self.joules += 3600.0  # each time that it is read
        return self.joules

    def close(self) -> None:
        self.world.places.append("closed")
        self.running.clear()

    def _life(self, trial: Trial) -> Any:
        settings, run = trial.settings, RunDir(trial.path)
        run.settings_file.write_text(json.dumps(settings))  # YAML, too
        run.write_manifest({"status": "running", "started": now()})
        last, every = settings["train"]["max_steps"], settings["eval"]["every"]
        for step in range(every, last, every) if every else ():
            question = pruning.folder(trial.path) / f"{step}.question"
            if not question.parent.is_dir():
                continue
            question.write_text(json.dumps(self._figures(settings, step)))
            while not question.with_suffix(".answer").exists():
                yield None
            if question.with_suffix(".answer").read_text() == "stop":
                run.write_manifest(ended(INTERRUPTED, reason="SIGTERM"))
                yield 143
        if self.world.cut_off(settings):
            run.write_manifest(ended(INTERRUPTED, reason="SIGTERM"))
            yield 143
        if self.world.fails(settings):
            run.write_manifest(ended(FAILED, reason="RuntimeError: as the test wants it"))
            yield 1
        self._finish(run, settings, last)
        yield 0

    def _figures(self, settings: dict[str, Any], step: int) -> dict[str, float | None]:
        worth = self.world.worth(settings, step)
        wins = round(PAIRS * min(1.0, max(0.0, 0.5 + worth / 2)))
        figures = {
            "accuracy": wins / PAIRS, "margin": worth, "accuracy_length_controlled": 0.5, "loss": 1 - worth,
            "brier": 0.2, "calibration_error": 0.1,
        }  # fmt: skip
        return {**figures, **dict.fromkeys(self.world.lacks(settings))}

    def _finish(self, run: RunDir, settings: dict[str, Any], last: int) -> None:
        figures = self._figures(settings, last)
        share, confidence = figures["accuracy"], settings["eval"]["confidence"]
        assert share is not None
        half = NormalDist().inv_cdf(0.5 + confidence / 2) * math.sqrt(share * (1 - share) / PAIRS)
        after = {**figures, "step": last, "pairs": PAIRS, "accuracy_interval": [share - half, share + half]}
        run.eval_file.write_text(json.dumps({"confidence": confidence, "after": after}))
        wins = round(share * PAIRS)
        rows = [{"step": last, "prompt": f"p{n}", "pair": f"x{n}", "win": float(n < wins)} for n in range(PAIRS)]
        run.eval_pairs_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        steps = [{"step": s, "epoch": s / last, "loss": 0.7 - self.world.worth(settings, s)} for s in (1, last)]
        run.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in steps))
        run.write_manifest(
            {
                **ended(FINISHED),
                "data": {"train": {"pairs": settings["data"]["max_pairs"] or 400}, "heldout": {"pairs": PAIRS}},
                "training": {
                    "steps": last,
                    "pairs": 8 * last,
                    "tokens": 1000 * last,
                    "tokens_per_second": 9.0,
                    "peak_memory_bytes": 2**30,
                },
                "timings": {"total_seconds": 9.0, "training_seconds": 8.0},
            }
        )


def facts(sweep: Path) -> dict[str, Any]:
    """What sweep.json says."""
    return dict(json.loads((sweep / "sweep.json").read_text()))
