"""What lint found, as plain values for lint.json and as text for people; and whether training may start."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import datasets
import numpy as np

from dpo_lora.errors import UserError
from dpo_lora.preferences.lint.judge import Judgement
from dpo_lora.preferences.lint.kinds import BIT, ERROR, NOTE, ROW_KINDS, SET_KINDS, WARNING, Kind
from dpo_lora.preferences.parts import HELDOUT, TRAIN
from dpo_lora.schema import DataSettings

_EXAMPLES = 3
_SHOWN = 24  # tokens of a text in an example
_MARRED_LEAST = 20  # pairs with just one marred side, below which their direction says nothing
_MARRED_SIGMAS = 3.3  # one in a thousand by chance


def report(judgement: Judgement, rows: datasets.Dataset, tokenizer: Any, data: DataSettings) -> dict[str, Any]:
    """All findings with counts, shares and examples, and the set's figures; JSON values only.

    Args:
        rows: every pair (prepare.SCHEMA), in the judgement's order.
    """
    total = len(judgement.faults)
    findings = []
    for kind in ROW_KINDS:
        hit = (judgement.faults & np.uint64(BIT[kind.name])) != 0
        count = int(np.count_nonzero(hit))
        if count:
            examples = [_example(rows[int(n)], tokenizer) for n in np.flatnonzero(hit)[:_EXAMPLES]]
            findings.append(
                {
                    **_finding(kind, count, count / total),
                    "train": int(np.count_nonzero(hit & (judgement.goes == TRAIN))),
                    "heldout": int(np.count_nonzero(hit & (judgement.goes == HELDOUT))),
                    "left_out": int(np.count_nonzero(hit & judgement.left_out)),
                    "examples": examples,
                }
            )
    figures = judgement.figures
    findings += list(_of_the_set(figures, data))
    order = {ERROR: 0, WARNING: 1, NOTE: 2}
    findings.sort(key=lambda f: (order[f["level"]], -f["count"]))
    return {
        "pairs": total,
        "used": {name: part["pairs"] for name, part in figures["parts"].items()},
        "left_out": int(np.count_nonzero(judgement.left_out)),
        "prompts": figures["prompts"],
        "counts": {level: sum(f["count"] for f in findings if f["level"] == level) for level in order},
        "findings": findings,
        "lengths": figures["lengths"],
        "sources": figures["sources"],
        "refusals": _refusals(findings, data),
    }


def _finding(kind: Kind, count: int, share: float) -> dict[str, Any]:
    return {
        "kind": kind.name,
        "level": kind.level,
        "title": kind.title,
        "advice": kind.advice,
        "count": count,
        "share": share,
    }


def _example(row: Mapping[str, Any], tokenizer: Any) -> dict[str, str]:
    return {
        "place": row["place"],
        "id": row["id"],
        "prompt": tokenizer.decode(row["prompt_ids"][-_SHOWN:]),
        "chosen": tokenizer.decode(row["chosen_ids"][:_SHOWN]),
        "rejected": tokenizer.decode(row["rejected_ids"][:_SHOWN]),
    }


def _of_the_set(figures: dict[str, Any], data: DataSettings) -> Iterator[dict[str, Any]]:
    length_bias, swapped, repeated = SET_KINDS
    wins = figures["lengths"]["longer_wins"]
    if wins["accuracy"] is not None:
        low, high = wins["interval"]
        beyond = max(wins["accuracy"], 1 - wins["accuracy"]) >= data.lint.length_bias
        if beyond and not low <= 0.5 <= high:
            yield {**_finding(length_bias, figures["parts"]["train"]["pairs"], 1.0), **wins, "examples": []}
    chosen, rejected = figures["marred"]["chosen_only"], figures["marred"]["rejected_only"]
    both = chosen + rejected
    if both >= _MARRED_LEAST and (chosen - rejected) / math.sqrt(both) > _MARRED_SIGMAS:
        yield {**_finding(swapped, chosen, chosen / both), **figures["marred"], "examples": []}
    if figures["repeated_ids"]:
        yield {**_finding(repeated, figures["repeated_ids"], 0.0), "examples": []}


def _refusals(findings: list[dict[str, Any]], data: DataSettings) -> list[str]:
    """Why training must not start: kinds that are over their limit and not named in data.drop."""
    found = []
    for finding in findings:
        limit = data.lint.limits.get(finding["kind"])
        if limit is not None and finding["share"] > limit and finding["kind"] not in data.drop:
            found.append(
                f"{finding['kind']}: {finding['count']} rows ({finding['share']:.1%}), more than "
                f"data.lint.limits.{finding['kind']}={limit:g} allows: {finding['title']}. {finding['advice']}"
                + "".join(f"\n    {e['place']} (id {e['id']})" for e in finding["examples"])
                + f"\n    To train without these rows: data.drop=[{finding['kind']}]"
            )
    return found


def refuse(found: dict[str, Any]) -> None:
    """Stop a training that its data does not allow.

    Raises:
        UserError: with every reason.
    """
    if found["refusals"]:
        raise UserError(
            "The pairs are not fit to train on:\n  " + "\n  ".join(found["refusals"]) + "\n'dpo-lora lint' with the "
            "same overrides shows all findings."
        )


def nothing_left(found: dict[str, Any], data: DataSettings) -> list[str]:
    """Why training must not start where no pair is left to train on, or none to score."""
    told = ", ".join(f"{f['kind']} {f['count']}" for f in found["findings"] if f.get("left_out"))
    return [
        f"{data.path or data.name} leaves no {name} pairs of {found['pairs']} "
        f"(left out: {told or 'none'}). Give more rows, another data.heldout_share, or a file of held-out "
        "pairs (data.heldout_path)."
        for name, pairs in found["used"].items()
        if not pairs
    ]


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """For run.json: counts by level and by kind; lint.json has the rest."""
    return {
        "counts": found["counts"],
        "findings": {f["kind"]: f["count"] for f in found["findings"]},
        "left_out": {f["kind"]: f["left_out"] for f in found["findings"] if f.get("left_out")},
        "longer_wins": found["lengths"]["longer_wins"],
    }


_MARKS = {ERROR: "error  ", WARNING: "warning", NOTE: "note   "}


def brief(found: dict[str, Any]) -> list[str]:
    """One line a finding, for the log at the start of training."""
    return [
        f"{_MARKS[f['level']]} {f['kind']}: {f['count']} ({f['share']:.1%}) {f['title']}"
        + (f" e.g. {f['examples'][0]['place']}" if f["examples"] else "")
        for f in found["findings"]
    ]


def lines(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(style, line) of the whole report, for a terminal."""
    used, counts = found["used"], found["counts"]
    parts = f"{used['train']} to train on, {used['heldout']} held out, {found['left_out']} left out."
    yield "bold", f"{found['pairs']} pairs on {found['prompts']} prompts: {parts}"
    yield "", f"{counts[ERROR]} errors, {counts[WARNING]} warnings, {counts[NOTE]} notes."
    styles = {ERROR: "red", WARNING: "yellow", NOTE: "cyan"}
    for f in found["findings"]:
        out = f", {f['left_out']} left out" if f.get("left_out") else ""
        yield styles[f["level"]], f"\n{f['level']} {f['kind']}: {f['count']} ({f['share']:.1%}{out})"
        yield "", f"  {f['title']}"
        for example in f["examples"]:
            yield "dim", f"  {example['place']} (id {example['id']})"
            shown = (example["prompt"][-60:], example["chosen"][:60], example["rejected"][:60])
            yield "dim", "    ...{!r} + {!r} / {!r}".format(*shown)
        yield "", f"  -> {f['advice']}"
    yield from _figures(found)


def _figures(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    lengths = found["lengths"]
    wins = lengths["longer_wins"]
    if wins["accuracy"] is not None:
        low, high = wins["interval"]
        says = f"\nPicking the longer answer is right in {wins['accuracy']:.3f} [{low:.3f}, {high:.3f}] of the"
        yield "", f"{says} training pairs; log length correlates {wins['correlation']:+.3f} with being chosen."
    for name in ("prompt", "chosen", "rejected"):
        if name in lengths:
            marks = ", ".join(f"{k} {v}" for k, v in lengths[name].items())
            yield "", f"Tokens of {name}: {marks}"
    for source in found["sources"]:
        longer = "" if source["longer_wins"] is None else f", longer wins {source['longer_wins']:.3f}"
        yield (
            "",
            (
                f"Source {source['name']}: {source['pairs']} pairs, {source['errors']} with errors; {source['train']} "
                f"({source['train_share']:.1%}) of the training pairs{longer}"
            ),
        )
    for refusal in found["refusals"]:
        yield "red", f"\nTraining refuses. {refusal}"
