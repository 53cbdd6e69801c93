"""Each shape from a small file, against pairs written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from preference_rows import ROOT

from dpo_lora.choices import DataSource, Pairing, PlainText
from dpo_lora.errors import UserError
from dpo_lora.preferences.parts import UNDECIDED, Part
from dpo_lora.preferences.prepare import Recipe, _pairs
from dpo_lora.preferences.shapes import rankings
from dpo_lora.preferences.shapes.recognise import SHAPES, recognise, renamed, unused
from dpo_lora.preferences.sources import files

FOLDER = Path(__file__).parent / "shapes"
CASES = sorted(p.stem for p in FOLDER.glob("*.jsonl"))


def converted(path: Path, **settings: str) -> tuple[str, list[Any]]:
    part = Part("it", DataSource.local, str(path), None, None, "train", {}, (), UNDECIDED)
    rules = Pairing[settings.get("pairing", "best_worst")], PlainText[settings.get("plain_text", "keep")]
    found, name = [], ""
    for batch in files.read([path]):
        for place, row in batch.decoded():
            shape = recognise(renamed(row, {}), str(path))
            name = name or shape.name
            found += [f.pair for f in _pairs(Recipe(part, 0, None, *rules, shape=shape), place, row)]  # type: ignore[arg-type]
    return name, found


@pytest.mark.parametrize("case", CASES)
def test_a_shape_becomes_the_pairs_written_by_hand(case: str) -> None:
    expected = json.loads((FOLDER / f"{case}.expected.json").read_text(encoding="utf-8"))
    shape, pairs = converted(FOLDER / f"{case}.jsonl", **expected["settings"])
    assert shape == expected["shape"]
    assert [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs] == [
        {k: pair[k] for k in ("prompt", "chosen", "rejected")} for pair in expected["pairs"]
    ]
    for pair, wanted in zip(pairs, expected["pairs"], strict=True):
        assert (list(pair.scores) if pair.scores else None) == wanted.get("scores")
        assert pair.tools == wanted.get("tools")


def test_every_shape_has_a_case() -> None:
    told = {json.loads((FOLDER / f"{c}.expected.json").read_text(encoding="utf-8"))["shape"] for c in CASES}
    assert told == {shape.name for shape in SHAPES}


def test_the_docs_list_every_shape() -> None:
    docs = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    for shape in SHAPES:
        assert f"| {shape.name} |" in docs


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Pairing.best_worst, ["ad"]),
        (Pairing.best_rest, ["ab", "ac", "ad"]),
        (Pairing.adjacent, ["ab", "cd"]),  # b and c are equal
        (Pairing.all, ["ab", "ac", "ad", "bd", "cd"]),
    ],
)
def test_ranked_answers_pair_by_the_named_rule(rule: Pairing, expected: list[str]) -> None:
    answers = [(2.0, "b"), (1.0, "d"), (3.0, "a"), (2.0, "c")]
    assert [better + worse for _, better, _, worse in rankings.pairs_of(answers, rule)] == expected


def test_a_misnamed_prompt_shows_among_the_unused_columns() -> None:
    row = {"promt": "Why?", "chosen": "Because it is so.", "rejected": "Because."}
    shape = recognise(row, "it")
    assert shape.name == "text, implicit prompt"
    assert unused(shape, row, in_turns=False) == ["promt"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "completion": "b", "label": True}, "unpaired"),
        ({"prompt": "a", "good": "b", "rejected": "c"}, "data.columns={chosen: NAME}"),
        ({"prompt": "a", "chosen": 1, "rejected": 2}, "neither texts nor messages"),
    ],
)
def test_an_unknown_shape_is_refused_with_what_to_do(row: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match="(?s)" + words.replace("{", r"\{").replace("}", r"\}")):
        recognise(row, "it")
