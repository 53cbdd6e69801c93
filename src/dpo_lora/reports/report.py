"""report.html of one run, read from its directory alone: whatever it came to, there is a page."""

from __future__ import annotations

import json
import shlex
from datetime import datetime
from pathlib import Path
from typing import Any

from dpo_lora.evaluation import diagnosis
from dpo_lora.files import read_jsonl, write_atomic
from dpo_lora.reports import answers, ending, facts, figures, pairs, terminal
from dpo_lora.reports.pages import render, safe_link, shown
from dpo_lora.rundir import RunDir
from dpo_lora.settings import defaults


def write(run: RunDir) -> None:
    """Write ``report.html`` into ``run``."""
    write_atomic(run.report_file, page(run))


def page(run: RunDir) -> str:
    """The page as HTML; parts whose files are not there are left out."""
    manifest, settings = run.manifest(), run.settings()
    metrics = list(read_jsonl(run.metrics_file)) if run.metrics_file.exists() else []
    scored = list(read_jsonl(run.eval_pairs_file)) if run.eval_pairs_file.exists() else []
    evaluation = _read(run.eval_file)
    # At step 0 policy and reference are one: every figure is what it must be, and says nothing of the run.
    after = evaluation["after"] if evaluation and evaluation["after"]["step"] else None
    status = run.status()
    reference = manifest.get("reference", {}).get("base", {})
    parent = manifest.get("parent")
    return render(
        "report.html.j2",
        title=f"{run.path.name} · dpo-lora",
        name=run.path.name,
        path=str(run.path),
        status=status,
        ending=ending.of_run(run, status, manifest, settings, metrics),
        when=_when(manifest),
        purpose=shown(
            f"LoRA adapter for {reference.get('name', settings['model']['name'])}, by DPO on the pairs of "
            f"{settings['data']['name']}"
        ),
        after=after,
        baselines=evaluation and evaluation["baselines"],
        level=f"{100 * settings['eval']['confidence']:g} %",
        samples_summary=evaluation and evaluation.get("samples"),
        findings=diagnosis.of_run(run),
        training=figures.training(metrics, evaluation),
        heldout=figures.heldout([row for row in scored if after and row["step"] == after["step"]], after),
        samples=answers.of_run(run),
        judge=_judged(run),
        regression=_regressed(run),
        data=pairs.of_run(run, manifest),
        settings=facts.settings(settings, defaults()),
        command=shlex.join(manifest.get("command", [])),
        parent=parent and {"name": parent["name"], "link": safe_link(parent["link"])},
        version=manifest.get("version"),
        tracker=safe_link(manifest.get("tracker", {}).get("url") or ""),
        environment=facts.rows(_environment(manifest)),
    )


def _read(file: Path) -> dict[str, Any] | None:
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None


def _judged(run: RunDir) -> dict[str, Any] | None:
    """The judge's win rate with who was judged; None where no prompt has a verdict."""
    found = _read(run.judge_file)
    if found is None or found["win_rate"] is None:
        return None
    against = "its reference" if len(found["runs"]) == 1 else found["runs"][0]
    return {**found, "against": shown(against, 200), "model": shown(found["model"], 200)}


def _regressed(run: RunDir) -> dict[str, Any] | None:
    found = _read(run.regress_file)
    return found and {**found, "says": terminal.regression_verdict(found["rows"])}


def _when(manifest: dict[str, Any]) -> str:
    seconds = manifest.get("timings", {}).get("total_seconds")
    return manifest.get("started", "") + (f" · {duration(seconds)}" if seconds is not None else "")


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, hours = whole // 60, whole // 3600
    return f"{minutes} min {whole % 60} s" if hours == 0 else f"{hours} h {minutes % 60} min"


def seconds_between(manifest: dict[str, Any]) -> float | None:
    """From start to end; None while it runs."""
    if "ended" not in manifest:
        return None
    return (datetime.fromisoformat(manifest["ended"]) - datetime.fromisoformat(manifest["started"])).total_seconds()


def _environment(manifest: dict[str, Any]) -> dict[str, Any]:
    git = manifest.get("git") or {}
    named = ("compute", "machine", "packages", "training", "timings", "settings_fingerprint", "reference")
    return {
        **{name: manifest[name] for name in named if name in manifest},
        **({"git": {"commit": git["commit"], "uncommitted changes": git["dirty"]}} if git else {}),
    }
