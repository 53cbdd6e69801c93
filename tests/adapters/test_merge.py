"""A merged model says what base and adapter say together, and needs no PEFT."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness import CommandLine


@pytest.mark.parametrize("lora", ["all-linear", "dora"])
def test_a_merged_model_gives_the_adapters_logits(
    cli: CommandLine, finished: Path, tiny_overrides: list[str], tmp_path: Path, lora: str
) -> None:
    run = finished
    if lora != "all-linear":
        run = cli("train", *tiny_overrides, f"lora={lora}", "train.learning_rate=1e-2").run
    target = tmp_path / "deep" / "merged"
    outcome = cli("merge", str(run), str(target))
    assert outcome.code == 0, outcome.err
    assert outcome.out.strip().endswith(str(target))
    assert not (target / "adapter_config.json").exists()
    ids = AutoTokenizer.from_pretrained(target)("What is two?", return_tensors="pt")["input_ids"]
    merged = AutoModelForCausalLM.from_pretrained(target)
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(str(run))
    with torch.no_grad():
        together = adapted(ids).logits
        torch.testing.assert_close(merged(ids).logits, together, rtol=1e-5, atol=1e-5)
        with adapted.disable_adapter():
            assert (adapted(ids).logits - together).abs().max() > 1e-3


def test_merging_overwrites_nothing(cli: CommandLine, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("keep")
    outcome = cli("merge", str(finished), str(tmp_path / "taken"))
    assert outcome.code == 2
    assert "nothing is overwritten" in outcome.err
    assert [f.name for f in (tmp_path / "taken").iterdir()] == ["mine"]
