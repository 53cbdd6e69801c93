"""A finished run for many tests to look at: made once, by the real entry point in this process."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path

import pytest

from harness import cache_with_kernels


def tiny_words(model: Path, pairs: Path, outputs: Path) -> list[str]:
    """A command line that trains in a second."""
    return [
        "model=hub",
        f"model.name={model}",
        "data=local",
        f"data.path={pairs}",
        "data.heldout_share=0.3",
        "train=cpu",
        "train.pairs_per_step=4",
        "train.micro_batch=4",
        "train.max_steps=4",
        "train.save_every=2",
        "eval.report=false",  # drawing it takes as long as all else; tests/reports asks for it
        "tracking=none",
        f"outputs={outputs}",
    ]


def one_run(model: Path, pairs: Path, folder: Path, *words: str) -> Path:
    """Train by `tiny_words` and ``words``, and return the run's directory below ``folder``."""
    from hydra.core.global_hydra import GlobalHydra

    from dpo_lora.__main__ import main

    command = [*tiny_words(model, pairs, folder / "outputs"), *words]
    GlobalHydra.instance().clear()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setenv("DPO_LORA_CACHE", str(cache_with_kernels(folder / "cache")))
        patch.setattr(sys, "argv", ["dpo-lora", "train", *command])
        main()
    return Path(said.getvalue().strip().splitlines()[-1])
