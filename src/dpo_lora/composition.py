"""What Hydra does for us: compose, sweep, and say where a run goes. The only user of its API besides train.py."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import hydra
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpo_lora import usage
from dpo_lora.errors import UserError
from dpo_lora.files import write_atomic
from dpo_lora.preferences.parts import parts
from dpo_lora.provenance import record_command
from dpo_lora.resources import conf_dir, missing_folder
from dpo_lora.schema import RunSettings
from dpo_lora.settings import fingerprint, from_hydra, from_plain, plain, register_schema
from dpo_lora.typos import check_names, explain

if TYPE_CHECKING:
    from dpo_lora.rundir import RunDir


@dataclass(frozen=True)
class Place:
    """Where Hydra puts the job at hand. ``trial`` and ``sweep`` are None for a single run."""

    trial: Path | None
    sweep: Path | None
    overrides: list[str]


def register_resolvers() -> None:
    # Cached: every trial of a sweep must read the same second, or one sweep makes several directories.
    OmegaConf.register_new_resolver("unix_seconds", lambda: int(time.time()), use_cache=True, replace=True)


def place() -> Place:
    """The place of the job that Hydra is running now."""
    hydra = HydraConfig.get()
    overrides = list(hydra.overrides.task)
    if hydra.mode is not RunMode.MULTIRUN:
        return Place(None, None, overrides)
    sweep = Path(hydra.sweep.dir).resolve()
    return Place(sweep / str(hydra.sweep.subdir), sweep, overrides)


def settings_of(cfg: DictConfig, place: Place) -> RunSettings:
    """The settings of the job at hand. The files that a single run is to read are looked for: a wrong path need not
    wait for libraries and a model. In a sweep it fails its trial.

    Raises:
        omegaconf.errors.OmegaConfBaseException, UserError: as :func:`from_hydra`; a file is not there.
    """
    from dpo_lora.preferences.sources.source import require

    settings = from_hydra(cfg)
    if place.sweep is not None:
        return settings
    if missing := missing_folder(settings.model.name):
        raise UserError(missing)
    for part in parts(settings.data):
        require(part)
    return settings


def open_run(
    settings: RunSettings, *, trial: Path | None, overrides: list[str], resume: Path | None
) -> tuple[RunDir, RunSettings]:
    """The directory of a new run, or of the one to resume, its lock held; and its settings, for good.

    Raises:
        UserError: it is in use, holds another run, or cannot be written.
    """
    from dpo_lora.rundir import RunDir  # a typo need not wait for it

    if resume is not None:
        run = RunDir.reopen(resume)
        _bring_up_to_date(run, settings)
        return run, settings
    settings = replace(settings, parent=pinned(settings.parent, Path(settings.outputs), in_sweep=trial is not None))
    run = RunDir.create(
        plain(settings),
        outputs=Path(settings.outputs),
        name=f"dpo-{settings.data.name}-lora-output",
        path=trial if settings.run_dir is None else Path(settings.run_dir),
    )
    record = run.path / ".hydra"
    record.mkdir()
    (record / "config.yaml").write_text(yaml.safe_dump(plain(settings), sort_keys=False), encoding="utf-8")
    (record / "overrides.yaml").write_text(yaml.safe_dump(overrides), encoding="utf-8")
    return run, settings


def _bring_up_to_date(run: RunDir, settings: RunSettings) -> None:
    """Write the settings that ``run`` goes on with where it computes the same by them: another tracker, say."""
    known = run.settings()
    if known != plain(settings) and fingerprint(from_plain(known)) == fingerprint(settings):
        write_atomic(run.settings_file, yaml.safe_dump(plain(settings), sort_keys=False, allow_unicode=True))


def pinned(parent: str | None, outputs: Path, *, in_sweep: bool) -> str | None:
    """A parent that lies on this disk by its full path, which is the same run from everywhere and tomorrow.

    An id on the hub, or what is nothing at all, stays as it is: lineage tells.

    Args:
        in_sweep: the sweep's trials are to have the same parent whenever it goes on.

    Raises:
        UserError: ``latest`` without a finished run, or in a sweep a name that is another run at another time.
    """
    from dpo_lora.rundir import find

    if parent is None:
        return None
    try:
        path = find(parent, outputs).path
    except UserError:
        if parent == "latest":
            raise
        return parent
    if in_sweep and (parent == "latest" or any(named.is_symlink() for named in (Path(parent), outputs / parent))):
        raise UserError(
            f"parent={parent} may be another run when the sweep goes on, and its trials would not be comparable. "
            f"Name the run that it is now: parent={path}"
        )
    return str(path)


def compose(overrides: list[str], config_dir: Path | None = None) -> RunSettings:
    """The settings that ``dpo-lora train`` would run with, for commands that train nothing.

    Exits with 2 and one message for a mistyped override.

    Args:
        config_dir: a folder of the user's own presets, searched after the shipped ones.
    """
    search = [] if config_dir is None else [f"hydra.searchpath=[file://{config_dir.resolve()}]"]
    register_schema()
    register_resolvers()
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
            return from_hydra(hydra.compose("config", overrides=[*overrides, *search]))
    except (UserError, HydraException, OmegaConfBaseException) as error:
        refuse(error)


def run_hydra(entry: Callable[[], None], overrides: list[str] | None) -> None:
    """Run a Hydra entry with ``overrides`` (None: the process' own arguments).

    Exits with 2 and one message for a user's mistake; a crash keeps its traceback and exits with 1.
    """
    if overrides is not None:
        sys.argv = [sys.argv[0], *overrides]
    record_command("train", *sys.argv[1:])
    sys.argv[1:] = _overrides_first(sys.argv[1:])
    # Hydra would print and exit by itself; with this it hands the exception over.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        check_names([word for word in sys.argv[1:] if not word.startswith("-")])
        flags = get_args_parser().parse_args()
        if flags.help:
            print(usage.text(flags.overrides, Path(flags.config_dir) if flags.config_dir else None))  # noqa: T201
        else:
            entry()
    except (UserError, HydraException, OmegaConfBaseException) as error:
        refuse(error)
    except ValueError as error:
        if not str(error).startswith("Only one of --run"):  # flags that exclude each other
            raise
        refuse(error)


def _overrides_first(words: list[str]) -> list[str]:
    """The same words with the flags last: Hydra refuses an override that follows a flag."""
    overrides = get_args_parser().parse_intermixed_args(words).overrides
    flags = list(words)
    for override in overrides:
        flags.remove(override)
    return [*overrides, *flags]


@contextlib.contextmanager
def refusing(place: Place) -> Iterator[None]:
    """End a single run at a user's mistake here, before Hydra adds its own lines; a trial's goes to its sweep."""
    try:
        yield
    except (UserError, OmegaConfBaseException) as error:
        if place.sweep is not None:
            raise
        refuse(error)


def refuse(error: Exception) -> NoReturn:
    """Say what the user got wrong, without a traceback, and exit with 2."""
    print(f"dpo-lora: {explain(error)}", file=sys.stderr)  # noqa: T201
    sys.exit(2)
