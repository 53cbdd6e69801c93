"""Nested values as rows of dotted names, and settings parted by whether they are the default."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from dpo_lora.reports.pages import shown


@dataclass(frozen=True)
class Row:
    name: str
    value: str
    default: str = ""  # where it differs


@dataclass(frozen=True)
class Settings:
    changed: list[Row]
    usual: list[Row]


def rows(values: dict[str, Any], prefix: str = "") -> list[Row]:
    """One row a leaf, fit for a page."""
    found: list[Row] = []
    for name, value in values.items():
        if isinstance(value, dict) and value:
            found += rows(value, f"{prefix}{name}.")
        else:
            text = json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else str(value)
            found.append(Row(shown(f"{prefix}{name}", 200), shown(text, 1000)))
    return found


def settings(values: dict[str, Any], defaults: dict[str, Any]) -> Settings:
    """A run's settings: those that differ from ``defaults``, with what stands there, and the others."""
    usual = {row.name: row.value for row in rows(defaults)}
    found = Settings([], [])
    for row in rows(values):
        if row.value == usual.get(row.name):
            found.usual.append(row)
        else:
            found.changed.append(Row(row.name, row.value, usual.get(row.name, "")))
    return found
