"""``dpo-lora lint`` refuses what training refuses, in the same words."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from preference_rows import talk, write_rows

from harness import CommandLine


@pytest.mark.parametrize(("has", "lacks"), [("train", "heldout"), ("test", "train")])
def test_a_part_without_pairs_is_refused_as_training_refuses_it(
    cli: CommandLine, tiny_overrides: list[str], tmp_path: Path, has: str, lacks: str
) -> None:
    rows = [talk(f"Question {n}, the {n}th of them?", f"Yes, {n}.", f"No {n}.", split=has) for n in range(8)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    words = [w for w in tiny_overrides if not w.startswith("data.path=")]
    words += [f"data.path={file}", "data.heldout_split=test"]
    trained = cli("train", *words)
    assert trained.code == 2
    said = re.search(r"\S+ leaves no (\w+) pairs of .*\(data\.heldout_path\)\.", trained.err)
    assert said
    assert said[1] == lacks
    looked = cli("lint", *words, "--json", str(tmp_path / "lint.json"))
    assert looked.code == 2
    assert f"Training refuses. {said[0]}" in looked.out
    assert json.loads((tmp_path / "lint.json").read_text())["refusals"] == [said[0]]


def test_pairs_on_both_sides_are_not_refused(cli: CommandLine, tiny_overrides: list[str], tmp_path: Path) -> None:
    outcome = cli("lint", *tiny_overrides, "--json", str(tmp_path / "lint.json"))
    assert outcome.code == 0, outcome.out
    assert json.loads((tmp_path / "lint.json").read_text())["refusals"] == []
