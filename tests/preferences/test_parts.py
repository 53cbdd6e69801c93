"""Which sources a mix is read from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from preference_rows import talk, write_rows

from dpo_lora.preferences import pairs
from dpo_lora.preferences.parts import HELDOUT, parts
from dpo_lora.schema import DataSettings


def test_heldout_pairs_of_a_mix_are_read_once_where_two_items_have_one_path(
    tokenizer: Any, settings: Callable[..., DataSettings], tmp_path: Path
) -> None:
    rows = [talk(f"Question {n}: what about it?", f"Yes, {n}.", f"No {n}.", id=f"{n}") for n in range(20)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    held = write_rows(tmp_path / "held.jsonl", [talk(f"Asked {n}, apart?", f"So {n}.", f"Not {n}.") for n in range(5)])
    mix = [{"path": str(file), "name": "few", "max_pairs": 3}, {"path": str(file), "name": "all"}]
    asked = settings(None, mix=mix, heldout_path=str(held), near_duplicate=None)
    assert [part.name for part in parts(asked) if part.goes == HELDOUT] == ["few-heldout"]
    assert len(pairs.load(asked, tokenizer, 0).heldout) == 5
