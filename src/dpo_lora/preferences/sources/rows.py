"""What readers yield: bounded batches of rows that know where they come from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from dpo_lora.errors import UserError

MAX_ROW_BYTES = 16 * 2**20  # no preference pair is longer; a broken or hostile file is
BATCH_ROWS = 512
BATCH_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Place:
    """Where a row lies, for people."""

    file: str
    number: int
    unit: str  # "line" where an editor's line number finds it, else "row"

    def __str__(self) -> str:
        return f"{self.file}, {self.unit} {self.number}"


@dataclass(frozen=True)
class Batch:
    """Consecutive rows of one file; JSON lines are still bytes, so that workers do the parsing."""

    file: str
    unit: str
    numbers: list[int]
    rows: list[bytes] | list[dict[str, Any]] | pa.RecordBatch

    def decoded(self) -> Iterator[tuple[Place, dict[str, Any]]]:
        """Each row as a dictionary with its place.

        Raises:
            UserError: a line is no UTF-8, no JSON, or no object.
        """
        rows: Iterable[Any] = self.rows.to_pylist() if isinstance(self.rows, pa.RecordBatch) else self.rows
        for number, row in zip(self.numbers, rows, strict=True):
            place = Place(self.file, number, self.unit)
            value = parse_json(row, place) if isinstance(row, bytes) else row
            if not isinstance(value, dict):
                raise UserError(f"{place}: a row is a JSON object with named columns, not {_kind(value)}.")
            yield place, value


def parse_json(raw: bytes, place: Place) -> Any:
    """The JSON value of one line.

    Raises:
        UserError: it is not UTF-8, not JSON, or nested too deeply.
    """
    try:
        return json.loads(raw.decode("utf-8-sig" if place.number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 ({error.reason}). Save the file as UTF-8.") from error
    except json.JSONDecodeError as error:
        ends = error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated string")
        cut = " The line ends in the middle of the row: was the file cut off?" if ends else ""
        raise UserError(f"{place}: broken JSON at column {error.colno}: {error.msg}.{cut}") from error
    except RecursionError as error:
        raise UserError(f"{place}: JSON nested too deeply to be a preference pair.") from error


def batched(file: str, unit: str, rows: Iterable[tuple[int, Any, int]]) -> Iterator[Batch]:
    """Group (number, row, size in bytes) into batches bounded by count and by bytes."""
    numbers: list[int] = []
    kept: list[Any] = []
    size = 0
    for number, row, length in rows:
        numbers.append(number)
        kept.append(row)
        size += length
        if len(kept) >= BATCH_ROWS or size >= BATCH_BYTES:
            yield Batch(file, unit, numbers, kept)
            numbers, kept, size = [], [], 0
    if kept:
        yield Batch(file, unit, numbers, kept)


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a text", int: "a number", float: "a number", bool: "true or false"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
