"""Trainers over given pairs, with an adapter that was moved at random instead of trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import make_pair


def move(model: torch.nn.Module, seed: int = 0) -> None:
    """Give a fresh adapter a direction: LoRA's B starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.05 * torch.randn(weight.shape, generator=generator))


@pytest.fixture
def move_adapter() -> Callable[..., None]:
    return move


@pytest.fixture
def make_trainer(tiny_model: Path, tmp_path: Path) -> Callable[..., Any]:
    """``make_trainer(pairs, *overrides)``: a trainer whose training and held-out pairs are ``pairs``."""
    import datasets

    from dpo_lora import device, lora, model, settings
    from dpo_lora.dpo.arguments import arguments
    from dpo_lora.dpo.trainer import PairTrainer
    from dpo_lora.evaluation.record import Record
    from dpo_lora.preferences.shapes.pair import Pair
    from dpo_lora.preferences.tokens import Encoder
    from dpo_lora.rundir import RunDir

    def make(pairs: list[dict], *overrides: str, moved: bool = True) -> Any:
        base = ["model=hub", f"model.name='{tiny_model}'", "train=cpu", "tracking=none", "train.pairs_per_step=2"]
        run = settings.composed([*base, *overrides])
        machine = device.choose(run.train, run.seed)
        loaded = model.load(run.model, machine)
        written = [Pair(p["prompt"], p["chosen"], p["rejected"]) for p in pairs]
        encoded = Encoder(loaded.tokenizer, run.data.max_length, ()).encode(written)
        rows = datasets.Dataset.from_list(
            [
                {
                    "id": pair["id"],
                    "topic": pair["topic"],
                    "prompt_ids": e.prompt,
                    "chosen_ids": e.chosen,
                    "rejected_ids": e.rejected,
                }
                for pair, e in zip(pairs, encoded, strict=True)
            ]
        )
        (tmp_path / "run").mkdir(exist_ok=True)
        trainer = PairTrainer(
            run=run,
            model=loaded.model,
            peft_config=lora.config(run.lora, loaded.model),
            args=arguments(run, machine, tmp_path / "checkpoints", len(rows)),
            tokenizer=loaded.tokenizer,
            train_rows=rows,
            heldout_rows=rows,
            binding={},
            record=Record(RunDir(tmp_path / "run"), run),
            sampler=None,
        )
        if moved:
            move(trainer.model)
        return trainer

    return make


@pytest.fixture
def pairs() -> list[dict]:
    return [make_pair(n) for n in range(24)]
