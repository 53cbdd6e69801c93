"""Every kind of source gives the same rows; every broken one gives one clear message."""

from __future__ import annotations

import csv
import gzip
import json
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from preference_rows import talk, write_rows

from dpo_lora import composition
from dpo_lora.errors import UserError
from dpo_lora.preferences import pairs
from dpo_lora.preferences.sources import files
from dpo_lora.schema import DataSettings
from harness import CommandLine

Settings = Callable[..., DataSettings]

ROWS = [talk(f"What is {n} plus {n}, said in a word or two?", f"It is {2 * n}.", "No idea" + "." * n) for n in range(7)]


def as_jsonl(folder: Path) -> Path:
    return write_rows(folder / "rows.jsonl", ROWS)


def as_gzip(folder: Path) -> Path:
    path = folder / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(as_jsonl(folder).read_bytes()))
    return path


def as_json_array(folder: Path) -> Path:
    path = folder / "rows.json"
    path.write_text("\ufeff" + json.dumps(ROWS, indent=1), encoding="utf-8")
    return path


def as_lines_called_json(folder: Path) -> Path:
    return as_jsonl(folder).rename(folder / "lines.json")


def as_csv(folder: Path) -> Path:
    path = folder / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows({k: json.dumps(v) for k, v in row.items()} for row in ROWS)
    return path


def as_parquet(folder: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet")
    return folder / "rows.parquet"


def as_saved_dataset(folder: Path) -> Path:
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved", num_shards=2)
    return folder / "saved"


def as_saved_splits(folder: Path) -> Path:
    one = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": one, "test": one.select([0])}).save_to_disk(folder / "splits")
    return folder / "splits"


def as_arrow_file(folder: Path) -> Path:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return folder / "rows.arrow"


def as_folder(folder: Path) -> Path:
    many = folder / "many"
    many.mkdir()
    write_rows(many / "a.jsonl", ROWS[:3])
    pq.write_table(pa.Table.from_pylist(ROWS[3:]), many / "b.parquet")
    (many / "README.txt").write_text("not data")
    return many


MAKERS = [
    as_jsonl,
    as_gzip,
    as_json_array,
    as_lines_called_json,
    as_csv,
    as_parquet,
    as_saved_dataset,
    as_saved_splits,
    as_arrow_file,
    as_folder,
]


@pytest.mark.parametrize("make", MAKERS)
def test_every_kind_of_file_gives_the_same_rows(make: Callable[[Path], Path], tmp_path: Path) -> None:
    paths = files.locate(str(make(tmp_path)), Path(), "train")
    assert [row for batch in files.read(paths) for _, row in batch.decoded()] == ROWS


def test_csv_cells_keep_quotes_commas_and_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('prompt,chosen,rejected\n"Say ""hi"",\nplease","Hi,\n""you""",no\nb,c,d\n', encoding="utf-8")
    found = [(place.number, row) for batch in files.read([path]) for place, row in batch.decoded()]
    assert found == [
        (2, {"prompt": 'Say "hi",\nplease', "chosen": 'Hi,\n"you"', "rejected": "no"}),
        (5, {"prompt": "b", "chosen": "c", "rejected": "d"}),
    ]


def broken(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


GOOD = (json.dumps(ROWS[0]) + "\n").encode()
TEXT = b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
BROKEN: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "last line cut off": ("rows.jsonl", lambda: GOOD * 3 + GOOD[:90], "line 4: broken JSON.*cut off"),
    "not UTF-8": ("rows.jsonl", lambda: GOOD + GOOD.replace(b"No idea", b"No id\xe9a"), "line 2: not UTF-8"),
    "UTF-16": ("rows.jsonl", lambda: GOOD.decode().encode("utf-16"), "UTF-16"),
    "one row of 50 MB": (
        "rows.jsonl",
        lambda: GOOD + b'{"prompt": "' + b"a" * 50_000_000 + b'"}\n',
        "line 2 is longer than 16 MiB",
    ),
    "one element of 50 MB": ("rows.json", lambda: b'[{"prompt": "' + b"a" * 50_000_000 + b'"}]', "longer than 16 MiB"),
    "gzip bomb": ("rows.jsonl.gz", lambda: gzip.compress(TEXT * 4_000_000), "unpacks to more than 200 times its size"),
    "gzip bomb of one row": ("rows.jsonl.gz", lambda: gzip.compress(b" " * 50_000_000), "longer than 16 MiB"),
    "gzip cut off": ("rows.jsonl.gz", lambda: gzip.compress(GOOD * 9)[:-12], "broken gzip"),
    "no gzip at all": ("rows.jsonl.gz", lambda: GOOD, "broken gzip"),
    "CSV row with a cell too many": (
        "rows.csv",
        lambda: b"prompt,chosen,rejected\na,b,c\na,b,c,d\n",
        "line 3: 4 cells.*3 columns",
    ),
    "CSV quote never closed": ("rows.csv", lambda: b'prompt,chosen,rejected\na,b,"c\n', "broken CSV"),
    "CSV not UTF-8": ("rows.csv", lambda: b"prompt,chosen,rejected\na,b,\xe9\n", "not UTF-8"),
    "mixed types in a column": (
        "rows.jsonl",
        lambda: TEXT + TEXT.replace(b'"b"', b"5"),
        "line 2.*(neither texts nor messages|where a text belongs)",
    ),
    "texts and messages in a column": ("rows.jsonl", lambda: TEXT + GOOD, "line 2: this row looks like"),
    "message without a role or text": (
        "rows.jsonl",
        lambda: GOOD + GOOD.replace(b'"content": "It is 0."', b'"content": 7'),
        "line 2: .*content is a number",
    ),
    "empty file": ("rows.jsonl", lambda: b"", "is empty"),
    "only blank lines": ("rows.jsonl", lambda: b"\n\n", "has no rows"),
    "empty list": ("rows.json", lambda: b"[]", "has no rows"),
    "list never closed": ("rows.json", lambda: b"[" + GOOD.strip(), "never closed"),
    "an object, not a list": ("rows.json", lambda: b'{\n"data": []\n}', "neither a list of rows"),
    "header alone": ("rows.csv", lambda: b"prompt,chosen,rejected\n", "has no rows"),
    "no parquet": ("rows.parquet", lambda: b"PAR1 nonsense", "cannot be read as parquet"),
    "no arrow": ("rows.arrow", lambda: b"nonsense", "cannot be read as Arrow"),
    "rows are no objects": ("rows.jsonl", lambda: b"[1, 2]\n", "line 1: a row is a JSON object"),
    "nested 100,000 deep": (
        "rows.jsonl",
        lambda: b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
        "nested too deeply",
    ),
    "a kind not known": ("rows.xlsx", lambda: b"x", "pairs are read from"),
}


@pytest.fixture
def refused(cli: CommandLine, tiny_model: Path) -> Callable[[Path], str]:
    """The one message with which the real command line refuses a file."""

    def message(path: Path) -> str:
        outcome = cli("lint", "model=hub", f"model.name={tiny_model}", "data=local", f"data.path={path}")
        assert outcome.code == 2
        assert outcome.err.count("dpo-lora: ") == 1
        assert "Traceback" not in outcome.err + outcome.out
        found: str = outcome.err.partition("dpo-lora: ")[2]
        assert str(path) in found
        return found

    return message


@pytest.mark.parametrize("case", list(BROKEN))
def test_a_broken_file_gives_one_clear_message(
    case: str, tmp_path: Path, refused: Callable[[Path], str], cache: Path
) -> None:
    name, content, words = BROKEN[case]
    message = refused(broken(tmp_path, name, content()))
    assert re.search(f"(?s){words}", message), message
    assert len(message) < 700, "a message, not a dump of the file"
    assert not list((cache / "pairs").glob(".*building*")), "a scratch folder was left behind"


def test_a_gzip_bomb_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    path = broken(tmp_path, "rows.jsonl.gz", gzip.compress(TEXT * 6_000_000))  # 0.9 MB on the disk, 294 MB unpacked
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="unpacks to more than 200 times"):
        list(files.read([path]))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


