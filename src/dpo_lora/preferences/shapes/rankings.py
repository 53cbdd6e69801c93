"""Ranked and scored lists of answers, two answers with a winner, and trees of replies: to pairs by a named rule."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, TypeVar

from dpo_lora.choices import Pairing
from dpo_lora.preferences.shapes.pair import Message, Pair, ShapeError, messages, number, text

Answer = TypeVar("Answer")


def pairs_of(answers: list[tuple[float, Answer]], rule: Pairing) -> Iterator[tuple[float, Answer, float, Answer]]:
    """(score, better, score, worse) by ``rule``; equal scores give no pair, and the first of equals stands for them."""
    ordered = sorted(answers, key=lambda a: -a[0])  # stable: ties keep their order
    if rule is Pairing.best_worst:
        found = [(ordered[0], ordered[-1])] if len(ordered) > 1 else []
    elif rule is Pairing.best_rest:
        found = [(ordered[0], other) for other in ordered[1:]]
    elif rule is Pairing.adjacent:
        found = list(pairwise(ordered))
    else:
        found = [(a, b) for n, a in enumerate(ordered) for b in ordered[n + 1 :]]
    for (high, better), (low, worse) in found:
        if high > low:
            yield high, better, low, worse


LISTS = ("completions", "responses", "answers", "candidates", "outputs", "generations", "all_generated_responses")
_SCORES = ("overall_score", "score", "rating", "reward", "fine-grained_score")
_RANKS = ("rank", "ranking")  # 1 (or 0) is the best
_TEXTS = ("response", "answer", "text", "content", "completion", "output", "generation")
_SCORE_LISTS = ("scores", "ratings", "rewards", "all_rm_scores", "score", "rating")
_RANK_LISTS = ("ranks", "ranking", "rank")


def is_list(row: dict[str, Any]) -> bool:
    """Whether a row holds one prompt's answers with a score or a rank each."""
    name = _answers_column(row)
    if name is None:
        return False
    first = row[name][0] if row[name] else None
    if isinstance(first, dict):
        return any(k in first for k in (*_SCORES, *_RANKS)) and any(k in first for k in _TEXTS)
    return any(isinstance(row.get(k), list) for k in (*_SCORE_LISTS, *_RANK_LISTS))


def _answers_column(row: dict[str, Any]) -> str | None:
    return next((name for name in LISTS if isinstance(row.get(name), list)), None)


def scored(row: dict[str, Any]) -> list[tuple[float, str]]:
    """The answers of a list row with their scores (a rank counts downwards); unscored ones are left out."""
    name = _answers_column(row)
    if name is None:
        raise ShapeError(f"it has no list of answers ({', '.join(LISTS)})")
    answers = row[name]
    if all(isinstance(a, dict) for a in answers):
        found = [(_own_score(a, name), text(_first(a, _TEXTS, name), name)) for a in answers]
    else:
        column = next((k for k in (*_SCORE_LISTS, *_RANK_LISTS) if isinstance(row.get(k), list)), None)
        if column is None or len(row[column]) != len(answers):
            raise ShapeError(f"its {len(answers)} {name} need as many scores or ranks")
        sign = -1 if column in _RANK_LISTS else 1
        values = [number(v, column) for v in row[column]]
        found = [(None if v is None else sign * v, text(a, name)) for v, a in zip(values, answers, strict=True)]
    return [(score, answer) for score, answer in found if score is not None]


def _first(row: dict[str, Any], keys: tuple[str, ...], what: str) -> Any:
    for key in keys:
        if key in row:
            return row[key]
    raise ShapeError(f"an entry of {what} has none of {', '.join(keys)}")


def _own_score(answer: dict[str, Any], what: str) -> float | None:
    for key in _SCORES:
        if answer.get(key) is not None:
            return number(answer[key], f"{what}.{key}")
    rank = next((number(answer[k], f"{what}.{k}") for k in _RANKS if answer.get(k) is not None), None)
    return None if rank is None else -rank


# Two answers in columns of their own: first, second, and the labels by which a winner may be named.
COMPARED = (
    ("response_0", "response_1"),
    ("response_1", "response_2"),
    ("response_a", "response_b"),
    ("response1", "response2"),
    ("answer_0", "answer_1"),
    ("answer_a", "answer_b"),
    ("output_1", "output_2"),
    ("completion_a", "completion_b"),
    ("conversation_a", "conversation_b"),
    ("human_ref_A", "human_ref_B"),
)
WINNERS = ("better_response_id", "winner", "preferred", "preference", "label", "labels", "choice")
_TIES = ("tie", "tie (bothbad)", "both", "neither", "equal", "-1", "none", "")


def is_compared(row: dict[str, Any]) -> bool:
    """Whether a row holds two answers and says which one won."""
    return any(a in row and b in row for a, b in COMPARED) and any(w in row for w in WINNERS)


def compared(row: dict[str, Any]) -> tuple[Any, Any] | None:
    """(winner, loser), or None for a tie.

    Raises:
        ShapeError: the winner is named in no way known.
    """
    first, second = next((a, b) for a, b in COMPARED if a in row and b in row)
    column = next(w for w in WINNERS if w in row)
    named = str(row[column]).strip().lower()
    if named in _TIES:
        return None
    if first == "human_ref_A":  # SHP: label 1 means that A is preferred
        names = (("1", "a", first.lower()), ("0", "b", second.lower()))
    else:
        tags = [column_name.lower()[-1] for column_name in (first, second)]
        names = tuple((tag, f"model_{tag}", name.lower()) for tag, name in zip(tags, (first, second), strict=True))  # type: ignore[assignment]
        if tags == ["a", "b"]:
            names = ((*names[0], "0"), (*names[1], "1"))  # type: ignore[assignment]
    if named in names[0]:
        return row[first], row[second]
    if named in names[1]:
        return row[second], row[first]
    raise ShapeError(f"{column}={row[column]!r} names neither {first} nor {second}")


def tree(row: dict[str, Any], rule: Pairing) -> Iterator[Pair]:
    """OASST: at every turn of the user's with ranked replies, pairs of them with the path as the prompt.

    Rank 0 is the best reply; replies without a rank are left out, as are deleted ones.
    """
    yield from _branch(row["prompt"], [], rule)


def _branch(node: Any, path: list[Message], rule: Pairing) -> Iterator[Pair]:
    # Depth first with a stack: a hostile tree may be deeper than Python recurses.
    stack: list[tuple[Any, list[Message]]] = [(node, path)]
    while stack:
        turn, before = stack.pop()
        if not isinstance(turn, dict):
            raise ShapeError("a node of the tree is no object")
        here = [*before, *messages(turn, "prompt", "user")]
        replies = [r for r in turn.get("replies") or [] if isinstance(r, dict) and not r.get("deleted")]
        if here[-1]["role"] == "user":
            ranked = [(-float(r["rank"]), r) for r in replies if r.get("rank") is not None]
            for _, better, _, worse in pairs_of(ranked, rule):
                yield Pair(
                    here,
                    messages({k: better.get(k) for k in ("role", "text")}, "replies", "assistant"),
                    messages({k: worse.get(k) for k in ("role", "text")}, "replies", "assistant"),
                )
        stack += [(reply, here) for reply in reversed(replies)]
