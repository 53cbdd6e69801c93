"""A sweep's directory: found again by what the sweep varies around, held by one process at a time."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dpo_lora.errors import UserError
from dpo_lora.files import write_json
from dpo_lora.rundir import FAILED, INTERRUPTED, RUNNING, claim_second, now, unfinished

# A reader that asks whether a sweep is live holds its lock for microseconds; whoever wants it waits that long.
_PATIENCE = 2.0


@dataclass(frozen=True)
class Identity:
    """What makes two command lines the same sweep: everything but the values it varies."""

    base: dict[str, Any]  # the composed settings without any swept value
    varied: list[str]  # names that are swept
    kind: str  # the sweeper

    def digest(self) -> str:
        """16 hex digits, blind to where results go and to how trials are run."""
        blind = ("hydra", "tracking", "outputs", "run_dir", "sweep")
        base = {name: value for name, value in self.base.items() if name not in blind}
        canonical = json.dumps([base, sorted(self.varied), self.kind], sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]


@dataclass
class SweepDir:
    """The files of one sweep. :meth:`claim` holds its lock; :func:`find` does not."""

    path: Path
    _lock: FileLock = field(init=False, repr=False, compare=False)
    _before: dict[str, Any] = field(init=False, repr=False, compare=False, default_factory=dict)  # sweep.json's words

    def __post_init__(self) -> None:
        self._lock = FileLock(self.path / ".lock", timeout=_PATIENCE)

    @property
    def summary_file(self) -> Path:
        return self.path / "sweep.json"

    @property
    def table_file(self) -> Path:
        return self.path / "trials.csv"

    @property
    def report_file(self) -> Path:
        return self.path / "report.html"

    @classmethod
    def claim(cls, outputs: Path, name: str, identity: Identity, given: Path | None, facts: dict[str, Any]) -> SweepDir:
        """The directory of this sweep, held: ``given``, the newest of the same identity, or a new one.

        Args:
            facts: what sweep.json says from the start: the command, and by what trials are ranked.

        Raises:
            UserError: another process runs this sweep now, ``given`` holds a different one, or
                nothing can be written there.
        """
        digest = identity.digest()
        try:
            outputs.mkdir(parents=True, exist_ok=True)
            # Two processes that start the same sweep at once must not both find nothing.
            with FileLock(outputs / ".sweeps.lock"):
                path = given or same(outputs, digest) or claim_second(outputs, name)
                path.mkdir(parents=True, exist_ok=True)
                sweep = cls(path.resolve())
                sweep._hold()
                sweep._check(digest)
                facts = {"identity": digest, "cwd": str(Path.cwd()), "status": RUNNING, **facts}
                sweep._before = sweep.summary()
                sweep.write({"started": now(), **sweep._before, **facts, "resumed": now()})
        except OSError as error:
            raise UserError(
                f"Cannot write a sweep into {given or outputs}: {error.strerror}. "
                "Choose a writable folder with outputs=FOLDER."
            ) from error
        return sweep

    def _hold(self) -> None:
        try:
            self._lock.acquire()
        except Timeout as error:
            raise UserError(
                f"This sweep is running now, in another process: {self.path}. Watch it with "
                f"'dpo-lora status {self.path}'; for a second, separate one give hydra.sweep.dir=FOLDER."
            ) from error

    def _check(self, digest: str) -> None:
        known = self.summary().get("identity", digest)
        if known != digest:
            self.release()
            raise UserError(
                f"{self.path} holds another sweep: its settings or the names it varies differ from these. "
                "Give another hydra.sweep.dir, or leave it out for a new directory."
            )

    def release(self) -> None:
        self._lock.release()

    def abandon(self) -> None:
        """Let go of a sweep none of whose trials has begun: as it was before, or, if it was not, without a trace."""
        if self._before:
            self.write(self._before)
            self.release()
            return
        self.release()
        for name in (self.summary_file.name, "multirun.yaml", ".lock"):
            (self.path / name).unlink(missing_ok=True)
        for folder in (self.path / ".cluster", self.path / ".slurm", self.path):  # for jobs that never were
            with contextlib.suppress(OSError):  # what else lies in a folder that was named is not ours
                folder.rmdir()

    def is_live(self) -> bool:
        """Whether a process is running this sweep now."""
        probe = FileLock(self._lock.lock_file, timeout=0)
        try:
            probe.acquire()
        except Timeout:
            return True
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            return self._is_held()
        probe.release()
        return False

    def _is_held(self) -> bool:
        """:meth:`is_live` for a reader of somebody else's sweep, who may not open its lock as those who take it do."""
        import fcntl  # which Windows lacks, as it does such a refusal

        try:
            handle = os.open(self._lock.lock_file, os.O_RDONLY)
        except FileNotFoundError:
            return False
        except OSError:  # not even that: by its own last word
            return self.summary().get("status") == RUNNING
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # the second on some network file systems
            return True
        finally:
            os.close(handle)
        return False

    def summary(self) -> dict[str, Any]:
        """What sweep.json says; empty before the first time."""
        try:
            return dict(json.loads(self.summary_file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return {}

    def write(self, summary: dict[str, Any]) -> None:
        write_json(self.summary_file, summary)


def find(name: str, outputs: Path) -> SweepDir | None:
    """The sweep that people name, by path, by its folder's name in ``outputs``; None if it is no sweep.

    ``latest`` is the newest.
    """
    if name == "latest":
        newest = sorted(outputs.glob("*/sweep.json"), key=lambda file: file.stat().st_mtime)
        return SweepDir(newest[-1].parent.resolve()) if newest else None
    for path in (Path(name), outputs / name):
        if (path / "sweep.json").is_file():
            return SweepDir(path.resolve())
    return None


def find_unfinished(outputs: Path, *, retry: bool) -> Path:
    """The run or sweep in ``outputs`` that was started last of those which can be gone on with.

    Args:
        retry: a sweep of which only failed trials are left counts as well.

    Raises:
        UserError: each has finished, or is running.
    """
    found = [(str(run.manifest()["started"]), run.path) for run in unfinished(outputs)]
    wanted = (RUNNING, INTERRUPTED, *([FAILED] if retry else []))
    for file in outputs.resolve().glob("*/sweep.json"):
        sweep = SweepDir(file.parent)
        if (known := sweep.summary())["status"] in wanted and not sweep.is_live():
            found.append((str(known["started"]), sweep.path))
    if not found:
        raise UserError(
            f"No interrupted or failed run, and no interrupted sweep, in {outputs.resolve()}; "
            "there is nothing to resume. A sweep's failed trials are run again with --retry."
        )
    return max(found)[1]


def same(outputs: Path, digest: str) -> Path | None:
    """The newest sweep in ``outputs`` with this identity."""
    found = [
        (str(summary.get("started")), file.parent)
        for file in outputs.glob("*/sweep.json")
        if (summary := SweepDir(file.parent).summary()).get("identity") == digest
    ]
    return max(found)[1] if found else None
