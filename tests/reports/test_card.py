"""The model card: complete, escaped, and its quick start runs as printed."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from dpo_lora.reports import card
from dpo_lora.rundir import RunDir
from harness import CommandLine


def front_matter(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def quick_start(text: str) -> str:
    code = re.search(r"```python\n(.*?)```", text, re.S)
    assert code
    return code[1]


def source(path: str, kind: str = "local", **facts: Any) -> dict[str, Any]:
    """As the manifest names a source of pairs."""
    return {"name": Path(path).name, "source": kind, "path": path, "commit": None, "revision": None, **facts}


def test_the_quick_start_runs_as_printed(finished: Path, tmp_path: Path) -> None:
    code = quick_start((finished / "README.md").read_text())
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_a_run_directory_loads_with_peft_alone(finished: Path) -> None:
    import peft
    import torch
    from transformers import AutoTokenizer

    model = peft.AutoPeftModelForCausalLM.from_pretrained(str(finished))
    tokenizer = AutoTokenizer.from_pretrained(str(finished))
    ids = tokenizer("hello", return_tensors="pt")["input_ids"]
    with torch.no_grad(), model.disable_adapter():
        base = model(ids).logits
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, base)


def test_the_card_carries_what_the_run_knows(own_run: Path) -> None:
    settings = own_run / "settings.yaml"
    settings.write_text(settings.read_text().replace("beta: 0.1\n", "beta: 0.25\n"))
    text = card.render(RunDir(own_run))
    matter = front_matter(text)
    assert {"dpo", "trl"} <= set(matter["tags"])
    assert matter["library_name"] == "peft"
    assert matter["model_name"] == own_run.name
    manifest = RunDir(own_run).manifest()
    for fact in (
        "beta 0.25",
        manifest["data"]["train"]["tokens"],
        manifest["reference"]["base"]["identity"]["weights"],
        "rafailov2023direct",
        "vonwerra2020trl",
        "dpo-lora train",
        "2305.18290",
        f"trl: {manifest['packages']['trl']}",
    ):
        assert fact in text


def test_a_pushed_card_names_the_hub_id(finished: Path) -> None:
    text = card.render(RunDir(finished), hub_id="someone/my-adapter")
    assert "model='someone/my-adapter'" in text
    assert front_matter(text)["model_name"] == "my-adapter"
    assert str(finished) not in quick_start(text)


def test_names_from_data_cannot_write_markdown(own_run: Path) -> None:
    directory = RunDir(own_run)
    data = {**directory.manifest()["data"], "sources": [source("[x](javascript:alert(1)) <script>")]}
    directory.write_manifest({"data": data})
    text = card.render(directory)
    assert "javascript:alert" in text
    assert "<script>" not in text
    assert "[x](javascript" not in text


def test_the_hub_reads_the_exact_metrics(finished: Path) -> None:
    after = json.loads((finished / "eval.json").read_text())["after"]
    results = ModelCard.load(finished / "README.md").data.eval_results
    assert results is not None
    assert {(r.metric_type, r.metric_value) for r in results} >= {
        ("accuracy", after["accuracy"]),
        ("loss", after["loss"]),
    }


def test_a_licence_without_an_id_is_other_with_its_name(finished: Path) -> None:
    matter = front_matter((finished / "README.md").read_text())
    named = {name: value for name, value in matter.items() if name.startswith("license")}
    link = "https://example.org/licence"
    assert named == {"license": "other", "license_name": "tiny-research", "license_link": link}


def test_a_licence_that_an_earlier_version_kept_is_one_word(own_run: Path) -> None:
    run = RunDir(own_run)
    reference = run.manifest()["reference"]
    for kept, expected in (("mit", "mit"), (None, None)):
        run.write_manifest({"reference": {"base": {**reference["base"], "license": kept}}})
        assert front_matter(card.render(run)).get("license") == expected


def test_a_mix_names_every_source_and_a_public_card_no_folder_of_this_machine(
    cli: CommandLine, tiny_overrides: list[str], pairs_file: Path, tmp_path: Path
) -> None:
    lines = pairs_file.read_text().splitlines(keepends=True)
    for name, part in (("a", lines[::2]), ("b", lines[1::2])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    mix = f"data.mix=[{{path: {tmp_path}/a.jsonl, weight: 1}}, {{path: '{tmp_path}/b.jsonl', weight: 1}}]"
    words = [word for word in tiny_overrides if not word.startswith(("data=", "data.path="))]
    run = cli("train", *words, "data=mix", mix, "train.max_steps=1", "eval.samples=0").run
    assert f"| data | {tmp_path}/a.jsonl, {tmp_path}/b.jsonl, ".replace("_", "\\_") in (run / "README.md").read_text()
    text = card.render(RunDir(run), hub_id="someone/my-adapter", hub_base="their/base")
    assert "| data | a.jsonl, b.jsonl, " in text
    assert "'data.mix=[{path: a.jsonl, weight: 1}, {path: " in text
    assert str(tmp_path) not in text


def test_data_sets_of_the_hub_are_named_once(own_run: Path) -> None:
    run = RunDir(own_run)
    sources = [
        source("a/b", "hub", commit="c0ffee"),
        source("a/b", "hub", commit="c0ffee", heldout=True),
        source("mine.jsonl"),
    ]
    run.write_manifest({"data": {**run.manifest()["data"], "source": "mix", "path": None, "sources": sources}})
    text = card.render(run, hub_id="someone/my-adapter")
    assert front_matter(text)["datasets"] == ["a/b"]
    assert "| data | a/b at c0ffee, mine.jsonl, " in text


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("data.path=/home/me/my pairs.jsonl", "data.path=my pairs.jsonl"),
        ("/home/me/presets", "presets"),
        ("a=[/x/y.jsonl,{path:/x/z.jsonl}]", "a=[y.jsonl,{path:z.jsonl}]"),
        ("a=[{path: '/x y/z, 1.jsonl', weight: 2}]", "a=[{path: 'z, 1.jsonl', weight: 2}]"),
        ("hydra.searchpath=[file:///home/me/presets]", "hydra.searchpath=[presets]"),
        ("model.name=https://hub.example/a/b", "model.name=https://hub.example/a/b"),
        ("eval.prompts=['What is in /etc/hosts?']", "eval.prompts=['What is in /etc/hosts?']"),
        ("data.path=pairs/a.jsonl", "data.path=pairs/a.jsonl"),
    ],
)
def test_a_public_command_shows_no_folder_of_this_machine(own_run: Path, word: str, shown: str) -> None:
    run = RunDir(own_run)
    run.write_manifest({"command": ["dpo-lora", "train", word]})
    text = card.render(run, hub_id="someone/my-adapter")
    command = re.search(r"```sh\n(.*?)\n```", text, re.S)
    assert command
    assert shlex.split(command[1]) == ["dpo-lora", "train", shown]
