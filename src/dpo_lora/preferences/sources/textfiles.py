"""JSON lines, JSON arrays and CSV, plain or gzipped: streamed, with every length bounded."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from dpo_lora.errors import UserError
from dpo_lora.preferences.sources.rows import MAX_ROW_BYTES, Batch, Place, batched, parse_json

# Text of preference pairs shrinks 3 to 20 times; deflate's limit, which bombs reach, is 1030.
_MAX_RATIO = 200
_FREE_BYTES = 64 * 2**20  # small files may shrink as they like
_CHUNK = 2**20


class _Bounded(io.RawIOBase):
    """A gzip stream that refuses to unpack to more than a sane multiple of what lies on the disk."""

    def __init__(self, path: Path):
        self._path = path
        self._most = max(_FREE_BYTES, _MAX_RATIO * path.stat().st_size)
        self._file = gzip.open(path, "rb")  # noqa: SIM115  # close() closes it
        self._read = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._file.read(len(buffer))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{self._path}: broken gzip ({error}). Was it cut off? Make or fetch it again.") from error
        self._read += len(data)
        if self._read > self._most:
            raise UserError(
                f"{self._path}: unpacks to more than {_MAX_RATIO} times its size, as no preference data does "
                f"(stopped after {self._read >> 20} MiB). If you trust it, unpack it yourself and name that file."
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def check(path: Path) -> None:
    """Unpack a gzipped file once, keeping nothing: a bomb is refused before any of its rows is worked on.

    Raises:
        UserError: it unpacks to more than a sane multiple of its size, or is broken.
    """
    if path.suffix == ".gz":
        with _opened(path) as stream:
            while stream.read(_CHUNK):
                pass


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        raw = _Bounded(path) if path.suffix == ".gz" else path.open("rb", buffering=0)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    with io.BufferedReader(cast("io.RawIOBase", raw), _CHUNK) as stream:
        yield cast("IO[bytes]", stream)


def _too_long(place: Place) -> UserError:
    return UserError(
        f"{place} is longer than {MAX_ROW_BYTES >> 20} MiB: no preference pair is. "
        "Is it one row a line, and is it the right file?"
    )


def json_lines(path: Path) -> Iterator[Batch]:
    """One JSON object a line; blank lines are passed over.

    Raises:
        UserError: a line is too long, or the file cannot be read.
    """
    with _opened(path) as stream:
        yield from batched(str(path), "line", _lines(path, stream))


def _lines(path: Path, stream: IO[bytes]) -> Iterator[tuple[int, bytes, int]]:
    number = 0
    while line := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            raise _too_long(Place(str(path), number, "line"))
        if number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(f"{path}: not UTF-8 but UTF-16. Save the file as UTF-8.")
        if line.strip():
            yield number, line, len(line)


def json_array(path: Path) -> Iterator[Batch]:
    """A JSON array of objects, or JSON lines under the wrong name.

    Raises:
        UserError: it is neither, an element is too long or broken.
    """
    with _opened(path) as stream:
        head = stream.peek(64).lstrip(b"\xef\xbb\xbf \t\r\n")  # type: ignore[attr-defined]
        if head[:1] == b"[":
            yield from batched(str(path), "row", _elements(path, stream))
            return
        first = stream.readline(MAX_ROW_BYTES + 1)
    place = Place(str(path), 1, "line")
    try:
        one_a_line = bool(first.strip()) and isinstance(parse_json(first, place), dict)
    except UserError:
        one_a_line = False
    if one_a_line:
        yield from json_lines(path)
    elif first.strip():
        raise UserError(
            f"{path} is neither a list of rows ([{{...}}, ...]) nor one JSON object a line. If the list lies inside "
            "an object, save that list as the file."
        )


def _elements(path: Path, stream: IO[bytes]) -> Iterator[tuple[int, Any, int]]:
    decoder, text = json.JSONDecoder(), io.TextIOWrapper(stream, encoding="utf-8-sig")
    buffer, number, ended = "", 0, False
    separators = " \t\r\n["
    while True:
        buffer = buffer.lstrip(separators)
        place = Place(str(path), number + 1, "row")
        if buffer.startswith("]"):
            return
        try:
            value, end = decoder.raw_decode(buffer)
            whole = ended or end < len(buffer)  # a number at the end may go on in the next chunk
        except json.JSONDecodeError as error:
            if ended and not buffer:
                raise UserError(f"{path}: the list of rows is never closed; was the file cut off?") from error
            if ended:
                raise UserError(f"{place}: broken JSON: {error.msg}. Was the file cut off?") from error
            whole = False
        except RecursionError as error:
            raise UserError(f"{place}: JSON nested too deeply to be a preference pair.") from error
        if whole:
            number += 1
            yield number, value, end
            buffer, separators = buffer[end:], " \t\r\n,"
            continue
        if len(buffer) > MAX_ROW_BYTES:
            raise _too_long(place)
        try:
            # As much again as is waiting: a long row is tried a few times, not once a chunk.
            more = text.read(max(_CHUNK, len(buffer)))
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 after row {number} ({error.reason}). Save it as UTF-8.") from error
        ended = not more
        buffer += more


def table(path: Path) -> Iterator[Batch]:
    """CSV (or TSV) with a header; cells that hold JSON lists or objects are parsed where a shape needs them.

    Raises:
        UserError: a row has another number of cells than the header, quotes are left open, or no UTF-8.
    """
    with _opened(path) as stream:
        yield from batched(str(path), "line", _records(path, stream))


def _records(path: Path, stream: IO[bytes]) -> Iterator[tuple[int, dict[str, Any], int]]:
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    csv.field_size_limit(MAX_ROW_BYTES)
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    reader = csv.reader(_bounded_lines(path, text), strict=True, delimiter=delimiter)
    begins = 1
    try:
        header = next(reader, None)
        if header is None:
            return
        begins = reader.line_num + 1
        for cells in reader:
            if len(cells) != len(header) and cells:
                raise UserError(
                    f"{path}, line {begins}: {len(cells)} cells, but the header names {len(header)} columns. "
                    "Put quotes around cells with commas or line breaks in them."
                )
            if cells:
                yield begins, dict(zip(header, map(_cell, cells), strict=True)), sum(map(len, cells))
            begins = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, the row from line {begins} on: broken CSV: {error}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 after line {begins} ({error.reason}). Save the file as UTF-8.") from error


def _bounded_lines(path: Path, text: io.TextIOWrapper) -> Iterator[str]:
    number = 0
    while line := text.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            raise _too_long(Place(str(path), number, "line"))
        yield line


def _cell(cell: str) -> Any:
    """Messages and answer lists travel through CSV as JSON."""
    if cell[:2] in ("[{", '["') or cell[:2] == '{"':
        with contextlib.suppress(json.JSONDecodeError, RecursionError):
            return json.loads(cell)
    return cell
