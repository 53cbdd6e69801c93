"""index.html of an outputs folder: every run, sweep and trial in one table."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import shorten
from typing import Any

from dpo_lora.files import write_atomic
from dpo_lora.reports.pages import render, shown
from dpo_lora.reports.report import duration, seconds_between
from dpo_lora.reports.sweep import name_of
from dpo_lora.rundir import INTERRUPTED, RUNNING, RunDir, runs
from dpo_lora.sweeps.directory import SweepDir

_SETTINGS = {
    "data": ("data", "name"),
    "model": ("model", "name"),
    "beta": ("dpo", "beta"),
    "loss": ("dpo", "loss_type"),
    "rank": ("lora", "r"),
    "rate": ("train", "learning_rate"),
    "seed": ("seed",),
}
COLUMNS = ("name", "kind", "status", "accuracy", "interval", "margin", *_SETTINGS, "duration", "started", "note")


def write(outputs: Path) -> Path:
    """Write ``index.html`` into ``outputs`` and return its path."""
    file = outputs / "index.html"
    write_atomic(file, page(outputs))
    return file


def page(outputs: Path) -> str:
    """The page as HTML, newest first, a sweep before its trials."""
    folder = outputs.resolve()
    sweeps = [SweepDir(file.parent) for file in folder.glob("*/sweep.json") if not file.parent.is_symlink()]
    found = [_run(run, folder) for run in runs(outputs)] + [_sweep(sweep) for sweep in sweeps]
    begun = {row["name"]: row["started"] for row in found if row["kind"] == "sweep"}

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        top = row["name"].partition("/")[0]
        return begun.get(top, row["started"]), top, row["kind"] == "sweep", row["started"], row["name"]

    found.sort(key=place, reverse=True)
    return render(
        "index.html.j2",
        title=f"Runs in {folder.name}",
        columns=COLUMNS,
        rows=found,
        kinds={kind: sum(row["kind"] == kind for row in found) for kind in ("run", "sweep", "trial")},
        statuses=sorted({row["status"] for row in found}),
        duration=duration,
    )


def _run(run: RunDir, outputs: Path) -> dict[str, Any]:
    manifest, settings = run.manifest(), run.settings()
    evaluation = json.loads(run.eval_file.read_text(encoding="utf-8")) if run.eval_file.exists() else None
    # Scored at step 0 alone, a run has no figure of its own.
    after = evaluation["after"] if evaluation and evaluation["after"]["step"] else None
    place = run.path.resolve().relative_to(outputs)
    is_trial = len(place.parts) > 1
    status = run.status()
    link = next((f for f in (run.report_file, run.card_file) if f.exists()), None)
    return {
        "name": place.as_posix(),
        "kind": "trial" if is_trial else "run",
        "link": None if link is None else f"./{place.as_posix()}/{link.name}",
        "status": status,
        "accuracy": None if after is None else after["accuracy"],
        "interval": None if after is None else after["accuracy_interval"],
        "margin": None if after is None else after["margin"],
        "note": _note(manifest.get("reason") or ""),
        "settings": _settings(settings),
        "seconds": seconds_between(manifest),
        "started": manifest.get("started", ""),
    }


def _sweep(sweep: SweepDir) -> dict[str, Any]:
    """A sweep as its best setting: that setting's figures, and how many trials it was chosen from."""
    facts = sweep.summary()
    status = facts["status"]
    ranking = facts.get("ranking", [])
    best = ranking[0] if ranking else None
    figures = next((t["figures"] for t in facts.get("trials", []) if t["id"] == facts.get("best")), None)
    # Over several seeds the ranking has the accuracy of all; where it ranks by something else, one trial's is shown.
    if best is not None and facts["objectives"][0] == "accuracy":
        accuracy, interval = best["value"], best["interval"]
    else:
        accuracy = figures and figures["accuracy"]
        interval = figures and [figures["accuracy_low"], figures["accuracy_high"]]
    counts = ", ".join(f"{number} {name}" for name, number in facts.get("counts", {}).items())
    name = sweep.path.name
    return {
        "name": name,
        "kind": "sweep",
        "link": f"./{name}/{sweep.report_file.name}" if sweep.report_file.exists() else None,
        "status": INTERRUPTED if status == RUNNING and not sweep.is_live() else status,
        "accuracy": accuracy,
        "interval": interval,
        "margin": figures and figures["margin"],
        "note": _note((counts or "no trials yet") + (f"; best {name_of(best)}" if best else "")),
        "settings": _settings(RunDir(sweep.path / facts["best"]).settings()) if figures else [""] * len(_SETTINGS),
        "seconds": sum(s["seconds"] for s in facts["sittings"]) if facts.get("sittings") else None,
        "started": facts["started"],
    }


def _note(text: str) -> str:
    return shown(shorten(text, 160, placeholder=" …"))


def _settings(settings: dict[str, Any]) -> list[str]:
    return [shown(_setting(settings, path), 80) for path in _SETTINGS.values()]


def _setting(settings: dict[str, Any], path: tuple[str, ...]) -> str:
    value: Any = settings
    for name in path:
        value = value[name]
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
