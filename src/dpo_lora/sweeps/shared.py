"""What all trials of a sweep need and one of them would otherwise compute for all: done before they fan out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from dpo_lora.errors import UserError
from dpo_lora.schema import ModelSource, RunSettings
from dpo_lora.settings import from_plain


def key(settings: dict[str, Any]) -> str:
    """Equal for plain settings that share all that :func:`prepare` makes: the same model, the same data."""
    parts = {name: settings[name] for name in ("model", "data", "parent")}
    # The seed chooses the pairs where only some are kept.
    if settings["data"]["max_pairs"] is not None or settings["data"]["max_heldout"] is not None:
        parts["seed"] = settings["seed"]
    return json.dumps(parts, sort_keys=True)


def is_needed(settings: RunSettings) -> bool:
    """Whether :func:`prepare` has anything to do: a process for nothing would cost a second."""
    return settings.model.source is ModelSource.embedded


def prepare(settings: RunSettings) -> None:
    """Fetch and convert the base model of one group of trials; each trial then finds it in the cache."""
    if settings.model.source is ModelSource.embedded:
        from dpo_lora import embedded

        embedded.ensure()


def run(path: Path) -> int:
    """In a process of its own: prepare for the plain settings in the JSON file ``path``; the exit code."""
    try:
        prepare(from_plain(json.loads(path.read_text(encoding="utf-8"))))
    except UserError as error:
        print(f"dpo-lora: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1])))
