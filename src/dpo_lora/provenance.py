"""Where a run comes from: code, packages and machine, for the manifest."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = (
    "dpo-lora", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers",
    "hydra-core", "omegaconf", "wandb",
)  # fmt: skip
_command: list[str] = []
MAX_DIFF = 200_000  # characters of an uncommitted diff kept in the manifest


def package_versions() -> dict[str, str]:
    """Installed versions of what can change a result."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_state() -> dict[str, Any] | None:
    """Commit and uncommitted diff of the checkout this package runs from; None for an installed wheel."""
    root = Path(__file__).resolve().parents[2]
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None or not (root / "pyproject.toml").is_file():
        return None
    diff = _git(root, "diff", "HEAD") or ""
    return {"commit": commit.strip(), "dirty": bool(diff.strip()), "diff": diff[:MAX_DIFF]}


def _git(root: Path, *args: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *args],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
            errors="replace",
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def machine() -> dict[str, Any]:
    """The computer: host, processor, memory in bytes, Python."""
    import psutil

    return {
        "host": platform.node(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()


def record_command(*words: str) -> None:
    """Remember what the user typed: Hydra and typer read sys.argv in their own ways."""
    _command[:] = ["dpo-lora", *words]


def command() -> list[str]:
    """The command line this process was started with; empty for a call from Python."""
    return list(_command)
