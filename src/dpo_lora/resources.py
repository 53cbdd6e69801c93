"""Where things lie: shipped presets and pairs (beside the package in a wheel, at the root in a checkout), caches."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

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


def cache_dir() -> Path:
    """Folder for what can be made again: ``$DPO_LORA_CACHE``, else the user's cache folder."""
    return Path(os.environ.get("DPO_LORA_CACHE") or platformdirs.user_cache_dir("dpo-lora"))


def missing_folder(model: str) -> str | None:
    """What to tell of a base model whose name is a path where no folder is; None: there is one, or it is a hub id."""
    if Path(model).is_dir() or not model.startswith((".", "/", "~")):
        return None
    return f"There is no model folder {model}. Give an existing folder or a hub id such as Qwen/Qwen3-0.6B."


def reference_folder() -> Path:
    """Where reference log-probabilities are kept for all runs of this user."""
    return cache_dir() / "reference"


def proofs_folder() -> Path:
    """Where it is noted on what the packed engine was found equal to the stock one."""
    return cache_dir() / "proofs"


def kernels_folder() -> Path:
    """Where what was compiled for this machine lies."""
    return cache_dir() / "kernels"
