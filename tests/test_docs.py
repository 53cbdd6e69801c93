"""Documents that are made from the code say what the code says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_of_settings_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("settings_page", DOCS / "settings.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.page() == (DOCS / "settings.md").read_text(encoding="utf-8"), "make fix writes it anew"
    unsaid = [line for line in module.page().splitlines() if line.startswith("| `") and line.endswith("| |")]
    assert not unsaid
