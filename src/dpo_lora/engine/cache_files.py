"""The files of the reference cache: their content, their checksums, how they appear and how damage is set
aside."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

log = logging.getLogger(__name__)

LogProbs = tuple[np.ndarray, np.ndarray]
"""float32 log-probabilities of the scored chosen and rejected tokens of one pair."""


def write_shard(folder: Path, keys: list[bytes], values: list[LogProbs]) -> None:
    """One file for the pairs: keys [n, 32] uint8, lengths [n, 2], log_probs flat float32; named by its
    sha256."""
    data = save({
        "keys": np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), 32),
        "lengths": np.array([[len(v) for v in pair] for pair in values], np.int64),
        "log_probs": np.concatenate([v for pair in values for v in pair]).astype(np.float32),
    })  # fmt: skip
    write_atomically(folder / f"{hashlib.sha256(data).hexdigest()}.safetensors", data)


def load_checked(path: Path) -> dict[str, np.ndarray] | None:
    """A shard's arrays, or None if it vanished or does not match its name (then it is set aside and said)."""
    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() == path.stem:
            return load(data)
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("reference cache file %s cannot be read (%s); its pairs will be computed again", path, error)
        return None
    except SafetensorError:
        pass
    log.warning("reference cache file %s is corrupt; set aside, its pairs will be computed again", path)
    with contextlib.suppress(OSError):  # another process set it aside first, or the folder is not ours
        path.replace(path.with_suffix(".corrupt"))
    return None


def unpack(content: dict[str, np.ndarray]) -> Iterator[tuple[bytes, LogProbs]]:
    """(key, values) of each pair of a shard."""
    ends = content["lengths"].reshape(-1).cumsum()
    parts = np.split(content["log_probs"], ends[:-1])
    for number, key in enumerate(content["keys"]):
        yield key.tobytes(), (parts[2 * number], parts[2 * number + 1])


def touch(path: Path) -> None:
    """Note that the file was used now; the oldest are dropped first."""
    with contextlib.suppress(OSError):  # read-only or just removed: its age is then what it was
        os.utime(path, (time.time(), time.time()))


def write_atomically(path: Path, data: bytes) -> None:
    """The file is there whole or not at all, also after a power cut."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)  # mkstemp's file is its owner's alone, and caches are shared
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
