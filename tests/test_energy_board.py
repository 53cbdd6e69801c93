"""The counter of the whole board contains those of the processors beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo_lora import energy


def zone(root: Path, number: int, name: str) -> Path:
    folder = root / f"intel-rapl:{number}"
    folder.mkdir()
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text("262143328850")
    (folder / "energy_uj").write_text("0")
    return folder / "energy_uj"


def test_no_joule_is_counted_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "_RAPL", tmp_path)
    package, board = zone(tmp_path, 0, "package-0"), zone(tmp_path, 1, "psys")
    meter = energy.meter([])
    package.write_text("5000000")
    board.write_text("9000000")
    assert meter.joules() == pytest.approx(5.0)
