"""A sweep finds its directory again, and shares it with nobody."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dpo_lora.errors import UserError
from dpo_lora.sweeps import status
from dpo_lora.sweeps.directory import Identity, SweepDir, find
from harness import CommandLine

ONE = Identity({"dpo": {"beta": 0.1}, "outputs": "here"}, ["lora.r"], "GridSweeper")
FACTS = {"command": ["dpo-lora"]}
OTHER = Identity({"dpo": {"beta": 0.2}, "outputs": "here"}, ["lora.r"], "GridSweeper")


def test_the_same_sweep_finds_itself_and_another_does_not(tmp_path: Path) -> None:
    first = SweepDir.claim(tmp_path, "sweep", ONE, None, FACTS)
    first.release()
    moved = Identity({**ONE.base, "outputs": "there"}, ONE.varied, ONE.kind)
    again = SweepDir.claim(tmp_path, "sweep", moved, None, FACTS)
    again.release()
    other = SweepDir.claim(tmp_path, "sweep", OTHER, None, FACTS)
    assert again.path == first.path
    assert other.path != first.path  # even in the same second
    assert find(first.path.name, tmp_path) == SweepDir(first.path)


def test_a_sweep_that_runs_is_refused_to_a_second_process(tmp_path: Path) -> None:
    first = SweepDir.claim(tmp_path, "sweep", ONE, None, FACTS)
    assert SweepDir(first.path).is_live()
    with pytest.raises(UserError, match="running now"):
        SweepDir.claim(tmp_path, "sweep", ONE, None, FACTS)
    first.release()
    assert not SweepDir(first.path).is_live()


def test_a_directory_of_another_sweep_is_refused(tmp_path: Path) -> None:
    SweepDir.claim(tmp_path, "sweep", ONE, tmp_path / "mine", FACTS).release()
    with pytest.raises(UserError, match="another sweep"):
        SweepDir.claim(tmp_path, "sweep", OTHER, tmp_path / "mine", FACTS)


@contextlib.contextmanager
def _as_a_stranger(folder: Path) -> Iterator[None]:
    """Who may read ``folder`` and write nothing there; root may write anywhere, so root is somebody else meanwhile."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    if os.geteuid() == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        folder.chmod(0o755)


def test_a_sweep_is_read_by_those_who_may_not_write_there(capfd: pytest.CaptureFixture[str]) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as scratch:  # everybody gets there, unlike pytest's own
        Path(scratch).chmod(0o755)
        sweep = SweepDir.claim(
            Path(scratch), "sweep", ONE, Path(scratch, "mine"), {**FACTS, "objectives": ["accuracy"], "confidence": 0.9}
        )
        with _as_a_stranger(sweep.path):
            with pytest.raises(PermissionError):
                (sweep.path / "anything").touch()
            assert SweepDir(sweep.path).is_live()
            status.show(SweepDir(sweep.path))
        assert "(running)" in capfd.readouterr().out
        sweep.release()
        with _as_a_stranger(sweep.path):
            assert not SweepDir(sweep.path).is_live()
        (sweep.path / ".lock").unlink()
        with _as_a_stranger(sweep.path):
            assert not SweepDir(sweep.path).is_live()


def _without(package: str) -> Any:
    found = importlib.util.find_spec
    return lambda name, *rest: None if name == package else found(name, *rest)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["hydra/launcher=slurm"], "no sbatch"),
        (["hydra/launcher=slurm", "missing=submitit"], "needs submitit"),
        (["hydra/sweeper=study", "missing=optuna"], "needs optuna"),
        (["hydra/sweeper=study", "hydra/launcher=slurm"], "no sbatch"),
        (["hydra/launcher=slurm", "hydra.launcher.cluster=local", "dpo.beta=-1"], "dpo.beta"),
        (["lora.r=interval(2,8)"], "lora.r"),
    ],
)
def test_a_sweep_that_is_refused_leaves_nothing_to_go_on_with(
    cli: CommandLine,
    sweep_words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    told: str,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # a cluster's login node has sbatch
    for word in words:
        if word.startswith("missing="):
            monkeypatch.setattr(importlib.util, "find_spec", _without(word.removeprefix("missing=")))
    done = cli(*sweep_words, "lora.alpha=8,16", *(word for word in words if not word.startswith("missing=")))
    assert done.code == 2
    assert told in done.err
    assert "Traceback" not in done.err
    assert not list((tmp_path / "outputs").glob("dpo-*"))
    latest = cli("resume", "latest", "--outputs", str(tmp_path / "outputs"))
    assert (latest.code, "nothing to resume" in latest.err) == (2, True)
