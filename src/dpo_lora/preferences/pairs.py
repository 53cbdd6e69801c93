"""From data settings to tokenised pairs, ready to train and to score."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from dpo_lora.errors import UserError
from dpo_lora.preferences import contract, sources, split, tokens
from dpo_lora.schema import DataSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pairs:
    """Training and held-out rows: id, prompt_ids, chosen_ids, rejected_ids, and topic where the source has one."""

    train: Dataset
    heldout: Dataset
    heldout_texts: Dataset  # the held-out rows before tokenisation, to answer and to show
    facts: dict[str, Any]  # for the manifest: source, counts, fingerprints by content


def load(data: DataSettings, tokenizer: PreTrainedTokenizerBase, seed: int) -> Pairs:
    """Read, check, split and tokenise the pairs that ``data`` names.

    Raises:
        UserError: the source is missing, broken, lacks columns, or leaves nothing to train or to score.
    """
    train_rows, heldout_rows = sources.read(data)
    train_rows = contract.canonical(train_rows, data)
    if heldout_rows is None:
        train_rows, heldout_rows = split.by_prompt(train_rows, data.heldout_share)
    else:
        heldout_rows = contract.canonical(heldout_rows, data)
        train_rows = split.without_shared_prompts(train_rows, heldout_rows)
    train_rows = split.subset(train_rows, data.max_pairs, seed)
    heldout_rows = split.subset(heldout_rows, data.max_heldout, seed)
    parts, facts = {}, {}
    for part, rows in (("train", train_rows), ("heldout", heldout_rows)):
        tokenised, dropped = tokens.tokenise(rows, tokenizer, data.max_length)
        if not len(tokenised):
            raise UserError(
                f"{data.path} leaves no {part} pairs: {len(rows)} rows were read and {dropped} of them have a "
                f"prompt that fills data.max_length={data.max_length}."
            )
        parts[part] = tokenised
        facts[part] = {
            "pairs": len(tokenised),
            "prompt_too_long": dropped,
            "rows": contract.fingerprint(rows),
            "tokens": tokens.fingerprint(tokenised),
        }
    log.info("Data %s: %d pairs to train on, %d held out", data.name, len(parts["train"]), len(parts["heldout"]))
    source = {"name": data.name, "source": data.source.value, "path": data.path, "revision": data.revision}
    return Pairs(parts["train"], parts["heldout"], heldout_rows, {**source, **facts})


def load_all(data: DataSettings, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Every pair of a source, tokenised; none is held out.

    Raises:
        UserError: as for :func:`load`.
    """
    rows, _ = sources.read(data)
    tokenised, dropped = tokens.tokenise(contract.canonical(rows, data), tokenizer, data.max_length)
    if not len(tokenised):
        raise UserError(f"{data.path} leaves no pairs: the prompts of all {dropped} fill data.max_length.")
    return tokenised
