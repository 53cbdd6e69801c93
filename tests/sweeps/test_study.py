"""A study prunes, is killed, goes on to its total, and comes out as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from dpo_lora.errors import UserError
from dpo_lora.sweeps import space
from harness import dpo_lora

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("dpo.beta=interval(0.1,1)", FloatDistribution(0.1, 1.0)),
        ("dpo.beta=tag(log,interval(0.01,1))", FloatDistribution(0.01, 1.0, log=True)),
        ("lora.r=int(interval(4,64))", IntDistribution(4, 64)),
        ("lora.r=range(4,17,4)", IntDistribution(4, 16, step=4)),
        ("dpo=choice(sigmoid,ipo)", CategoricalDistribution(["sigmoid", "ipo"])),
        ("lora.r=8,16", CategoricalDistribution(["8", "16"])),
    ],
)
def test_hydras_words_become_distributions(typed: str, expected: object) -> None:
    assert space.distribution(OverridesParser.create().parse_overrides([typed])[0]) == expected


def test_a_space_that_cannot_be_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="cannot be searched"):
        space.distribution(OverridesParser.create().parse_overrides(["dpo.beta=tag(log,interval(0,1))"])[0])


def _study(sweep: Path) -> list[Any]:
    facts = json.loads((sweep / "sweep.json").read_text())
    return [(t["number"], t["state"], t["params"], t["values"]) for t in facts["study"]["trials"]]


def test_killed_and_resumed_equals_undisturbed(tiny_overrides: list[str], tmp_path: Path) -> None:
    words = [
        "train", "-m", *(o for o in tiny_overrides if not o.startswith("outputs=")),
        "hydra/sweeper=study-pruned", "hydra.sweeper.trials=6", "hydra.sweeper.startup_trials=2", "sweep.slots=1",
        "sweep.objectives=[margin]", "eval.every=2", "train.max_steps=6", "eval.samples=0", "eval.report=false",
        "dpo.beta=tag(log,interval(0.01,1))", "train.learning_rate=tag(log,interval(1e-5,1e-2))",
    ]  # fmt: skip
    calm = dpo_lora(*words, f"outputs={tmp_path / 'calm'}")
    assert calm.returncode == 0, calm.stderr
    undisturbed = _study(Path(calm.stdout.strip()))

    rough = subprocess.Popen([sys.executable, "-m", "dpo_lora", *words, f"outputs={tmp_path / 'rough'}"])
    while not list((tmp_path / "rough").glob("*/*/eval.json")):
        time.sleep(0.05)
    below = psutil.Process(rough.pid).children(recursive=True)
    os.kill(rough.pid, signal.SIGKILL)
    rough.wait()
    _, alive = psutil.wait_procs(below, timeout=10)
    assert not alive
    (sweep,) = (tmp_path / "rough").glob("dpo-*")
    resumed = dpo_lora("resume", str(sweep))
    assert resumed.returncode == 0, resumed.stderr
    assert _study(sweep) == undisturbed
    assert len(undisturbed) == 6
    assert {state for _, state, _, _ in undisturbed} >= {"complete"}