def test_a_folder_without_data_is_refused(tmp_path: Path, refused: Callable[[Path], str]) -> None:
    (tmp_path / "rows.jsonl").mkdir()
    assert "folder without a file of pairs" in refused(tmp_path / "rows.jsonl")


def test_a_mistyped_file_names_its_neighbour(tmp_path: Path, refused: Callable[[Path], str]) -> None:
    as_jsonl(tmp_path)
    assert "Did you mean 'rows.jsonl'" in refused(tmp_path / "row.jsonl")


def test_a_hub_data_set_is_read_by_split(tmp_path: Path, tokenizer: Any, settings: Settings) -> None:
    # A local folder goes through the same loader as a hub id.
    write_rows(tmp_path / "train.jsonl", ROWS[:5])
    write_rows(tmp_path / "test.jsonl", ROWS[5:])
    found = pairs.load(settings(tmp_path, data="hh-rlhf"), tokenizer, 0)
    assert (len(found.train), len(found.heldout)) == (5, 2)
    with pytest.raises(UserError, match="split nowhere"):
        pairs.load(settings(tmp_path, data="hh-rlhf", split="nowhere"), tokenizer, 0)


def test_columns_are_renamed_and_rows_filtered_by_settings(tmp_path: Path, tokenizer: Any, settings: Settings) -> None:
    rows = [
        {"ask": f"Question number {n}?", "good": f"Yes {n}", "bad": "No", "meta": {"score": n, "lang": "en"}}
        for n in range(12)
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    names = {"prompt": "ask", "chosen": "good", "rejected": "bad"}
    rules = [
        {"column": "meta.score", "op": ">=", "value": 4},
        {"column": "meta.lang", "op": "in", "value": ["en", "de"]},
    ]
    found = pairs.load(settings(path, columns=names, filter=rules, heldout_share=0.3), tokenizer, 0)
    assert len(found.train) + len(found.heldout) == 8
    assert found.facts["sources"][0]["filtered"] == 4
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"filter": [{"column": "score", "op": ">", "value": 1}]}, "names the column 'score'"),
        ({"filter": [{"column": "ask", "op": ">", "value": 1}]}, "cannot be compared"),
        ({"columns": {"prompt": "asks"}}, "Did you mean 'ask'"),
    ]
    for changes, words in wrong:
        with pytest.raises(UserError, match=words):
            pairs.load(settings(path, **{"columns": names, **changes}), tokenizer, 0)


@pytest.mark.parametrize(
    "rule", ["{column: a, op: '=~', value: 1}", "{column: a, op: in, value: 1}", "{column: a, op: matches, value: '('}"]
)
def test_a_broken_filter_rule_is_refused_before_anything_is_read(rule: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        composition.compose(["data=local", "data.path=nowhere.jsonl", f"data.filter=[{rule}]"])
    assert stopped.value.code == 2
    assert "data.filter" in capsys.readouterr().err
