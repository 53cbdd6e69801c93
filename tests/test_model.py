"""Base models: what their own card says, and the embedded one's file."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from dpo_lora import embedded
from dpo_lora.errors import UserError
from harness import CommandLine

LICENCES = [
    ("license: mit", "mit"),
    ("license: other\nlicense_name: llama3.2", "llama3.2"),
    ("tags: [x]", None),
]


@pytest.mark.parametrize(("matter", "expected"), LICENCES, ids=["plain", "named", "none"])
def test_the_card_repeats_the_base_models_licence(
    cli: CommandLine, tiny_overrides: list[str], tiny_model: Path, tmp_path: Path, matter: str, expected: str | None
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    (base / "README.md").write_text(f"---\n{matter}\n---\nA model.\n")
    run = cli("train", *tiny_overrides, "train.max_steps=1", f"model.name={base}").run
    assert yaml.safe_load((run / "README.md").read_text().split("---\n")[1]).get("license") == expected


def test_an_installed_package_with_another_file_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF of somebody else")
    found = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    with pytest.raises(UserError, match="not the file that was checked"):
        embedded.ensure()
