"""One trial of a sweep: named by what it computes, known from its directory alone."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dpo_lora import objectives
from dpo_lora.files import write_json
from dpo_lora.rundir import FINISHED, INTERRUPTED, RUNNING, RunDir
from dpo_lora.schema import RunSettings
from dpo_lora.settings import fingerprint, plain

WAITING, PRUNED = "waiting", "pruned"


@dataclass(frozen=True)
class Outcome:
    """How the last attempt at a trial ended; kept in the trial's directory by whoever ran the sweep."""

    status: str  # finished, failed, interrupted or pruned
    reason: str | None = None
    code: int | None = None  # exit code; minus the signal's number for a killed process
    seconds: float = 0.0  # of this attempt
    log: list[str] = field(default_factory=list)  # the last lines of output.log


@dataclass(frozen=True)
class Trial:
    """What one trial is to compute, and where.

    ``varied`` holds only the values that the sweep varies, as they were typed; repeats of one
    setting differ in ``seed`` alone and share ``setting``.
    """

    id: str  # the settings' fingerprint: its directory's name
    setting: str  # the fingerprint without the seed
    seed: int
    varied: dict[str, str]
    overrides: list[str]
    settings: dict[str, Any]  # plain
    path: Path

    @classmethod
    def of(cls, settings: RunSettings, sweep: Path, overrides: list[str], varied: dict[str, str]) -> Trial:
        name, setting = fingerprint(settings), fingerprint(replace(settings, seed=0))
        return cls(name, setting, settings.seed, varied, overrides, plain(settings), sweep / name)

    @classmethod
    def read(cls, path: Path) -> Trial:
        """The trial that lies in ``path``.

        Raises:
            OSError: there is none.
        """
        values = json.loads((path / "trial.json").read_text(encoding="utf-8"))
        return cls(**values, path=path)

    def write(self) -> None:
        """Leave trial.json, from which a worker starts; a trial that has one keeps it until it begins."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not self._file.exists():
            self._save(self.varied)

    def _save(self, varied: dict[str, str]) -> None:
        values = asdict(self)
        del values["path"]
        write_json(self._file, {**values, "varied": varied})

    @property
    def _file(self) -> Path:
        return self.path / "trial.json"

    @property
    def run(self) -> RunDir:
        return RunDir(self.path)

    @property
    def output_file(self) -> Path:
        """All that the trial's processes said, attempt after attempt."""
        return self.path / "output.log"

    @property
    def _outcome_file(self) -> Path:
        return self.path / "outcome.json"

    def begin(self) -> None:
        """A new attempt: what is known of the last one no longer holds, nor how it was to be run.

        What it computes is the same, or it would be another trial; its tracker, for one, may have changed.
        """
        self.write()
        first = self._file.stat()
        self._save(Trial.read(self.path).varied)
        os.utime(self._file, ns=(first.st_atime_ns, first.st_mtime_ns))  # by which trials are in order
        self._outcome_file.unlink(missing_ok=True)
        run = self.run
        # Another process that has taken the run alone tells of it; this attempt will be refused.
        if run.manifest_file.exists() and not run.is_live() and run.manifest()["status"] != FINISHED:
            run.write_manifest({"status": RUNNING, "reason": None})

    def end(self, outcome: Outcome) -> None:
        write_json(self._outcome_file, asdict(outcome))

    def outcome(self) -> Outcome | None:
        """How the last attempt ended; None while one runs, or where its end was not seen."""
        try:
            return Outcome(**json.loads(self._outcome_file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None

    def status(self, *, live: bool) -> str:
        """waiting, running, finished, failed, interrupted or pruned.

        Args:
            live: whether the process that runs the sweep is alive; without it, "running" means cut off.
        """
        run = self.run
        said = str(run.manifest()["status"]) if run.manifest_file.exists() else None
        ended = self.outcome()
        if said == FINISHED:
            return FINISHED
        if ended is not None:
            return ended.status
        if said == RUNNING and not live:
            return INTERRUPTED
        return said or WAITING


def distinct(groups: list[list[Trial]]) -> list[Trial]:
    """The trials of several settings; two that compute the same are one."""
    return list({trial.id: trial for group in groups for trial in group}.values())


def objective(trials: list[Trial], names: list[str]) -> list[float] | None:
    """The objectives of one setting, meaned over its trials; None where a trial has none."""
    if any(trial.status(live=False) != FINISHED for trial in trials):
        return None
    values, _ = objectives.mean([trial.run for trial in trials], names)
    return values or None


def read_all(sweep: Path) -> list[Trial]:
    """Every trial that lies in a sweep's directory, oldest first."""
    files = [file for file in sweep.glob("*/trial.json") if not file.parent.is_symlink()]  # best is a link
    found = [(file.stat().st_mtime_ns, file.parent) for file in files]
    return [Trial.read(path) for _, path in sorted(found)]
