"""The door of this room: data settings in, sound tokenised pairs out."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import xxhash
from filelock import FileLock

from dpo_lora.choices import PlainText
from dpo_lora.errors import UserError
from dpo_lora.files import write_json
from dpo_lora.preferences import store
from dpo_lora.preferences.lint import report
from dpo_lora.preferences.lint.judge import judge
from dpo_lora.preferences.parts import HELDOUT, parts
from dpo_lora.preferences.prepare import Recipe
from dpo_lora.preferences.shapes.pair import ShapeError
from dpo_lora.preferences.shapes.recognise import EXPLICIT_TEXT, Shape, recognise, renamed, unused
from dpo_lora.preferences.similarity import Rows
from dpo_lora.preferences.sources import source as sources
from dpo_lora.preferences.sources.source import Source
from dpo_lora.preferences.tokens import Encoder
from dpo_lora.resources import cache_dir
from dpo_lora.schema import DataSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_VERSION = 2  # of lint and split: raise when the same pairs would be judged otherwise


@dataclass(frozen=True)
class Pairs:
    """Training and held-out rows: id, source, prompt_ids, chosen_ids, rejected_ids, and topic where there is one."""

    train: datasets.Dataset
    heldout: datasets.Dataset
    texts: datasets.Dataset  # of the held-out rows: id, topic, and what was asked and preferred, as JSON
    facts: dict[str, Any]  # for the manifest: sources, counts, findings, fingerprints by content

    @property
    def heldout_texts(self) -> Iterator[dict[str, Any]]:
        """The held-out rows as people wrote them: id, topic, prompt and chosen."""
        for row in self.texts:
            yield {"id": row["id"], "topic": row["topic"], **json.loads(row["texts"])}


@dataclass(frozen=True)
class Looked:
    """Every pair, what lint says of them, and which are used."""

    rows: datasets.Dataset  # prepare.SCHEMA, memory-mapped
    train: Rows
    heldout: Rows
    report: dict[str, Any]
    facts: dict[str, Any]


def load(
    data: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    *,
    stop_ids: Collection[int] = (),
    report_file: Path | None = None,
) -> Pairs:
    """Read, check, split and tokenise the pairs that ``data`` names.

    Args:
        stop_ids: token ids at which the model stops, besides the tokenizer's eos.
        report_file: where lint's report goes, also when it refuses.

    Raises:
        UserError: a source is missing or broken, lint refuses, or nothing is left to train on or to score.
    """
    looked = look(data, tokenizer, seed, stop_ids=stop_ids)
    if report_file is not None:
        write_json(report_file, looked.report)
    for line in report.brief(looked.report):
        log.warning("%s", line) if not line.startswith("note") else log.info("%s", line)
    report.refuse(looked.report)
    for reason in report.nothing_left(looked.report, data):
        raise UserError(reason)
    log.info("Data %s: %d pairs to train on, %d held out", data.name, len(looked.train), len(looked.heldout))
    texts = looked.rows.select_columns(["id", "topic", "texts"]).select(looked.heldout)
    return Pairs(_selected(looked, looked.train), _selected(looked, looked.heldout), texts, looked.facts)


def load_all(
    data: DataSettings, tokenizer: PreTrainedTokenizerBase, seed: int, *, stop_ids: Collection[int] = ()
) -> datasets.Dataset:
    """Every sound pair of a source, tokenised; none is held out.

    Raises:
        UserError: as for :func:`load`.
    """
    looked = look(data, tokenizer, seed, stop_ids=stop_ids)
    every = np.sort(np.concatenate([looked.train, looked.heldout]))
    if not len(every):
        raise UserError(f"{data.path} leaves no pairs of {looked.report['pairs']}; 'dpo-lora lint' says why.")
    return _selected(looked, every)


def look(
    data: DataSettings, tokenizer: PreTrainedTokenizerBase, seed: int, *, stop_ids: Collection[int] = ()
) -> Looked:
    """Prepare the pairs and lint them, without judging whether they may be trained.

    Raises:
        UserError: a source is missing or broken.
    """
    chosen = parts(data)
    encoder = Encoder(tokenizer, data.max_length, stop_ids)
    found = [sources.find(part) for part in chosen]
    stores = []
    for number, source in enumerate(found):
        recipe = _recognised(source, Recipe(source.part, number, encoder, data.pairing, data.plain_text))
        stores.append(store.prepared(source, recipe))
    rows = [s.rows() for s in stores]
    whole = rows[0] if len(rows) == 1 else datasets.concatenate_datasets(rows)

    def write(folder: Path) -> dict[str, Any]:
        judgement = judge(stores, whole, chosen, data, seed)
        judgement.train.astype(np.int64).tofile(folder / "train")
        judgement.heldout.astype(np.int64).tofile(folder / "heldout")
        return {"report": report.report(judgement, whole, tokenizer, data), "parts": judgement.figures["parts"]}

    folder = cache_dir() / "pairs" / f"judged-{_key(stores, data, seed)}"
    with FileLock(f"{folder}.lock"):
        verdict = store.verified(folder, "verdict.json") or store.build(folder, "verdict.json", write)
        train, heldout = (np.fromfile(folder / name, dtype=np.int64) for name in ("train", "heldout"))
    facts = _facts(data, found, stores, verdict)
    return Looked(whole, train, heldout, verdict["report"], facts)


def _recognised(source: Source, recipe: Recipe) -> Recipe:
    """``recipe`` with the shape of the source's first row; the log says what it is and what is done with it."""
    batch = next(source.batches(), None)
    if batch is None:
        raise UserError(f"{source.part.path} has no rows.")
    place, row = next(batch.decoded())
    try:
        ours = renamed(row, source.part.columns)
    except ShapeError as error:
        raise UserError(f"{place}: {error}.") from error
    shape = recognise(ours, source.part.path)
    recipe = replace(recipe, shape=shape, plain_text=_plain_text(recipe, shape))
    in_turns = recipe.plain_text is PlainText.chat
    told = [f"Source {source.part.name}: recognised as {shape.name}: {shape.becomes}."]
    if shape.is_text:
        told.append(
            "Its texts become chat turns; data.plain_text=keep trains them as written."
            if in_turns
            else "It is trained without a chat template; data.plain_text=chat makes turns of its texts."
        )
    if spare := unused(shape, ours, in_turns):
        told.append(f"Columns not used: {', '.join(spare)}.")
    log.info(" ".join(told))
    return recipe


