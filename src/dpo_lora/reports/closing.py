"""The table a finished run ends with in the terminal."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dpo_lora.evaluation import diagnosis
from dpo_lora.reports import terminal
from dpo_lora.rundir import RunDir


def show(run: RunDir, console: Console) -> None:
    """What was learned, where it is, and three commands to try next, from the run's files."""
    evaluation = json.loads(run.eval_file.read_text(encoding="utf-8"))
    manifest = run.manifest()
    training = manifest["training"]
    level = f"{100 * evaluation['confidence']:g} %"
    table = Table(title="Held-out preference accuracy", title_justify="left", show_edge=False, pad_edge=False)
    for column in ("", "accuracy", f"{level} interval", "margin"):
        table.add_column(column, justify="left" if not column else "right")
    if evaluation["before"]:
        table.add_row("before", *_figures(evaluation["before"]))
    table.add_row("after", *_figures(evaluation["after"]))
    longer = evaluation["baselines"]
    table.add_row(
        "always the longer answer",
        f"{longer['longer_wins']:.3f}",
        _interval(longer["longer_wins_interval"]),
        "",
    )
    console.print()
    console.print(table)
    low, high = evaluation["after"]["accuracy_interval"]
    console.print(f"Pairs held out: {evaluation['after']['pairs']}; {_verdict(low, high)}")
    terminal.show_findings(console, diagnosis.of_run(run))
    console.print(
        f"{training['steps']} steps, {training['pairs']} pairs, {training['tokens_per_second']:.0f} tokens/s, "
        f"peak memory {training['peak_memory_bytes'] / 2**30:.1f} GiB"
    )
    path = _short(run.path)
    console.print(f"\nThe adapter, its card and its numbers: {path}", highlight=False, soft_wrap=True)
    console.print("Next:", highlight=False)
    for command in (["dpo-lora", "chat", path], *_trainings(manifest["command"], path)):
        console.print(f"  {shlex.join(command)}", highlight=False, markup=False, soft_wrap=True)


def _trainings(command: list[str], path: str) -> list[list[str]]:
    """The run's own command line, going on from its adapter, and as a sweep; none for a call from Python.

    All of its words are repeated: with another base model, number format or adapter the run is no parent, and
    with other pairs the sweep would answer another question.
    """
    if command[:2] != ["dpo-lora", "train"]:
        return []
    words = [word for word in command if not word.startswith("run_dir=")]  # it holds this run
    again = [word for word in words if not word.startswith("parent=")]
    varied = [word for word in words[2:] if not word.startswith("dpo.beta=")]
    return [[*again, f"parent={path}"], ["dpo-lora", "train", "-m", *varied, "dpo.beta=0.05,0.1,0.2"]]


def _figures(summary: dict[str, Any]) -> tuple[str, str, str]:
    return f"{summary['accuracy']:.3f}", _interval(summary["accuracy_interval"]), f"{summary['margin']:+.4f}"


def _interval(bounds: list[float]) -> str:
    return f"{bounds[0]:.3f} to {bounds[1]:.3f}"


def _verdict(low: float, high: float) -> str:
    if low > 0.5:
        return "better than a coin, beyond chance."
    if high < 0.5:
        return "worse than a coin: look at the pairs or the learning rate."
    return "too few to tell it from a coin."


def _short(path: Path) -> str:
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
