"""The pairs a run was given: where they came from, what became of each, what lint found."""

from __future__ import annotations

import json
from typing import Any

from dpo_lora.reports.pages import shown
from dpo_lora.rundir import RunDir

_TEXT = 400  # characters of an example


def of_run(run: RunDir, manifest: dict[str, Any]) -> dict[str, Any] | None:
    """What the page says of the data; None where the run stopped before it had read any."""
    if not run.lint_file.exists():
        return None
    lint = json.loads(run.lint_file.read_text(encoding="utf-8"))
    data = manifest.get("data", {})  # not there yet where the pairs themselves were refused
    used = lint["used"]
    return {
        "pairs": lint["pairs"],
        "prompts": lint["prompts"],
        "train": used["train"],
        "heldout": used["heldout"],
        "left_out": lint["left_out"],
        "not_drawn": lint["pairs"] - used["train"] - used["heldout"] - lint["left_out"],
        "dropped": [(f["kind"], f["left_out"]) for f in lint["findings"] if f.get("left_out")],
        "counts": lint["counts"],
        "findings": [_finding(finding) for finding in lint["findings"]],
        "lengths": {
            name: lint["lengths"][name] for name in ("prompt", "chosen", "rejected") if name in lint["lengths"]
        },
        "longer_wins": lint["lengths"]["longer_wins"],
        "sources": _sources(lint["sources"], data.get("sources", [])),
        "fingerprints": [
            (f"{part}, {of}", data[part][key])
            for part in ("train", "heldout")
            for key, of in (("rows", "as written"), ("tokens", "as tokens"))
            if part in data
        ],
    }


def _finding(finding: dict[str, Any]) -> dict[str, Any]:
    examples = [{name: shown(text, _TEXT) for name, text in example.items()} for example in finding["examples"]]
    return {**finding, "examples": examples}


def _sources(judged: list[dict[str, Any]], read: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a source: what lint counted, with where it was read from."""
    known = {source["name"]: source for source in read}
    return [{**source, "name": shown(source["name"], 200), **_read(known.get(source["name"]))} for source in judged]


def _read(source: dict[str, Any] | None) -> dict[str, Any]:
    if source is None:
        return {"path": "", "rows": None, "passed_over": ""}
    names = {"filtered": "by data.filter", "other_split": "of other splits", "no_pair": "without a pair"}
    commit = source["commit"] or source["revision"]
    return {
        "path": shown(source["path"] + (f" at {commit}" if commit else ""), 300),
        "rows": source["rows"],
        "passed_over": ", ".join(f"{source[name]} {why}" for name, why in names.items() if source[name]),
    }
