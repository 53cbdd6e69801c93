"""A user's mistakes: one clear message, exit code 2, no traceback, nothing lost."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_lora import checkpoints
from dpo_lora.rundir import FAILED, RunDir
from harness import CommandLine, make_pair


def replaced(overrides: list[str], *words: str) -> list[str]:
    """The command line with these settings in place of earlier ones of the same name."""
    names = {w.partition("=")[0] for w in words}
    return [o for o in overrides if o.partition("=")[0] not in names] + list(words)


def refused(cli: CommandLine, *words: str) -> str:
    outcome = cli("train", *words)
    assert outcome.code == 2, outcome.err
    assert "Traceback" not in outcome.err
    return outcome.err


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


GOOD = [make_pair(n) for n in range(12)]

FILES = {
    "broken JSON": (lines(*GOOD[:2]) + '{"prompt": \n' + lines(*GOOD[2:]), ["line 3", "broken JSON"]),
    "missing columns": (lines({"prompt": "a", "chosen": "b"}), ["rejected", "prompt, chosen"]),
    "zero rows": ("", ["is empty"]),
    "a list in a line": ("[1, 2]\n", ["line 1", "JSON object"]),
    "too few for a step": (lines(*GOOD[:4]), ["train.pairs_per_step"]),
}


@pytest.mark.parametrize("case", FILES)
def test_a_broken_file_of_pairs(cli: CommandLine, tiny_overrides: list[str], tmp_path: Path, case: str) -> None:
    text, expected = FILES[case]
    file = tmp_path / "pairs.jsonl"
    file.write_text(text, encoding="utf-8")
    message = refused(cli, *replaced(tiny_overrides, f"data.path={file}"))
    for words in expected:
        assert words in message


def test_not_utf8_names_the_line(cli: CommandLine, tiny_overrides: list[str], tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(lines(*GOOD[:2]).encode() + b'{"prompt": "caf\xe9"}\n')
    assert "line 3" in refused(cli, *replaced(tiny_overrides, f"data.path={file}"))


def test_no_such_file_suggests_a_near_name(cli: CommandLine, tiny_overrides: list[str], tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(lines(*GOOD))
    message = refused(cli, *replaced(tiny_overrides, f"data.path={tmp_path / 'pears.jsonl'}"))
    assert "'pairs.jsonl'" in message


@pytest.mark.parametrize("word", ["model.name=./no/such/folder", "data.path=no/such/pairs.jsonl"])
def test_a_wrong_path_is_told_before_anything_is_loaded_or_made(
    tiny_overrides: list[str], tmp_path: Path, word: str
) -> None:
    words = replaced(tiny_overrides, word)
    command = [sys.executable, "-X", "importtime", "-m", "dpo_lora", "train", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "There is no" in done.stderr
    assert "dpo_lora.composition" in done.stderr, "imports are told"
    assert not any(line.split("|")[-1].strip() in ("torch", "datasets") for line in done.stderr.splitlines())
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["model.name=./no/such/folder"], ["There is no model folder"]),
        (["model.name=nobody/nothing"], ["nobody/nothing", "local folder"]),
        (["lora.targets=[q_prj]"], ["q_prj", "'q_proj'", "k_proj"]),
        (["lora.init=pissa"], ["base weights", "reference"]),
        (["lora.init=glorot"], ["glorot", "gaussian"]),
        (["parent=no-such-run"], ["no-such-run"]),
        (["train.pairs_per_step=64"], ["training pairs", "or lower"]),
        (["model.quantization=nf4"], ["dpo-lora[quantized]"]),
        (["model.attention=flahs"], ["flahs", "model.attention"]),
        (["train.optimizer=adamw_troch"], ["adamw_troch", "'adamw_torch'"]),
        (["train.epochs=null"], ["train.epochs cannot be null"]),
        (["tracking=none", "train.epochs=0.01", "train.max_steps=null"], ["less than one optimizer step"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_request_that_cannot_be_met(
    cli: CommandLine, tiny_overrides: list[str], words: list[str], expected: list[str]
) -> None:
    if "nf4" in words[0]:
        pytest.importorskip("torch")
        try:
            import bitsandbytes  # noqa: F401
        except ImportError:
            pass
        else:
            pytest.skip("bitsandbytes is installed here")
    message = refused(cli, *replaced(tiny_overrides, *words))
    for part in expected:
        assert part in message


def test_a_mistake_inside_a_tracked_run_is_one_message(cli: CommandLine, tiny_overrides: list[str]) -> None:
    refused(cli, *replaced(tiny_overrides, "tracking=wandb", "train.pairs_per_step=64"))


def test_several_processes_for_one_run_are_refused(
    cli: CommandLine, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one device" in refused(cli, *tiny_overrides)


def test_a_file_called_latest_stays_what_it_is(cli: CommandLine, tiny_overrides: list[str], tmp_path: Path) -> None:
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "latest").write_text("mine")
    (tmp_path / "latest").write_text("mine")
    cli("train", *tiny_overrides, "train.max_steps=1")
    cli("train", *tiny_overrides, "train.max_steps=1", f"run_dir={tmp_path / 'elsewhere'}")
    assert (tmp_path / "outputs" / "latest").read_text() == "mine"
    assert (tmp_path / "latest").read_text() == "mine"


def test_an_output_directory_that_holds_a_run(cli: CommandLine, tiny_overrides: list[str], tmp_path: Path) -> None:
    run = cli("train", *tiny_overrides, f"run_dir={tmp_path / 'mine'}").run
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    message = refused(cli, *tiny_overrides, f"run_dir={run}")
    assert "already holds a run" in message
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_no_permission_to_write(cli: CommandLine, tiny_overrides: list[str], tmp_path: Path) -> None:
    blocked = tmp_path / "a-file"
    blocked.write_text("")  # root may write into any folder, but nobody below a file
    message = refused(cli, *replaced(tiny_overrides, f"outputs={blocked}/runs"))
    assert "outputs=" in message


def test_a_full_disk_keeps_the_last_good_checkpoint(
    cli: CommandLine, tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up while the second checkpoint is written."""
    seal = checkpoints.seal

    def full_at_four(staged: Path, folder: Path, binding: dict[str, str]) -> Path:
        if checkpoints.step_of(staged) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return seal(staged, folder, binding)

    monkeypatch.setattr(checkpoints, "seal", full_at_four)
    run = tmp_path / "full"
    message = refused(cli, *tiny_overrides, f"run_dir={run}")
    assert "disk is full" in message
    assert f"dpo-lora resume {run}" in message
    assert RunDir(run).status() == FAILED
    assert checkpoints.newest_whole(run / "checkpoints") == run / "checkpoints" / "checkpoint-2"
    monkeypatch.undo()


