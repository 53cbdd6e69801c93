"""The commands that score and compare: run the evaluation room, print its figures, keep them where asked."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from dpo_lora import rundir
from dpo_lora.errors import UserError
from dpo_lora.evaluation import comparison
from dpo_lora.reports import terminal


def score(target: str, data: str | None, reference: str | None, out: Path | None, outputs: Path) -> None:
    """``dpo-lora score``: figures to the terminal and, with ``out``, figures and pairs to that folder."""
    from dpo_lora.evaluation import figures, scoring  # torch takes seconds to import; a typo must not wait
    from dpo_lora.lifecycle import quiet_libraries

    quiet_libraries()
    scores, run = scoring.score(target, data, reference, outputs)
    confidence = run.eval.confidence
    found = figures.figures(scores, run.dpo.beta, confidence)
    longer = figures.baselines(scores, confidence)
    terminal.show_scores(Console(), f"{target} on {data or 'its held-out pairs'}", found, longer, _level(confidence))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        rundir.write_json(
            out / "eval.json",
            {"confidence": confidence, "beta": run.dpo.beta, "target": target, "after": found, "baselines": longer},
        )
        (out / "eval_pairs.jsonl").unlink(missing_ok=True)
        rundir.append_jsonl(out / "eval_pairs.jsonl", scores.rows(run.dpo.beta))


def compare(names: list[str], as_json: bool, outputs: Path) -> None:
    """``dpo-lora compare``: each run against the first.

    Raises:
        UserError: fewer than two runs, or runs without common pairs.
    """
    if len(names) < 2:
        raise UserError("Name two runs or more: dpo-lora compare RUN RUN.")
    runs = [rundir.find(name, outputs) for name in names]
    confidence = float(runs[0].settings()["eval"]["confidence"])
    # Bonferroni: with several comparisons one of them would look significant by chance.
    shared = 1 - (1 - confidence) / (len(runs) - 1)
    found = [comparison.compare(runs[0], other, shared) for other in runs[1:]]
    settings = comparison.differing_settings(runs)
    if as_json:
        print(json.dumps({"runs": [str(run.path) for run in runs], "comparisons": found, "settings": settings}))  # noqa: T201
        return
    console = Console()
    for other, comparison_ in zip(runs[1:], found, strict=True):
        terminal.show_comparison(console, runs[0].path.name, other.path.name, comparison_)
        console.print()
    terminal.show_settings(console, [run.path.name for run in runs], settings)


def _level(confidence: float) -> str:
    return f"{100 * confidence:g} %"
