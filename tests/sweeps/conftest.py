"""Base models whose own code misbehaves while it is loaded, and trials that take no time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sweeps.instant import InstantProcesses, World

FAULTS = {
    "fine": None,
    "raises": "raise RuntimeError('this model is cursed')",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "exits": "import sys; sys.exit(7)",
    "hangs": "import time; time.sleep(3600)",
    "segfaults": "import ctypes; ctypes.string_at(0)",
}


def curse(folder: Path, fault: str) -> None:
    """Give the model in ``folder`` configuration code of its own, as hub models may have."""
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = f"cursed-{fault}"
    config["auto_map"] = {"AutoConfig": f"configuration_{fault}.Cursed"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / f"configuration_{fault}.py").write_text(
        f"from transformers import LlamaConfig\n\n{FAULTS[fault]}\n\n\nclass Cursed(LlamaConfig):\n    pass\n"
    )


@pytest.fixture
def models(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """``models(name, fault)``: a copy of the tiny model, cursed unless ``fault`` is "fine"."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))

    def make(name: str, fault: str) -> Path:
        folder = tmp_path / "models" / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tiny_model, folder)
        if FAULTS[fault]:
            curse(folder, fault)
        return folder

    return make


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """Sweeps on the local launcher whose trials take no time."""
    world = World()
    monkeypatch.setattr("dpo_lora.sweeps.processes.LocalProcesses", lambda slots: InstantProcesses(world, slots))
    return world


@pytest.fixture
def sweep_words(tmp_path: Path) -> list[str]:
    """A sweep's command line but for what it varies; its model and data are never read."""
    return [
        "train", "-m", "model=hub", "model.name=none", "data=local", "data.path=none.jsonl", "tracking=none",
        "train=cpu", "train.max_steps=10", "sweep.slots=1", f"outputs={tmp_path / 'outputs'}",
    ]  # fmt: skip
