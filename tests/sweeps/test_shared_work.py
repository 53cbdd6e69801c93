"""What trials share is computed once, and a trial is the run that its settings make alone."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.numpy import load_file

from harness import CommandLine

TRIAL = "[0-9a-f]" * 16


def test_eight_trials_make_one_reference_pass(cli: CommandLine, tiny_overrides: list[str], own_cache: Path) -> None:
    words = [*tiny_overrides, "eval.samples=0"]
    varied = ["dpo.beta=0.05,0.1", "train.learning_rate=1e-3,2e-3", "lora.r=2,4"]
    done = cli("train", "-m", *words, *varied, "sweep.slots=2")
    assert done.code == 0, done.err
    sweep = Path(done.out.strip().splitlines()[-1])
    runs = [json.loads(file.read_text()) for file in sweep.glob(f"{TRIAL}/run.json")]
    assert [run["status"] for run in runs] == ["finished"] * 8
    uses = [run["engine"]["reference_cache"] for run in runs]
    assert uses == [{"pairs_found": 40, "pairs_computed": 0}] * 8
    shards = (own_cache / "reference").rglob("*.safetensors")
    assert sum(len(load_file(shard)["keys"]) for shard in shards) == 40  # and none of them twice

    alone = cli("train", *words, "dpo.beta=0.05", "train.learning_rate=1e-3", "lora.r=2")
    told = json.loads((alone.run / "run.json").read_text())["settings_fingerprint"]
    trial = sweep / told  # named by what it computes
    name = "adapter_model.safetensors"
    assert (trial / name).read_bytes() == (alone.run / name).read_bytes()
