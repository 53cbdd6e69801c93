"""What the model says now: answers of reference and policy to the same prompts, side by side."""

from __future__ import annotations

import json
import logging
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_lora.engine.batching import is_out_of_memory
from dpo_lora.evaluation.decoding import Continuation, continuations, end_tokens, token_logps
from dpo_lora.evaluation.statistics import bootstrap_intervals
from dpo_lora.schema import EvalSettings

log = logging.getLogger(__name__)

DECODINGS = ("greedy", "sampled")
SIDES = ("reference", "policy")


@dataclass(frozen=True)
class Prompt:
    """A prompt to answer, and the preferred answer where the data has one."""

    id: str
    content: str | list[dict[str, str]]  # plain text, or chat messages
    preferred: str | None

    def ids(self, tokenizer: Any) -> list[int]:
        if isinstance(self.content, str):
            return list(tokenizer(self.content)["input_ids"])
        encoded = tokenizer.apply_chat_template(self.content, add_generation_prompt=True, return_dict=True)
        return list(encoded["input_ids"])


def prompts(settings: EvalSettings, heldout: Iterable[dict[str, Any]]) -> list[Prompt]:
    """The prompts of ``eval.prompts``, else ``eval.samples`` held-out ones, topics in turn."""
    if settings.prompts:
        texts = enumerate(settings.prompts, 1)
        return [Prompt(f"eval.prompts[{n}]", [{"role": "user", "content": text}], None) for n, text in texts]
    by_topic: dict[str, list[Prompt]] = defaultdict(list)
    seen = set()
    for row in heldout:
        key = json.dumps(row["prompt"], ensure_ascii=False)
        if key not in seen:
            seen.add(key)
            by_topic[str(row.get("topic"))].append(Prompt(str(row["id"]), row["prompt"], _text(row["chosen"])))
    ordered = [(place, topic, prompt) for topic, found in by_topic.items() for place, prompt in enumerate(found)]
    return [prompt for _, _, prompt in sorted(ordered, key=lambda item: item[:2])][: settings.samples]


def _text(answer: str | list[dict[str, str]]) -> str:
    return answer if isinstance(answer, str) else "\n".join(message["content"] for message in answer)


