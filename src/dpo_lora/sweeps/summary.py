"""What a sweep has come to, read from its trials' directories: sweep.json, trials.csv and the link ``best``."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from collections import Counter
from dataclasses import asdict
from typing import Any

from dpo_lora.files import read_jsonl, write_atomic
from dpo_lora.rundir import FAILED, FINISHED, RUNNING
from dpo_lora.sweeps import endings
from dpo_lora.sweeps.directory import SweepDir
from dpo_lora.sweeps.trial import Trial, read_all

# Columns of trials.csv between the varied settings and the figures.
_FIGURES = (
    "accuracy", "accuracy_low", "accuracy_high", "margin", "loss", "steps", "pairs", "tokens",
    "tokens_per_second", "peak_memory_bytes", "seconds", "accuracy_length_controlled", "brier", "calibration_error",
)  # fmt: skip


def build(sweep: SweepDir, objectives: list[str], confidence: float, *, live: bool) -> dict[str, Any]:
    """The summary of every trial that lies in the sweep's directory.

    Args:
        objectives: the first one ranks.
        live: whether the sweep's process is running.
    """
    from dpo_lora.sweeps import ranking  # and numpy, for which no trial need wait

    trials = read_all(sweep.path)
    rows = [row(trial, live=live) for trial in trials]
    by_status = Counter(r["status"] for r in rows)
    finished = [trial for trial, r in zip(trials, rows, strict=True) if r["status"] == FINISHED]
    scores = [score for trial in finished if (score := ranking.score(trial, objectives[0]))]
    ranked = ranking.rank(scores, objectives[0], confidence)
    return {
        "objectives": objectives,
        "confidence": confidence,
        "varies": varies(trials),
        "counts": dict(sorted(by_status.items())),
        "best": ranked[0].trials[0] if ranked else None,
        "ranking": [asdict(r) for r in ranked],
        "trials": rows,
    }


def varies(trials: list[Trial]) -> list[str]:
    """Names of the varied settings, in the order of the first trial that has them."""
    return list(dict.fromkeys(name for trial in trials for name in trial.varied))


def row(trial: Trial, *, live: bool) -> dict[str, Any]:
    """One trial's facts: what it is, what became of it, how far it came, what it scored."""
    status = trial.status(live=live)
    ended = trial.outcome()
    facts: dict[str, Any] = {
        "id": trial.id,
        "setting": trial.setting,
        "seed": trial.seed,
        "varied": trial.varied,
        "status": status,
        "reason": ended.reason if ended and status not in (FINISHED, RUNNING) else None,
        "progress": progress(trial),
    }
    if status == FAILED:
        facts["log"] = ended.log if ended else endings.last_lines(trial.output_file)
    if status == FINISHED:
        facts["figures"] = figures(trial)
    return facts


def figures(trial: Trial) -> dict[str, Any]:
    """Scores and costs of a finished trial; None where a figure does not exist."""
    run = trial.run
    after = json.loads(run.eval_file.read_text(encoding="utf-8"))["after"]
    manifest = run.manifest()
    low, high = after["accuracy_interval"]
    known = {**after, **manifest["training"], "accuracy_low": low, "accuracy_high": high}
    timings = manifest["timings"]
    known["seconds"] = timings["training_seconds"]  # as the objective of this name
    return {**{name: known[name] for name in _FIGURES if name in known}, "total_seconds": timings["total_seconds"]}


def progress(trial: Trial) -> dict[str, Any]:
    """Step, steps in all, loss and held-out accuracy as metrics.jsonl last told them; None where it has not."""
    seen: dict[str, Any] = {"step": None, "steps": None, "loss": None, "accuracy": None}
    if not trial.run.metrics_file.exists():
        return seen
    for line in read_jsonl(trial.run.metrics_file):
        seen["step"] = line["step"]
        seen["loss"] = line.get("loss", seen["loss"])
        seen["accuracy"] = line.get("eval/accuracy", seen["accuracy"])
        if line["step"] and line.get("epoch"):
            train = trial.settings["train"]
            seen["steps"] = train["max_steps"] or round(train["epochs"] * line["step"] / line["epoch"])
    return seen


def write(sweep: SweepDir, facts: dict[str, Any]) -> dict[str, Any]:
    """Bring sweep.json, trials.csv and ``best`` up to date; returns the summary as written."""
    summary = {**sweep.summary(), **facts}
    sweep.write(summary)
    write_atomic(sweep.table_file, _csv(summary))
    _point_best(sweep, summary.get("best"))
    return summary


def table_rows(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a trial: its settings that vary, its status, its figures; None where it has none."""
    rows = []
    for line in summary["trials"]:
        known = line.get("figures", {})
        varied = {name: line["varied"].get(name) for name in summary["varies"]}
        measured = {name: known.get(name) for name in _FIGURES}
        rows.append(
            {
                "trial": line["id"],
                **varied,
                "seed": line["seed"],
                "status": line["status"],
                **measured,
                "reason": line["reason"],
            }
        )
    return rows


def _csv(summary: dict[str, Any]) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["trial", *summary["varies"], "seed", "status", *_FIGURES, "reason"])
    table.writerows(["" if v is None else v for v in row.values()] for row in table_rows(summary))
    return text.getvalue()


def _point_best(sweep: SweepDir, best: str | None) -> None:
    if best is None:
        return
    temporary = sweep.path / f".best-{os.getpid()}"
    with contextlib.suppress(OSError):  # a file system without links: sweep.json names the best as well
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(best)
        temporary.replace(sweep.path / "best")
