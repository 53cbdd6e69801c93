"""Files that are whole or absent: written to a temporary name, synced, then renamed over the old one."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def write_atomic(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` (UTF-8) so that a reader or a crash sees the old or the new, never half.

    Raises:
        OSError: the disk is full or the folder cannot be written; the old file is still there.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """``value`` as indented JSON; NaN and infinity become null, which every reader takes."""
    write_atomic(path, json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """``value`` with NaN and infinities, which JSON has no word for, as None."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a file this package wrote; a line cut off by a crash is the last one and is left out."""
    with path.open("rb") as file:  # line by line as bytes: the cut may go through a character
        for line in file:
            try:
                yield json.loads(line.decode("utf-8"))
            except (UnicodeDecodeError, json.JSONDecodeError):
                return


def append_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add one line a row, on the disk before this returns; NaN and infinity become null."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(finite(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
