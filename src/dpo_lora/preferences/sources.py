"""Where rows come from: shipped files, the user's own, the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets

from dpo_lora.errors import UserError, nearest
from dpo_lora.resources import data_dir
from dpo_lora.schema import DataSettings, DataSource

SPLIT = "split"


def read(data: DataSettings) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Training rows, and held-out rows where the source keeps them apart (else None).

    Raises:
        UserError: no such file or data set, or a file that cannot be read as rows.
    """
    if data.source is DataSource.hub:
        return _from_hub(data)
    path = _locate(data, data.path)
    rows = _from_file(path)
    if data.heldout_path is not None:
        return rows, _from_file(_locate(data, data.heldout_path))
    if data.heldout_split is None:
        return rows, None
    if SPLIT not in rows.column_names:
        raise UserError(
            f"{path} has no column {SPLIT!r} to tell {data.split!r} from {data.heldout_split!r} "
            f"(it has {', '.join(rows.column_names)}). Set data.heldout_split=null to hold out "
            "data.heldout_share of the prompts instead."
        )
    parts = [rows.filter(lambda row, name=name: row[SPLIT] == name) for name in (data.split, data.heldout_split)]
    for name, part in zip((data.split, data.heldout_split), parts, strict=True):
        if not len(part):
            found = sorted(set(rows[SPLIT]))
            raise UserError(f"{path} has no row with {SPLIT}={name!r}; it has {found}.")
    return parts[0], parts[1]


def _locate(data: DataSettings, name: str) -> Path:
    folder = data_dir() if data.source is DataSource.shipped else Path()
    path = folder / Path(name).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a file of pairs; name the file in it.")
    beside = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
    raise UserError(f"There is no file {path}.{nearest(path.name, beside)}")


def _from_file(path: Path) -> datasets.Dataset:
    if path.suffix == ".parquet":
        return datasets.Dataset.from_parquet(str(path))
    if path.suffix not in (".json", ".jsonl"):
        raise UserError(f"{path}: pairs are read from .jsonl, .json or .parquet files, not {path.suffix or 'that'}.")
    rows = _json_rows(path)
    if not rows:
        raise UserError(f"{path} has no rows.")
    try:
        return datasets.Dataset.from_list(rows)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: its rows do not share one shape: {error}") from error


def _json_rows(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8 ({error.reason}). Save the file as UTF-8.") from error
    if path.suffix == ".json":
        rows = _parse(path, 1, text)
        if not isinstance(rows, list):
            raise UserError(f"{path} holds one JSON object, not a list of rows. One row a line? Call it .jsonl.")
    else:
        rows = [_parse(path, n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(
                f"{path}, row {number}: a row is a JSON object with named columns, not {type(row).__name__}."
            )
    return rows


def _parse(path: Path, line: int, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = line + error.lineno - 1
        raise UserError(f"{path}, line {where}: broken JSON at column {error.colno}: {error.msg}.") from error
    except RecursionError as error:
        raise UserError(f"{path}, line {line}: JSON nested too deeply to be a preference pair.") from error


def _from_hub(data: DataSettings) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    def part(split: str) -> datasets.Dataset:
        try:
            return datasets.load_dataset(data.path, data.subset, split=split, revision=data.revision)
        except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
            raise UserError(
                f"The data set {data.path} (split {split}) could not be had from the hub: {error}\n"
                "Check the id, the split and the network, or use a file: data=local data.path=PAIRS.jsonl"
            ) from error

    return part(data.split), None if data.heldout_split is None else part(data.heldout_split)
