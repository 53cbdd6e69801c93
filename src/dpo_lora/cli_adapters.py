"""Commands for a finished adapter: ``dpo-lora chat``, ``merge`` and ``push``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

Run = Annotated[str, typer.Argument(help="A run's directory, its name in the outputs folder, or 'latest'.")]
Outputs = Annotated[Path, typer.Option(help="Folder that runs are written into.")]


def chat(
    run: Run = "latest",
    prompt: Annotated[str | None, typer.Option(help="Ask this once and leave; without it, a conversation.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    outputs: Outputs = Path("outputs"),
) -> None:
    """Talk to a trained adapter."""
    from dpo_lora import rundir
    from dpo_lora.adapters import chat as room

    found = rundir.find(run, outputs)
    questions = iter([prompt]) if prompt is not None else _typed()
    for reply in room.converse(found, questions, max_new_tokens):
        typer.echo(reply)


def merge(
    run: Run,
    folder: Annotated[Path, typer.Argument(help="Where to write the model; made, never overwritten.")],
    outputs: Outputs = Path("outputs"),
) -> None:
    """Write base model and adapter as one model that needs no PEFT."""
    from dpo_lora import rundir
    from dpo_lora.adapters import merge as room

    room.merge(rundir.find(run, outputs), folder)
    typer.echo(folder)


def push(
    run: Run,
    hub_id: Annotated[str, typer.Argument(help="OWNER/NAME on the Hugging Face hub; made if it is not there.")],
    base: Annotated[str | None, typer.Option(help="Hub id of the base model, where the run's was a folder.")] = None,
    public: Annotated[bool, typer.Option("--public", help="If the repository is new, make it public.")] = False,
    outputs: Outputs = Path("outputs"),
) -> None:
    """Publish an adapter with its card and exact scores; private unless told otherwise."""
    from dpo_lora import rundir
    from dpo_lora.adapters import push as room

    typer.echo(room.push(rundir.find(run, outputs), hub_id, base=base, public=public))


def _typed() -> Iterator[str]:
    typer.echo("Ask something; an empty line ends.", err=True)
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            return
        if not question:
            return
        yield question
