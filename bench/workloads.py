"""What is measured on: pairs with log-normal lengths, random models of known shapes, stock TRL's trainer."""

from __future__ import annotations

import json
import math
import random
import statistics
import time
from pathlib import Path

import torch
import transformers

PAIRS_PER_STEP = 8
WORKLOADS = {
    "short": (40, 60, 50),
    "medium": (100, 100, 80),
    "long": (300, 120, 120),
    "chat": (600, 250, 200),
}
# Pairs of people, read where the file lies beside this checkout (they are not ours to ship).
FILES = {
    "helpful": "hh_helpful_base_test/hh_helpful_base_test_pairs.jsonl",
    "polite": "rasbt_polite/rasbt_polite_pairs.jsonl",
}
SHARED = Path(__file__).parents[2] / "shared" / "data"
SHAPES = {
    # SmolLM2-135M-Instruct; random weights, the time does not depend on them
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    },
    "llama-3.2-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "gemma-3-1b": {
        "model_type": "gemma3_text",
        "vocab_size": 262144,
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "max_position_embeddings": 32768,
        "sliding_window": 512,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}


def make_rows(means: tuple[int, int, int], count: int, vocabulary: int, seed: int = 0) -> list[dict]:
    """Random pairs with log-normal lengths (sigma 0.5) of the given means, in tokens."""
    rng = random.Random(seed)

    def words(mean: int) -> list[int]:
        length = max(2, round(rng.lognormvariate(math.log(mean) - 0.125, 0.5)))
        return [rng.randrange(5, vocabulary) for _ in range(length)]

    return [
        dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), map(words, means), strict=True)) for _ in range(count)
    ]


def read_rows(file: Path, count: int, seed: int = 0, longest: int = 1024) -> list[dict]:
    """`count` pairs of a file of chats, drawn by the seed, in the embedded model's tokens (its template, its end of
    turn)."""
    from transformers import AutoTokenizer

    from dpo_lora import embedded

    tokenizer = AutoTokenizer.from_pretrained(embedded.ensure())
    lines = file.read_text(encoding="utf-8").splitlines()
    random.Random(seed).shuffle(lines)
    rows: list[dict] = []
    for line in lines:
        pair = json.loads(line)
        prompt = tokenizer.apply_chat_template(pair["prompt"], add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        row = {"prompt_ids": list(prompt)}
        for side in ("chosen", "rejected"):
            row[f"{side}_ids"] = [*tokenizer(pair[side][0]["content"])["input_ids"], tokenizer.eos_token_id]
        if len(prompt) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) <= longest:
            rows.append(row)
        if len(rows) == count:
            break
    return rows


def rows_of(workload: str, count: int, vocabulary: int, shared: Path = SHARED) -> list[dict]:
    """The pairs of a workload, random or from a file."""
    if workload in FILES:
        return read_rows(shared / FILES[workload], count)
    return make_rows(WORKLOADS[workload], count, vocabulary)


def make_trainer(shape: str, rows: list[dict], folder: str, device: str, dtype: torch.dtype):
    """TRL's DPOTrainer with its defaults around a random model of the shape; adapters moved away from
    zero."""
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from trl import DPOConfig, DPOTrainer

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset, *_args, **_kwargs):
            return dataset

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**{"model_type": "llama", **SHAPES[shape]})
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    backend = Tokenizer(models.WordLevel({f"t{i}": i for i in range(8)}, unk_token="t0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="t0", eos_token="t2")
    args = DPOConfig(
        output_dir=folder,
        report_to="none",
        max_length=None,
        use_cpu=device == "cpu",
        bf16=dtype == torch.bfloat16,
        dataloader_pin_memory=False,
    )
    trainer = Tokenised(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.model.to(device).train()
    for name, p in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, 0, 0.01)
    return trainer


def matmul_rate(shape: str, device: str, dtype: torch.dtype) -> float:
    """FLOP/s of plain products of many tokens at the model's layer shapes, weighed by their work.

    The better of torch.mm and, on a CPU in float32, the engine's own products: the peak is the machine's, not a
    library's.
    """
    from dpo_lora.engine.products import linear

    s, tokens = SHAPES[shape], 8192 if device == "cuda" else 1024
    hidden, inter = s["hidden_size"], s["intermediate_size"]
    rates = []
    for product in (lambda x, w, out: torch.mm(x, w.t(), out=out), lambda x, w, out: linear(x, w)):
        rates.append(_rate(product, ((hidden, hidden), (hidden, inter), (inter, hidden)), tokens, device, dtype))
    return max(rates)


def _rate(product, shapes, tokens: int, device: str, dtype: torch.dtype) -> float:
    work = seconds = 0.0
    for k, n in shapes:
        x, w = (
            torch.randn(tokens, k, device=device, dtype=dtype),
            torch.randn(n, k, device=device, dtype=dtype),
        )
        out = torch.empty(tokens, n, device=device, dtype=dtype)
        times = []
        for _ in range(12):
            if device == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            product(x, w, out)
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        work += 2 * tokens * k * n
        seconds += statistics.median(times)
    return work / seconds
