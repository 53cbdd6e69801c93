"""Data sets of the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import datasets

from dpo_lora.errors import UserError
from dpo_lora.preferences.sources.rows import BATCH_ROWS, Batch


def fetch(path: str, subset: str | None, split: str, revision: str | None) -> tuple[datasets.Dataset, str | None]:
    """One split, on the disk as Arrow files, and the commit it was taken from where the hub tells it.

    Raises:
        UserError: no such data set or split, or the hub is out of reach.
    """
    try:
        builder = datasets.load_dataset_builder(path, subset, revision=revision)
        builder.download_and_prepare()
        rows = builder.as_dataset(split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"The data set {path} (split {split}) could not be had from the hub: {error}\n"
            "Check the id, the split and the network, or use a file: data=local data.path=PAIRS.jsonl"
        ) from error
    assert isinstance(rows, datasets.Dataset)
    commit = builder.hash if builder.hash and re.fullmatch("[0-9a-f]{40}", builder.hash) else None
    return rows, commit


def files(rows: datasets.Dataset) -> list[Path]:
    """The Arrow files behind ``rows``, to tell their content by."""
    return [Path(file["filename"]) for file in rows.cache_files]


def read(name: str, rows: datasets.Dataset) -> Iterator[Batch]:
    """The rows in batches."""
    number = 1
    for table in rows.with_format("arrow").iter(batch_size=BATCH_ROWS):
        for batch in table.to_batches():
            yield Batch(name, "row", list(range(number, number + batch.num_rows)), batch)
            number += batch.num_rows
