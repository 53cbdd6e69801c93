"""One finished run that every test of this folder may read."""

from __future__ import annotations

from pathlib import Path

import pytest

from one_run import one_run


@pytest.fixture(scope="session")
def finished(tiny_model: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An all-linear adapter that has moved; nothing may be written into its directory."""
    return one_run(tiny_model, pairs_file, tmp_path_factory.mktemp("adapters"), "train.learning_rate=1e-2")
