"""A run's directory: its name, its lock, its files, its manifest and its status.

Everything that anyone wants to know of a run later is read from here, so files are written whole
(temporary file, fsync, rename) and never in place.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from dpo_lora.errors import UserError
from dpo_lora.files import append_jsonl, read_jsonl, write_atomic, write_json

FINISHED, FAILED, INTERRUPTED, RUNNING = "finished", "failed", "interrupted", "running"

# Seconds. A reader that asks whether a run is live holds its lock for a moment; whoever wants the lock waits that
# long, and another reader, which must not keep anybody waiting, asks once more.
_PATIENCE, _SECOND_LOOK = 2.0, 0.06


class RunDir:
    """One run's files; :meth:`create` and :meth:`reopen` hold its lock, :func:`find` does not."""

    def __init__(self, path: Path):
        self.path = path
        self.settings_file = path / "settings.yaml"
        self.manifest_file = path / "run.json"
        self.metrics_file = path / "metrics.jsonl"
        self.eval_file = path / "eval.json"
        self.eval_pairs_file = path / "eval_pairs.jsonl"
        self.samples_file = path / "samples.jsonl"
        self.verdicts_file = path / "verdicts.jsonl"
        self.judge_file = path / "judge.json"
        self.regress_file = path / "regress.json"
        self.report_file = path / "report.html"
        self.lint_file = path / "lint.json"
        self.log_file = path / "train.log"
        self.card_file = path / "README.md"
        self.checkpoints = path / "checkpoints"
        self._lock = FileLock(path / ".lock", timeout=_PATIENCE)

    def __str__(self) -> str:
        return str(self.path)

    # -- coming to life

    @classmethod
    def create(cls, settings: dict[str, Any], *, outputs: Path, name: str, path: Path | None = None) -> RunDir:
        """Claim a directory that no other run has: ``path``, or ``outputs/<name>-<unix seconds>``.

        Two runs started in the same second get different seconds, so the name stays one second long.

        Raises:
            UserError: ``path`` holds a run already, or the folder cannot be written.
        """
        try:
            if path is None:
                outputs.mkdir(parents=True, exist_ok=True)
                path = claim_second(outputs, name)
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path.resolve())
            run._hold()
            # Mode x is the claim itself: whoever creates this file owns the directory for good.
            with run.settings_file.open("x", encoding="utf-8") as file:
                yaml.safe_dump(settings, file, sort_keys=False, allow_unicode=True)
        except FileExistsError as error:
            raise UserError(
                f"{path} already holds a run; a run never writes into another's directory. "
                f"Continue it with 'dpo-lora resume {path}', or choose another run_dir."
            ) from error
        except OSError as error:
            raise UserError(
                f"Cannot write a run into {path or outputs}: {error.strerror}. "
                "Choose a writable folder with outputs=FOLDER."
            ) from error
        run.write_manifest({"status": RUNNING, "started": now()})
        return run

    @classmethod
    def reopen(cls, path: Path) -> RunDir:
        """Take the lock of a run that is not running, to continue it.

        Raises:
            UserError: a live process holds it.
        """
        run = cls(path)
        run._hold()
        return run

    def _hold(self) -> None:
        try:
            self._lock.acquire()
        except Timeout as error:
            raise UserError(
                f"{self.path} is in use by another process; wait for it to end, or start a new run."
            ) from error

    def release(self) -> None:
        self._lock.release()

    def is_live(self) -> bool:
        """Whether a process holds this run now: tells a running run from one whose process died."""
        if not self._lock.lock_file or not Path(self._lock.lock_file).exists():
            return False
        probe = FileLock(self._lock.lock_file, timeout=_SECOND_LOOK)
        try:
            probe.acquire()
        except Timeout:
            return True
        probe.release()
        return False

    @contextlib.contextmanager
    def in_its_folder(self) -> Iterator[None]:
        """Work where the run was started, if that is still there: its settings may name paths relative to it."""
        known = self.manifest().get("cwd")
        with contextlib.chdir(known) if known and Path(known).is_dir() else contextlib.nullcontext():
            yield

    # -- what it says of itself

    def settings(self) -> dict[str, Any]:
        """The resolved settings that this run was started with, as plain containers."""
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml, ten times faster, where it is built in
        return dict(yaml.load(self.settings_file.read_text(encoding="utf-8"), Loader=loader))

    def manifest(self) -> dict[str, Any]:
        return dict(json.loads(self.manifest_file.read_text(encoding="utf-8")))

    def write_manifest(self, facts: dict[str, Any]) -> None:
        """Merge ``facts`` into run.json, one level deep."""
        known = self.manifest() if self.manifest_file.exists() else {}
        for key, value in facts.items():
            if isinstance(value, dict) and isinstance(known.get(key), dict):
                known[key] = {**known[key], **value}
            else:
                known[key] = value
        write_json(self.manifest_file, known)

    def status(self) -> str:
        """running, finished, failed or interrupted; a dead process' "running" reads as interrupted."""
        status = str(self.manifest()["status"])
        return INTERRUPTED if status == RUNNING and not self.is_live() else status

    def append_metrics(self, row: dict[str, Any]) -> None:
        """One line into metrics.jsonl, on the disk before this returns."""
        append_jsonl(self.metrics_file, [row])

    def trim_metrics(self, last_step: int) -> None:
        """Drop the rows past ``last_step``, and a half-written last one, before a run is continued from there."""
        trim_jsonl(self.metrics_file, last_step)

    def logged_seconds(self) -> float:
        """Seconds of the last row in metrics.jsonl, where a resumed run's clock goes on; 0 before the first."""
        rows = list(read_jsonl(self.metrics_file)) if self.metrics_file.exists() else []
        return float(rows[-1]["seconds"]) if rows else 0.0

    def point_latest(self, outputs: Path) -> None:
        """Make ``latest`` in ``outputs`` name this run, where it lies there; a file of that name stays what it is."""
        link = outputs.resolve() / "latest"
        if self.path.parent != link.parent or (link.exists() and not link.is_symlink()):
            return
        temporary = link.with_name(f".latest-{os.getpid()}")
        with contextlib.suppress(OSError):  # a file system without links: find() falls back to run.json
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(self.path.name)
            temporary.replace(link)


