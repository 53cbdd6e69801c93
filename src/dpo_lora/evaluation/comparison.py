"""Two runs on the pairs that both were scored on: pair by pair, since intervals of each alone say little."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from dpo_lora.errors import UserError
from dpo_lora.evaluation.scores import PairScores
from dpo_lora.evaluation.statistics import paired
from dpo_lora.files import read_jsonl
from dpo_lora.rundir import RunDir


def scores_of(run: RunDir) -> PairScores:
    """The scores of the adapter that the run kept.

    Raises:
        UserError: it has none yet.
    """
    if not (run.eval_file.exists() and run.eval_pairs_file.exists()):
        raise UserError(f"{run.path} has no held-out scores (status {run.status()}).")
    step = json.loads(run.eval_file.read_text(encoding="utf-8"))["after"]["step"]
    return PairScores.from_rows(row for row in read_jsonl(run.eval_pairs_file) if row["step"] == step)


def compare(first: RunDir, second: RunDir, confidence: float) -> dict[str, Any]:
    """What the second run has over the first on their common held-out pairs.

    Raises:
        UserError: they have no pair in common, or one has no scores.
    """
    a, b = scores_of(first), scores_of(second)
    a_at, b_at = _common(first, second, a, b)
    if not len(a_at):
        raise UserError(
            f"{first.path.name} and {second.path.name} share no held-out pair, so they cannot be compared pair by "
            "pair. Train both with the same data.heldout_path."
        )
    return compare_pairs(a, b, a_at, b_at, confidence)


def compare_pairs(a: PairScores, b: PairScores, a_at: Any, b_at: Any, confidence: float) -> dict[str, Any]:
    """The comparison of pairs ``a_at`` of ``a`` with ``b_at`` of ``b`` (index arrays of one length)."""
    wins = b.wins[b_at] - a.wins[a_at]
    # In nats, not rewards: those of runs with different beta have different units.
    margins = b.margins[b_at] - a.margins[a_at]
    clusters = [a.prompts[i] for i in a_at]
    by_margin = paired(margins, clusters, confidence)
    topics = np.asarray(["" if a.topics is None else a.topics[i] for i in a_at])
    return {
        "pairs": len(a_at),
        "only_first": len(set(a.pairs)) - len(a_at),
        "only_second": len(set(b.pairs)) - len(b_at),
        "accuracy_first": float(np.mean(a.wins[a_at])),
        "accuracy_second": float(np.mean(b.wins[b_at])),
        **paired(wins, clusters, confidence),
        "margin_difference_nats": by_margin["difference"],
        "margin_difference_nats_interval": by_margin["difference_interval"],
        "by_topic": [
            {
                "name": str(topic),
                "pairs": int(np.sum(topics == topic)),
                "second_ahead": int(np.sum(wins[topics == topic] > 0)),
                "first_ahead": int(np.sum(wins[topics == topic] < 0)),
            }
            for topic in sorted(set(topics.tolist()))
            if topic
        ],
    }


def _common(first: RunDir, second: RunDir, a: PairScores, b: PairScores) -> tuple[Any, Any]:
    """Index arrays of the pairs that are in both."""
    texts = [run.manifest().get("data", {}).get("heldout", {}).get("rows") for run in (first, second)]
    # Another tokenizer gives the same texts other tokens; then ids tell the pairs, if the texts are known to be one.
    by_id = texts[0] is not None and texts[0] == texts[1] and len(set(a.ids)) == len(a.ids)
    left, right = (a.ids, b.ids) if by_id else (a.pairs, b.pairs)
    place = {key: i for i, key in enumerate(right)}
    met = {key: i for i, key in enumerate(left)}  # a pair that a set has twice counts once
    common = [(i, place[key]) for key, i in met.items() if key in place]
    both = np.asarray(common, dtype=np.int64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def differing_settings(runs: list[RunDir]) -> dict[str, list[str]]:
    """Dotted names of settings on which the runs differ, with each run's value."""
    flat = [_flat(run.settings()) for run in runs]
    names = sorted(set().union(*flat) - {"outputs", "run_dir"})
    rows = {name: [str(values.get(name, "")) for values in flat] for name in names}
    return {name: values for name, values in rows.items() if len(set(values)) > 1}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
