"""A sweep in W&B, offline: one run a trial in one group, and a summary run whose table can be drawn."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from dpo_lora.choices import TrackerKind, TrackerMode
from dpo_lora.rundir import RunDir
from dpo_lora.schema import TrackingSettings
from dpo_lora.tracking import open_tracker
from harness import CommandLine
from sweeps.instant import World

OFFLINE = TrackingSettings(
    kind=TrackerKind.wandb, project="p", entity=None, group=None, tags=[], mode=TrackerMode.offline, log_adapter=False
)


def _said(folder: Path, *fields: tuple[str, str]) -> bool:
    """Whether the file that ``wandb sync`` uploads says this, one field after the other: it is not compressed."""
    (file,) = folder.glob("run-*.wandb")
    tags = {"group": "2", "job": ":", "name": "B"}  # of wandb's RunRecord: fields 6, 7 and 8
    wanted = "".join(f"{tags[name]}{chr(len(text))}{text}" for name, text in fields).encode()
    deadline = time.monotonic() + 20  # wandb's own process writes the file after the run was closed
    while wanted not in file.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.1)
    return wanted in file.read_bytes()


def test_the_summary_run_holds_a_row_a_trial(
    cli: CommandLine, world: World, sweep_words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    words = ["tracking=wandb" if w == "tracking=none" else w for w in sweep_words]
    world.fails = lambda settings: settings["lora"]["r"] == 8 and settings["dpo"]["beta"] == 0.1
    done = cli(*words, "dpo.beta=0.05,0.1", "lora.r=4,8")
    assert done.code == 1
    sweep = Path(done.out.strip().splitlines()[-1])
    (folder,) = sweep.glob("wandb/offline-run-*")
    assert folder.name.endswith(f"{sweep.name}-summary")
    assert _said(folder, ("group", sweep.name), ("job", "sweep"), ("name", sweep.name))
    (file,) = folder.glob("files/media/table/trials_*.table.json")
    table = json.loads(file.read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert {(row["dpo.beta"], row["lora.r"]) for row in rows} == {(b, r) for b in (0.05, 0.1) for r in (4.0, 8.0)}
    assert all(isinstance(row["accuracy"], float) for row in rows if row["status"] == "finished")
    assert [row["status"] for row in rows].count("failed") == 1
    (page,) = folder.glob("files/media/html/report_*.html")
    assert "Parallel coordinates" in page.read_text()


def test_a_trials_run_lies_in_the_group_and_says_what_varies(tmp_path: Path) -> None:
    trial = tmp_path / "sweep" / "0123456789abcdef"
    trial.mkdir(parents=True)
    (trial / "trial.json").write_text(json.dumps({"varied": {"dpo.beta": "0.1", "lora": "dora"}}))
    run = RunDir(trial)
    run.write_manifest({"status": "running"})
    with open_tracker(OFFLINE, run, trial.parent, {"dpo": {"beta": 0.1}}) as tracker:
        tracker.log({"loss": 0.5}, 1)
    (folder,) = trial.parent.glob("wandb/offline-run-*")
    assert _said(folder, ("group", "sweep"), ("job", "trial"), ("name", "dpo.beta=0.1 lora=dora 01234567"))
    (file,) = folder.glob("run-*.wandb")
    assert b'{"dpo.beta":0.1,"lora":"dora"}' in file.read_bytes()
