"""eval.json of a run that was killed and goes on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml

from dpo_lora.evaluation.record import Record
from dpo_lora.evaluation.scores import PairScores
from dpo_lora.rundir import RunDir
from dpo_lora.settings import from_plain
from harness import CommandLine


def test_a_run_killed_after_its_last_evaluation_keeps_all_of_it(
    cli: CommandLine, tiny_overrides: list[str], tmp_path: Path
) -> None:
    """It is not evaluated again, so what eval.json held beside the figures has to come from the file."""
    done = cli("train", *tiny_overrides, "--cfg", "job", "--resolve")
    settings = from_plain(yaml.safe_load(done.out))
    (tmp_path / "run").mkdir()
    run = RunDir(tmp_path / "run")
    rows = [
        {"id": str(n), "prompt_ids": [n], "chosen_ids": [1, 2], "rejected_ids": [3] * (1 + n % 3)} for n in range(6)
    ]
    first = Record(run, settings)
    first.add(8, PairScores.of(rows, np.arange(24, dtype=np.float64).reshape(6, 4)))
    before = json.loads(run.eval_file.read_text())

    second = Record(run, settings)
    second.restore(8)
    second.add_samples({"answers": 1})
    after = json.loads(run.eval_file.read_text())
    assert after == {**before, "samples": {"answers": 1}}


def test_the_best_evaluation_comes_back_where_a_later_one_is_undone(
    cli: CommandLine, tiny_overrides: list[str], tmp_path: Path
) -> None:
    """Killed after the best evaluation so far, before its checkpoint: the best is again one that was kept."""
    done = cli("train", *tiny_overrides, "train.keep_best=eval/margin", "eval.every=2", "--cfg", "job", "--resolve")
    settings = from_plain(yaml.safe_load(done.out))
    (tmp_path / "run").mkdir()
    run = RunDir(tmp_path / "run")
    rows = [{"id": str(n), "prompt_ids": [n], "chosen_ids": [1, 2], "rejected_ids": [3]} for n in range(6)]

    def scored(margin: float) -> PairScores:
        return PairScores.of(rows, np.tile([margin, 0.0, 0.0, 0.0], (6, 1)))

    first = Record(run, settings)
    first.add(2, scored(2.0))
    best = first._best
    first.add(4, scored(1.0))
    first.add(6, scored(3.0))

    second = Record(run, settings)
    second.restore(4)
    assert second._best == best
    second.add(6, scored(0.5))
    second.keep_best()
    assert json.loads(run.eval_file.read_text())["after"] == best
