"""Training and held-out parts: by prompt, by content, whatever is added later."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from preference_rows import talk, write_rows

from dpo_lora.errors import UserError
from dpo_lora.preferences import pairs
from dpo_lora.preferences.pairs import Pairs
from dpo_lora.preferences.similarity import SketchFile, near, normalised, shingles, sketches
from dpo_lora.schema import DataSettings

Settings = Callable[..., DataSettings]
Load = Callable[..., Pairs]

VERBS = ("boil", "fold", "draw", "mend", "plant", "carry", "paint", "weigh", "count", "polish")
THINGS = ("a lemon", "the old map", "two ropes", "some clay", "a bell", "the ladder", "your hat", "one stone", "an oar")


def question(n: int) -> str:
    """One of 90 questions, no two nearly alike."""
    verb, thing = VERBS[n % 10], THINGS[n // 10]
    return f"{verb.title()} {thing} {n} times: how would {'a sailor' if n % 3 else 'my aunt'} go about it, and why?"


def row(n: int, answer: int = 0) -> dict[str, Any]:
    return talk(question(n), f"First answer {answer} to {n}: slowly.", f"No, never {answer} {n}.", id=f"{n}-{answer}")


@pytest.fixture
def load(tokenizer: Any, settings: Settings, tmp_path: Path) -> Load:
    def loaded(rows: Iterable[dict[str, Any]], name: str = "rows", **changes: Any) -> Pairs:
        path = write_rows(tmp_path / f"{name}.jsonl", rows)
        asked = settings(None if "mix" in changes else path, **{"heldout_share": 0.3, **changes})
        return pairs.load(asked, tokenizer, 0)

    return loaded


def sides(found: Pairs) -> dict[str, str]:
    return {i: name for name in ("train", "heldout") for i in getattr(found, name)["id"]}


def test_all_rows_of_a_prompt_stay_together_however_it_is_written(load: Load) -> None:
    rows = [row(n, answer) for n in range(90) for answer in range(3)]
    for one in rows[1::3]:
        one["prompt"][0]["content"] = f"  {one['prompt'][0]['content'].upper()}!"
    found = sides(load(rows))
    assert len(found) == 270
    for n in range(90):
        assert len({found[f"{n}-{answer}"] for answer in range(3)}) == 1
    assert 0.15 < list(found.values()).count("heldout") / 270 < 0.45


def test_adding_and_reordering_rows_moves_no_other(load: Load) -> None:
    few = sides(load([row(n) for n in range(0, 90, 2)], "few"))
    many = sides(load([row(n) for n in reversed(range(90))], "many"))
    assert {i: many[i] for i in few} == few


def test_a_larger_share_only_adds_to_the_heldout_prompts(load: Load) -> None:
    rows = [row(n) for n in range(90)]
    small, large = (sides(load(rows, heldout_share=share)) for share in (0.1, 0.4))
    held = {i for i, side in small.items() if side == "heldout"}
    assert held < {i for i, side in large.items() if side == "heldout"}


def test_nearly_equal_prompts_stay_on_one_side(load: Load) -> None:
    """Variants of one question would be parted by their hashes; those that are held out are set aside."""
    base = "Suppose that a friend of mine wants to learn how to bake bread at home in a very small oven: where to begin"
    words = ("today", "tomorrow", "now", "soon", "please", "then", "later", "gladly", "slowly", "safely")
    variants = [talk(f"{base}, {word}?", f"With flour, {word}.", f"Nowhere {word}.", id=word) for word in words]
    rows = [row(n) for n in range(90)]
    apart = sides(load([*rows, *variants], near_duplicate=None, heldout_share=0.5))
    assert {apart[v["id"]] for v in variants} == {"train", "heldout"}
    together = load([*rows, *variants], heldout_share=0.5)
    assert {sides(together)[v["id"]] for v in variants if v["id"] in sides(together)} == {"train"}
    assert together.facts["lint"]["left_out"] == {
        "near_prompt_leak": sum(apart[v["id"]] == "heldout" for v in variants)
    }


def test_a_heldout_file_is_checked_against_training(load: Load, tmp_path: Path) -> None:
    held = write_rows(tmp_path / "held.jsonl", [row(n, 7) for n in range(20, 30)])
    found = load([row(n) for n in range(25)], heldout_path=str(held))
    assert sorted(found.heldout["id"]) == [f"{n}-7" for n in range(20, 30)]
    assert sorted(found.train["id"]) == sorted(f"{n}-0" for n in range(20))
    assert found.facts["lint"]["left_out"] == {"prompt_leak": 5}
    assert [source["heldout"] for source in found.facts["sources"]] == [False, True]


def test_a_split_column_decides_where_it_is_asked_to(load: Load) -> None:
    rows = [row(n) | {"split": ("train", "test", "extra")[n % 3]} for n in range(30)]
    found = load(rows, heldout_split="test")
    assert all(i.split("-")[0] in map(str, range(0, 30, 3)) for i in found.train["id"])
    assert (len(found.train), len(found.heldout)) == (10, 10)
    assert found.facts["sources"][0]["other_split"] == 10
    with pytest.raises(UserError, match=r"line 1: it has no column 'split'.*data\.heldout_split=null"):
        load([row(n) for n in range(9)], "bare", heldout_split="test")


def test_a_part_of_the_pairs_is_the_same_part_when_rows_are_added(load: Load) -> None:
    few, more = (
        load([row(n) for n in range(count)], f"first-{count}", max_pairs=20, max_heldout=9) for count in (80, 81)
    )
    assert (len(few.train), len(few.heldout)) == (20, 9)
    assert len(set(few.train["id"]) & set(more.train["id"])) >= 19
    other = load([row(n) for n in range(80)], "first-80", max_pairs=20, max_heldout=9, near_duplicate=None)
    assert other.train["id"] == few.train["id"]


def test_sources_are_mixed_by_weight_and_cap(load: Load, tmp_path: Path) -> None:
    for name, numbers in {"a": range(40), "b": range(40, 80), "c": range(80, 90)}.items():
        write_rows(tmp_path / f"{name}.jsonl", [row(n) for n in numbers])

    def mixed(*items: dict[str, Any]) -> dict[str, int]:
        mix = [{"path": str(tmp_path / f"{item.pop('of')}.jsonl"), **item} for item in items]
        found = load([row(0)], "unused", mix=mix, heldout_share=0.2)
        assert all(len(set(found.train[k])) == len(found.train) for k in ("id",))
        sources = found.train["source"]
        return {name: list(sources).count(name) for name in sorted(set(sources))}

    everything = mixed({"of": "a"}, {"of": "b"})
    assert sum(everything.values()) > 50
    weighted = mixed({"of": "a", "weight": 3, "name": "big"}, {"of": "b", "weight": 1, "name": "small"})
    assert weighted["big"] == everything["a.jsonl"]
    assert weighted["small"] == round(weighted["big"] / 3)
    assert mixed({"of": "a", "max_pairs": 5}, {"of": "b"}) == everything | {"a.jsonl": 5}
    only = [{"column": "id", "op": "in", "value": ["41-0", "42-0", "43-0", "44-0", "45-0"]}]
    filtered = mixed({"of": "a"}, {"of": "b", "filter": only})
    assert filtered["a.jsonl"] == everything["a.jsonl"]
    assert filtered["b.jsonl"] <= 5


@pytest.mark.parametrize(
    ("mix", "words"),
    [
        ([{"path": "a.jsonl", "wieght": 1}], "Did you mean 'weight'"),
        ([{"name": "a"}], "names no path"),
        ([{"path": "a.jsonl", "weight": 0}], "a number above 0"),
        ([{"path": "a.jsonl", "weight": 1}, {"path": "b.jsonl"}], "every source a weight, or none"),
        ([{"path": "x/a.jsonl"}, {"path": "y/a.jsonl"}], "same name"),
        ([{"path": "a.jsonl", "columns": {"promt": "q"}}], "no column of ours"),
        ([{"path": "a.jsonl", "source": "web"}], "none of"),
    ],
)
def test_a_broken_mix_is_refused(mix: list[dict[str, Any]], words: str, load: Load) -> None:
    with pytest.raises(UserError, match=words):
        load([row(0)], mix=mix)


def test_sketches_estimate_similarity(tmp_path: Path) -> None:
    words = [f"word{n}" for n in range(400)]
    texts = [" ".join(words)] + [" ".join(words[cut:]) for cut in (40, 80, 160)]
    sets = [set(shingles(normalised(text))) for text in texts]
    (tmp_path / "sketch").write_bytes(sketches([shingles(normalised(text)) for text in texts]).tobytes())
    file = SketchFile([tmp_path / "sketch"])
    true = [len(sets[0] & s) / len(sets[0] | s) for s in sets[1:]]
    found = file.agreement(np.zeros(3, dtype=np.int64), np.arange(1, 4))
    assert np.abs(found - true).max() < 4 * 0.045  # a share of 126 places has a standard error of 0.045 at most
    close = {(int(a), int(b)) for one, other in near(file, np.arange(4), 0.8) for a, b in zip(one, other, strict=True)}
    assert (0, 1) in close
    assert not {(0, 3), (1, 3)} & close
