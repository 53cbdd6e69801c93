"""Writes docs/settings.md from the schema, its comments and the default run: python docs/settings.py."""

from __future__ import annotations

import ast
import json
import re
import sys
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_type_hints

from dpo_lora import choices, schema, settings

ROOT = Path(__file__).parents[1]
PAGE = Path(__file__).with_suffix(".md")
HEAD = """# Settings

Every setting of `dpo-lora train`, its value in the default run, and what it means. Set any of them on the command line
(`dpo.beta=0.2`), several values to sweep (`-m dpo.beta=0.1,0.2`), or a whole group by a preset (`train=gpu`). `null`
means none. This page is written by `python docs/settings.py`.
"""
TITLES = {
    "": "The run",
    "model": "model: the base model",
    "data": "data: the preference pairs",
    "lora": "lora: the adapter",
    "dpo": "dpo: the loss (names are TRL's)",
    "train": "train: how it is trained",
    "eval": "eval: held-out scores and sampled answers",
    "tracking": "tracking: where metrics are shown",
    "sweep": "sweep: how trials are run (-m)",
}


def comments(module: Any) -> dict[tuple[str, str], str]:
    """(class, name) of each field or member with a comment on its line."""
    source = Path(module.__file__).read_text(encoding="utf-8")
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, ast.AnnAssign | ast.Assign):
                    target = item.target if isinstance(item, ast.AnnAssign) else item.targets[0]
                    told = re.search(r"  # (.*)$", lines[item.lineno - 1])
                    if isinstance(target, ast.Name) and told is not None:
                        found[node.name, target.id] = told.group(1)
    return found


def page() -> str:
    """The page's text."""
    told = comments(schema) | comments(choices)
    parts = [HEAD]
    run = settings.composed([])
    sections = [("", run), *((f.name, getattr(run, f.name)) for f in fields(run) if is_dataclass(getattr(run, f.name)))]
    for prefix, part in sections:
        rows = list(_rows(part, prefix, told))
        parts += [
            f"## {TITLES[prefix]}\n",
            "| name | default | meaning |\n| --- | --- | --- |\n" + "\n".join(rows) + "\n",
        ]
    return "\n".join(parts)


def _rows(part: Any, prefix: str, told: dict[tuple[str, str], str]) -> Any:
    types = get_type_hints(type(part))
    for field in fields(part):
        value, name = getattr(part, field.name), f"{prefix}.{field.name}".removeprefix(".")
        if is_dataclass(value):
            if prefix:
                yield from _rows(value, name, told)
            continue
        meaning = told.get((type(part).__name__, field.name), "")
        kind = types[field.name]
        if isinstance(kind, type) and issubclass(kind, Enum):
            words = [_choice(member.name, told.get((kind.__name__, member.name))) for member in kind]
            meaning = f"{meaning}: {'; '.join(words)}".removeprefix(": ")
        yield f"| `{name}` | {_shown(value)} | {meaning.replace('None', 'null')} |".replace("|  |", "| |")


def _choice(name: str, meaning: str | None) -> str:
    return f"`{name}`" + (f" ({meaning})" if meaning else "")


def _shown(value: Any) -> str:
    plain = value.value if isinstance(value, Enum) else value
    if isinstance(plain, dict) and plain:
        return "see conf/data/explainer.yaml"
    return f"`{plain}`" if isinstance(plain, str) else f"`{json.dumps(plain)}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE}\n")
