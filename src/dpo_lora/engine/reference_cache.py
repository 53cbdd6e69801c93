"""Reference log-probabilities on disk: computed once for a base model and a pair, shared by every run and
trial.

    <folder>/<scope>/<sha256 of the file>.safetensors      a shard: some dozens of pairs
    <folder>/<scope>/scope.json                            what the scope stands for, for people
    <folder>/<scope>.lock                                  one builder at a time; others wait, then find it
    done

The scope names everything that fixes the numbers besides the pair (base weights, reference adapter, dtype,
engine version); a pair's key is the hash of its two truncated token sequences, so length rules are part of
it. Log-probs are kept per token: every loss and `ld_alpha` derive from them. A file's name is its checksum,
files appear by atomic rename and never change, so a killed build loses one shard and concurrent builders
cannot harm each other. A file that does not match its name is set aside (".corrupt") and its pairs are
computed again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock

from dpo_lora.engine.cache_files import LogProbs, load_checked, touch, unpack, write_atomically, write_shard
from dpo_lora.engine.wanted import KEY_BYTES, Wanted
from dpo_lora.errors import UserError

log = logging.getLogger(__name__)

ENGINE_VERSION = 1
"""Raise when the meaning of a stored number changes; older entries are then not found and age out."""

Tokens = tuple[tuple[Sequence[int], int], tuple[Sequence[int], int]]
"""A pair as it is trained: ((chosen ids, completion start), (rejected ids, completion start))."""


@dataclass(frozen=True)
class ScopeInfo:
    """One line of `list_scopes`: sizes in bytes, `used` in seconds since the epoch."""

    scope: str
    about: dict
    shards: int
    size: int
    used: float


def scope_of(**facts: object) -> str:
    """Name of a scope from what fixes the numbers, e.g. base=<fingerprint>, adapter=<fingerprint or None>,
    dtype=..."""
    text = json.dumps({**facts, "engine_version": ENGINE_VERSION}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def row_key(row: Tokens) -> bytes:
    """32 bytes that name a pair by content."""
    digest = hashlib.sha256()
    for ids, start in row:
        digest.update(np.asarray([len(ids), start, *ids], dtype="<i8").tobytes())
    return digest.digest()


def sequence_log_probs(values: LogProbs, ld_alpha: float | None) -> tuple[float, float]:
    """(chosen, rejected) log-probability of a pair; ld_alpha weighs tokens beyond the shorter answer's
    length, as TRL.

    Source: TRL 1.16 `compute_ref_log_probs`; LD-DPO, arXiv 2409.06411.
    """
    if ld_alpha is None:
        return tuple(float(v.sum(dtype=np.float64)) for v in values)
    shared = min(len(v) for v in values)
    return tuple(float(v[:shared].sum(dtype=np.float64) + ld_alpha * v[shared:].sum(dtype=np.float64)) for v in values)


def _wanted(rows: Sequence[Tokens]) -> Wanted:
    keys, sizes = np.empty(len(rows), dtype=f"S{KEY_BYTES}"), np.empty(len(rows), dtype=np.int32)
    for number, row in enumerate(rows):
        keys[number], sizes[number] = row_key(row), sum(len(ids) for ids, _ in row)
    return Wanted(keys, sizes)


def _hand_out(
    wanted: Wanted, keys: Sequence[bytes], values: Sequence[LogProbs], note: Callable[[int, LogProbs], None]
) -> bool:
    """Give each row that waits for one of the keys its value; whether there was any."""
    taken = wanted.take(np.array(keys, dtype=f"S{KEY_BYTES}"))
    for place, numbers in taken:
        for number in numbers.tolist():
            note(number, values[place])
    return bool(taken)


class ReferenceCache:
    """The store in `folder` (made when first written), kept below max_bytes by dropping what was unused
    longest."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = Path(folder), max_bytes

    def visit(
        self,
        scope: str,
        rows: Sequence[Tokens],
        compute: Callable[[list[Tokens]], list[LogProbs]],
        note: Callable[[int, LogProbs], None],
        about: dict | None = None,
        rows_per_shard: int = 64,
        wait: float = 3600.0,
    ) -> tuple[int, int]:
        """Call note(number of a row, its log-probs) once for each row, a shard's at a time; what is not stored
        is computed, in shards, and stored. Returns how many distinct pairs were found and how many computed.

        rows are read one by one and never kept. compute gets rows and returns their values in order; it is
        not called when everything is stored. wait: seconds to wait for another builder of the scope before
        computing beside it (both results are the same).
        """
        wanted = _wanted(rows)
        self._read(scope, wanted, note)
        found = wanted.found
        if not wanted.complete:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / f"{scope}.lock")
            try:
                lock.acquire(timeout=wait)
            except TimeoutError:
                log.warning("another process has been building reference log-probs for %.0f s; computing too", wait)
            try:
                self._read(scope, wanted, note)
                found = wanted.found
                # long pairs beside long ones: a shard is then computed in tight micro-batches
                missing = wanted.missing()
                for at in range(0, len(missing), rows_per_shard):
                    part = [rows[i] for i in missing[at : at + rows_per_shard].tolist()]
                    keys = [row_key(row) for row in part]
                    values = [tuple(np.asarray(v, np.float32) for v in pair) for pair in compute(part)]
                    assert len(values) == len(part)
                    self._write(scope, keys, values, about or {})
                    _hand_out(wanted, keys, values, note)
            finally:
                lock.release()
            self._shrink(keep=scope)
        return found, wanted.distinct - found

    def _read(self, scope: str, wanted: Wanted, note: Callable[[int, LogProbs], None]) -> None:
        for path in self._shards(scope):
            if wanted.complete:
                break
            content = load_checked(path)
            if content is None:
                continue
            keys, values = zip(*unpack(content), strict=True)
            if _hand_out(wanted, keys, values, note):
                touch(path)

    def _shards(self, scope: str) -> list[Path]:
        return sorted((self.folder / scope).glob("*.safetensors"))

    def _write(self, scope: str, keys: list[bytes], values: list[LogProbs], about: dict) -> None:
        folder = self.folder / scope
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "scope.json").exists():
            write_atomically(folder / "scope.json", (json.dumps(about, indent=1, default=str) + "\n").encode())
        write_shard(folder, keys, values)

    def _shrink(self, keep: str) -> None:
        """Drop shards unused longest until the folder is below max_bytes; those of `keep` are in use and
        stay."""
        with FileLock(self.folder / "shrink.lock"):
            files = []
            for path in self.folder.glob("*/*"):
                try:
                    stat = path.stat()
                except FileNotFoundError:
                    continue
                files.append((stat.st_mtime, stat.st_size, path))
            total = sum(size for _, size, _ in files)
            for _, size, path in sorted(files, key=lambda f: f[0]):
                if total <= self.max_bytes:
                    break
                if path.parent.name != keep and path.name != "scope.json":
                    path.unlink(missing_ok=True)
                    total -= size

    def list_scopes(self) -> list[ScopeInfo]:
        """All scopes, most recently used first."""
        infos = []
        for folder in self.folder.glob("*/"):
            shards = self._shards(folder.name)
            try:
                about = json.loads((folder / "scope.json").read_text())
            except (OSError, ValueError):
                about = {}
            stats = [p.stat() for p in shards if p.exists()]
            used = max((s.st_mtime for s in stats), default=0.0)
            infos.append(ScopeInfo(folder.name, about, len(stats), sum(s.st_size for s in stats), used))
        return sorted(infos, key=lambda i: -i.used)

    def remove(self, scope: str) -> int:
        """Delete a scope; returns the number of files removed. An unknown name is an error."""
        if scope not in {i.scope for i in self.list_scopes()}:
            raise UserError(f"the reference cache {self.folder} has no entry {scope!r}; list them first")
        with FileLock(self.folder / f"{scope}.lock"):
            files = list((self.folder / scope).iterdir())
            for path in files:
                path.unlink(missing_ok=True)
            (self.folder / scope).rmdir()
        return len(files)

    def verify(self) -> dict[Path, bool]:
        """Every shard and whether it matches its checksum; those that do not are set aside."""
        return {p: load_checked(p) is not None for i in self.list_scopes() for p in self._shards(i.scope)}
