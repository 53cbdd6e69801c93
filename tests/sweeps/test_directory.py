"""A sweep finds its directory again, and shares it with nobody."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo_lora.errors import UserError
from dpo_lora.sweeps.directory import Identity, SweepDir, find

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
