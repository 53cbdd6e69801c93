"""What must hold whatever the settings, shown through the real command line on a tiny model."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpo_lora.files import read_jsonl
from dpo_lora.rundir import RunDir
from harness import CommandLine


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter_model.safetensors")


def assert_bit_identical(a: Path, b: Path) -> None:
    left, right = adapter(a), adapter(b)
    assert left.keys() == right.keys()
    assert left
    for name in left:
        assert torch.equal(left[name], right[name]), name


def training_rows(run: Path) -> list[dict]:
    return [row for row in read_jsonl(run / "metrics.jsonl") if "loss" in row]


def test_the_first_step_has_a_loss_of_ln_2_and_no_margin(cli: CommandLine, tiny_overrides: list[str]) -> None:
    first = training_rows(cli("train", *tiny_overrides).run)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert first["rewards/accuracies"] == 0.5


def test_training_moves_the_adapter(cli: CommandLine, tiny_overrides: list[str]) -> None:
    weights = adapter(cli("train", *tiny_overrides, "train.learning_rate=1e-2").run)
    assert all(w.abs().max() > 0 for name, w in weights.items() if "lora_B" in name)


def test_eight_times_one_pair_equals_one_time_eight(cli: CommandLine, tiny_overrides: list[str]) -> None:
    """An optimizer step is pairs_per_step pairs however memory is cut; 3 does not divide 8."""
    runs = [
        cli(
            "train", *tiny_overrides, "train.pairs_per_step=8", f"train.micro_batch={m}", "train.learning_rate=1e-2"
        ).run
        for m in (8, 1, 3)
    ]
    whole = adapter(runs[0])
    for other in map(adapter, runs[1:]):
        for name, weight in whole.items():
            torch.testing.assert_close(other[name], weight, rtol=1e-4, atol=1e-5)
    losses = [[row["loss"] for row in training_rows(run)] for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)
    metrics = ("rewards/margins", "logps/chosen", "entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected")
    for name in metrics:
        values = [[row[name] for row in training_rows(run)] for run in runs]
        assert values[1] == pytest.approx(values[0], rel=1e-3, abs=1e-6), name
        assert values[2] == pytest.approx(values[0], rel=1e-3, abs=1e-6), name


def test_the_same_settings_give_the_same_bits(cli: CommandLine, tiny_overrides: list[str]) -> None:
    assert_bit_identical(cli("train", *tiny_overrides).run, cli("train", *tiny_overrides).run)


def _has_step(run: Path, step: int) -> bool:
    return any(int(folder.name.rpartition("-")[2]) >= step for folder in run.glob("checkpoints/checkpoint-*"))


def test_resume_after_a_kill_equals_an_uninterrupted_run(
    cli: CommandLine, tiny_overrides: list[str], tmp_path: Path
) -> None:
    """kill -9 in the second epoch, then resume: the same bits, the same metrics, nothing twice."""
    steps = [*tiny_overrides, "train.max_steps=30", "train.save_every=3"]
    whole = cli("train", *steps).run
    killed_in = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "dpo_lora", "train", *steps, f"run_dir={killed_in}"], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not _has_step(killed_in, 12) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert RunDir(killed_in).manifest()["status"] == "running"
    assert RunDir(killed_in).status() == "interrupted"
    outcome = cli("resume", str(killed_in))
    assert outcome.code == 0, outcome.err
    assert RunDir(killed_in).status() == "finished"
    assert_bit_identical(whole, killed_in)
    for name in ("loss", "pairs", "tokens"):
        assert [r[name] for r in training_rows(killed_in)] == [r[name] for r in training_rows(whole)]
    for name in ("pairs", "tokens"):
        assert RunDir(killed_in).manifest()["training"][name] == RunDir(whole).manifest()["training"][name]


def test_ctrl_c_leaves_a_checkpoint_and_resume_goes_on(
    cli: CommandLine, tiny_overrides: list[str], tmp_path: Path
) -> None:
    steps = [*tiny_overrides, "train.max_steps=40", "train.save_every=0"]
    whole = cli("train", *steps).run
    run = tmp_path / "stopped"
    process = subprocess.Popen(
        [sys.executable, "-m", "dpo_lora", "train", *steps, f"run_dir={run}"],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not any("loss" in row for row in _rows_so_far(run)) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1]
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert RunDir(run).manifest()["status"] == "interrupted"
    assert list(run.glob("checkpoints/checkpoint-*"))
    assert cli("resume", str(run)).code == 0
    assert_bit_identical(whole, run)


def _rows_so_far(run: Path) -> list[dict]:
    file = run / "metrics.jsonl"
    return list(read_jsonl(file)) if file.exists() else []


def test_two_trials_of_a_sweep_equal_two_runs_apart(cli: CommandLine, tiny_overrides: list[str]) -> None:
    words = ["dpo.beta=0.05,0.5", "train.learning_rate=1e-2", "eval.report=true"]
    sweep = cli("train", "-m", *tiny_overrides, *words)
    assert sweep.code == 0, sweep.err
    outputs = Path(next(o for o in tiny_overrides if o.startswith("outputs=")).partition("=")[2])
    trials = sorted(f for f in outputs.glob("dpo-*-sweep-*/*/run.json") if not f.parent.is_symlink())
    assert len(trials) == 2
    betas = {RunDir(t.parent).settings()["dpo"]["beta"]: t.parent for t in trials}
    for beta, trial in betas.items():
        assert (trial / "report.html").is_file()
        alone = cli("train", *tiny_overrides, f"dpo.beta={beta}", "train.learning_rate=1e-2").run
        assert_bit_identical(trial, alone)


def test_a_finished_run_started_again_does_nothing(cli: CommandLine, tiny_overrides: list[str]) -> None:
    run = cli("train", *tiny_overrides).run
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    outcome = cli("resume", str(run))
    assert outcome.code == 0
    assert "finished" in outcome.err
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()} == before


def test_a_checkpoint_of_other_settings_is_not_resumed(cli: CommandLine, tiny_overrides: list[str]) -> None:
    run = cli("train", *tiny_overrides).run
    settings = (run / "settings.yaml").read_text()
    (run / "settings.yaml").write_text(settings.replace("learning_rate: 0.0001", "learning_rate: 0.1"))
    manifest = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**manifest, "status": "interrupted"}))
    outcome = cli("resume", str(run))
    assert outcome.code == 2
    assert "settings differ" in outcome.err
    assert "Traceback" not in outcome.err


def test_a_broken_checkpoint_is_set_aside_and_the_one_before_used(cli: CommandLine, tiny_overrides: list[str]) -> None:
    run = cli("train", *tiny_overrides).run
    newest = run / "checkpoints" / "checkpoint-4" / "optimizer.pt"
    bits = bytearray(newest.read_bytes())
    bits[len(bits) // 2] ^= 1
    newest.write_bytes(bits)
    manifest = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**manifest, "status": "interrupted"}))
    before = adapter(run)
    assert cli("resume", str(run)).code == 0
    assert (run / "checkpoints" / "broken-checkpoint-4").is_dir()
    after = adapter(run)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_parent_is_the_reference_and_versions_count_up(cli: CommandLine, tiny_overrides: list[str]) -> None:
    first = cli("train", *tiny_overrides, "train.learning_rate=1e-2").run
    words = [f"parent={first}", "train.learning_rate=1e-2", "eval.report=true"]
    second = cli("train", *tiny_overrides, *words).run
    assert (second / "report.html").is_file()
    manifest = RunDir(second).manifest()
    assert manifest["version"] == 2
    assert manifest["parent"]["name"] == first.name
    # Policy and reference both start from the parent's adapter, not from the base model.
    assert training_rows(second)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert any(not torch.equal(adapter(first)[n], w) for n, w in adapter(second).items())
    card = (second / "README.md").read_text()
    assert first.name.replace("_", "\\_") in card
    link = manifest["parent"]["link"]
    assert (second / os.fspath(link)).resolve() == (first / "README.md").resolve()


def test_cuda_is_refused_where_there_is_none(cli: CommandLine, tiny_overrides: list[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    words = [w for w in tiny_overrides if w != "train=cpu"]
    outcome = cli("train", *words, "train=gpu")
    assert outcome.code == 2
    assert "train.device=cuda" in outcome.err
    assert "train=cpu" in outcome.err


def _cut_off(run: Path) -> None:
    """As a kill after the last checkpoint leaves a run."""
    manifest = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**manifest, "status": "interrupted"}))
    (run / "adapter_model.safetensors").unlink()


def test_a_run_cut_off_after_its_last_step_takes_no_further_one(cli: CommandLine, tiny_overrides: list[str]) -> None:
    run = cli("train", *tiny_overrides, "train.schedule=constant", "train.save_every=0").run
    kept, samples = adapter(run), (run / "samples.jsonl").read_text()
    training = RunDir(run).manifest()["training"]
    _cut_off(run)
    assert cli("resume", "latest", "--outputs", str(run.parent)).run == run
    assert all(torch.equal(tensor, kept[name]) for name, tensor in adapter(run).items())
    assert max(row["step"] for row in read_jsonl(run / "metrics.jsonl")) == 4
    assert (run / "samples.jsonl").read_text() == samples
    again = RunDir(run).manifest()["training"]
    assert {k: again[k] for k in ("steps", "pairs", "tokens")} == {k: training[k] for k in ("steps", "pairs", "tokens")}


def test_a_parent_called_latest_stays_the_one_it_was(cli: CommandLine, tiny_overrides: list[str]) -> None:
    first = cli("train", *tiny_overrides, "train.learning_rate=1e-2").run
    second = cli("train", *tiny_overrides, "train.learning_rate=1e-2", "parent=latest").run
    assert RunDir(second).settings()["parent"] == str(first)
    said = json.loads((second / "eval.json").read_text())["after"]
    outcome = cli("score", str(second), "--out", str(second / "again"))
    assert outcome.code == 0, outcome.err
    again = json.loads((second / "again" / "eval.json").read_text())["after"]
    assert again["margin"] == pytest.approx(said["margin"], abs=1e-6)
    assert abs(said["margin"]) > 1e-4


def test_a_parent_of_another_shape_is_refused_with_the_words_that_fit(
    cli: CommandLine, tiny_overrides: list[str]
) -> None:
    cli("train", *tiny_overrides, "lora=attention", "lora.r=4")
    outcome = cli("train", *tiny_overrides, "parent=latest")
    assert outcome.code == 2
    words = "lora.r=4 lora.targets=[k_proj,o_proj,q_proj,v_proj]"
    assert words in outcome.err
    assert cli("train", *tiny_overrides, "parent=latest", *words.split()).code == 0


@pytest.mark.parametrize(
    "words", [["train.reference_cache=false"], ["train.engine=stock"], ["dpo.ld_alpha=0.5"]], ids=str
)
def test_ties_of_the_first_step_count_one_half(cli: CommandLine, tiny_overrides: list[str], words: list[str]) -> None:
    run = cli("train", *tiny_overrides, *words).run
    assert training_rows(run)[0]["rewards/accuracies"] == 0.5


def test_an_adapter_trained_on_a_gpu_is_used_where_there_is_none(cli: CommandLine, tiny_overrides: list[str]) -> None:
    run = cli("train", *tiny_overrides).run
    text = (run / "settings.yaml").read_text()
    (run / "settings.yaml").write_text(
        text.replace("device: cpu", "device: cuda").replace("dtype: float32", "dtype: bfloat16")
    )
    outcome = cli("chat", str(run), "--prompt", "Hi", "--max-new-tokens", "4")
    assert outcome.code == 0, outcome.err
