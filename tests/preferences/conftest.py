"""Settings and a tokenizer for trying the preferences room without a run around it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo_lora import composition
from dpo_lora.schema import DataSettings


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("DPO_LORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def settings() -> Callable[..., DataSettings]:
    """Data settings as the command line composes them: ``settings("data.drop=[truncated]", data="local")``."""

    def compose(*overrides: str, data: str = "local") -> DataSettings:
        return composition.compose([f"data={data}", *overrides]).data

    return compose
