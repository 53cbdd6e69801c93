"""One converter a shape: a row (our column names) in, its pairs out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dpo_lora.choices import Pairing
from dpo_lora.preferences.shapes import rankings, transcripts
from dpo_lora.preferences.shapes.pair import Message, Pair, ShapeError, common_start, messages, number, text

Row = dict[str, Any]

PROMPTS = ("prompt", "instruction", "question", "query", "input", "history", "context")
SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
    ("rating_chosen", "rating_rejected"),
)


def has_sides(row: Row) -> bool:
    """Whether a row has both answers."""
    return "chosen" in row and "rejected" in row


def _prompt(row: Row) -> Any:
    for name in PROMPTS:
        if row.get(name) is not None:
            return row[name]
    raise ShapeError(f"it has no prompt ({', '.join(PROMPTS)})")


def _asked(value: Any) -> list[Message]:
    """A prompt of any make as messages."""
    if transcripts.is_hh(value) or (isinstance(value, str) and value.lstrip("\n").startswith("Human: ")):
        turns = transcripts.hh(value)
        return turns[:-1] if turns and turns[-1] == {"role": "assistant", "content": ""} else turns
    return messages(value, "prompt", "user")


def _pair(row: Row, prompt: list[Message], chosen: Any, rejected: Any) -> Pair:
    system = row.get("system")
    if isinstance(system, str) and system.strip() and not (prompt and prompt[0]["role"] == "system"):
        prompt = [{"role": "system", "content": system}, *prompt]
    return Pair(
        prompt,
        messages(chosen, "chosen", "assistant"),
        messages(rejected, "rejected", "assistant"),
        scores=own_scores(row),
    )


def own_scores(row: Row) -> tuple[float, float] | None:
    """The source's own scores of chosen and rejected, where it gives both."""
    for a, b in SCORES:
        if a in row and b in row:
            high, low = number(row[a], a), number(row[b], b)
            return None if high is None or low is None else (high, low)
    return None


def reply_tree(row: Row, rule: Pairing) -> Iterator[Pair]:
    """OASST."""
    yield from rankings.tree(row, rule)


def ranked_list(row: Row, rule: Pairing) -> Iterator[Pair]:
    """N answers with scores or ranks."""
    for high, better, low, worse in rankings.pairs_of(rankings.scored(row), rule):
        pair = _pair(row, _asked(_prompt(row)), better, worse)
        pair.scores = (high, low)
        yield pair


def comparison(row: Row, _: Pairing) -> Iterator[Pair]:
    """Two answers and the winner; a tie gives nothing."""
    found = rankings.compared(row)
    if found is None:
        return
    if all(isinstance(side, list) for side in found):
        yield from conversations({**row, "chosen": found[0], "rejected": found[1]}, _)
    else:
        yield _pair(row, _asked(_prompt(row)), *found)


def sharegpt(row: Row, _: Pairing) -> Iterator[Pair]:
    """conversations, chosen, rejected."""
    yield _pair(row, messages(row["conversations"], "conversations", "user"), row["chosen"], row["rejected"])


def is_alpaca(row: Row) -> bool:
    """Whether a row is an instruction with two answers."""
    two = isinstance(row.get("output"), list) and len(row["output"]) == 2
    return "instruction" in row and "prompt" not in row and (two or (has_sides(row) and isinstance(row["chosen"], str)))


def alpaca(row: Row, _: Pairing) -> Iterator[Pair]:
    """instruction and input, after the history."""
    chosen, rejected = (row["chosen"], row["rejected"]) if has_sides(row) else row["output"]
    asked = "\n".join(part for k in ("instruction", "input") if (part := text(row.get(k), k)))
    before = []
    for turn in row.get("history") or []:
        if not isinstance(turn, list) or len(turn) != 2:
            raise ShapeError("history is a list of [question, answer]")
        before += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    yield _pair(row, [*before, {"role": "user", "content": asked}], chosen, rejected)


def orca(row: Row, _: Pairing) -> Iterator[Pair]:
    """question, after the system prompt."""
    yield _pair(row, [{"role": "user", "content": text(row["question"], "question")}], row["chosen"], row["rejected"])


def cut_transcripts(row: Row, _: Pairing) -> Iterator[Pair]:
    """Whole conversations written as one text each."""
    read = transcripts.hh if transcripts.is_hh(row["chosen"]) else transcripts.chatml
    sides = [read(text(row[side], side)) for side in ("chosen", "rejected")]
    if not all(sides):
        raise ShapeError("chosen is a transcript with turns, rejected is not")
    start = common_start(*sides)
    yield _pair(row, sides[0][:start], sides[0][start:], sides[1][start:])


def rendered_prompt(row: Row, _: Pairing) -> Iterator[Pair]:
    """A prompt that was put through a template already, and plain answers."""
    read = transcripts.chatml if transcripts.is_chatml(row["prompt"]) else transcripts.hh
    prompt = read(text(row["prompt"], "prompt"))
    if prompt and prompt[-1] == {"role": "assistant", "content": ""}:
        prompt = prompt[:-1]
    sides = [text(row[side], side).removesuffix("\n").removesuffix("<|im_end|>") for side in ("chosen", "rejected")]
    yield _pair(row, prompt, *sides)


def conversations(row: Row, _: Pairing) -> Iterator[Pair]:
    """Messages, with the prompt in a column of its own or in both sides."""
    chosen, rejected = (messages(row[side], side, "assistant") for side in ("chosen", "rejected"))
    if row.get("prompt") is None or (isinstance(row["prompt"], str) and len(chosen) > 1):
        start = common_start(chosen, rejected)
        yield _pair(row, chosen[:start], chosen[start:], rejected[start:])
        return
    prompt = _asked(row["prompt"])
    size = len(prompt)
    if len(chosen) > size and len(rejected) > size and chosen[:size] == rejected[:size] == prompt:
        chosen, rejected = chosen[size:], rejected[size:]  # both sides repeat the prompt
    yield _pair(row, prompt, chosen, rejected)


def plain_texts(row: Row, _: Pairing) -> Iterator[Pair]:
    """Texts, as they are."""
    prompt, chosen, rejected = (text(row[k], k) for k in ("prompt", "chosen", "rejected"))
    yield Pair(prompt, chosen, rejected, scores=own_scores(row))


def joined_texts(row: Row, _: Pairing) -> Iterator[Pair]:
    """Texts that begin with the prompt."""
    chosen, rejected = (text(row[side], side) for side in ("chosen", "rejected"))
    same = next((n for n, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    start = min(len(chosen), len(rejected)) if same is None else same
    if 0 < start < len(chosen) and chosen[start - 1] == " ":
        start -= 1  # the blank belongs to the answer's first word, as tokenizers have it
    yield Pair(chosen[:start], chosen[start:], rejected[start:], scores=own_scores(row))


def is_conversational(row: Row) -> bool:
    """Whether any part of a pair is made of messages."""
    return has_sides(row) and any(isinstance(row[k], list | dict) for k in ("chosen", "rejected", "prompt") if k in row)


def is_plain(row: Row) -> bool:
    """Whether both answers are texts."""
    return has_sides(row) and all(isinstance(row[k], str | None) for k in ("chosen", "rejected"))
