"""What tests share besides fixtures: the command line in this process, and pairs to train on."""

from __future__ import annotations

import functools
import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


_KERNELS = Path(tempfile.gettempdir()) / f"dpo-lora-kernels-{os.getuid()}"


def cache_with_kernels(folder: Path) -> Path:
    """A cache folder of a test's own but for what was compiled for this machine, which takes two seconds."""
    _KERNELS.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernels").symlink_to(_KERNELS)
    return folder


def make_pair(number: int) -> dict[str, object]:
    """A conversational pair whose sides differ in wording and length."""
    return {
        "id": f"pair-{number}",
        "topic": ("odd", "even")[number % 2 == 0],
        "prompt": [{"role": "user", "content": f"What is {number} plus {number}?"}],
        "chosen": [{"role": "assistant", "content": f"It is {2 * number}." + " Sure." * (number % 3)}],
        "rejected": [{"role": "assistant", "content": "Who knows" + "?" * (1 + number % 5)}],
    }


def dpo_lora(
    *words: str, cwd: Path | None = None, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The real command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "dpo_lora", *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
        check=False,
        timeout=timeout,
    )


class Outcome:
    """What a command line left: exit code, stdout, stderr and, where the last line names one, the run's directory."""

    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err

    @property
    def run(self) -> Path:
        assert self.code == 0, self.err
        return Path(self.out.strip().splitlines()[-1])


@functools.cache
def forget_imports() -> None:
    """Take what the stack's modules are made of out of the collector's sight: accelerate collects in each training."""
    gc.collect()
    gc.freeze()


class CommandLine:
    """The real entry point with real arguments, in this process: imports are paid for once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
        self.monkeypatch, self.capfd = monkeypatch, capfd

    def __call__(self, *words: str) -> Outcome:
        from hydra.core.global_hydra import GlobalHydra

        from dpo_lora.__main__ import main

        GlobalHydra.instance().clear()
        self.monkeypatch.setattr(sys, "argv", ["dpo-lora", *words])
        self.capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if "accelerate" in sys.modules:
            forget_imports()
        out, err = self.capfd.readouterr()
        return Outcome(code, out, err)
