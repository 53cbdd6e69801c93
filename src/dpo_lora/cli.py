"""The command table. Imports nothing heavy: help and a mistyped override answer in under a second."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from dpo_lora import __version__
from dpo_lora.errors import UserError
from dpo_lora.provenance import record_command

app = typer.Typer(
    name="dpo-lora",
    help="DPO training of LoRA adapters: from preference pairs to a proven adapter.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Run = Annotated[str, typer.Argument(help="A run's directory, its name in the outputs folder, or 'latest'.")]
Outputs = Annotated[Path, typer.Option(help="Folder that runs are written into.")]


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train() -> None:
    """Train an adapter: dpo-lora train [GROUP=PRESET] [NAME=VALUE] [-m]. Its own --help lists every setting."""
    raise AssertionError("main() hands 'train' to Hydra before the command table is asked")


@app.command()
def resume(
    run: Run,
    retry: Annotated[bool, typer.Option("--retry", help="A sweep: run its failed trials again, too.")] = False,
    outputs: Outputs = Path("outputs"),
) -> None:
    """Continue an interrupted or failed run from its last whole checkpoint, or a sweep where it stopped."""
    from dpo_lora import rundir
    from dpo_lora.settings import from_plain
    from dpo_lora.sweeps import directory, status

    if run != "latest" and (sweep := directory.find(run, outputs)) is not None:
        from dpo_lora.train import main as train_main

        train_main(status.command_again(sweep, retry=retry))
        return
    found = rundir.find(run, outputs)
    status = found.status()
    if status == rundir.FINISHED:
        typer.echo(f"{found.path} has finished; there is nothing to resume.", err=True)
    elif found.is_live():
        raise UserError(f"{found.path} is running now, in another process.")
    else:
        from dpo_lora.train import train as start

        in_sweep = any((found.path.parent / name).is_file() for name in ("sweep.json", "multirun.yaml"))
        start(from_plain(found.settings()), resume=found.path, sweep=found.path.parent if in_sweep else None)
    typer.echo(found.path)


@app.command()
def status(
    sweep: Annotated[str, typer.Argument(help="A sweep's directory, its name in the outputs folder, or 'latest'.")],
    outputs: Outputs = Path("outputs"),
) -> None:
    """Say how a sweep stands, from any shell: trials, ranking, failures."""
    from dpo_lora.sweeps import directory
    from dpo_lora.sweeps import status as room

    found = directory.find(sweep, outputs)
    if found is None:
        raise UserError(f"{sweep} is no sweep: it has no sweep.json.")
    room.show(found)


@app.command()
def chat(
    run: Run = "latest",
    prompt: Annotated[str | None, typer.Option(help="Ask this once and leave; without it, a conversation.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    outputs: Outputs = Path("outputs"),
) -> None:
    """Talk to a trained adapter."""
    from dpo_lora import rundir
    from dpo_lora.adapters import chat as room

    found = rundir.find(run, outputs)
    questions = iter([prompt]) if prompt is not None else _typed()
    for reply in room.converse(found, questions, max_new_tokens):
        typer.echo(reply)


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


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    """Console script ``dpo-lora``."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["train"]:
        from dpo_lora.train import main as train_main

        train_main(arguments[1:])
    elif arguments[:1] and arguments[0] in ("-sc", "--shell-completion"):
        _complete(arguments)
    else:
        record_command(*arguments)
        try:
            app()
        except UserError as error:
            typer.echo(f"dpo-lora: {error}", err=True)
            sys.exit(2)


def _complete(arguments: list[str]) -> None:
    """Hydra's completion asks the program itself, without the word ``train``; answer for ``dpo-lora train``."""
    line = os.environ.get("COMP_LINE", "")
    program, _, rest = line.partition(" ")
    command, _, overrides = rest.lstrip().partition(" ")
    if line and command != "train":
        if "query=bash" in arguments:
            names = [name for c in app.registered_commands if (name := c.callback.__name__ if c.callback else "")]
            typer.echo("\n".join(name for name in names if name.startswith(command)))
        return
    if line:
        os.environ["COMP_LINE"] = f"{program} {overrides}"
        os.environ["COMP_POINT"] = str(len(os.environ["COMP_LINE"]))
    from dpo_lora.train import main as train_main

    train_main(arguments)
