"""The house as a failing test: who may import what, how long a file may be, what may not exist."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from harness import ROOT

SRC = ROOT / "src" / "dpo_lora"

# Each third-party library and the only files or rooms that may import it.
ROOMS = {
    "wandb": {"tracking.py"},
    "trl": {"dpo/", "engine/"},
    "peft": {"lora.py", "lineage.py", "adapters/", "engine/"},
    "hydra": {"sweeps/", "composition.py", "train.py", "usage.py", "typos.py", "settings.py"},
    "omegaconf": {"usage.py", "sweeps/sweep.py", "settings.py", "schema.py", "composition.py", "train.py", "typos.py"},
    "datasets": {"preferences/", "dpo/", "lifecycle.py"},
    "jinja2": {"reports/", "preferences/"},
    "matplotlib": {"reports/"},
    "typer": {"cli.py", "cli_cache.py", "cli_adapters.py", "cli_evaluation.py"},
    "accelerate": set(),  # transformers drives it
    "gguf": set(),
    "optuna": {"sweeps/study.py", "sweeps/space.py", "sweeps/search.py"},
    "submitit": {"sweeps/slurm.py"},
    "ray": {"sweeps/ray_cluster.py"},
    "pynvml": {"energy.py"},
    "lm_eval": {"evaluation/regression.py"},
    "bitsandbytes": {"model.py"},
    "huggingface_hub": {"model.py", "adapters/push.py"},
}


def _imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("library", ROOMS)
def test_a_library_is_imported_in_its_room_only(library: str) -> None:
    users = {str(f.relative_to(SRC)) for f in SRC.rglob("*.py") if library in _imports(f)}
    strays = {user for user in users if not any(user.startswith(room) for room in ROOMS[library])}
    assert not strays


def test_the_rooms_are_used() -> None:
    """The table above guards nothing if the files it names moved away."""
    for library, rooms in ROOMS.items():
        for room in rooms - {"engine/"}:
            files = [SRC / room] if room.endswith(".py") else list((SRC / room).rglob("*.py"))
            assert any(library in _imports(f) for f in files), f"{room} no longer imports {library}"


def test_no_module_is_too_long() -> None:
    long = {str(f.relative_to(SRC)): n for f in SRC.rglob("*.py") if (n := len(f.read_text().splitlines())) > 260}
    assert not long
    assert len((SRC / "train.py").read_text().splitlines()) < 80


def test_no_drawer_for_everything() -> None:
    names = {f.stem for f in SRC.rglob("*.py")}
    assert not names & {"utils", "util", "common", "helpers", "misc"}


def test_nothing_swallows_every_exception() -> None:
    """``except Exception`` may only be followed, somewhere below, by a raise."""
    for file in SRC.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ExceptHandler):
                broad = node.type is None or getattr(node.type, "id", "") in ("Exception", "BaseException")
                if broad:
                    assert any(isinstance(n, ast.Raise) for n in ast.walk(node)), f"{file}:{node.lineno}"


def test_nothing_heavy_at_import_of_the_command_line() -> None:
    for name in ("cli.py", "train.py", "composition.py", "settings.py", "schema.py", "rules.py", "typos.py"):
        top = {
            alias
            for node in ast.parse((SRC / name).read_text()).body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in ([node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
        }
        assert not top & {"torch", "transformers", "trl", "peft", "datasets", "wandb"}
