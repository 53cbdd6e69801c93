"""Talk to a trained adapter in the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dpo_lora.adapters.loading import load
from dpo_lora.rundir import RunDir


def answer(policy: Any, tokenizer: Any, messages: list[dict[str, str]], max_new_tokens: int) -> str:
    """The greedy answer to a conversation that ends with the user's turn."""
    import torch

    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(policy.device)
    with torch.no_grad():
        output = policy.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def converse(run: RunDir, questions: Iterator[str], max_new_tokens: int) -> Iterator[str]:
    """Answers to ``questions``, each with the turns before it as context."""
    policy, tokenizer = load(run)
    messages: list[dict[str, str]] = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        reply = answer(policy, tokenizer, messages, max_new_tokens)
        messages.append({"role": "assistant", "content": reply})
        yield reply