def _plain_text(recipe: Recipe, shape: Shape) -> PlainText:
    if recipe.plain_text is not PlainText.auto:
        return recipe.plain_text
    # A prompt that has no column of its own ends where two texts part: in the middle of a sentence, no turn.
    return PlainText.chat if shape is EXPLICIT_TEXT and recipe.encoder.tokenizer.chat_template else PlainText.keep


def _key(stores: list[store.Store], data: DataSettings, seed: int) -> str:
    """32 hex digits of all that lint and split depend on."""
    values = {
        "version": _VERSION,
        "stores": [s.key for s in stores],
        "weights": [[item.get("weight"), item.get("max_pairs")] for item in data.mix],
        "settings": [
            data.heldout_share,
            data.max_pairs,
            data.max_heldout,
            data.near_duplicate,
            sorted(data.drop),
            sorted(data.lint.limits.items()),
            data.lint.length_bias,
            data.lint.outlier,
            seed,
        ],
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True).encode())


def _selected(looked: Looked, indices: Rows) -> datasets.Dataset:
    rows = looked.rows.remove_columns("texts")
    if any(f["kind"] == "repeated_id" for f in looked.report["findings"]):
        rows = rows.remove_columns("id").rename_column("place", "id")
    else:
        rows = rows.remove_columns("place")
    if not looked.facts["topics"]:
        rows = rows.remove_columns("topic")
    return rows.select(indices)


def _facts(
    data: DataSettings, found: list[Source], stores: list[store.Store], verdict: dict[str, Any]
) -> dict[str, Any]:
    return {
        "name": data.name,
        "source": "mix" if data.mix else data.source.value,
        "path": data.path,
        "revision": data.revision,
        "sources": [
            {**source.facts(), **one.facts["counts"], "heldout": source.part.goes == HELDOUT}
            for source, one in zip(found, stores, strict=True)
        ],
        "topics": any(one.facts["topics"] for one in stores),
        "train": verdict["parts"]["train"],
        "heldout": verdict["parts"]["heldout"],
        "lint": report.summary(verdict["report"]),
    }
