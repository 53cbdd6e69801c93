"""Prepared pairs on the disk: found again by content, never used unverified, made once by whoever comes first."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from preference_rows import talk, write_rows

from dpo_lora.choices import PlainText
from dpo_lora.preferences import pairs, store, workers
from dpo_lora.preferences.prepare import SCHEMA
from dpo_lora.preferences.sources import rows as row_sizes
from dpo_lora.schema import DataSettings

Settings = Callable[..., DataSettings]

ROWS = [talk(f"What is {n} plus {n}, in words?", f"It is {2 * n}.", "No idea" + "." * n, id=f"{n}") for n in range(40)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that a source was prepared."""
    times: list[int] = []
    real = workers.run

    def counted(*args: Any) -> Any:
        times.append(1)
        return real(*args)

    monkeypatch.setattr(workers, "run", counted)
    return times


def content(found: pairs.Pairs) -> list[Any]:
    return [found.train.to_list(), found.heldout.to_list(), list(found.heldout_texts)]


def test_a_second_run_reads_what_the_first_has_made(
    file: Path, tokenizer: Any, settings: Settings, prepared: list[int]
) -> None:
    first = content(pairs.load(settings(file), tokenizer, 0))
    assert content(pairs.load(settings(file), tokenizer, 0)) == first
    assert prepared == [1]


def changed_row(file: Path, tokenizer: Any, data: DataSettings) -> None:
    """The same size and the same date: content alone tells."""
    before = file.stat()
    text = file.read_text()
    file.write_text(text.replace("It is 8.", "It is 9."))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert file.read_text() != text


def changed_template(file: Path, tokenizer: Any, data: DataSettings) -> None:
    tokenizer.chat_template += " "


def changed_vocabulary(file: Path, tokenizer: Any, data: DataSettings) -> None:
    tokenizer.add_tokens(["It is"])


def changed_length(file: Path, tokenizer: Any, data: DataSettings) -> None:
    data.max_length = 1000


def changed_columns(file: Path, tokenizer: Any, data: DataSettings) -> None:
    data.columns.chosen, data.columns.rejected = "rejected", "chosen"


def changed_filter(file: Path, tokenizer: Any, data: DataSettings) -> None:
    data.filter = [{"column": "id", "op": "!=", "value": "7"}]


def changed_reading(file: Path, tokenizer: Any, data: DataSettings) -> None:
    data.plain_text = PlainText.chat


CHANGES = [
    changed_row,
    changed_template,
    changed_vocabulary,
    changed_length,
    changed_columns,
    changed_filter,
    changed_reading,
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_ids_depend_on_is_part_of_the_name(
    change: Callable[[Path, Any, DataSettings], None],
    file: Path,
    tokenizer: Any,
    settings: Settings,
    prepared: list[int],
) -> None:
    data = settings(file)
    pairs.load(data, tokenizer, 0)
    change(file, tokenizer, data)
    pairs.load(data, tokenizer, 0)
    assert len(prepared) == 2


def test_what_they_do_not_depend_on_is_not(file: Path, tokenizer: Any, settings: Settings, prepared: list[int]) -> None:
    pairs.load(settings(file), tokenizer, 0)
    again = pairs.load(settings(file, max_pairs=5, drop=["truncated"], heldout_share=0.4), tokenizer, 1)
    assert prepared == [1]
    assert len(again.train) == 5


def flipped(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def gone(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        *(
            (name, flipped)
            for name in ("pairs.arrow", "faults", "prompt_sketch", "store.json", "verdict.json", "train")
        ),
        *((name, harm) for name in ("pairs.arrow", "store.json") for harm in (cut_off, gone)),
    ],
)
def test_a_damaged_file_is_noticed_and_made_again(
    name: str, harm: Callable[[Path], None], file: Path, tokenizer: Any, settings: Settings, cache: Path, caplog: Any
) -> None:
    first = content(pairs.load(settings(file), tokenizer, 0))
    [damaged] = (cache / "pairs").glob(f"*/{name}")
    before = damaged.read_bytes()
    harm(damaged)
    with caplog.at_level(logging.WARNING):
        assert content(pairs.load(settings(file), tokenizer, 0)) == first
    assert damaged.read_bytes() == before
    assert ("is damaged" in caplog.text) == (harm is not gone or not name.endswith("json"))


def load_in_a_process(data: DataSettings, tokenizer: Any, ready: Any, answers: Any) -> None:
    times: list[int] = []
    real = workers.run
    workers.run = lambda *args: times.append(1) or real(*args)  # type: ignore[func-returns-value]
    ready.wait()
    found = pairs.load(data, tokenizer, 0)
    answers.put((len(times), found.facts["train"], found.facts["heldout"]))


def test_two_processes_that_want_the_same_make_it_once(file: Path, tokenizer: Any, settings: Settings) -> None:
    context = multiprocessing.get_context("fork")
    ready, answers = context.Barrier(3), context.Queue()
    started = [
        context.Process(target=load_in_a_process, args=(settings(file), tokenizer, ready, answers)) for _ in range(3)
    ]
    for process in started:
        process.start()
    found = [answers.get(timeout=60) for _ in started]
    for process in started:
        process.join()
    assert sorted(made for made, *_ in found) == [0, 0, 1]
    assert len({str(facts) for _, *facts in found}) == 1


def dies_half_way(data: DataSettings, tokenizer: Any) -> None:
    def run(*_: Any) -> Any:
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)

    workers.run = run
    pairs.load(data, tokenizer, 0)


