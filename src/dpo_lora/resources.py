"""Where the shipped presets and preference sets lie: beside the package in a wheel, at the root in a checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def _shipped(folder: str) -> Path:
    packaged = _PACKAGE / folder
    return packaged if packaged.is_dir() else _PACKAGE.parents[1] / folder


def conf_dir() -> Path:
    """The folder of config groups."""
    return _shipped("conf")


def data_dir() -> Path:
    """The folder of shipped preference sets."""
    return _shipped("data")
