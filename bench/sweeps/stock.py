"""The sweep people write today: a Hydra app with stock TRL, one trial after the other in one process.

    python bench/sweeps/stock.py -m beta=0.05,0.1 train=FILE heldout=FILE model=FOLDER ...

What a careful user gives TRL and no more: full-size batches, scores before and after, the adapter saved.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class Stock:
    model: str = MISSING
    train: str = MISSING
    heldout: str = MISSING
    beta: float = 0.1
    learning_rate: float = 1e-4
    rank: int = 8
    steps: int = 4
    pairs_per_step: int = 4


ConfigStore.instance().store(name="stock", node=Stock)


@hydra.main(version_base="1.3", config_path=None, config_name="stock")
def main(cfg: Stock) -> None:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    begun = time.monotonic()
    folder = hydra.core.hydra_config.HydraConfig.get().runtime.output_dir
    tokenizer = AutoTokenizer.from_pretrained(cfg.model)
    model = AutoModelForCausalLM.from_pretrained(cfg.model, dtype=torch.float32)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=folder,
            beta=cfg.beta,
            learning_rate=cfg.learning_rate,
            lr_scheduler_type="cosine",
            max_steps=cfg.steps,
            per_device_train_batch_size=cfg.pairs_per_step,
            max_length=1024,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            dataloader_pin_memory=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(_rows(cfg.train)),
        eval_dataset=Dataset.from_list(_rows(cfg.heldout)),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=cfg.rank, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    trainer.save_model(folder)
    facts = {"seconds": time.monotonic() - begun, "before": before, "after": after, "log": trainer.state.log_history}
    Path(folder, "stock.json").write_text(json.dumps(facts))


def _rows(file: str) -> list[dict]:
    rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
    return [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
