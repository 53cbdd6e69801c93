"""Lines that a crash cut off."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo_lora.files import append_jsonl, read_jsonl
from dpo_lora.rundir import RunDir

ROWS = [{"step": 1, "seconds": 2.5, "text": "plain"}, {"step": 2, "seconds": 5.0, "text": "Größe 大きさ"}]


@pytest.mark.parametrize("left", [1, 2], ids=["first byte of a character", "two of its three"])
def test_a_line_that_was_cut_inside_a_character_is_left_out(tmp_path: Path, left: int) -> None:
    file = tmp_path / "rows.jsonl"
    append_jsonl(file, ROWS)
    whole = file.read_bytes()
    file.write_bytes(whole[: whole.index("大".encode()) + left])
    assert list(read_jsonl(file)) == ROWS[:1]


def test_a_run_with_such_a_line_can_be_gone_on_with(tmp_path: Path) -> None:
    run = RunDir.create({}, outputs=tmp_path, name="x")
    for row in ROWS:
        run.append_metrics(row)
    run.metrics_file.write_bytes(run.metrics_file.read_bytes()[:-5])
    assert run.logged_seconds() == 2.5
    run.trim_metrics(5)
    run.append_metrics({"step": 3})
    assert [row["step"] for row in read_jsonl(run.metrics_file)] == [1, 3]
