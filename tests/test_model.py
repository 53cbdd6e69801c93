"""Base models: what their own card says, and the embedded one's file."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard

from dpo_lora import embedded, model
from dpo_lora.choices import ModelSource, Quantization
from dpo_lora.errors import UserError
from dpo_lora.schema import ModelSettings

HUB = ModelSettings(
    name="someone/base",
    source=ModelSource.hub,
    revision=None,
    quantization=Quantization.none,
    attention="sdpa",
    trust_remote_code=False,
)

LICENCES = {
    "plain": ("license: mit", {"license": "mit"}),
    "named": (
        "license: other\nlicense_name: tiny-research\nlicense_link: https://example.org/l",
        {"license": "other", "license_name": "tiny-research", "license_link": "https://example.org/l"},
    ),
    "a file beside a folder's card": (
        "license: other\nlicense_name: tiny-research\nlicense_link: LICENSE",
        {"license": "other", "license_name": "tiny-research"},
    ),
    "none": ("tags: [x]", {}),
}


@pytest.mark.parametrize("case", LICENCES)
def test_what_the_base_models_card_says_of_its_licence(tmp_path: Path, case: str) -> None:
    matter, expected = LICENCES[case]
    (tmp_path / "README.md").write_text(f"---\n{matter}\n---\nA model.\n")
    assert model._license(HUB, str(tmp_path)) == expected


def test_a_folder_without_a_card_states_no_licence(tmp_path: Path) -> None:
    assert model._license(HUB, str(tmp_path)) == {}


def test_a_licence_beside_a_card_on_the_hub_is_linked_there(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "---\nlicense: other\nlicense_name: tiny-research\nlicense_link: LICENSE\n---\nA model.\n"
    monkeypatch.setattr(ModelCard, "load", lambda source: ModelCard(text))
    assert model._license(HUB, HUB.name)["license_link"] == "https://huggingface.co/someone/base/blob/main/LICENSE"


def test_an_installed_package_with_another_file_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF of somebody else")
    found = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    with pytest.raises(UserError, match="not the file that was checked"):
        embedded.ensure()
