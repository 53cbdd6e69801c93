"""The commands of the command table that measure: score, compare, judge, regress."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from dpo_lora.cli_adapters import Outputs, Run


def add(app: typer.Typer) -> None:
    """Put them into the table."""
    for command in (score, compare, judge, regress):
        app.command()(command)


def score(
    target: Annotated[str, typer.Argument(help="A run, an adapter (folder or hub id), or a whole model.")],
    data: Annotated[
        str | None, typer.Option(help="A file of pairs or a data preset (default: the run's held-out pairs).")
    ] = None,
    reference: Annotated[str | None, typer.Option(help="Base of an adapter, or reference of a whole model.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for eval.json and eval_pairs.jsonl.")] = None,
    outputs: Outputs = Path("outputs"),
) -> None:
    """Score an adapter exactly, on its own held-out pairs or on any others."""
    from dpo_lora.evaluation import commands

    commands.score(target, data, reference, out, outputs)


def compare(
    runs: Annotated[list[str], typer.Argument(help="Two or more runs; each is compared with the first.")],
    json_: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    outputs: Outputs = Path("outputs"),
) -> None:
    """Compare runs pair by pair on the held-out pairs that they share."""
    from dpo_lora.evaluation import commands

    commands.compare(runs, json_, outputs)


def judge(
    runs: Annotated[list[str], typer.Argument(help="One run: reference against policy. Two: first against second.")],
    model: Annotated[str | None, typer.Option(help="The judge's name at the endpoint.")] = None,
    base_url: Annotated[
        str | None, typer.Option(envvar="OPENAI_BASE_URL", help="The endpoint, up to and including /v1.")
    ] = None,
    local: Annotated[
        str | None, typer.Option(help="Instead: a reward or chat model here, as a folder or hub id.")
    ] = None,
    cost: Annotated[bool, typer.Option("--cost", help="Say what it would ask, and ask nothing.")] = False,
    outputs: Outputs = Path("outputs"),
) -> None:
    """Win rate of answers by a chat model at an OpenAI-compatible endpoint, or by a model on this machine.

    An endpoint's key comes from OPENAI_API_KEY.
    """
    from dpo_lora.evaluation import commands

    commands.judge(runs, model, base_url, os.environ.get("OPENAI_API_KEY"), local, cost, outputs)


def regress(
    run: Run,
    tasks: Annotated[str, typer.Option(help="Names of lm-evaluation-harness, with commas between.")],
    include: Annotated[Path | None, typer.Option(help="A folder with task files of your own.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first N documents of each task.")] = None,
    fewshot: Annotated[
        int | None, typer.Option(min=0, help="Few-shot examples per document (default: the task's).")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Documents at a time.")] = 8,
    chat_template: Annotated[bool, typer.Option(help="Wrap prompts in the chat template.")] = False,
    outputs: Outputs = Path("outputs"),
) -> None:
    """Ask base and adapter the same benchmark tasks: did the model unlearn something?"""
    from dpo_lora.evaluation import commands
    from dpo_lora.evaluation.regression import Questions

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    folder = None if include is None else str(include)
    commands.regress(run, Questions(names, folder, limit, fewshot, batch, chat_template), outputs)
