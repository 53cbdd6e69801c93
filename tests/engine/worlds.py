"""Tiny random models, pairs and TRL trainers that the engine's tests compare against."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import transformers as tf
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from dpo_lora.engine.cache_files import LogProbs
from dpo_lora.engine.reference_cache import ReferenceCache, Tokens

VOCABULARY = 97


def tokenizer():
    from tokenizers import Tokenizer, models

    words = {f"t{i}": i for i in range(VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="t0"))
    return tf.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="t0", eos_token="t2", bos_token="t1")


def pairs(count: int, seed: int = 0, longest: int = 12, opening: int = 0) -> list[dict]:
    """Random pairs; some share the first answer tokens, one has a prompt of length 1, one a very short
    answer. All prompts begin with the same ``opening`` tokens before that."""
    rng = random.Random(seed)
    begin = list(range(20, 20 + opening))

    def words(n: int) -> list[int]:
        return [rng.randrange(3, VOCABULARY) for _ in range(n)]

    rows = []
    for i in range(count):
        alike = words(rng.randrange(0, 3)) if i % 2 else []
        prompt = words(1 if i == 1 else rng.randrange(2, longest))
        rows.append(
            {
                "prompt_ids": begin + prompt,
                "chosen_ids": alike + words(rng.randrange(1, longest)),
                "rejected_ids": alike + words(rng.randrange(1, longest)),
            }
        )
    return rows


_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def configs() -> dict[str, tf.PretrainedConfig]:
    """One tiny config for each architecture the engine claims to know."""
    moe = {"num_experts": 4, "num_experts_per_tok": 2}
    return {
        "llama": tf.LlamaConfig(**_SHAPE, tie_word_embeddings=True),
        "qwen2": tf.Qwen2Config(**_SHAPE),
        "qwen3": tf.Qwen3Config(**_SHAPE, head_dim=8),
        "mistral": tf.MistralConfig(**_SHAPE, sliding_window=None),
        "phi3": tf.Phi3Config(**_SHAPE),
        "gemma2": tf.Gemma2Config(
            **_SHAPE, head_dim=8, sliding_window=64, final_logit_softcapping=5.0, attn_logit_softcapping=3.0
        ),
        # The two kinds of layers rotate by frequencies of their own.
        "gemma3": tf.Gemma3TextConfig(
            **_SHAPE, head_dim=8, sliding_window=64, layer_types=["sliding_attention", "full_attention"]
        ),
        "olmo2": tf.Olmo2Config(**_SHAPE),
        "gpt2": tf.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=128,
            bos_token_id=1,
            eos_token_id=2,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
        ),
        "qwen3_moe": tf.Qwen3MoeConfig(
            **_SHAPE,
            head_dim=8,
            moe_intermediate_size=16,
            decoder_sparse_step=1,
            **moe,
            output_router_logits=True,
        ),
        "mixtral": tf.MixtralConfig(**_SHAPE, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    }


WINDOWS: dict[str, dict[str, object]] = {
    "gemma2": {},
    "gemma3": {},
    "mistral": {},
    "mixtral": {},
    "phi3": {},
    "qwen2": {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
    "qwen3": {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
}
"""Architectures with a sliding window, and what else their config must say to have one."""


def windowed(name: str, window: int = 8) -> tf.PreTrainedModel:
    """A model whose window is shorter than most of :func:`pairs`."""
    return model(name, sliding_window=window, **WINDOWS[name])


def model(name: str = "llama", seed: int = 0, **changes) -> tf.PreTrainedModel:
    torch.manual_seed(seed)
    config = configs()[name]
    for key, value in changes.items():
        setattr(config, key, value)
    made = tf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # larger than the usual 0.02, so that every path matters in the result
        for p in made.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.15)
        # Norms start at a factor of one and biases at none: whoever forgot them would compute the same.
        for part, p in made.named_parameters():
            if part.endswith("bias"):
                p.normal_(0, 0.1)
            elif p.dim() == 1:
                p.add_(torch.empty_like(p).uniform_(-0.5, 0.5))
    return made


class TokenisedDPOTrainer(DPOTrainer):
    """TRL's trainer on rows that are tokenised already."""

    def _prepare_dataset(self, dataset, *_args, **_kwargs):
        return dataset


def trainer(
    base, rows: list[dict], tmp_path, adapter_scale: float = 0.1, lora: dict | None = None, **options
) -> DPOTrainer:
    """TRL's trainer with a LoRA adapter whose B is not zero."""
    adapter = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **(lora or {})}
    peft_config = LoraConfig(task_type="CAUSAL_LM", **adapter)
    settings = {
        "gradient_checkpointing": False,
        "bf16": False,
        "per_device_train_batch_size": len(rows),
        "report_to": "none",
        "use_cpu": True,
        "logging_steps": 1,
        "max_length": None,
        "dataloader_pin_memory": False,
    }
    settings.update(options)
    args = DPOConfig(output_dir=str(tmp_path), **settings)
    made = TokenisedDPOTrainer(
        model=base,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )
    torch.manual_seed(5)
    with torch.no_grad():
        for name, p in made.model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, adapter_scale)
    made.model.train()
    return made


def gradients(model: torch.nn.Module) -> torch.Tensor:
    """All trainable gradients, one flat vector; cleared afterwards."""
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None])
    model.zero_grad()
    return flat


def close(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference relative to the larger norm."""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    return float((a - b).norm() / b.norm().clamp_min(1e-12))


def truncate_pair(
    prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int], max_length: int | None, mode: str
) -> tuple[tuple[Sequence[int], int], tuple[Sequence[int], int]]:
    """Both full sequences and where their completions start, cut exactly as TRL's DataCollatorForPreference cuts.

    mode is "keep_start" or "keep_end". With "keep_end" the two prompts may lose different numbers of tokens.
    Returns ((chosen ids, start), (rejected ids, start)).
    """
    if mode not in ("keep_start", "keep_end"):
        raise ValueError(f"truncation mode is {mode!r}, which TRL does not know; use 'keep_start' or 'keep_end'")
    out = []
    for completion in (chosen, rejected):
        ids, start = [*prompt, *completion], len(prompt)
        if max_length is not None and len(ids) > max_length:
            if mode == "keep_start":
                ids, start = ids[:max_length], min(start, max_length)
            else:
                ids, start = ids[-max_length:], max(0, start - (len(ids) - max_length))
        out.append((ids, start))
    return out[0], out[1]


class Fetched(NamedTuple):
    """values[i] belongs to rows[i]; how many distinct pairs were found and how many had to be computed."""

    values: list[LogProbs]
    found: int
    computed: int


def fetch(
    cache: ReferenceCache,
    scope: str,
    rows: list[Tokens],
    compute: Callable[[list[Tokens]], list[LogProbs]],
    **options,
) -> Fetched:
    """What the cache tells of all rows, each once; options as `ReferenceCache.visit` takes them."""
    values: dict[int, LogProbs] = {}

    def note(row: int, value: LogProbs) -> None:
        assert row not in values
        values[row] = value

    counts = cache.visit(scope, rows, compute, note, **options)
    return Fetched([values[row] for row in range(len(rows))], *counts)