def test_a_loss_that_is_not_finite_stops_before_the_optimizer(
    cli: CommandLine, tiny_overrides: list[str], tmp_path: Path
) -> None:
    """A learning rate far too high: the run fails, the checkpoint before holds finite weights."""
    from safetensors.torch import load_file

    run = tmp_path / "burst"
    message = refused(
        cli,
        *replaced(tiny_overrides, "train.learning_rate=1e30", "train.max_steps=8", "train.save_every=1"),
        "train.max_grad_norm=1e30",
        "train.warmup=0",
        f"run_dir={run}",
    )
    assert "not finite" in message or "nan" in message
    assert RunDir(run).status() == FAILED
    for file in run.glob("checkpoints/checkpoint-*/adapter_model.safetensors"):
        assert all(weight.isfinite().all() for weight in load_file(file).values())


def test_a_crash_leaves_its_traceback_and_the_status_failed(
    cli: CommandLine, tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpo_lora.dpo.trainer import PairTrainer

    monkeypatch.setattr(PairTrainer, "training_step", lambda *a, **k: 1 / 0)
    run = tmp_path / "crashed"
    with pytest.raises(ZeroDivisionError):
        cli("train", *tiny_overrides, f"run_dir={run}")
    assert RunDir(run).status() == FAILED
    assert "ZeroDivisionError" in RunDir(run).manifest()["reason"]
    assert "Traceback" in (run / "train.log").read_text()


def test_resume_of_what_is_no_run(cli: CommandLine, tmp_path: Path) -> None:
    outcome = cli("resume", "nonsense", "--outputs", str(tmp_path))
    assert outcome.code == 2
    assert "no run directory" in outcome.err
    outcome = cli("resume", "latest", "--outputs", str(tmp_path))
    assert outcome.code == 2
    assert "nothing to resume" in outcome.err
