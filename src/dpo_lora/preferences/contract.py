"""What a pair is: an id, a prompt, a chosen and a rejected answer, as chat messages or as plain text."""

from __future__ import annotations

import json
from typing import Any

import datasets
import xxhash

from dpo_lora.errors import UserError
from dpo_lora.schema import DataSettings

SIDES = ("chosen", "rejected")
COLUMNS = ("id", "prompt", "chosen", "rejected", "topic")


def canonical(rows: datasets.Dataset, data: DataSettings) -> datasets.Dataset:
    """Rows with the columns id, prompt, chosen, rejected and, where given, topic; others are left out.

    Implicit prompts (both sides carry the whole conversation) are taken apart at the last message,
    and Orca's system and question columns become messages.

    Raises:
        UserError: columns are missing, or there are no rows.
    """
    if not len(rows):
        raise UserError(f"{data.path} has no rows.")
    have = set(rows.column_names)
    missing = [side for side in SIDES if side not in have]
    if missing:
        raise UserError(
            f"{data.path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; it has "
            f"{', '.join(rows.column_names)}. A pair is prompt, chosen, rejected: chat messages "
            "([{role, content}, ...]) or plain text."
        )
    convert = _converter(have, rows[0])
    wanted = rows.map(
        lambda row, index: {**convert(row), "id": str(row.get("id", index))},
        with_indices=True,
        desc="Reading pairs",
    )
    return wanted.select_columns([c for c in COLUMNS if c in wanted.column_names])


def _converter(have: set[str], first: dict[str, Any]) -> Any:
    if "question" in have and isinstance(first["chosen"], str):
        return _orca
    if isinstance(first["chosen"], list):
        if "prompt" not in have or isinstance(first["prompt"], str):
            return _last_message
        return lambda row: {key: _messages(row[key]) for key in ("prompt", *SIDES)}
    if "prompt" not in have:
        raise UserError(f"Plain-text pairs need a prompt column; there are {', '.join(sorted(have))}.")
    return lambda row: {key: row[key] for key in ("prompt", *SIDES)}


def _orca(row: dict[str, Any]) -> dict[str, Any]:
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return {
        "prompt": [*system, {"role": "user", "content": row["question"]}],
        **{side: [{"role": "assistant", "content": row[side]}] for side in SIDES},
    }


def _last_message(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": _messages(row["chosen"][:-1]), **{side: _messages(row[side][-1:]) for side in SIDES}}


def _messages(messages: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def prompt_key(row: dict[str, Any]) -> str:
    """The prompt as one string, to tell equal prompts."""
    return row["prompt"] if isinstance(row["prompt"], str) else json.dumps(row["prompt"], ensure_ascii=False)


def fingerprint(rows: datasets.Dataset) -> str:
    """32 hex digits of the rows' content in order (XXH3, 128 bit); a moved or renamed file keeps them."""
    digest = xxhash.xxh3_128()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
