"""Parquet and Arrow files, in batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_lora.errors import UserError
from dpo_lora.preferences.sources.rows import BATCH_ROWS, MAX_ROW_BYTES, Batch

_MAX_GROUP_BYTES = 4 * 2**30  # unpacked; a writer's row group is 0.1 to 1 GB


def parquet(path: Path) -> Iterator[Batch]:
    """Rows of a parquet file.

    Raises:
        UserError: it is broken, or a row group unpacks to more than memory should take.
    """
    try:
        with pq.ParquetFile(path) as file:
            for group in range(file.metadata.num_row_groups):
                size = file.metadata.row_group(group).total_byte_size
                if size > _MAX_GROUP_BYTES:
                    raise UserError(
                        f"{path}: row group {group} unpacks to {size >> 20} MiB. Write it again with smaller ones."
                    )
            yield from _numbered(path, file.iter_batches(batch_size=BATCH_ROWS))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet: {error}") from error


def arrow(path: Path) -> Iterator[Batch]:
    """Rows of an Arrow file, in the streaming format of datasets or the random-access one.

    Raises:
        UserError: it is neither.
    """
    try:
        with pa.OSFile(str(path)) as source:
            yield from _numbered(path, _stream(source))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as Arrow: {error}") from error


def _stream(source: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    if source.read(6) == b"ARROW1":
        source.seek(0)
        file = pa.ipc.open_file(source)
        for number in range(file.num_record_batches):
            yield file.get_batch(number)
    else:
        source.seek(0)
        yield from pa.ipc.open_stream(source)


def _numbered(path: Path, batches: Iterator[pa.RecordBatch]) -> Iterator[Batch]:
    number = 1
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH_ROWS):
            part = batch.slice(start, BATCH_ROWS)
            if part.get_total_buffer_size() and part.nbytes > BATCH_ROWS * MAX_ROW_BYTES:
                raise UserError(f"{path}, from row {number}: rows longer than {MAX_ROW_BYTES >> 20} MiB.")
            yield Batch(str(path), "row", list(range(number, number + part.num_rows)), part)
            number += part.num_rows
