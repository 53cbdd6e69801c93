"""What each trial gets of the machine."""

from __future__ import annotations

import pytest

from dpo_lora.choices import Device, Retry
from dpo_lora.schema import SweepSettings
from dpo_lora.sweeps import placement


def _sweep(**values: object) -> SweepSettings:
    usual = {"slots": None, "per_gpu": 1, "trial_timeout": None, "grace": 1.0, "retry": Retry.none, "repeats": 1}
    return SweepSettings(**{**usual, "objectives": ["accuracy"], **values})  # type: ignore[arg-type]


def test_each_trial_sees_its_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    slots = placement.slots(_sweep(per_gpu=2), Device.auto, trials=10)
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["3", "5", "3", "5"]
    assert len(placement.slots(_sweep(per_gpu=2), Device.auto, trials=3)) == 3


def test_a_cpu_sweep_takes_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert all(slot.gpu is None for slot in placement.slots(_sweep(slots=2), Device.cpu, trials=4))


def test_threads_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [slot.threads for slot in placement.slots(_sweep(slots=3), Device.cpu, trials=9)] == [2, 2, 2]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert placement.slots(_sweep(slots=1), Device.cpu, trials=1)[0].threads == 1
