"""Which answer is better? A judge is asked about each duel, and every verdict is kept."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dpo_lora.evaluation.duels import Duel
from dpo_lora.evaluation.endpoint import Endpoint, NoAnswerError
from dpo_lora.evaluation.statistics import bootstrap_intervals, weighted_mean
from dpo_lora.files import append_jsonl, read_jsonl

MAX_TOKENS = 16  # of a verdict
CHARACTERS_A_TOKEN = 4  # for the estimate before the first question
BOTH_ORDERS: tuple[bool, ...] = (False, True)
_VERDICT = re.compile(r"^\W*(?:answer\s+|verdict\W+)?([ABT])\b", re.IGNORECASE)


@dataclass(frozen=True)
class Verdict:
    """What a judge made of one duel in one order."""

    winner: str | None  # first, second or tie; None for a reply that is no verdict
    reply: str
    usage: dict[str, int]  # prompt_tokens, completion_tokens


class Judge(Protocol):
    """Whoever decides: a chat model elsewhere or here, or a reward model."""

    model: str  # what its verdicts go by
    orders: tuple[bool, ...]  # swapped or not: the orders in which a duel is put to it

    def decide(self, duel: Duel, swapped: bool) -> Verdict:
        """Raises NoAnswerError where it gave none."""
        ...


class ChatJudge:
    """A chat model behind an endpoint, asked in both orders: what it likes about a place cancels out."""

    orders = BOTH_ORDERS

    def __init__(self, endpoint: Endpoint):
        self.endpoint, self.model = endpoint, endpoint.model

    def decide(self, duel: Duel, swapped: bool) -> Verdict:
        reply = self.endpoint.ask(duel.messages(swapped), MAX_TOKENS)
        return Verdict(winner(reply["text"], swapped), reply["text"], reply["usage"])


def winner(text: str, swapped: bool) -> str | None:
    """first, second or tie; None for a reply that is no verdict."""
    found = _VERDICT.match(text.strip())
    if found is None:
        return None
    letter = found[1].upper()
    if letter == "T":
        return "tie"
    return "second" if (letter == "A") == swapped else "first"


def estimate(found: list[Duel], judge_: Judge, verdicts: Path) -> dict[str, int]:
    """Questions still to ask and about how many tokens they take, before any is asked."""
    known = _known(verdicts)
    open_ = [d.messages(s) for d in found for s in judge_.orders if d.key(judge_.model, s) not in known]
    characters = sum(len(m["content"]) for messages in open_ for m in messages)
    return {
        "questions": len(open_),
        "prompt_tokens": characters // CHARACTERS_A_TOKEN,
        "completion_tokens": len(open_) * MAX_TOKENS,
    }


def judge(found: list[Duel], judge_: Judge, verdicts: Path) -> Iterator[dict[str, Any]]:
    """Ask what is not in ``verdicts`` yet; every reply is appended there before the next question.

    A question that the judge never answered is not kept, so that the next call asks it again.
    """
    known = _known(verdicts)
    for duel in found:
        for swapped in judge_.orders:
            key = duel.key(judge_.model, swapped)
            if key in known:
                yield known[key]
                continue
            about = {"key": key, "id": duel.id, "prompt": duel.prompt, "swapped": swapped, "model": judge_.model}
            try:
                verdict = judge_.decide(duel, swapped)
            except NoAnswerError as error:
                yield {**about, "winner": None, "trouble": str(error)}
                continue
            row = {
                **about,
                "reply": verdict.reply,
                "winner": verdict.winner,
                "words_first": len(duel.first.split()),
                "words_second": len(duel.second.split()),
                "usage": verdict.usage,
            }
            append_jsonl(verdicts, [row])
            yield row


def _known(verdicts: Path) -> dict[str, dict[str, Any]]:
    """Verdicts on disk; a reply that was none is there too, and is asked for again."""
    rows = read_jsonl(verdicts) if verdicts.exists() else ()
    return {row["key"]: row for row in rows if row["winner"] is not None}


def summary(rows: list[dict[str, Any]], confidence: float) -> dict[str, Any]:
    """Win rate of the second side: ties one half, the orders of a prompt averaged; prompts are resampled.

    A prompt counts when it has a verdict in every order it was asked in. ``win_rate_length_controlled``
    gives prompts where its answer is the longer one and those where it is the shorter one half the weight
    each. ``consistent`` is the share of prompts with the same winner in both orders, None for a judge that
    sees no order.
    """
    value = {"second": 1.0, "tie": 0.5, "first": 0.0}
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt"], []).append(row)
    whole = [asked for asked in by_prompt.values() if all(row["winner"] is not None for row in asked)]
    found: dict[str, Any] = {
        "prompts": len(whole),
        "without_verdict": sum(row["winner"] is None for row in rows),
        "usage": {
            kind: sum(row["usage"][kind] for row in rows if "usage" in row)
            for kind in ("prompt_tokens", "completion_tokens")
        },
    }
    if not whole:
        return {**found, "win_rate": None}
    wins = np.asarray([np.mean([value[row["winner"]] for row in asked]) for asked in whole])
    longer = np.asarray([np.sign(p[0]["words_second"] - p[0]["words_first"]) / 2 + 0.5 for p in whole])

    def rates(weights: Any) -> list[float]:
        controlled = (weighted_mean(wins, weights * longer) + weighted_mean(wins, weights * (1 - longer))) / 2
        return [weighted_mean(wins, weights), controlled]

    rate, controlled = rates(np.ones(len(wins)))
    intervals = bootstrap_intervals(rates, [asked[0]["prompt"] for asked in whole], confidence)
    agreed = [len({row["winner"] for row in asked}) == 1 for asked in whole if len(asked) > 1]
    return {
        **found,
        "win_rate": rate,
        "win_rate_interval": list(intervals[0]),
        "win_rate_length_controlled": None if np.isnan(controlled) else controlled,
        "consistent": float(np.mean(agreed)) if agreed else None,
    }
