"""Training and held-out parts that share no prompt, whatever rows are added later."""

from __future__ import annotations

import logging
import random

import datasets
import xxhash

from dpo_lora.errors import UserError
from dpo_lora.preferences.contract import prompt_key

log = logging.getLogger(__name__)


def by_prompt(rows: datasets.Dataset, share: float) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Hold out about ``share`` of the distinct prompts, each with all its rows.

    A prompt's side depends on its text alone, so adding rows never moves others across.

    Raises:
        UserError: one of the parts would be empty.
    """
    held = [_place(prompt_key(row)) < share for row in rows]
    train = rows.select([i for i, h in enumerate(held) if not h])
    heldout = rows.select([i for i, h in enumerate(held) if h])
    if not len(train) or not len(heldout):
        raise UserError(
            f"data.heldout_share={share} of {len(rows)} rows leaves {len(train)} to train on and {len(heldout)} held "
            "out. Give more rows, another share, or a file of held-out pairs (data.heldout_path)."
        )
    return train, heldout


def without_shared_prompts(train: datasets.Dataset, heldout: datasets.Dataset) -> datasets.Dataset:
    """Training rows whose prompt is not among the held-out ones.

    Raises:
        UserError: none is left.
    """
    scored = {prompt_key(row) for row in heldout}
    kept = [i for i, row in enumerate(train) if prompt_key(row) not in scored]
    if len(kept) < len(train):
        log.warning(
            "%d of %d training rows left out: their prompt is among the held-out ones.",
            len(train) - len(kept),
            len(train),
        )
    if not kept:
        raise UserError("Every training prompt is among the held-out ones; nothing is left to train on.")
    return train.select(kept)


def subset(rows: datasets.Dataset, most: int | None, seed: int) -> datasets.Dataset:
    """At most ``most`` rows, chosen by ``seed``, in their original order."""
    if most is None or most >= len(rows):
        return rows
    return rows.select(sorted(random.Random(seed).sample(range(len(rows)), most)))


def _place(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass")) / 2**64
