"""Did the model unlearn something? Tasks of lm-evaluation-harness, base against adapter, document by document."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from dpo_lora.adapters import loading
from dpo_lora.errors import UserError, nearest
from dpo_lora.evaluation.statistics import paired
from dpo_lora.rundir import RunDir

SIDES = ("base", "adapter")
Results = dict[str, Any]


@dataclass(frozen=True)
class Questions:
    """What both sides are asked, in the harness' own terms."""

    tasks: list[str]
    folder: str | None  # further task files
    limit: int | None  # documents a task, from the first; None: all
    fewshot: int | None  # None: as each task says
    batch: int  # documents at a time
    chat_template: bool  # put the documents as user turns


def regress(run: RunDir, questions: Questions, confidence: float) -> dict[str, Any]:
    """Every figure of the tasks for the base and for the run's adapter, and their paired differences.

    Args:
        confidence: of all intervals together: each is wider where there are several (Bonferroni).

    Raises:
        UserError: the harness is missing, a task is unknown or cannot be loaded, or the run has no adapter.
    """
    harness = _harness()
    manager = harness.tasks.TaskManager(include_path=questions.folder)
    known = set(manager.all_tasks)
    for name in questions.tasks:
        if name not in known:
            where = "" if questions.folder is None else f" and none in {questions.folder}"
            raise UserError(f"--tasks {name}: no such task in the harness{where}.{nearest(name, sorted(known))}")
    policy, tokenizer = loading.load(run)
    found = {"adapter": _ask(harness, policy, tokenizer, questions, manager)}
    with policy.disable_adapter():
        found["base"] = _ask(harness, policy, tokenizer, questions, manager)
    return {
        "harness": version("lm_eval"),
        "questions": asdict(questions),
        "confidence": confidence,
        "rows": _rows(found, confidence),
    }


def _harness() -> Any:
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("dpo-lora regress needs lm-evaluation-harness: pip install 'dpo-lora[regress]'.")
    import lm_eval
    import lm_eval.models.huggingface
    import lm_eval.tasks

    # It tells every request and every default at the level of a warning.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return lm_eval


def _ask(harness: Any, model: Any, tokenizer: Any, questions: Questions, manager: Any) -> Results:
    wrapped = harness.models.huggingface.HFLM(
        pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=questions.batch
    )
    try:
        return dict(
            harness.simple_evaluate(
                model=wrapped,
                tasks=list(questions.tasks),
                num_fewshot=questions.fewshot,
                limit=questions.limit,
                apply_chat_template=questions.chat_template,
                task_manager=manager,
                bootstrap_iters=1000,
                log_samples=True,
            )
        )
    except (OSError, ValueError, ConnectionError) as error:
        names = ", ".join(questions.tasks)
        raise UserError(
            f"The harness could not run {names}: {str(error).splitlines()[0]} Tasks fetch their data from the hub; "
            "without a network, give task files whose data lie on this machine with --include FOLDER."
        ) from error


def _rows(found: dict[str, Results], confidence: float) -> list[dict[str, Any]]:
    """One row a task, filter and figure."""
    places = list(_places(found["base"]))
    # With several figures one of them would look significant by chance.
    shared = 1 - (1 - confidence) / max(1, len(places))
    return [_row(found, task, rule, figure, shared) for task, rule, figure in places]


def _places(results: Results) -> Iterator[tuple[str, str, str]]:
    for task in sorted(results["samples"]):
        for name in results["results"][task]:
            figure, _, rule = name.partition(",")
            if rule and not figure.endswith("_stderr"):
                yield task, rule, figure


def _row(found: dict[str, Results], task: str, rule: str, figure: str, confidence: float) -> dict[str, Any]:
    better_up = found["base"]["higher_is_better"].get(task, {}).get(figure)
    row: dict[str, Any] = {"task": task, "filter": rule, "figure": figure, "higher_is_better": better_up}
    for side in SIDES:
        values = found[side]["results"][task]
        error = values.get(f"{figure}_stderr,{rule}")
        row[side] = float(values[f"{figure},{rule}"])
        row[f"{side}_error"] = float(error) if isinstance(error, int | float) else None
    by_side = [_by_document(found[side]["samples"][task], rule, figure) for side in SIDES]
    documents = sorted(set(by_side[0]) & set(by_side[1]))
    row["documents"] = len(documents)
    if not documents or len(documents) < len(by_side[0]):
        return {**row, "paired": None}  # a figure of the whole task, such as a perplexity: no value a document
    sign = -1.0 if better_up is False else 1.0
    gains = sign * np.asarray([by_side[1][d] - by_side[0][d] for d in documents], dtype=np.float64)
    return {**row, "paired": paired(gains, [str(d) for d in documents], confidence)}


def _by_document(samples: list[dict[str, Any]], rule: str, figure: str) -> dict[int, float]:
    """The figure of each document; empty where it has none of its own."""
    mine = [sample for sample in samples if sample["filter"] == rule]
    return {s["doc_id"]: float(s[figure]) for s in mine if isinstance(s.get(figure), int | float | np.number)}
