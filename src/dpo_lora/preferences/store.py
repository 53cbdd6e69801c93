"""Prepared sources on the disk, named by their content: made once, verified before each use.

A store holds ``pairs.arrow`` (prepare.SCHEMA, memory-mapped by the trainer), one raw file a column
of prepare.COLUMNS, the sketches, and ``store.json`` with sizes and checksums, written last.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash
from filelock import FileLock

from dpo_lora.errors import UserError
from dpo_lora.files import write_json
from dpo_lora.preferences import workers
from dpo_lora.preferences.prepare import COLUMNS, SCHEMA, SKETCHES, Recipe
from dpo_lora.preferences.sources.source import Source
from dpo_lora.resources import cache_dir

log = logging.getLogger(__name__)

_BATCH_BYTES = 16 * 2**20  # of rows, written together
_VERSION = 3  # raise when the same content would be prepared otherwise
_ROWS, _FACTS = "pairs.arrow", "store.json"


@dataclass(frozen=True)
class Store:
    """One prepared source."""

    folder: Path
    facts: dict[str, Any]

    @property
    def key(self) -> str:
        return self.folder.name

    def __len__(self) -> int:
        return int(self.facts["pairs"])

    def column(self, name: str) -> npt.NDArray[Any]:
        return np.fromfile(self.folder / name, dtype=COLUMNS[name])

    def sketch(self, name: str) -> Path:
        return self.folder / name

    def rows(self) -> datasets.Dataset:
        """The pairs, memory-mapped."""
        return datasets.Dataset.from_file(str(self.folder / _ROWS))


def prepared(source: Source, recipe: Recipe) -> Store:
    """The store of ``source``: found and verified, or made now.

    Two processes that want the same one make it once.

    Raises:
        UserError: a row cannot be read or converted, or there is none.
    """
    folder = cache_dir() / "pairs" / key(source, recipe)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        facts = verified(folder, _FACTS)
        if facts is None:
            facts = build(folder, _FACTS, lambda scratch: _write(source, recipe, scratch))
    return Store(folder, facts)


def key(source: Source, recipe: Recipe) -> str:
    """32 hex digits of all that the prepared pairs depend on."""
    part = recipe.part
    values = {
        "version": _VERSION,
        "bytes": source.digest,
        "files": [str(p) for p in source.paths],  # places name them
        "part": [part.name, part.split, part.goes, part.heldout_split, part.columns, repr(part.filter)],
        "encoder": recipe.encoder.identity(),
        "rules": [recipe.pairing.value, recipe.plain_text.value],
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True).encode())


def _write(source: Source, recipe: Recipe, folder: Path) -> dict[str, Any]:
    begun = time.monotonic()
    counts: dict[str, int] = {}
    pairs, topics = 0, False
    names = [*COLUMNS, *SKETCHES]
    files = {name: (folder / name).open("wb") for name in names}
    try:
        with pa.OSFile(str(folder / _ROWS), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as stream:
            writer = _Writer(stream)
            for part in workers.run(recipe, source.batches()):
                for name, count in part.counts.items():
                    counts[name] = counts.get(name, 0) + count
                pairs += part.rows.num_rows
                topics |= part.rows["topic"].null_count < part.rows.num_rows
                writer.add(part.rows)
                for name in names:
                    files[name].write(part.columns[name].tobytes())
            writer.flush()
    finally:
        for file in files.values():
            file.close()
    if not counts.get("rows"):
        raise UserError(f"{source.part.path} has no rows.")
    if not pairs:
        told = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in counts.items() if n and name != "rows")
        raise UserError(
            f"{source.part.path} leaves no pairs of {counts['rows']} rows ({told or 'none gave one'}); see data.split, "
            "data.filter and docs/data.md."
        )
    seconds = time.monotonic() - begun
    log.info(
        "%s: %d pairs of %d rows prepared in %.1f s (%.0f rows a second)",
        source.part.name,
        pairs,
        counts["rows"],
        seconds,
        counts["rows"] / max(seconds, 1e-9),
    )
    return {"pairs": pairs, "topics": topics, "counts": counts}


class _Writer:
    """Rows in few large batches.

    Reading one column of many small ones touches a page or more in each, and the kernel maps its neighbours with
    it: a third of the file for the lengths of its lists alone.
    """

    def __init__(self, stream: pa.RecordBatchStreamWriter):
        self.stream = stream
        self.waiting: list[pa.RecordBatch] = []

    def add(self, rows: pa.RecordBatch) -> None:
        self.waiting.append(rows)
        if sum(batch.nbytes for batch in self.waiting) >= _BATCH_BYTES:
            self.flush()

    def flush(self) -> None:
        table = pa.Table.from_batches(self.waiting, SCHEMA).combine_chunks()
        if table.num_rows:
            self.stream.write_table(table)
        self.waiting.clear()


def build(folder: Path, facts_name: str, write: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Make ``folder`` by ``write``, whole or not at all; its lock is held.

    Args:
        write: fills the scratch folder it is given and returns what ``facts_name`` shall say.
    """
    scratch = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(scratch, ignore_errors=True)  # of a process that died
    shutil.rmtree(folder, ignore_errors=True)  # what did not verify
    scratch.mkdir()
    try:
        facts = write(scratch)
        facts["files"] = {p.name: [p.stat().st_size, checksum(p)] for p in sorted(scratch.iterdir())}
        write_json(scratch / facts_name, facts | {"digest": _digest(facts)})
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return facts


def verified(folder: Path, facts_name: str) -> dict[str, Any] | None:
    """What ``folder`` says of itself, if every file is there, of its size and with its checksum; else None."""
    told = folder / facts_name
    if not told.is_file():
        return None
    try:
        facts: dict[str, Any] = json.loads(told.read_text(encoding="utf-8"))
        damaged = None if facts.pop("digest") == _digest(facts) else facts_name
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, UnicodeDecodeError):
        damaged = facts_name
    if damaged is None:
        damaged = next((name for name, size in facts["files"].items() if not _is_whole(folder / name, *size)), None)
    if damaged is not None:
        log.warning("%s is damaged (%s) and is made again.", folder, damaged)
        return None
    return facts


def _is_whole(path: Path, size: int, digest: str) -> bool:
    return path.is_file() and path.stat().st_size == size and checksum(path) == digest


def _digest(facts: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode())


def checksum(path: Path) -> str:
    """32 hex digits of a file's bytes (XXH3, 128 bit), read without mapping it."""
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(8 * 2**20):
            digest.update(chunk)
    return digest.hexdigest()
