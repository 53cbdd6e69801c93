"""Rows for the tests of the preferences room."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """``rows`` as JSON lines in ``path``."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def talk(prompt: str, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    """A conversational row."""
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        **more,
    }
