"""Which files a path stands for, and which reader each one needs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import xxhash

from dpo_lora.errors import UserError, nearest
from dpo_lora.preferences.sources import tables, textfiles
from dpo_lora.preferences.sources.rows import Batch

READERS: dict[str, Callable[[Path], Iterator[Batch]]] = {
    ".jsonl": textfiles.json_lines,
    ".ndjson": textfiles.json_lines,
    ".jsonl.gz": textfiles.json_lines,
    ".json": textfiles.json_array,
    ".json.gz": textfiles.json_array,
    ".csv": textfiles.table,
    ".csv.gz": textfiles.table,
    ".tsv": textfiles.table,
    ".parquet": tables.parquet,
    ".arrow": tables.arrow,
}


def locate(name: str, folder: Path, split: str) -> list[Path]:
    """The files that ``name`` in ``folder`` stands for: itself, or what a folder of data holds.

    Args:
        split: which part of a saved DatasetDict to take.

    Raises:
        UserError: there is no such file, it is of no known kind, or the folder holds none.
    """
    path = folder / Path(name).expanduser()
    if path.is_dir():
        return _in_folder(path, split)
    if not path.is_file():
        beside = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
        raise UserError(f"There is no file {path}.{nearest(path.name, beside)}")
    if _suffix(path) is None:
        raise UserError(f"{path}: pairs are read from {', '.join(READERS)} files, not {path.suffix or 'that'}.")
    return [path]


def _in_folder(path: Path, split: str) -> list[Path]:
    if (path / "dataset_dict.json").is_file():
        names = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        if split not in names:
            raise UserError(f"{path} has no split {split!r}; it has {', '.join(names)}. Choose one: data.split=NAME")
        return _in_folder(path / split, split)
    if (path / "state.json").is_file():
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        return [path / file["filename"] for file in state["_data_files"]]
    found = sorted(p for p in path.iterdir() if p.is_file() and _suffix(p) and not p.name.startswith("."))
    if not found:
        raise UserError(f"{path} is a folder without a file of pairs in it ({', '.join(READERS)}).")
    return found


def _suffix(path: Path) -> str | None:
    name = path.name.lower()
    return next((suffix for suffix in sorted(READERS, key=len, reverse=True) if name.endswith(suffix)), None)


def read(paths: list[Path]) -> Iterator[Batch]:
    """Rows of all files, one after the other.

    Raises:
        UserError: a file is broken or empty.
    """
    for path in paths:
        if not path.stat().st_size:
            raise UserError(f"{path} is empty.")
        textfiles.check(path)
        suffix = _suffix(path)
        assert suffix is not None
        yield from READERS[suffix](path)


def digest(paths: list[Path]) -> str:
    """32 hex digits of the files' bytes (XXH3, 128 bit): sizes and dates can stay while rows change."""
    total = xxhash.xxh3_128()
    for path in paths:
        one = xxhash.xxh3_128()
        try:
            with path.open("rb", buffering=0) as file:
                while chunk := file.read(8 * 2**20):
                    one.update(chunk)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}.") from error
        total.update(one.digest())
    return total.hexdigest()
