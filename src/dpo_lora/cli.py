"""The command table. Imports nothing heavy: help and a mistyped override answer in under a second."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpo_lora import __version__, cli_adapters, cli_evaluation
from dpo_lora.cli_adapters import Outputs, Run
from dpo_lora.cli_cache import cache
from dpo_lora.errors import UserError
from dpo_lora.provenance import record_command

if TYPE_CHECKING:
    from dpo_lora.rundir import RunDir

app = typer.Typer(
    name="dpo-lora",
    help="DPO training of LoRA adapters: from preference pairs to a measured adapter.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(cache, name="cache")
for command in (cli_adapters.chat, cli_adapters.merge, cli_adapters.push):
    app.command()(command)


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train() -> None:
    """Train an adapter: dpo-lora train [GROUP=PRESET] [NAME=VALUE] [-m]. Its own --help lists every setting."""
    raise AssertionError("__main__ hands 'train' to Hydra before the command table is asked")


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def plan() -> None:
    """Say what a sweep would do before it starts: dpo-lora plan -m [NAME=VALUE,VALUE ...], as for train."""
    raise AssertionError("__main__ hands 'plan' to Hydra before the command table is asked")


@app.command()
def lint(
    overrides: Annotated[list[str] | None, typer.Argument(help="As for train: GROUP=PRESET NAME=VALUE ...")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the report here as well.")] = None,
    show: Annotated[int, typer.Option(min=0, help="Print this many pairs as the trainer sees them.")] = 0,
    config_dir: Annotated[Path | None, typer.Option(help="A folder of your own presets.")] = None,
) -> None:
    """Look for faults in preference pairs, and train nothing; exits with 2 where training would refuse."""
    from rich.console import Console

    from dpo_lora import composition, lifecycle

    settings = composition.compose(overrides or [], config_dir)
    console = Console()
    with lifecycle.terminal_log(Console(stderr=True)):
        from dpo_lora.preferences.lint import command

        if not command.lint(settings, console, json, show):
            sys.exit(2)


@app.command()
def resume(
    run: Run,
    changes: Annotated[
        list[str] | None, typer.Argument(help="A sweep: how it goes on, sweep.NAME=VALUE ... (slots, trial_timeout).")
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="A sweep: run its failed trials again, too.")] = False,
    outputs: Outputs = Path("outputs"),
) -> None:
    """Continue an interrupted or failed run from its last whole checkpoint, or a sweep where it stopped."""
    from dpo_lora import rundir
    from dpo_lora.sweeps import directory, status

    if run == "latest":
        run = str(directory.find_unfinished(outputs, retry=retry))
    if (sweep := directory.find(run, outputs)) is not None:
        from dpo_lora.train import main as train_main

        train_main(status.command_again(sweep, retry=retry, changes=changes or []))
        return
    if changes:
        raise UserError(
            f"{changes[0]}: a run goes on with the settings it began with. For others start a new one with "
            "'dpo-lora train'; with parent=RUN it begins from this one's adapter."
        )
    found = rundir.find(run, outputs)
    if found.status() == rundir.FINISHED:
        typer.echo(f"{found.path} has finished; there is nothing to resume.", err=True)
    elif found.is_live():
        raise UserError(f"{found.path} is running now, in another process.")
    else:
        if retry:
            typer.echo("--retry has no effect: this is a single run, not a sweep with failed trials.", err=True)
        _go_on(found)
    typer.echo(found.path)


def _go_on(run: RunDir) -> None:
    """Train ``run`` to its end, by the settings and in the folder that it began with."""
    from dpo_lora import settings
    from dpo_lora.train import train as start

    manifest, values = run.manifest(), run.settings()
    if added := settings.added_since(values):
        before = manifest.get("packages", {}).get("dpo-lora", "an earlier version")
        commit = (manifest.get("git") or {}).get("commit")
        raise UserError(
            f"{run.path} was begun by dpo-lora {before}{f' (commit {commit[:12]})' if commit else ''}, which had no "
            f"setting {', '.join(added)}; this is {__version__}, and the rest of the run might be computed otherwise. "
            "Resume it with that version, or start a new run with 'dpo-lora train'."
        )
    folder = Path(manifest.get("cwd", Path.cwd()))
    if not folder.is_dir():
        typer.echo(f"The run was started in {folder}, which is gone: relative paths are looked for here.", err=True)
    elif folder.resolve() != Path.cwd():
        typer.echo(f"Working in {folder}, where the run was started.", err=True)
    in_sweep = any((run.path.parent / name).is_file() for name in ("sweep.json", "multirun.yaml"))
    with run.in_its_folder():
        start(settings.from_plain(values), resume=run.path, sweep=run.path.parent if in_sweep else None)


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


cli_evaluation.add(app)


@app.command()
def report(
    target: Annotated[str, typer.Argument(help="A run, a sweep, or a folder of runs such as 'outputs'.")] = "latest",
    outputs: Outputs = Path("outputs"),
) -> None:
    """Write a run's or a sweep's report.html, or the index.html of a folder of runs; says what a run's numbers say."""
    from rich.console import Console

    from dpo_lora import rundir
    from dpo_lora.evaluation import diagnosis
    from dpo_lora.reports import index, sweep, terminal
    from dpo_lora.reports import report as room
    from dpo_lora.sweeps import directory

    if target != "latest" and (found_sweep := directory.find(target, outputs)) is not None:
        typer.echo(sweep.write(found_sweep.path))
        return
    if Path(target).is_dir() and not (Path(target) / "run.json").is_file():
        typer.echo(index.write(Path(target)))
        return
    found = rundir.find(target, outputs)
    room.write(found)
    terminal.show_findings(Console(stderr=True), diagnosis.of_run(found))
    typer.echo(found.report_file)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def run_table() -> None:
    """Every command but train and plan; a user's mistake exits with 2 and one message."""
    record_command(*sys.argv[1:])
    try:
        app()
    except UserError as error:
        typer.echo(f"dpo-lora: {error}", err=True)
        sys.exit(2)


def complete(arguments: list[str]) -> None:
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
