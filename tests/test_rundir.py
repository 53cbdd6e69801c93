"""A run's directory: claimed once, written whole, read without doubt."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from dpo_lora import checkpoints
from dpo_lora.errors import UserError
from dpo_lora.files import read_jsonl, write_json
from dpo_lora.rundir import FINISHED, INTERRUPTED, RUNNING, RunDir, find


def _create(outputs: str) -> str:
    return RunDir.create({"a": 1}, outputs=Path(outputs), name="dpo-x-lora-output").path.name


def test_runs_started_in_the_same_second_get_different_directories(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        names = pool.map(_create, [str(tmp_path)] * 8)
    assert len(set(names)) == 8
    assert all(len(name) == len("dpo-x-lora-output-") + 10 for name in names)


def test_a_directory_is_claimed_once(tmp_path: Path) -> None:
    run = RunDir.create({}, outputs=tmp_path, name="x", path=tmp_path / "here")
    with pytest.raises(UserError, match="in use"):
        RunDir.reopen(run.path)
    run.release()
    with pytest.raises(UserError, match="already holds a run"):
        RunDir.create({}, outputs=tmp_path, name="x", path=tmp_path / "here")


def test_a_reader_tells_a_live_run_from_a_dead_one(tmp_path: Path) -> None:
    run = RunDir.create({}, outputs=tmp_path, name="x")
    reader = RunDir(run.path)
    assert reader.is_live()
    assert reader.status() == RUNNING
    run.release()
    assert not reader.is_live()
    assert reader.status() == INTERRUPTED


def test_a_manifest_is_replaced_whole(tmp_path: Path) -> None:
    run = RunDir.create({}, outputs=tmp_path, name="x")
    run.write_manifest({"training": {"steps": 1}})
    run.write_manifest({"training": {"pairs": 2}, "loss": float("nan")})
    manifest = json.loads(run.manifest_file.read_text())
    assert manifest["training"] == {"steps": 1, "pairs": 2}
    assert manifest["loss"] is None
    assert not [p for p in run.path.iterdir() if p.name.startswith(".run.json")]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "f.json"
    write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["f.json"]


def test_metrics_survive_a_half_written_line_and_are_trimmed(tmp_path: Path) -> None:
    run = RunDir.create({}, outputs=tmp_path, name="x")
    for step in (1, 2, 3):
        run.append_metrics({"step": step, "loss": float("inf")})
    with run.metrics_file.open("a") as file:
        file.write('{"step": 4, "lo')
    run.trim_metrics(2)
    assert [row["step"] for row in read_jsonl(run.metrics_file)] == [1, 2]


def test_find_by_path_name_and_latest(tmp_path: Path) -> None:
    older = RunDir.create({}, outputs=tmp_path, name="x")
    older.write_manifest({"status": FINISHED, "ended": "2026-01-01T00:00:00Z"})
    newer = RunDir.create({}, outputs=tmp_path, name="x")
    newer.write_manifest({"status": FINISHED, "ended": "2026-01-02T00:00:00Z"})
    newer.point_latest(tmp_path)
    assert (tmp_path / "latest").resolve() == newer.path
    assert find("latest", tmp_path).path == newer.path
    trial = RunDir.create({}, outputs=tmp_path, name="x", path=tmp_path / "sweep" / "trial")
    trial.write_manifest({"status": FINISHED, "ended": "2026-01-03T00:00:00Z"})
    assert find("latest", tmp_path).path == newer.path, "the trial that ends last is any of its sweep's"
    assert find(older.path.name, tmp_path).path == older.path
    assert find(str(older.path), tmp_path).path == older.path
    with pytest.raises(UserError, match=newer.path.name):
        find("oldest", tmp_path)


def _staged(folder: Path, step: int) -> Path:
    staged = folder / checkpoints.STAGING / f"checkpoint-{step}"
    staged.mkdir(parents=True)
    (staged / "weights").write_bytes(os.urandom(1000))
    (staged / "state.json").write_text("{}")
    return staged


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "no manifest"])
def test_a_damaged_checkpoint_is_not_whole(tmp_path: Path, damage: str) -> None:
    for step in (2, 10):
        checkpoints.seal(_staged(tmp_path, step), tmp_path, {"settings": "s"})
    newest = tmp_path / "checkpoint-10"
    assert checkpoints.newest_whole(tmp_path) == newest
    weights = newest / "weights"
    if damage == "flip":
        bits = bytearray(weights.read_bytes())
        bits[500] ^= 1
        weights.write_bytes(bits)
    elif damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "remove":
        weights.unlink()
    else:
        (newest / checkpoints.MANIFEST).unlink()
    assert not checkpoints.is_whole(newest)
    assert checkpoints.newest_whole(tmp_path) == tmp_path / "checkpoint-2"
    assert (tmp_path / "broken-checkpoint-10").is_dir()
    assert checkpoints.binding(tmp_path / "checkpoint-2") == {"settings": "s"}


def test_rotation_keeps_the_newest_by_step(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        checkpoints.seal(_staged(tmp_path, step), tmp_path, {})
    checkpoints.rotate(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-9"]
