"""THE entrypoint: compose, build, train, leave a run directory behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from dpo_lora import composition
from dpo_lora.resources import conf_dir
from dpo_lora.schema import RunSettings
from dpo_lora.settings import plain, register_schema

register_schema()
composition.register_resolvers()


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
def hydra_entry(cfg: DictConfig) -> None:
    """One run, or one trial of a sweep; its directory is the last line on stdout."""
    place = composition.place()
    with composition.refusing(place):
        settings = composition.settings_of(cfg, place)
        print(train(settings, trial=place.trial, sweep=place.sweep, overrides=place.overrides), flush=True)  # noqa: T201


def train(
    settings: RunSettings,
    *,
    trial: Path | None = None,
    sweep: Path | None = None,
    overrides: list[str] | None = None,
    resume: Path | None = None,
    callbacks: Sequence[Any] = (),
) -> Path:
    """Train one adapter and return its run directory.

    Args:
        trial: the directory a sweep gives this run; None: a new one in ``settings.outputs``.
        sweep: the sweep's directory, shared by its trials.
        overrides: the command line's, kept in ``.hydra/``.
        resume: an interrupted run's directory to continue.
        callbacks: transformers callbacks of whoever started the run: a sweep that may stop it early.
    """
    # torch and transformers take seconds to import; a typo must not wait for them.
    from rich.console import Console

    from dpo_lora import device, lifecycle, lineage, lora, model, tracking
    from dpo_lora.preferences import pairs as preferences
    from dpo_lora.training import Training

    console = Console(stderr=True)
    run, settings = composition.open_run(settings, trial=trial, overrides=overrides or [], resume=resume)
    with lifecycle.running(run, console) as stop:
        machine = device.choose(settings.train, settings.seed)
        parent = lineage.resolve(settings.parent, Path(settings.outputs))
        base = model.load(settings.model, machine)
        adapter = lora.config(settings.lora, base.model)
        pairs = preferences.load(
            settings.data, base.tokenizer, settings.seed, stop_ids=base.stop_ids, report_file=run.lint_file
        )
        training = Training(settings, run, machine, base, pairs, adapter, parent, stop, console, callbacks)
        with tracking.open_tracker(settings.tracking, run, sweep, plain(settings)) as tracker:
            training.execute(tracker)
    if sweep is None:
        run.point_latest(Path(settings.outputs))
    return run.path


def main(overrides: list[str] | None = None) -> None:
    """``dpo-lora train`` with these overrides; None: the process' own arguments."""
    composition.run_hydra(hydra_entry, overrides)


if __name__ == "__main__":
    main()
