"""Energy that a piece of work took, where the device counts it: NVIDIA GPUs (NVML), Intel and AMD packages (RAPL).

Counters belong to devices, not to processes: what else ran on them meanwhile is in the figure. So a
sweep reads them once for all of its trials, and nothing is added up over trials that share a device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

_RAPL = Path("/sys/class/powercap")

Counter = Callable[[], float]  # joules since some moment


@dataclass
class Meter:
    """Joules since it was made, over ``counters``; None where no device counts."""

    counters: list[Counter]
    _begun: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self._begun = [read() for read in self.counters]

    def joules(self) -> float | None:
        if not self.counters:
            return None
        return round(sum(read() - begun for read, begun in zip(self.counters, self._begun, strict=True)), 1)


def meter(gpus: list[str]) -> Meter:
    """A running meter over these GPUs, by index or UUID as CUDA_VISIBLE_DEVICES names them, and the processor."""
    return Meter([*_nvml(gpus), *_rapl(_RAPL)])


def _nvml(gpus: list[str]) -> list[Counter]:
    """Counters of GPUs that have one (Volta and newer); starts no CUDA context."""
    if not gpus:
        return []
    try:
        import pynvml
    except ImportError:
        return []
    found: list[Counter] = []
    try:
        pynvml.nvmlInit()
        for gpu in gpus:
            by_name = pynvml.nvmlDeviceGetHandleByUUID
            handle = pynvml.nvmlDeviceGetHandleByIndex(int(gpu)) if gpu.isdigit() else by_name(gpu)
            found.append(partial(_gpu_joules, handle))
            found[-1]()
    except pynvml.NVMLError:
        return []  # no driver here, or a device without a counter: part of the energy would pass for all of it
    return found


def _gpu_joules(handle: object) -> float:
    import pynvml

    return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000  # counted in mJ


def _rapl(root: Path) -> list[Counter]:
    """One counter a processor package; most systems let only root read them."""
    return [
        _unwrapped(zone)
        for zone in sorted(root.glob("intel-rapl:?"))
        if _readable(zone / "energy_uj") and not _is_board(zone)
    ]


def _readable(file: Path) -> bool:
    try:
        file.read_text()
    except OSError:
        return False
    return True


def _is_board(zone: Path) -> bool:
    """Whether ``zone`` is ``psys``, the whole board: its joules contain those of the packages beside it."""
    try:
        return (zone / "name").read_text().strip() == "psys"
    except OSError:
        return False


def _unwrapped(zone: Path) -> Counter:
    """The kernel's counter starts again at 0 past its range, after some ten minutes at the earliest.

    Each reading adds what passed since the last, so somebody has to read now and then.
    """
    span = int((zone / "max_energy_range_uj").read_text())
    last, total = int((zone / "energy_uj").read_text()), 0

    def read() -> float:
        nonlocal last, total
        now = int((zone / "energy_uj").read_text())
        total += (now - last) % (span + 1)
        last = now
        return total / 1e6

    return read
