"""End to end on the embedded model, as a newcomer runs it: fetched, converted, trained, loaded, asked."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from dpo_lora.rundir import FINISHED, RunDir
from harness import CommandLine


@pytest.mark.embedded
@pytest.mark.timeout(900)
def test_the_default_model_trains_and_its_card_runs(cli: CommandLine, tmp_path: object) -> None:
    shorter = ["eval.samples=1", "eval.sample_tokens=16"]
    outcome = cli("train", "experiment=smoke", *shorter, f"outputs={tmp_path}/outputs")
    run = RunDir(outcome.run)
    assert re.fullmatch(r"dpo-explainer-lora-output-[0-9]{10}", run.path.name)
    assert run.status() == FINISHED
    manifest = run.manifest()
    assert manifest["engine"]["engine"] == "packed"
    assert manifest["reference"]["base"]["identity"]["published_as"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    evaluation = json.loads(run.eval_file.read_text())
    assert evaluation["before"]["accuracy"] == 0.5
    assert evaluation["after"]["margin"] > 0
    for name in ("eval_pairs.jsonl", "samples.jsonl", "report.html", "metrics.jsonl", ".hydra/overrides.yaml"):
        assert (run.path / name).is_file()
    assert list(run.path.glob("wandb/offline-run-*/run-*.wandb"))
    code = re.search(r"```python\n(.*?)```", run.card_file.read_text(), re.S)
    assert code
    done = subprocess.run([sys.executable, "-c", code[1]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 3
