"""What a finished run can be judged by: names, where they are read from, and which way is better."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpo_lora.rundir import RunDir

MAXIMIZE, MINIMIZE = "maximize", "minimize"

DIRECTIONS = {
    "accuracy": MAXIMIZE,  # held-out pairs on whose chosen side the policy moved, a share
    "margin": MAXIMIZE,  # mean held-out reward margin, beta included: compare only at one beta
    "accuracy_length_controlled": MAXIMIZE,
    "loss": MINIMIZE,  # held out
    "brier": MINIMIZE,
    "calibration_error": MINIMIZE,
    "tokens_per_second": MAXIMIZE,
    "seconds": MINIMIZE,  # of training alone: without what trials share or take from caches
    "peak_memory_bytes": MINIMIZE,
}

# Those that every evaluation during training has, too.
EVALUATED = ("accuracy", "margin", "accuracy_length_controlled", "loss", "brier", "calibration_error")


def read(run: RunDir) -> dict[str, float]:
    """The objectives of a finished run, from its files; a figure that is not finite is left out."""
    evaluation: dict[str, Any] = json.loads(run.eval_file.read_text(encoding="utf-8"))["after"]
    manifest = run.manifest()
    found = {
        **{name: evaluation[name] for name in EVALUATED},
        **{name: manifest["training"][name] for name in ("tokens_per_second", "peak_memory_bytes")},
        "seconds": manifest["timings"]["training_seconds"],
    }
    return {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}


def mean(runs: list[RunDir], names: list[str]) -> tuple[list[float], list[str]]:
    """Objectives of finished runs of one setting, meaned over them, and the names that some of them lack.

    The values are for all of ``names``, in their order, or empty where one is lacking.
    """
    figures = [read(run) for run in runs]
    lacking = [name for name in names if any(name not in one for one in figures)]
    values = [] if lacking else [sum(one[name] for one in figures) / len(figures) for name in names]
    return values, lacking
