"""The commands that score and compare: run the evaluation room, print its figures, keep them where asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from dpo_lora import rundir
from dpo_lora.errors import UserError
from dpo_lora.evaluation import comparison
from dpo_lora.reports import terminal
from dpo_lora.rundir import RunDir

if TYPE_CHECKING:
    from dpo_lora.evaluation.judge import Judge
    from dpo_lora.evaluation.regression import Questions


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


def judge(
    names: list[str],
    model: str | None,
    base_url: str | None,
    key: str | None,
    local: str | None,
    only_cost: bool,
    outputs: Path,
) -> None:
    """``dpo-lora judge``: cost first, then verdicts, each kept in the (second) run's verdicts.jsonl.

    Raises:
        UserError: more than two runs, no judge or two of them, or an endpoint that refuses.
    """
    from dpo_lora.evaluation import judge as room
    from dpo_lora.evaluation.duels import duels

    if not 1 <= len(names) <= 2:
        raise UserError("Name one run (its reference against its policy) or two (the first against the second).")
    runs = [rundir.find(name, outputs) for name in names]
    found, verdicts = duels(runs), runs[-1].verdicts_file
    chosen = _judge(runs[-1], model, base_url, key, local)
    console = Console()
    cost = room.estimate(found, chosen, verdicts)
    console.print(
        f"{cost['questions']} questions to {chosen.model}, about {cost['prompt_tokens']} prompt and at most "
        f"{cost['completion_tokens']} reply tokens.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    if only_cost:
        return
    rows = list(room.judge(found, chosen, verdicts))
    summary = room.summary(rows, float(runs[-1].settings()["eval"]["confidence"]))
    rundir.write_json(runs[-1].judge_file, {"model": chosen.model, "runs": [r.path.name for r in runs], **summary})
    terminal.show_verdicts(console, [r.path.name for r in runs], summary)


def _judge(run: RunDir, model: str | None, base_url: str | None, key: str | None, local: str | None) -> Judge:
    from dpo_lora.evaluation.endpoint import Endpoint
    from dpo_lora.evaluation.judge import ChatJudge

    if local is not None:
        if model is not None:
            raise UserError("Name one judge: --model at an endpoint, or --local FOLDER on this machine.")
        from dpo_lora import device, lifecycle, settings
        from dpo_lora.evaluation import local_judge

        lifecycle.quiet_libraries()
        run_settings = settings.from_plain(run.settings())
        return local_judge.load(local, device.choose(device.for_use(run_settings.train), run_settings.seed))
    if model is None or base_url is None:
        raise UserError(
            "Name a judge: --model NAME --base-url URL (or OPENAI_BASE_URL) for an endpoint, or --local FOLDER for a "
            "reward or chat model on this machine."
        )
    return ChatJudge(Endpoint(base_url, model, key))


def regress(name: str, questions: Questions, outputs: Path) -> None:
    """``dpo-lora regress``: a table to the terminal, all of it into the run's regress.json.

    Raises:
        UserError: the harness or a task is missing, or the run has no adapter.
    """
    from dpo_lora.evaluation import regression
    from dpo_lora.lifecycle import quiet_libraries

    quiet_libraries()
    run = rundir.find(name, outputs)
    found = regression.regress(run, questions, float(run.settings()["eval"]["confidence"]))
    rundir.write_json(run.regress_file, found)
    terminal.show_regression(Console(), run.path.name, found)