def trim_jsonl(path: Path, last_step: int) -> None:
    """Drop the rows past ``last_step``, and a half-written last one; no file stays no file."""
    if not path.exists():
        return
    kept = [row for row in read_jsonl(path) if row["step"] <= last_step]
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))


def find(run: str, outputs: Path) -> RunDir:
    """The run that people name: a path, a folder's name in ``outputs``, or ``latest``: the run that finished last.

    A sweep's trials have to be named, or its ``best``: the last to finish is any of them.

    Raises:
        UserError: there is no such run.
    """
    if run == "latest" and not Path(run).is_dir():
        finished = [r for r in runs(outputs, trials=False) if r.manifest().get("status") == FINISHED]
        if not finished:
            raise UserError(
                f"No finished run in {outputs.resolve()}; start one with 'dpo-lora train'. "
                "The best trial of a sweep is SWEEP/best."
            )
        return max(finished, key=lambda r: str(r.manifest().get("ended", "")))
    for path in (Path(run), outputs / run):
        if (path / "settings.yaml").is_file() and (path / "run.json").is_file():
            return RunDir(path.resolve())
    by_start = sorted(runs(outputs, trials=False), key=lambda r: (str(r.manifest().get("started", "")), r.path.name))
    newest = [r.path.name for r in by_start[-5:]]
    raise UserError(
        f"{run} is no run directory: it has no settings.yaml and run.json. "
        + (f"The newest in {outputs}: {', '.join(newest)}." if newest else f"There is none in {outputs} yet.")
    )


def unfinished(outputs: Path) -> list[RunDir]:
    """The runs in ``outputs`` that can be gone on with; trials go with their sweep."""
    return [r for r in runs(outputs, trials=False) if r.status() in (INTERRUPTED, FAILED)]


def runs(outputs: Path, *, trials: bool = True) -> list[RunDir]:
    """Runs, and sweeps' trials, below ``outputs``, whatever their status."""
    return [
        RunDir(p.parent)
        for depth in ("*", "*/*")[: 1 + trials]
        for p in outputs.resolve().glob(f"{depth}/run.json")
        if not p.parent.is_symlink() and not p.parent.parent.is_symlink()
    ]


def claim_second(outputs: Path, name: str) -> Path:
    """A new folder ``outputs/<name>-<unix seconds>``; where that second is taken, the next free one."""
    second = int(time.time())
    while True:
        path = outputs / f"{name}-{second}"
        try:
            path.mkdir()
        except FileExistsError:
            second += 1
        else:
            return path


def now() -> str:
    """UTC, to the second, as ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def ended(status: str, **facts: Any) -> dict[str, Any]:
    """The manifest's closing entries."""
    return {"status": status, "ended": now(), **facts}
