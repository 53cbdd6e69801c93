"""Energy: counters that wrap, counters nobody may read, machines without any."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from dpo_lora import energy


def _package(root: Path, number: int, micro_joules: int, span: int = 1_000_000_000) -> Path:
    zone = root / f"intel-rapl:{number}"
    zone.mkdir()
    (zone / "energy_uj").write_text(str(micro_joules))
    (zone / "max_energy_range_uj").write_text(str(span))
    return zone / "energy_uj"


def test_packages_add_up_and_their_counters_wrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "_RAPL", tmp_path)
    one, other = _package(tmp_path, 0, 999_000_000), _package(tmp_path, 1, 0)
    meter = energy.meter([])
    one.write_text("1000000")  # past its range: 1 J to the end, 1 J and the count for 0 after it
    other.write_text("5000000")
    assert meter.joules() == pytest.approx(7.0, abs=0.11)


def test_no_counter_is_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "_RAPL", tmp_path)
    assert energy.meter([]).joules() is None


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, int]:
    """NVIDIA's library with two GPUs; their counters in mJ."""
    monkeypatch.setattr(energy, "_RAPL", tmp_path)
    counted = {"0": 1_000, "GPU-abc": 2_000}

    class NVMLError(Exception):
        pass

    def read(handle: str) -> int:
        if handle not in counted:
            raise NVMLError
        return counted[handle]

    library = types.SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=str,
        nvmlDeviceGetHandleByUUID=str,
        nvmlDeviceGetTotalEnergyConsumption=read,
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    return counted


def test_gpus_by_index_and_by_name(nvml: dict[str, int]) -> None:
    meter = energy.meter(["0", "GPU-abc"])
    nvml["0"] += 4_000
    nvml["GPU-abc"] += 6_000
    assert meter.joules() == pytest.approx(10.0)


def test_part_of_the_energy_does_not_pass_for_all(nvml: dict[str, int]) -> None:
    assert energy.meter(["0", "MIG-without-a-counter"]).joules() is None
