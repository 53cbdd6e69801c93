"""W&B gets the figures of eval.json and the answers of samples.jsonl, read back from its own offline file."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dpo_lora.files import read_jsonl
from harness import CommandLine

BLOCK, HEADER = 32768, 7


def records(data: bytes) -> Iterator[bytes]:
    """W&B's file is a LevelDB log: blocks of 32 KiB, records cut at their ends (types 1 whole, 2 to 4 a part each)."""
    at, parts = HEADER, b""  # its own header stands where the first record's might
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        at += HEADER
        parts += data[at : at + length]
        at += length
        if kind in (1, 4):
            yield parts
            parts = b""


def history(run: Path) -> list[dict[str, Any]]:
    """The rows that W&B wrote for this run."""
    from wandb.proto.wandb_internal_pb2 import Record

    [file] = run.glob("wandb/offline-run-*/run-*.wandb")
    rows = []
    for data in records(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
    return rows


def test_wandb_has_the_same_figures_and_the_answers(cli: CommandLine, tiny_overrides: list[str]) -> None:
    words = [w for w in tiny_overrides if w != "tracking=none"]
    run = cli("train", *words, "eval.every=2", "eval.sample_each=true", "eval.sample_tokens=8").run
    evaluation = json.loads((run / "eval.json").read_text())
    rows = history(run)
    told = {row["trainer/step"]: row for row in rows if "eval/accuracy" in row}
    assert sorted(told) == [0, 2, 4] == [entry["step"] for entry in evaluation["history"]]
    for entry in evaluation["history"]:
        for name in ("accuracy", "loss", "margin", "brier", "calibration_error", "log_ratio_per_token_chosen"):
            assert told[entry["step"]][f"eval/{name}"] == pytest.approx(entry[name], abs=1e-12)
        assert told[entry["step"]]["eval/accuracy_low"] == pytest.approx(entry["accuracy_interval"][0])
    tables = {row["trainer/step"]: row["samples/path"] for row in rows if "samples/path" in row}
    assert sorted(tables) == [2, 4]
    [folder] = run.glob("wandb/offline-run-*/files")
    table = json.loads((folder / tables[4]).read_text())
    said = [row["policy"]["text"] for row in read_jsonl(run / "samples.jsonl") if row["step"] == 4]
    assert [row[table["columns"].index("policy")] for row in table["data"]] == said
    kl = [row["eval/kl_per_token"] for row in rows if "eval/kl_per_token" in row]
    assert kl[-1] == pytest.approx(evaluation["samples"]["kl_per_token"])
