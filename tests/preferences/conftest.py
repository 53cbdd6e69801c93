"""Settings and a tokenizer for trying the preferences room without a run around it."""

from __future__ import annotations

import copy
import dataclasses
import functools
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


@functools.cache
def _preset(name: str) -> DataSettings:
    return composition.compose([f"data={name}", "data.path=it"]).data


@pytest.fixture
def settings() -> Callable[..., DataSettings]:
    """A data preset's settings with some changed: ``settings(path, drop=["truncated"], data="local")``."""

    def change(path: Path | None, data: str = "local", **changes: Any) -> DataSettings:
        found = copy.deepcopy(_preset(data))
        for name, value in {"path": None if path is None else str(path), **changes}.items():
            old = getattr(found, name)
            setattr(found, name, dataclasses.replace(old, **value) if dataclasses.is_dataclass(old) else value)
        return found

    return change
