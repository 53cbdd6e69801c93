"""A run that is gone on with: from another folder, by another version; and what a closed terminal leaves of it."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from dpo_lora import checkpoints, settings
from dpo_lora.adapters import loading
from dpo_lora.callbacks import StopSignal
from dpo_lora.errors import UserError
from dpo_lora.reports import ending
from dpo_lora.rundir import RunDir
from harness import CommandLine
from one_run import one_run


@pytest.fixture(scope="module")
def home(tiny_model: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model and pairs, in which a run was started that names both relative to it."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copytree(tiny_model, folder / "base")
    shutil.copy(pairs_file, folder / "pairs.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        one_run(Path("./base"), Path("pairs.jsonl"), Path(), "run_dir=run", "eval.samples=0", "eval.report=true")
    return folder


@pytest.fixture
def run(home: Path, tmp_path: Path) -> RunDir:
    """That run, cut off after its last step and moved elsewhere."""
    copy = RunDir(Path(shutil.copytree(home / "run", tmp_path / "moved")))
    copy.write_manifest({"status": "interrupted"})
    return copy


def test_a_run_with_relative_paths_is_resumed_and_used_from_anywhere(
    cli: CommandLine, run: RunDir, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import AutoPeftModelForCausalLM

    monkeypatch.chdir(tmp_path)
    begun = time.time()
    outcome = cli("resume", "moved", "--retry")
    assert outcome.code == 0, outcome.err
    assert run.status() == "finished"
    assert run.report_file.stat().st_mtime > begun
    assert f"Working in {home}" in outcome.err
    assert "--retry has no effect: this is a single run" in outcome.err
    assert Path.cwd() == tmp_path
    loading.load(run)
    scored = cli("score", "moved")
    assert scored.code == 0, scored.err
    AutoPeftModelForCausalLM.from_pretrained("moved")  # by what its own adapter_config.json says


def test_a_folder_that_is_gone_is_said(
    cli: CommandLine, run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.write_manifest({"cwd": str(tmp_path / "gone")})
    monkeypatch.chdir(tmp_path)
    outcome = cli("resume", "moved")
    assert outcome.code == 2
    assert f"{tmp_path / 'gone'}, which is gone" in outcome.err
    assert "Traceback" not in outcome.err


def _without(run: RunDir, *names: str) -> None:
    """The run's settings as a version wrote them that had no such names."""
    values = run.settings()
    for name in names:
        *groups, last = name.split(".")
        group = values
        for word in groups:
            group = group[word]
        del group[last]
    run.settings_file.write_text(yaml.safe_dump(values, sort_keys=False))


def test_a_run_of_an_earlier_version_can_be_used_and_is_not_resumed(cli: CommandLine, run: RunDir) -> None:
    _without(run, "train.gradient_checkpointing", "data.lint", "sweep")
    run.write_manifest({"packages": {"dpo-lora": "0.0.1"}, "git": {"commit": "c0ffee" * 7}})
    outcome = cli("resume", str(run.path))
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    for fact in ("0.0.1 (commit c0ffeec0ffee)", "this is 0.1.0", "train.gradient_checkpointing", "data.lint", "sweep"):
        assert fact in outcome.err
    assert run.status() == "interrupted", "it was not touched"
    run.write_manifest({"status": "finished"})
    policy, _ = loading.load(run)
    assert "default" in policy.peft_config
    found = settings.from_plain(run.settings())
    usual = settings.defaults()
    assert found.train.gradient_checkpointing == usual["train"]["gradient_checkpointing"]
    assert found.data.lint.outlier == usual["data"]["lint"]["outlier"]
    assert found.data.path == "pairs.jsonl"


@pytest.mark.parametrize(("name", "value"), [("later", 1), ("beta", "much")])
def test_settings_of_another_version_are_refused_with_their_name(run: RunDir, name: str, value: object) -> None:
    values = run.settings()
    values["dpo"][name] = value
    with pytest.raises(UserError, match=rf"another version.*dpo\.{name}"):
        settings.from_plain(values)


@pytest.fixture
def hangup() -> Iterator[None]:
    """As a shell starts a program, although the tests themselves may run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    assert signal.getsignal(signal.SIGHUP) in (signal.SIG_IGN, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangup")
def test_a_closing_terminal_stops_a_run_once() -> None:
    with StopSignal() as stop:
        stop.in_training = True
        os.kill(os.getpid(), signal.SIGHUP)
        try:
            os.kill(os.getpid(), signal.SIGHUP)  # the kernel says it, and the shell again
        except KeyboardInterrupt:
            pytest.fail("it stopped at once, without a checkpoint")
        assert stop.received is signal.SIGHUP
        assert stop.exit_code == 129


@pytest.mark.usefixtures("hangup")
def test_nohup_is_respected() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignal() as stop:
        stop.in_training = True
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.received is None


def test_a_run_whose_terminal_closes_leaves_a_checkpoint(tiny_overrides: list[str], tmp_path: Path) -> None:
    run = RunDir(tmp_path / "dropped")
    words = [*tiny_overrides, "train.max_steps=2000", "train.save_every=0", f"run_dir={run}"]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", _IN_A_TERMINAL, *words], stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True
    )
    os.close(theirs)
    deadline = time.monotonic() + 120
    while not (run.metrics_file.exists() and b'"loss"' in run.metrics_file.read_bytes()):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    os.close(ours)  # as a dropped connection does: every write to the terminal fails from now on
    assert process.wait(timeout=60) == 129, run.log_file.read_text()
    manifest = run.manifest()
    assert (manifest["status"], manifest["reason"]) == ("interrupted", "SIGHUP")
    assert checkpoints.newest_whole(run.checkpoints) is not None
    rows = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    told = ending.of_run(run, "interrupted", manifest, run.settings(), rows)
    assert told is not None
    assert told.reason == "It received SIGHUP and stopped."


_IN_A_TERMINAL = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # the process leads a session that has this terminal
sys.argv = ["dpo-lora", "train", *sys.argv[1:]]
from dpo_lora.__main__ import main
main()
"""