def test_what_a_killed_process_left_is_not_taken_for_a_store(
    file: Path, tokenizer: Any, settings: Settings, cache: Path
) -> None:
    process = multiprocessing.get_context("fork").Process(target=dies_half_way, args=(settings(file), tokenizer))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert list((cache / "pairs").glob(".*.building"))
    found = pairs.load(settings(file), tokenizer, 0)
    assert len(found.train) + len(found.heldout) == 40
    assert not list((cache / "pairs").glob(".*.building"))


def test_all_cores_and_one_make_the_same(
    tmp_path: Path, file: Path, tokenizer: Any, settings: Settings, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    alone = content(pairs.load(settings(file), tokenizer, 0))
    # Batches of three rows: enough of them that processes are started.
    monkeypatch.setattr(row_sizes, "BATCH_ROWS", 3)
    started: list[int] = []
    real = workers.ProcessPoolExecutor
    monkeypatch.setattr(workers, "ProcessPoolExecutor", lambda n, *a, **k: started.append(n) or real(n, *a, **k))  # type: ignore[func-returns-value]
    monkeypatch.setenv("DPO_LORA_CACHE", str(tmp_path / "other"))
    assert content(pairs.load(settings(file), tokenizer, 0)) == alone
    assert started == [len(os.sched_getaffinity(0))]


def test_a_broken_row_in_a_process_of_its_own_names_its_line(
    tmp_path: Path, tokenizer: Any, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_sizes, "BATCH_ROWS", 3)
    path = write_rows(tmp_path / "broken.jsonl", [*ROWS[:30], {**ROWS[30], "chosen": 5}, *ROWS[31:]])
    with pytest.raises(Exception, match=r"broken\.jsonl, line 31: ") as caught:
        pairs.load(settings(path), tokenizer, 0)
    assert type(caught.value).__name__ == "UserError"


def test_the_manifest_says_how_another_machine_gets_the_same_rows(
    file: Path, tokenizer: Any, settings: Settings
) -> None:
    [facts] = pairs.load(settings(file), tokenizer, 0).facts["sources"]
    assert facts["files"] == ["rows.jsonl"]
    assert facts["digest"] == store_digest(file)
    assert facts["rows"] == 40
    moved = file.rename(file.with_name("moved.jsonl"))
    first = pairs.load(settings(moved), tokenizer, 0).facts
    assert first["sources"][0]["digest"] == facts["digest"]


def store_digest(path: Path) -> str:
    """As documented: XXH3 (128 bit) over the digests of the files."""
    import xxhash

    return xxhash.xxh3_128(bytes.fromhex(store.checksum(path))).hexdigest()


def test_rows_of_many_small_batches_lie_in_few_large_ones(tmp_path: Path) -> None:
    """Else the lengths of a million rows alone map a third of the file into memory."""
    import pyarrow as pa

    path = tmp_path / "rows"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as stream:
        writer = store._Writer(stream)
        for n in range(50):
            writer.add(pa.RecordBatch.from_pylist([{"id": f"{n}", "prompt_ids": [n] * 3}], SCHEMA))
        writer.flush()
    with pa.ipc.open_stream(path) as stream:
        (batch,) = stream
    assert batch["id"].to_pylist() == [f"{n}" for n in range(50)]
    assert batch["prompt_ids"].to_pylist() == [[n] * 3 for n in range(50)]
