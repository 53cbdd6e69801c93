"""Checkpoints that are whole or absent: staged, listed with their hashes, then renamed into place.

transformers writes a checkpoint file by file into its final folder, so a kill leaves a folder that
looks like a checkpoint. Here a folder counts only when its ``manifest.json``, written last, names
every file's size and sha256 and they agree.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

from dpo_lora.files import write_json

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STAGING = ".staging"
_PREFIX = "checkpoint-"


def seal(staged: Path, folder: Path, binding: dict[str, str]) -> Path:
    """Turn a finished staging folder into ``folder/checkpoint-<step>``.

    Args:
        staged: a folder named ``checkpoint-<step>`` that nobody writes to any more.
        folder: where checkpoints live, on the same file system.
        binding: what the checkpoint belongs to (settings, base weights, data); checked on resume.
    """
    files = {}
    for file in sorted(p for p in staged.rglob("*") if p.is_file()):
        files[str(file.relative_to(staged))] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        _fsync(file)
    write_json(staged / MANIFEST, {"binding": binding, "files": files})
    _fsync(staged)
    target = folder / staged.name
    if target.exists():  # an older attempt at the same step
        shutil.rmtree(target)
    staged.rename(target)
    _fsync(folder)
    return target


def is_whole(checkpoint: Path) -> bool:
    """Whether every file the manifest names is there, with its size and hash."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all(
            (checkpoint / name).stat().st_size == fact["bytes"] and _sha256(checkpoint / name) == fact["sha256"]
            for name, fact in files.items()
        )
    except (OSError, ValueError, KeyError):
        return False


def binding(checkpoint: Path) -> dict[str, str]:
    """What a whole checkpoint belongs to."""
    return dict(json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["binding"])


def at_step(folder: Path, step: int) -> Path:
    return folder / f"{_PREFIX}{step}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(_PREFIX))


def find_whole(folder: Path) -> Path | None:
    """The checkpoint with the highest step that verifies, from which a resumed run goes on; changes nothing."""
    return next((checkpoint for checkpoint in reversed(_all(folder)) if is_whole(checkpoint)), None)


def newest_whole(folder: Path) -> Path | None:
    """:func:`find_whole`; broken checkpoints of later steps are set aside, not deleted."""
    found = find_whole(folder)
    for checkpoint in _all(folder):
        if found is not None and step_of(checkpoint) <= step_of(found):
            continue
        aside = checkpoint.with_name(f"broken-{checkpoint.name}")
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)
        log.warning(
            "%s is not whole (a file is missing or differs from its manifest); set aside as %s",
            checkpoint,
            aside.name,
        )
    return found


def rotate(folder: Path, keep: int, protect: Path | None = None) -> None:
    """Delete all but the ``keep`` newest checkpoints; ``protect`` stays whatever its age."""
    for old in _all(folder)[:-keep]:
        if protect is None or old.name != protect.name:
            shutil.rmtree(old, ignore_errors=True)


def clear_staging(folder: Path) -> None:
    """Remove what a killed process left half-written."""
    shutil.rmtree(folder / STAGING, ignore_errors=True)


def _all(folder: Path) -> list[Path]:
    found = [p for p in folder.glob(f"{_PREFIX}*") if p.is_dir() and p.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=step_of)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
