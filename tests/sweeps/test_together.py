"""Sweeps beside each other: started in the same second, or the same one twice, nothing is damaged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sweeps.instant import facts


def _start(words: list[str]) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-m", "dpo_lora", "train", "-m", *words], stdout=pipe, stderr=pipe, text=True, env=os.environ
    )


@pytest.mark.slow
def test_started_in_the_same_second(tiny_overrides: list[str], tmp_path: Path) -> None:
    words = [*tiny_overrides, "sweep.slots=1", "eval.samples=0", "dpo.beta=0.05,0.1"]
    same, twin, other = _start(words), _start(words), _start([*words, "lora.r=2"])
    ended = {p: (*p.communicate(timeout=300), p.returncode) for p in (same, twin, other)}
    refused = [p for p in (same, twin) if ended[p][2] == 2]
    assert len(refused) == 1, [e[1] for e in ended.values()]
    assert "running now" in ended[refused[0]][1]
    sweeps = sorted((tmp_path / "outputs").glob("dpo-*"))
    assert len(sweeps) == 2
    for sweep in sweeps:
        assert facts(sweep)["counts"] == {"finished": 2}
    # The cache that both filled at once: whole, and nothing in it computed twice.
    files = (tmp_path / "outputs").glob(f"dpo-*/{'[0-9a-f]' * 16}/run.json")  # not by way of "best"
    runs = [json.loads(file.read_text()) for file in files]
    assert len(runs) == 4
    assert {run["engine"]["reference_cache"]["pairs_computed"] for run in runs} == {0}
