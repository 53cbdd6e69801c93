"""Answers side by side for a page: what differs is marked, earlier steps are folded away."""

from __future__ import annotations

from typing import Any

from dpo_lora.files import read_jsonl
from dpo_lora.reports.difference import differing
from dpo_lora.reports.pages import shown
from dpo_lora.rundir import RunDir

MOST = 24  # prompts and decodings


def of_run(run: RunDir) -> list[dict[str, Any]]:
    """The last step's answers, greedy ones first, each with what the policy said at earlier steps."""
    if not run.samples_file.exists():
        return []
    rows = list(read_jsonl(run.samples_file))
    last = [row for row in rows if row["step"] == rows[-1]["step"]]
    return [_answer(row, [r for r in rows if r["step"] < row["step"] and _same(r, row)]) for row in last[:MOST]]


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[name] == other[name] for name in ("id", "prompt", "decoding"))


def _answer(row: dict[str, Any], earlier: list[dict[str, Any]]) -> dict[str, Any]:
    before, now = shown(row["reference"]["text"]), shown(row["policy"]["text"])
    reference, policy = differing(before, now)
    return {
        "id": shown(row["id"], 100),
        "step": row["step"],
        "prompt": shown(_prompt(row["prompt"]), 1000),
        "decoding": row["decoding"],
        "seed": row["seed"],
        "reference": reference,
        "policy": policy,
        "same": before == now,
        "preferred": shown(row["preferred"] or ""),
        "earlier": [{"step": r["step"], "policy": differing(before, shown(r["policy"]["text"]))[1]} for r in earlier],
    }


def _prompt(prompt: str | list[dict[str, str]]) -> str:
    if isinstance(prompt, str):
        return prompt
    return prompt[0]["content"] if len(prompt) == 1 else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
