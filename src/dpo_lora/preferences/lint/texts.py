"""Faults that show in a pair's texts alone, before any tokenizer sees them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import cast

from ftfy.badness import is_bad

from dpo_lora.preferences.shapes.pair import ROLES, Message, Pair, Turns

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_END_MARKERS = (
    "</s>",
    "<eos>",
    "<|end|>",
    "<|eot_id|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<|eom_id|>",
    "<|end_of_turn|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "[/INST]",
)
# Ranges of letters, by script; the rest (Latin, digits, punctuation, emoji) is not told apart.
_SCRIPTS = {
    "Latin": re.compile(r"[A-Za-z\u00c0-\u024f]"),
    "Greek": re.compile(r"[\u0370-\u03ff]"),
    "Cyrillic": re.compile(r"[\u0400-\u052f]"),
    "Hebrew": re.compile(r"[\u0590-\u05ff]"),
    "Arabic": re.compile(r"[\u0600-\u06ff\u0750-\u077f]"),
    "Devanagari": re.compile(r"[\u0900-\u097f]"),
    "Thai": re.compile(r"[\u0e00-\u0e7f]"),
    "Hangul": re.compile(r"[\uac00-\ud7af]"),
    "Han, kana": re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]"),
}
_TURN = re.compile(r"(?:^|\n\s*| {2,})(?:Human|Assistant|USER|ASSISTANT|### ?(?:Instruction|Response)): ?")
_MARKS = re.compile(r"[.,;:!?\u2026]+(?=\s|$)")
_QUOTES = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")
_LONG_ANSWER = 40  # characters; shorter answers stand in prompts by right ("Which is larger, A or B?")
_SCRAP = 2  # words


def content(turns: Turns) -> str:
    """All that is said, without roles."""
    return turns if isinstance(turns, str) else "\n".join(m["content"] for m in turns)


def repair(pair: Pair) -> bool:
    """Put U+FFFD where half a character stands, in place; whether there was one.

    Nothing past this point (tokenizer, Arrow, JSON on the disk) can hold a lone surrogate.
    """
    found = False

    def clean(turns: Turns) -> Turns:
        nonlocal found
        if isinstance(turns, str):
            cleaned, count = _SURROGATE.subn("\ufffd", turns)
            found |= count > 0
            return cleaned
        return [{**m, "content": clean(m["content"])} for m in turns]

    if all(content(t).isascii() for t in (pair.prompt, pair.chosen, pair.rejected)):
        return False
    pair.prompt, pair.chosen, pair.rejected = clean(pair.prompt), clean(pair.chosen), clean(pair.rejected)
    return found


def faults(pair: Pair, own_end: frozenset[str]) -> Iterator[str]:
    """Names of the findings in ``pair``.

    Args:
        own_end: texts of this model's own end-of-turn tokens.
    """
    prompt, chosen, rejected = (content(t) for t in (pair.prompt, pair.chosen, pair.rejected))
    if not _says(pair.chosen, chosen) or not _says(pair.rejected, rejected):
        yield "empty_side"
    elif pair.chosen == pair.rejected:
        yield "identical_sides"
    elif _bare(chosen) == _bare(rejected) and not _calls(pair.chosen) and not _calls(pair.rejected):
        yield "sides_alike"
    if not prompt.strip():
        yield "empty_prompt"
    if not isinstance(pair.prompt, str):
        yield from _roles(pair)
    if pair.scores is not None and pair.scores[0] < pair.scores[1]:
        yield "score_contradicts"
    yield from _end_markers(pair, chosen, rejected, own_end)
    if len(chosen) >= _LONG_ANSWER and chosen.strip() in prompt and rejected.strip() not in prompt:
        yield "answer_in_prompt"
    if not isinstance(pair.prompt, str) and any(_TURN.search(t) for t in (prompt, chosen, rejected)):
        yield "turn_in_text"
    if any(_CONTROL.search(t) for t in (prompt, chosen, rejected)):
        yield "control_character"
    if prompt.isascii() and chosen.isascii() and rejected.isascii():
        return
    if any(not t.isascii() and ("\ufffd" in t or is_bad(t)) for t in (prompt, chosen, rejected)):
        yield "mojibake"
    scripts = _script(chosen), _script(rejected)
    if None not in scripts and scripts[0] != scripts[1]:
        yield "language_differs"


def _says(turns: Turns, said: str) -> bool:
    return bool(said.strip()) or _calls(turns)


def _calls(turns: Turns) -> bool:
    return not isinstance(turns, str) and any(m.get("tool_calls") for m in turns)


def _bare(text: str) -> str:
    """``text`` without case, spacing and the marks that end words; those inside of words (1.5, x-1) count."""
    return " ".join(_MARKS.sub("", text.translate(_QUOTES)).casefold().split())


def _roles(pair: Pair) -> Iterator[str]:
    assert not isinstance(pair.prompt, str)
    prompt = pair.prompt
    sides = [cast("list[Message]", side) for side in (pair.chosen, pair.rejected)]
    whole = [[m["role"] for m in prompt + side] for side in sides]
    asked = prompt[-1]["role"] if prompt else "user"  # an empty prompt is its own finding
    answers = [side[0]["role"] if side else "assistant" for side in sides]
    known = all(role in ROLES for roles in whole for role in roles)
    if not known or asked not in ("user", "tool") or any(role != "assistant" for role in answers):
        yield "wrong_roles"
        return
    for roles in whole:
        for before, after in pairwise(roles):
            if (before == after != "tool") or after in ("system", "developer"):
                yield "role_order"
                return


def _end_markers(pair: Pair, chosen: str, rejected: str, own_end: frozenset[str]) -> Iterator[str]:
    ends = [next((m for m in (*own_end, *_END_MARKERS) if t.rstrip().endswith(m)), None) for t in (chosen, rejected)]
    if any(end in own_end for end in ends):
        if not isinstance(pair.chosen, str):  # plain text may close itself; chat templates always do
            yield "end_of_turn_doubled"
    elif any(end is not None for end in ends):
        yield "end_of_turn_wrong"


def _script(text: str) -> str | None:
    """The script of nine letters in ten, or None where none dominates or there are few letters."""
    if text.isascii():
        return "Latin" if len(text) >= _LONG_ANSWER else None
    counts = {name: len(letters.findall(text)) for name, letters in _SCRIPTS.items()}
    total = sum(counts.values())
    name = max(counts, key=lambda n: counts[n])
    return name if total >= 20 and counts[name] >= 0.9 * total else None


def is_marred(answer: str, prompt: str) -> bool:
    """Whether an answer is broken in a way nobody prefers: a scrap, a loop, or the prompt again."""
    words = answer.split()
    if len(words) < _SCRAP:
        return not words
    if len(words) >= 30 and len(set(words)) < len(words) / 5:
        return True
    return len(answer) >= _LONG_ANSWER and answer.strip() == prompt.strip()
