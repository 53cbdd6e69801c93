"""A benchmark's result on disk: what was measured, where, with which versions, and when."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from pathlib import Path

import torch

from dpo_lora.files import finite


def write(path: Path, device: str, content: dict) -> None:
    """`content` as JSON with date (UTC), machine and versions; says where."""
    machine: dict[str, object] = {"processor": processor(), "cores": os.cpu_count(), "load": os.getloadavg()}
    if device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    versions = {m: importlib.metadata.version(m) for m in ("torch", "transformers", "trl", "peft")}
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    path.parent.mkdir(parents=True, exist_ok=True)
    known = finite({"date": date, "machine": machine, "versions": versions, **content})  # NaN is no JSON
    path.write_text(json.dumps(known, indent=1, allow_nan=False) + "\n")
    print(f"written: {path}")


def processor() -> str:
    """The processor's own name, where the system tells."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()
