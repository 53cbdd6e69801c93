"""The model card: complete, escaped, and its quick start runs as printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

from dpo_lora.reports import card
from dpo_lora.rundir import RunDir
from harness import CommandLine


def front_matter(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_the_quick_start_runs_as_printed(cli: CommandLine, tiny_overrides: list[str], tmp_path: Path) -> None:
    run = cli("train", *tiny_overrides).run
    code = re.search(r"```python\n(.*?)```", (run / "README.md").read_text(), re.S)
    assert code
    done = subprocess.run(
        [sys.executable, "-c", code[1]], capture_output=True, text=True, cwd=tmp_path, check=False, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_a_run_directory_loads_with_peft_alone(cli: CommandLine, tiny_overrides: list[str]) -> None:
    import peft
    import torch
    from transformers import AutoTokenizer

    run = cli("train", *tiny_overrides, "train.learning_rate=1e-2").run
    model = peft.AutoPeftModelForCausalLM.from_pretrained(str(run))
    tokenizer = AutoTokenizer.from_pretrained(str(run))
    ids = tokenizer("hello", return_tensors="pt")["input_ids"]
    with torch.no_grad(), model.disable_adapter():
        base = model(ids).logits
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, base)


def test_the_card_carries_what_the_run_knows(cli: CommandLine, tiny_overrides: list[str]) -> None:
    run = cli("train", *tiny_overrides, "dpo.beta=0.25").run
    text = (run / "README.md").read_text()
    matter = front_matter(text)
    assert {"dpo", "trl"} <= set(matter["tags"])
    assert matter["library_name"] == "peft"
    assert matter["model_name"] == run.name
    manifest = RunDir(run).manifest()
    for fact in (
        "beta 0.25",
        manifest["data"]["train"]["tokens"],
        manifest["reference"]["base"]["identity"]["weights"],
        "rafailov2023direct",
        "vonwerra2020trl",
        "dpo-lora train",
        "2305.18290",
        f"trl: {manifest['packages']['trl']}",
    ):
        assert fact in text


def test_a_pushed_card_names_the_hub_id(cli: CommandLine, tiny_overrides: list[str]) -> None:
    run = cli("train", *tiny_overrides).run
    text = card.render(RunDir(run), hub_id="someone/my-adapter")
    assert "model='someone/my-adapter'" in text
    assert front_matter(text)["model_name"] == "my-adapter"
    assert str(run) not in re.search(r"```python\n(.*?)```", text, re.S)[1]


def test_names_from_data_cannot_write_markdown(cli: CommandLine, tiny_overrides: list[str]) -> None:
    run = cli("train", *tiny_overrides).run
    directory = RunDir(run)
    data = {**directory.manifest()["data"], "path": "[x](javascript:alert(1)) <script>"}
    directory.write_manifest({"data": data})
    text = card.render(directory)
    assert "<script>" not in text
    assert "[x](javascript" not in text


def test_the_hub_reads_the_exact_metrics(cli: CommandLine, tiny_overrides: list[str]) -> None:
    import json

    from huggingface_hub import ModelCard

    run = cli("train", *tiny_overrides).run
    after = json.loads((run / "eval.json").read_text())["after"]
    results = ModelCard.load(run / "README.md").data.eval_results
    assert results is not None
    assert {(r.metric_type, r.metric_value) for r in results} >= {
        ("accuracy", after["accuracy"]),
        ("loss", after["loss"]),
    }
