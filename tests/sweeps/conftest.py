"""Base models whose own code misbehaves while it is loaded: faults that need no hook in the program."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

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