def take(trainer: Any, tokenizer: Any, wanted: list[Prompt], settings: EvalSettings, seed: int) -> list[dict[str, Any]]:
    """One row per prompt and decoding, with what reference and policy answer.

    All prompts are asked at once, fewer where memory runs out; none where not even one fits, and a warning says so.

    Args:
        trainer: a PairTrainer; its ``as_reference`` gives the reference.
        seed: of the sampled answers; the same noise for both sides.
    """
    was_training = trainer.model.training
    trainer.model.eval()
    rows: list[dict[str, Any]] = []
    left, size = list(wanted), len(wanted)
    try:
        while left:
            try:
                rows += _asked(trainer, tokenizer, left[:size], settings, seed)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if size == 1:
                    log.warning("Not even one sampled answer fits in memory: there are none of this step.")
                    return []
                size = -(-size // 2)
            else:
                left = left[size:]
    finally:
        trainer.model.train(was_training)
    return sorted(rows, key=lambda row: DECODINGS.index(row["decoding"]))


def _asked(
    trainer: Any, tokenizer: Any, wanted: list[Prompt], settings: EvalSettings, seed: int
) -> list[dict[str, Any]]:
    policy = trainer.accelerator.unwrap_model(trainer.model)
    ids = [prompt.ids(tokenizer) for prompt in wanted]
    ask = {
        "prompts": ids * len(DECODINGS),
        "sampled": [d == "sampled" for d in DECODINGS for _ in wanted],
        "seed": seed,
        "max_new_tokens": settings.sample_tokens,
        "ends": end_tokens(policy, tokenizer),
        "pad": tokenizer.pad_token_id,
        "by_engine": trainer.engine.packed is not None,
    }
    said: dict[str, list[Continuation]] = {}
    names = trainer.adapter_names()
    if names is not None:
        both = continuations(policy, **ask, adapters=names)
        said = {"policy": both[: len(both) // 2], "reference": both[len(both) // 2 :]}
    else:
        said["policy"] = continuations(policy, **ask)
        with trainer.as_reference() as reference:
            said["reference"] = continuations(reference, **ask)
    with trainer.as_reference() as reference:
        divergences = _divergences(reference, ids, said["policy"][len(wanted) :], tokenizer.pad_token_id)
    return [
        {
            "id": prompt.id,
            "prompt": prompt.content,
            "preferred": prompt.preferred,
            "decoding": decoding,
            "seed": seed if decoding == "sampled" else None,
            **{side: _said(tokenizer, said[side][place]) for side in SIDES},
            "kl": divergences[number] if decoding == "sampled" else None,
        }
        for place, (decoding, (number, prompt)) in enumerate((d, item) for d in DECODINGS for item in enumerate(wanted))
    ]


def _divergences(
    reference: Any, prompts: list[list[int]], answers: list[Continuation], pad: int
) -> list[dict[str, float | int]]:
    """Per answer the sum over its tokens of r - 1 - log r, r = reference / policy: nats, never below 0.

    On tokens drawn from the policy its mean estimates KL(policy || reference) without bias and with
    little spread (J. Schulman, Approximating KL Divergence, 2020).
    """
    found: list[dict[str, float | int]] = []
    # The token that ended the turn has a log-probability but is not kept; the rest is enough.
    before = token_logps(reference, prompts, [answer.tokens for answer in answers], pad)
    for mine, answer in zip(before, answers, strict=True):
        logs = [r - p for r, p in zip(mine, answer.logps, strict=False)]
        found.append({"sum": float(sum(math.expm1(log) - log for log in logs)), "tokens": len(logs)})
    return found


def _said(tokenizer: Any, answer: Continuation) -> dict[str, Any]:
    text = str(tokenizer.decode(answer.tokens, skip_special_tokens=True)).strip()
    return {"text": text, "tokens": len(answer.tokens), "ended": answer.ended, "repetition": repetition(text)}


def repetition(text: str, width: int = 3) -> float:
    """Share of the text's word triples that came before in it; 0 for a text without any."""
    words = text.split()
    grams = [tuple(words[i : i + width]) for i in range(len(words) - width + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def summary(rows: list[dict[str, Any]], confidence: float) -> dict[str, Any]:
    """Means over prompts of length, repetition and end-of-turn rate, and the KL estimate with its interval."""
    found: dict[str, Any] = {"step": rows[0]["step"], "prompts": len({row["id"] for row in rows})}
    for decoding in DECODINGS:
        chosen = [row for row in rows if row["decoding"] == decoding]
        found[decoding] = {
            side: {
                "tokens": float(np.mean([row[side]["tokens"] for row in chosen])),
                "ended": float(np.mean([row[side]["ended"] for row in chosen])),
                "repetition": float(np.mean([row[side]["repetition"] for row in chosen])),
            }
            for side in SIDES
        }
        found[decoding]["unchanged"] = sum(row["policy"]["text"] == row["reference"]["text"] for row in chosen)
    drawn = [row for row in rows if row["kl"] is not None]
    sums = np.asarray([row["kl"]["sum"] for row in drawn], dtype=np.float64)
    tokens = np.asarray([row["kl"]["tokens"] for row in drawn], dtype=np.float64)

    def mean(weights: Any) -> list[float]:
        total = float((tokens * weights).sum())
        return [float((sums * weights).sum()) / total if total else float("nan")]

    [value] = mean(np.ones(len(drawn)))
    [interval] = bootstrap_intervals(mean, [row["id"] for row in drawn], confidence)
    found["kl_per_token"] = None if math.isnan(value) else value
    found["kl_per_token_interval"] = [None if math.isnan(bound) else bound for bound in interval]
    return found
