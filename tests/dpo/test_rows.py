"""What the trainer reads of tokenised rows, and that it holds none of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from dpo_lora.dpo.engines import longest_sequence
from dpo_lora.dpo.rows import REFERENCE, PairTokens, ReferenceRows, SeededOrder, lengths, rows_read
from dpo_lora.engine.reference_cache import LogProbs, ReferenceCache, Tokens
from harness import CommandLine, make_pair


def made(count: int) -> datasets.Dataset:
    def sides(n: int) -> dict[str, Any]:
        return {"id": f"{n}", "prompt_ids": [1] * (n % 5 + 1), "chosen_ids": [n, 2], "rejected_ids": [n] * (n % 3)}

    return datasets.Dataset.from_list([sides(n) for n in range(count)])


def test_lengths_are_counted_in_the_order_of_a_selection() -> None:
    rows = made(20).select(range(1, 20)).select([7, 3, 18])  # a slice, then picked rows
    expected = [[len(row[k]) for k in ("prompt_ids", "chosen_ids", "rejected_ids")] for row in rows]
    assert lengths(rows).tolist() == expected
    assert lengths(ReferenceRows(rows, np.zeros((3, 2)))).tolist() == expected
    assert longest_sequence(rows) == max(p + max(c, r) for p, c, r in expected)
    assert lengths(rows.select([])).shape == (0, 3)


def test_reference_sums_stand_beside_their_rows() -> None:
    plain = made(9).select([4, 8, 2])
    rows = ReferenceRows(plain, np.arange(6.0).reshape(3, 2))
    expected = [{**row, REFERENCE[0]: 2.0 * n, REFERENCE[1]: 2.0 * n + 1} for n, row in enumerate(plain)]
    assert list(rows) == [rows[n] for n in range(3)] == rows.__getitems__([0, 1, 2]) == expected
    assert list(rows.select([2, 0])) == [expected[2], expected[0]]


def test_a_row_without_its_reference_is_not_given_out() -> None:
    rows = ReferenceRows(made(2), np.array([[1.0, np.nan], [0.0, 0.0]]), np.array([True, False]))
    assert rows[0][REFERENCE[0]] == 1.0
    for ask in (lambda: rows[1], lambda: list(rows), lambda: rows.select([1])[0]):
        with pytest.raises(AssertionError, match="was not computed"):
            ask()


def test_a_short_training_on_many_pairs_reads_few_of_them() -> None:
    few = rows_read(1000, seed=3, steps=4, pairs_per_step=8)
    assert few.tolist() == sorted(list(SeededOrder(1000, 3))[: 5 * 8])
    assert rows_read(600, seed=3, steps=4, pairs_per_step=8).tolist() == list(range(600)), "not few enough"
    assert rows_read(5, seed=0, steps=100, pairs_per_step=2).tolist() == list(range(5))


def test_the_order_of_an_epoch_is_known_before_it_starts() -> None:
    order = SeededOrder(50, seed=3)
    first = list(order)
    assert sorted(first) == list(range(50))
    assert order.first(8).tolist() == sorted(first[:8])
    order.set_epoch(1)
    assert list(order) not in (first, list(range(50)))
    assert order.first(8).tolist() == sorted(first[:8])
    assert list(SeededOrder(50, seed=4)) != first


def values(row: Tokens) -> LogProbs:
    return tuple(np.asarray(ids[start:], dtype=np.float32) / 8 for ids, start in row)  # type: ignore[return-value]


def test_the_cache_reads_rows_a_shard_at_a_time(tmp_path: Path) -> None:
    held = 0

    class Watched(PairTokens):
        def __getitem__(self, number: Any) -> Any:
            nonlocal held
            held += 1
            return super().__getitem__(number)

    rows = Watched(made(300).select([*range(300), 5, 5]))  # one pair three times
    batches: list[int] = []

    def compute(part: list[Tokens]) -> list[LogProbs]:
        nonlocal held
        batches.append(held)
        held = 0
        return [values(row) for row in part]

    noted: dict[int, LogProbs] = {}
    counts = ReferenceCache(tmp_path, 10**9).visit("s", rows, compute, noted.__setitem__, rows_per_shard=16)
    distinct = len({str(row) for row in rows})
    assert counts == (0, distinct)
    assert max(batches) == 16
    again: dict[int, LogProbs] = {}
    assert ReferenceCache(tmp_path, 10**9).visit("s", rows, pytest.fail, again.__setitem__) == (distinct, 0)  # type: ignore[arg-type]
    for found in (noted, again):
        assert sorted(found) == list(range(302))
        for number, row in enumerate(rows):
            assert all(np.array_equal(a, b) for a, b in zip(found[number], values(row), strict=True))


def test_keys_that_end_with_zero_bytes_are_told_apart(tmp_path: Path) -> None:
    from dpo_lora.engine.wanted import Wanted

    keys = [b"a" * 31 + b"\0", b"a" * 31 + b"b", b"a" * 30 + b"\0\0", b"a" * 31 + b"\0"]
    wanted = Wanted(keys, [3, 2, 1, 3])
    assert wanted.missing().tolist() == [2, 1, 0]
    hits = wanted.take(np.array([keys[0], b"c" * 32], dtype="S32"))
    assert [(place, sorted(rows.tolist())) for place, rows in hits] == [(0, [0, 3])]
    assert wanted.missing().tolist() == [2, 1]
    assert not wanted.complete


@pytest.fixture
def many_pairs(tiny_overrides: list[str], tmp_path: Path) -> list[str]:
    """The tiny command line over pairs of which its steps read few."""
    file = tmp_path / "many.jsonl"
    file.write_text("".join(json.dumps(make_pair(n)) + "\n" for n in range(480)), encoding="utf-8")
    return [*tiny_overrides, f"data.path={file}", "data.max_heldout=8", "eval.samples=0"]


def computed(run: Path) -> int:
    facts: dict[str, Any] = json.loads((run / "run.json").read_text())["engine"]["reference_cache"]
    return int(facts["pairs_computed"])


def test_the_reference_is_asked_for_what_the_steps_read(cli: CommandLine, many_pairs: list[str]) -> None:
    assert computed(cli("train", *many_pairs, "train.max_steps=2").run) == 8 + 3 * 4  # held out, four pairs a step
    assert computed(cli("train", *many_pairs, "train.max_steps=3").run) == 4
    assert computed(cli("train", *many_pairs, "train.max_steps=null", "train.epochs=1").run) > 300


def test_a_sweep_over_seeds_prepares_the_pairs_of_each(cli: CommandLine, many_pairs: list[str], tmp_path: Path) -> None:
    words = [*many_pairs, "train.max_steps=1", "train.save_every=0", "seed=1,2,3"]
    words = [w for w in words if not w.startswith("data.max_heldout")]  # it would choose other pairs for each seed
    done = cli("train", "-m", *words, "sweep.slots=1")
    assert done.code == 0, done.err
    runs = [*(tmp_path / "outputs").glob("*-sweep-*/" + "[0-9a-f]" * 16)]
    assert [computed(run) for run in runs] == [0, 0, 0]


def arrow_files(folder: Path) -> Iterator[str]:
    return (p.name for p in folder.rglob("*.arrow"))


def test_a_run_leaves_no_copies_of_the_pairs(cli: CommandLine, tiny_overrides: list[str], own_cache: Path) -> None:
    assert cli("train", *tiny_overrides, "train.max_steps=2").code == 0
    assert list(arrow_files(own_cache / "pairs")) == ["pairs.arrow"]
