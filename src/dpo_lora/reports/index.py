"""index.html of an outputs folder: every run and trial in one table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dpo_lora.files import write_atomic
from dpo_lora.reports.pages import render, shown
from dpo_lora.reports.report import duration, seconds_between
from dpo_lora.rundir import RunDir, runs

_SETTINGS = {
    "data": ("data", "name"),
    "model": ("model", "name"),
    "beta": ("dpo", "beta"),
    "loss": ("dpo", "loss_type"),
    "rank": ("lora", "r"),
    "rate": ("train", "learning_rate"),
    "seed": ("seed",),
}
COLUMNS = ("run", "sweep", "status", "accuracy", "interval", "margin", *_SETTINGS, "duration", "started")


def write(outputs: Path) -> Path:
    """Write ``index.html`` into ``outputs`` and return its path."""
    file = outputs / "index.html"
    write_atomic(file, page(outputs))
    return file


def page(outputs: Path) -> str:
    """The page as HTML, newest run first."""
    found = [_row(run, outputs.resolve()) for run in runs(outputs)]
    found.sort(key=lambda row: (row["started"], row["name"]), reverse=True)
    return render(
        "index.html.j2",
        title=f"Runs in {outputs.resolve().name}",
        columns=COLUMNS,
        runs=found,
        statuses=sorted({row["status"] for row in found}),
    )


def _row(run: RunDir, outputs: Path) -> dict[str, Any]:
    manifest, settings = run.manifest(), run.settings()
    evaluation = json.loads(run.eval_file.read_text(encoding="utf-8")) if run.eval_file.exists() else None
    after = evaluation["after"] if evaluation else None
    place = run.path.resolve().relative_to(outputs)
    link = next((f for f in (run.report_file, run.card_file) if f.exists()), None)
    seconds = seconds_between(manifest)
    return {
        "name": run.path.name,
        "sweep": place.parts[0] if len(place.parts) > 1 else "",
        "link": None if link is None else f"./{place.as_posix()}/{link.name}",
        "status": run.status(),
        "accuracy": None if after is None else after["accuracy"],
        "low": None if after is None else after["accuracy_interval"][0],
        "high": None if after is None else after["accuracy_interval"][1],
        "margin": None if after is None else after["margin"],
        "settings": [shown(_setting(settings, path), 80) for path in _SETTINGS.values()],
        "seconds": seconds,
        "duration": "" if seconds is None else duration(seconds),
        "started": manifest.get("started", ""),
    }


def _setting(settings: dict[str, Any], path: tuple[str, ...]) -> str:
    value: Any = settings
    for name in path:
        value = value[name]
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
