"""Pairs as they are trained: token ids after template and truncation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import xxhash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


def tokenise(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[datasets.Dataset, int]:
    """Rows as id, prompt_ids, chosen_ids, rejected_ids (and topic), and how many were dropped.

    The answer is cut so that prompt and answer have at most ``max_length`` tokens; a pair whose
    prompt alone fills that is dropped, since no answer token would be left to learn from.
    """

    def ids(row: dict[str, Any]) -> dict[str, list[int]]:
        prompt = _encode(tokenizer, row["prompt"], None)
        sides = [_encode(tokenizer, row["prompt"], row[side]) for side in ("chosen", "rejected")]
        # The answer starts where the template's rendering with and without it part: for some templates
        # and merges that is before the prompt's last token.
        start = min(_common_prefix(prompt, side) for side in sides)
        return {
            "prompt_ids": prompt[:start],
            "chosen_ids": sides[0][start:max_length],
            "rejected_ids": sides[1][start:max_length],
        }

    kept = [c for c in ("id", "topic") if c in rows.column_names]
    tokenised = rows.map(ids, remove_columns=[c for c in rows.column_names if c not in kept], desc="Tokenising pairs")
    fits = tokenised.filter(lambda row: len(row["prompt_ids"]) < max_length)
    return fits, len(tokenised) - len(fits)


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: Any, answer: Any) -> list[int]:
    if isinstance(prompt, str):
        text = prompt if answer is None else prompt + answer
        if answer is not None and not answer.endswith(tokenizer.eos_token):
            text += tokenizer.eos_token
        return _ids(tokenizer(text))
    if answer is None:
        return _ids(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True))
    return _ids(tokenizer.apply_chat_template(prompt + answer, return_dict=True))


def _ids(encoding: Any) -> list[int]:
    return list(encoding["input_ids"])


def _common_prefix(a: list[int], b: list[int]) -> int:
    for n, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return n
    return min(len(a), len(b))


def fingerprint(tokenised: datasets.Dataset) -> str:
    """32 hex digits of the token ids in order (XXH3, 128 bit): what was trained, by content."""
    digest = xxhash.xxh3_128()
    for row in tokenised:
        for key in IDS:
            digest.update(np.asarray([len(row[key]), *row[key]], dtype=np.int64).tobytes())
    return digest.hexdigest()
