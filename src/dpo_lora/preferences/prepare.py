"""From a batch of rows to columns of tokens and facts: what a worker does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from dpo_lora.choices import Pairing, PlainText
from dpo_lora.errors import UserError
from dpo_lora.preferences import similarity
from dpo_lora.preferences.lint import kinds, texts
from dpo_lora.preferences.parts import HELDOUT, TRAIN, Part
from dpo_lora.preferences.shapes.pair import Message, Pair, ShapeError
from dpo_lora.preferences.shapes.recognise import Row, Shape, recognise, renamed
from dpo_lora.preferences.sources.rows import Batch, Place
from dpo_lora.preferences.tokens import Encoded, Encoder

# What the trainer reads, row by row.
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("place", pa.string()),  # source, file and line: unique where ids are not
        ("source", pa.string()),
        ("topic", pa.string()),
        ("texts", pa.string()),  # JSON of prompt and chosen as written, for people
        ("prompt_ids", pa.list_(pa.int32())),
        ("chosen_ids", pa.list_(pa.int32())),
        ("rejected_ids", pa.list_(pa.int32())),
    ]
)
# What lint and split read, column by column.
COLUMNS: dict[str, Any] = {
    "goes": np.uint8,  # parts.TRAIN, HELDOUT or UNDECIDED
    "faults": np.uint64,  # lint.kinds.BIT
    "marred": np.uint8,  # bit 0: chosen, bit 1: rejected
    "prompt": np.uint64,  # hash of the normalised prompt
    "pair": np.uint64,  # hash of prompt, chosen, rejected as written
    "turned": np.uint64,  # hash of prompt, rejected, chosen
    "id": np.uint64,  # hash of the id
    "tokens": np.uint64,  # hash of the token ids
    "prompt_tokens": np.uint32,
    "chosen_tokens": np.uint32,
    "rejected_tokens": np.uint32,
    "full_tokens": np.uint32,  # the longer answer, before the cut
}
SKETCHES = ("prompt_sketch", "answer_sketch")


@dataclass(frozen=True)
class Recipe:
    """Everything a worker needs to turn a batch into columns."""

    part: Part
    number: int  # of the part, among all
    encoder: Encoder
    pairing: Pairing
    plain_text: PlainText  # keep or chat
    shape: Shape | None = None  # None: by the first row


@dataclass
class Columns:
    """One batch, prepared."""

    rows: pa.RecordBatch
    columns: dict[str, npt.NDArray[Any]]
    counts: dict[str, int] = field(default_factory=dict)  # rows read, filtered, of other splits, without a pair


@dataclass(slots=True)
class _Found:
    pair: Pair
    id: str
    place: Place
    split: int
    topic: str | None
    goes: int


def prepare(recipe: Recipe, batch: Batch) -> Columns:
    """One batch: converted, checked, tokenised.

    Raises:
        UserError: a row that is not of the source's shape, with its file and line.
    """
    counts = {"rows": 0, "filtered": 0, "other_split": 0, "no_pair": 0}
    found: list[_Found] = []
    for place, row in batch.decoded():
        counts["rows"] += 1
        try:
            outcome = list(_pairs(recipe, place, row))
        except ShapeError as error:
            raise UserError(f"{place}: {error}.") from error
        except KeyError as error:
            raise UserError(
                f"{place}: data.filter names the column {error}, which is not there; there are {', '.join(row)}."
            ) from error
        except TypeError as error:
            raise UserError(f"{place}: data.filter: {error}.") from error
        if outcome and isinstance(outcome[0], str):
            counts[outcome[0]] += 1
        else:
            found += outcome  # type: ignore[arg-type]
            counts["no_pair"] += not outcome
    return _columns(recipe, found, counts)


def _pairs(recipe: Recipe, place: Place, row: Row) -> Iterator[_Found | str]:
    part = recipe.part
    goes = part.goes
    if goes is None:
        if "split" not in row:
            raise ShapeError(
                f"it has no column 'split' to tell {part.split!r} from {part.heldout_split!r} (it has "
                f"{', '.join(row)}). Set data.heldout_split=null to hold out data.heldout_share of the prompts instead"
            )
        goes = {part.split: TRAIN, part.heldout_split: HELDOUT}.get(row["split"])
        if goes is None:
            yield "other_split"
            return
    if not all(rule.holds(row) for rule in part.filter):
        yield "filtered"
        return
    ours = renamed(row, part.columns)
    shape = recipe.shape or recognise(ours, f"{place}")
    if not shape.matches(ours):
        fits = recognise(ours, f"{place}")
        if not _agree(fits, shape):
            raise ShapeError(
                f"this row looks like '{fits.name}', the rows before it like '{shape.name}': one source has one shape. "
                "Give differing rows files of their own, in data.mix"
            )
        shape = fits
    tools = _tools(ours.get("tools"))
    topic = None if ours.get("topic") is None else _plain(ours["topic"])
    own = place.number if ours.get("id") is None else _plain(ours["id"])
    for number, pair in enumerate(shape.convert(ours, recipe.pairing)):
        pair.tools = tools
        if recipe.plain_text is PlainText.chat and isinstance(pair.prompt, str):
            _make_chat(pair, ours.get("system"))
        suffix = f"#{number}" if number else ""
        yield _Found(pair, f"{own}{suffix}", place, number, topic, goes)


def _agree(a: Shape, b: Shape) -> bool:
    """Shapes a source may mix freely: a null where another row has a value makes no other shape of it."""
    return a.name.split(",")[0] == b.name.split(",")[0]


def _tools(value: Any) -> list[dict[str, Any]] | None:
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ShapeError(f"tools is a text that is no JSON: {error}") from error
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ShapeError("tools is no list of functions ([{type: function, function: {...}}, ...])")
    return value


def _plain(value: Any) -> str:
    return str(value).encode("utf-8", "replace").decode()


def _make_chat(pair: Pair, system: Any) -> None:
    assert isinstance(pair.prompt, str)
    pair.prompt = [{"role": "user", "content": pair.prompt.strip()}]
    if isinstance(system, str) and system.strip():
        pair.prompt.insert(0, {"role": "system", "content": system})
    for side in ("chosen", "rejected"):
        setattr(pair, side, [{"role": "assistant", "content": getattr(pair, side).strip()}])


def _columns(recipe: Recipe, found: list[_Found], counts: dict[str, int]) -> Columns:
    lone = [texts.repair(f.pair) for f in found]
    encoded = recipe.encoder.encode([f.pair for f in found])
    names = [_names(f.pair, recipe.encoder.ends, e, half) for f, e, half in zip(found, encoded, lone, strict=True)]
    asked = [similarity.normalised(similarity.asked(f.pair.prompt)) for f in found]
    answers = [[similarity.normalised(texts.content(t)) for t in (f.pair.chosen, f.pair.rejected)] for f in found]
    written = [[_hashable(t) for t in (f.pair.prompt, f.pair.chosen, f.pair.rejected)] for f in found]
    values: dict[str, list[int]] = {
        "goes": [f.goes for f in found],
        "faults": [kinds.bits(n) for n in names],
        "marred": [_marred(f.pair) for f in found],
        "prompt": [_hash(t) for t in asked],
        "pair": [_hash(f"{p}\0{c}\0{r}") for p, c, r in written],
        "turned": [_hash(f"{p}\0{r}\0{c}") for p, c, r in written],
        "id": [_hash(f.id) for f in found],
        "tokens": [_tokens(e) for e in encoded],
        "prompt_tokens": [len(e.prompt) for e in encoded],
        "chosen_tokens": [len(e.chosen) for e in encoded],
        "rejected_tokens": [len(e.rejected) for e in encoded],
        "full_tokens": [max(e.full) for e in encoded],
    }
    columns: dict[str, npt.NDArray[Any]] = {k: np.asarray(v, dtype=COLUMNS[k]) for k, v in values.items()}
    columns["prompt_sketch"] = similarity.sketches([similarity.shingles(t) for t in asked])
    # The sides' triples are told apart: a pair is no duplicate of its own reverse.
    columns["answer_sketch"] = similarity.sketches(
        [similarity.shingles(c) + [f"\0{s}" for s in similarity.shingles(r)] for c, r in answers]
    )
    rows = pa.record_batch(
        [
            pa.array([f.id for f in found], pa.string()),
            pa.array([f"{f.place}{f' #{f.split}' if f.split else ''}" for f in found], pa.string()),
            pa.array([recipe.part.name] * len(found), pa.string()),
            pa.array([f.topic for f in found], pa.string()),
            pa.array([_texts(f.pair) for f in found], pa.string()),
            *(pa.array([getattr(e, side) for e in encoded], pa.list_(pa.int32())) for side in _SIDES),
        ],
        schema=SCHEMA,
    )
    return Columns(rows, columns, counts)


def _names(pair: Pair, ends: frozenset[str], encoded: Encoded, has_half_character: bool) -> set[str]:
    found = {*texts.faults(pair, ends)}
    if not found & {"empty_side", "wrong_roles"}:  # how a conversation that is none renders says nothing
        found |= {*encoded.faults}
    # U+FFFD stands in half a character's place: one fault, not two.
    return found - {"mojibake"} | {"lone_surrogate"} if has_half_character else found


_SIDES = ("prompt", "chosen", "rejected")


def _texts(pair: Pair) -> str:
    return json.dumps({"prompt": pair.prompt, "chosen": pair.chosen}, ensure_ascii=False)


def _hashable(turns: str | list[Message]) -> str:
    return turns if isinstance(turns, str) else json.dumps(turns, sort_keys=True, ensure_ascii=False)


def _marred(pair: Pair) -> int:
    prompt = texts.content(pair.prompt)
    return texts.is_marred(texts.content(pair.chosen), prompt) + 2 * texts.is_marred(
        texts.content(pair.rejected), prompt
    )


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))


def _tokens(e: Encoded) -> int:
    digest = xxhash.xxh3_64()
    for ids in (e.prompt, e.chosen, e.rejected):
        digest.update(np.asarray([len(ids), *ids], dtype=np.int64).tobytes())
    return digest.intdigest()
