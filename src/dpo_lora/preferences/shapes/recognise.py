"""The shapes that are known, how each is told from a row, and what it becomes.

The list is in order: the first shape that matches a source's first row is taken for all its rows.
docs/data.md shows it; a test keeps the two alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from dpo_lora.errors import UserError, nearest
from dpo_lora.preferences.shapes import rankings, transcripts
from dpo_lora.preferences.shapes.pair import Message, Pair, ShapeError, common_start, messages, number, text
from dpo_lora.schema import Pairing

Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """One shape of rows."""

    name: str
    looks: str  # the columns it is told by
    becomes: str  # what is done with it; the log says so
    matches: Callable[[Row], bool]
    convert: Callable[[Row, Pairing], Iterator[Pair]]


# Names that other projects give to our columns; taken where ours is absent.
ALIASES = {
    "chosen": ("chosen_response", "response_chosen", "chosen_answer", "answer_chosen", "preferred_response"),
    "rejected": (
        "rejected_response",
        "response_rejected",
        "rejected_answer",
        "answer_rejected",
        "dispreferred_response",
    ),
}
_PROMPTS = ("prompt", "instruction", "question", "query", "input", "history", "context")
_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
    ("rating_chosen", "rating_rejected"),
)


def renamed(row: Row, columns: dict[str, str]) -> Row:
    """The row with our column names, by the settings first and by known aliases then.

    Raises:
        ShapeError: a column that the settings name is not there.
    """
    taken = set(columns.values())
    for theirs in taken:
        if theirs not in row:
            raise ShapeError(f"it has no column {theirs!r}, which data.columns names.{nearest(theirs, row)}")
    ours = {k: v for k, v in row.items() if k not in taken and k not in columns}
    ours |= {name: row[theirs] for name, theirs in columns.items()}
    for name, others in ALIASES.items():
        found = next((o for o in others if o in ours), None)
        if name not in ours and found is not None:
            ours[name] = ours.pop(found)
    return ours


def _sides(row: Row) -> bool:
    return "chosen" in row and "rejected" in row


def _prompt(row: Row) -> Any:
    for name in _PROMPTS:
        if row.get(name) is not None:
            return row[name]
    raise ShapeError(f"it has no prompt ({', '.join(_PROMPTS)})")


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
    for a, b in _SCORES:
        if a in row and b in row:
            high, low = number(row[a], a), number(row[b], b)
            return None if high is None or low is None else (high, low)
    return None


def _tree(row: Row, rule: Pairing) -> Iterator[Pair]:
    yield from rankings.tree(row, rule)


def _ranked(row: Row, rule: Pairing) -> Iterator[Pair]:
    for high, better, low, worse in rankings.pairs_of(rankings.scored(row), rule):
        pair = _pair(row, _asked(_prompt(row)), better, worse)
        pair.scores = (high, low)
        yield pair


def _compared(row: Row, _: Pairing) -> Iterator[Pair]:
    found = rankings.compared(row)
    if found is None:
        return
    if all(isinstance(side, list) for side in found):
        yield from _conversations({**row, "chosen": found[0], "rejected": found[1]}, _)
    else:
        yield _pair(row, _asked(_prompt(row)), *found)


def _sharegpt(row: Row, _: Pairing) -> Iterator[Pair]:
    yield _pair(row, messages(row["conversations"], "conversations", "user"), row["chosen"], row["rejected"])


def _is_alpaca(row: Row) -> bool:
    two = isinstance(row.get("output"), list) and len(row["output"]) == 2
    return "instruction" in row and "prompt" not in row and (two or (_sides(row) and isinstance(row["chosen"], str)))


def _alpaca(row: Row, _: Pairing) -> Iterator[Pair]:
    chosen, rejected = (row["chosen"], row["rejected"]) if _sides(row) else row["output"]
    asked = "\n".join(part for k in ("instruction", "input") if (part := text(row.get(k), k)))
    before = []
    for turn in row.get("history") or []:
        if not isinstance(turn, list) or len(turn) != 2:
            raise ShapeError("history is a list of [question, answer]")
        before += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    yield _pair(row, [*before, {"role": "user", "content": asked}], chosen, rejected)


def _orca(row: Row, _: Pairing) -> Iterator[Pair]:
    yield _pair(row, [{"role": "user", "content": text(row["question"], "question")}], row["chosen"], row["rejected"])


def _transcripts(row: Row, _: Pairing) -> Iterator[Pair]:
    read = transcripts.hh if transcripts.is_hh(row["chosen"]) else transcripts.chatml
    sides = [read(text(row[side], side)) for side in ("chosen", "rejected")]
    if not all(sides):
        raise ShapeError("chosen is a transcript with turns, rejected is not")
    start = common_start(*sides)
    yield _pair(row, sides[0][:start], sides[0][start:], sides[1][start:])


def _rendered(row: Row, _: Pairing) -> Iterator[Pair]:
    read = transcripts.chatml if transcripts.is_chatml(row["prompt"]) else transcripts.hh
    prompt = read(text(row["prompt"], "prompt"))
    if prompt and prompt[-1] == {"role": "assistant", "content": ""}:
        prompt = prompt[:-1]
    sides = [text(row[side], side).removesuffix("\n").removesuffix("<|im_end|>") for side in ("chosen", "rejected")]
    yield _pair(row, prompt, *sides)


def _conversations(row: Row, _: Pairing) -> Iterator[Pair]:
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


def _texts(row: Row, _: Pairing) -> Iterator[Pair]:
    prompt, chosen, rejected = (text(row[k], k) for k in ("prompt", "chosen", "rejected"))
    yield Pair(prompt, chosen, rejected, scores=own_scores(row))


def _joined_texts(row: Row, _: Pairing) -> Iterator[Pair]:
    chosen, rejected = (text(row[side], side) for side in ("chosen", "rejected"))
    same = next((n for n, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    start = min(len(chosen), len(rejected)) if same is None else same
    if 0 < start < len(chosen) and chosen[start - 1] == " ":
        start -= 1  # the blank belongs to the answer's first word, as tokenizers have it
    yield Pair(chosen[:start], chosen[start:], rejected[start:], scores=own_scores(row))


def _conversational(row: Row) -> bool:
    return _sides(row) and any(isinstance(row[k], list | dict) for k in ("chosen", "rejected", "prompt") if k in row)


def _is_plain(row: Row) -> bool:
    return _sides(row) and all(isinstance(row[k], str | None) for k in ("chosen", "rejected"))


SHAPES = (
    Shape(
        "OASST tree",
        "prompt: {text, role, replies: [{rank, ...}]}",
        "the ranked replies to each user turn, paired by data.pairing; the path to the turn is the prompt",
        lambda row: isinstance(row.get("prompt"), dict) and "replies" in row["prompt"],
        _tree,
    ),
    Shape(
        "ranked list",
        "prompt or instruction; completions, responses, answers, each with a score or rank (UltraFeedback, Nectar)",
        "two answers of different score, paired by data.pairing",
        rankings.is_list,
        _ranked,
    ),
    Shape(
        "comparison",
        "prompt or history; response_0/_1 (a/b, 1/2, human_ref_A/B, conversation_a/b) and a winner (SHP, Arena)",
        "the winner is chosen, the other rejected; ties give no pair",
        rankings.is_compared,
        _compared,
    ),
    Shape(
        "ShareGPT ranking",
        "conversations: [{from, value}], chosen, rejected",
        "conversations is the prompt; human, gpt, observation become user, assistant, tool",
        lambda row: _sides(row) and isinstance(row.get("conversations"), list),
        _sharegpt,
    ),
    Shape(
        "Alpaca ranking",
        "instruction (and input, history, system); chosen and rejected, or output: [better, worse]",
        "instruction and input are the user's turn, on lines of their own",
        _is_alpaca,
        _alpaca,
    ),
    Shape(
        "Orca",
        "question (and system), chosen, rejected",
        "question is the user's turn, after the system turn where it is not empty",
        lambda row: _is_plain(row) and isinstance(row.get("question"), str) and "prompt" not in row,
        _orca,
    ),
    Shape(
        "transcript",
        'chosen, rejected: "\\n\\nHuman: ...\\n\\nAssistant: ..." (Anthropic HH) or rendered ChatML',
        "cut into turns; the turns that both share are the prompt",
        lambda row: (
            _is_plain(row)
            and any(
                told(row["chosen"]) and told(row["rejected"]) for told in (transcripts.is_hh, transcripts.is_chatml)
            )
        ),
        _transcripts,
    ),
    Shape(
        "rendered prompt",
        'prompt: "\\n\\nHuman: ...\\n\\nAssistant:" or "<|im_start|>user\\n..."; chosen, rejected: texts',
        "the prompt's turns are taken apart again, to be put through the model's own template",
        lambda row: (
            _is_plain(row) and any(told(row.get("prompt")) for told in (transcripts.is_hh, transcripts.is_chatml))
        ),
        _rendered,
    ),
    Shape(
        "conversation, explicit prompt",
        "prompt (a text or messages), chosen, rejected: messages (TRL, UltraFeedback binarised)",
        "as it is; where both sides repeat the prompt, it is taken off",
        lambda row: _conversational(row) and row.get("prompt") is not None,
        _conversations,
    ),
    Shape(
        "conversation, implicit prompt",
        "chosen, rejected: whole conversations (TRL)",
        "the messages that both begin with are the prompt",
        _conversational,
        _conversations,
    ),
    Shape(
        "text, explicit prompt",
        "prompt, chosen, rejected: texts (TRL)",
        "as it is, without turns, unless data.plain_text=chat",
        lambda row: _is_plain(row) and isinstance(row.get("prompt"), str),
        _texts,
    ),
    Shape(
        "text, implicit prompt",
        "chosen, rejected: texts (TRL)",
        "the text that both begin with is the prompt",
        lambda row: _is_plain(row) and row.get("prompt") is None,
        _joined_texts,
    ),
)


def recognise(row: Row, source: str) -> Shape:
    """The shape of a source, by one of its rows (renamed).

    Raises:
        UserError: it is none of the known ones; says which columns there are and what to do.
    """
    for shape in SHAPES:
        if shape.matches(row):
            return shape
    have = ", ".join(row)
    if "label" in row and "completion" in row:
        raise UserError(
            f"{source} has unpaired answers (completion, label), as for KTO; DPO needs two answers to a prompt. "
            "Pair them first: prompt, chosen, rejected."
        )
    missing = [side for side in ("chosen", "rejected") if side not in row]
    if missing:
        raise UserError(
            f"{source} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; it has {have}. If they have "
            f"another name, say so: 'data.columns={{{missing[0]}: NAME}}'. docs/data.md lists the known shapes."
        )
    raise UserError(
        f"{source}: chosen and rejected are neither texts nor messages ([{{role, content}}, ...]); it has {have}."
    )


def unused(shape: Shape, row: Row) -> list[str]:
    """Columns that a conversion of ``shape`` does not read, for the log: a misnamed prompt shows there."""
    read = {"id", "topic", "split", "tools", "system", "chosen", "rejected", "prompt", "conversations"}
    read |= {name for both in _SCORES for name in both}
    if shape.name in ("ranked list", "comparison", "Alpaca ranking", "Orca"):
        read |= {*_PROMPTS, *rankings.LISTS, "output", "scores", "ranks", "ratings", *rankings.WINNERS}
        read |= {name for both in rankings.COMPARED for name in both}
    return [name for name in row if name not in read]
