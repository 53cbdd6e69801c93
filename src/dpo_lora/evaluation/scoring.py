"""Exact scores of an adapter that is on disk or on the hub already, on any pairs."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo_lora import lineage, lora, model, settings
from dpo_lora.choices import DataSource, ModelSource
from dpo_lora.device import choose, for_use
from dpo_lora.dpo.arguments import arguments
from dpo_lora.dpo.trainer import PairTrainer
from dpo_lora.errors import UserError
from dpo_lora.evaluation.scores import PairScores
from dpo_lora.preferences import pairs as preferences
from dpo_lora.resources import conf_dir
from dpo_lora.rundir import RunDir, find
from dpo_lora.schema import DataSettings, RunSettings


@dataclass(frozen=True)
class Target:
    """What is scored, and how its base or reference is made."""

    settings: RunSettings
    adapter: str | None  # what PEFT loads; None: a whole model against a reference
    policy: str | None  # the whole model, then
    run: RunDir | None


def score(target: str, data: str | None, reference: str | None, outputs: Path) -> tuple[PairScores, RunSettings]:
    """Scores of ``target`` and the settings they were made with.

    Args:
        target: a run, an adapter (folder or hub id), or a whole model (with ``reference``).
        data: a file of pairs, all of which are scored, or a preset's name, whose held-out part is;
            None: the run's own held-out part.
        reference: base model of an adapter, or reference of a whole model; None: the adapter's own.

    Raises:
        UserError: there is no such target or data, or one of them is missing.
    """
    found = _target(target, reference, outputs)
    is_file = data is not None and Path(data).is_file()
    if data is not None and is_file:
        data = str(Path(data).absolute())  # a link's own name tells what kind of file it is
    if data is None and found.run is None:
        raise UserError(f"{target} is no run, so it has no held-out pairs of its own: name some with --data.")
    trained = None if found.run is None else found.settings.data
    run = found.settings if data is None else replace(found.settings, data=_data(data, trained))
    run = replace(run, train=for_use(run.train))
    machine = choose(run.train, run.seed)
    with contextlib.nullcontext() if found.run is None else found.run.in_its_folder():
        base = model.load(run.model, machine)
        rows = (
            preferences.load_all(run.data, base.tokenizer, run.seed, stop_ids=base.stop_ids)
            if is_file
            else preferences.load(run.data, base.tokenizer, run.seed, stop_ids=base.stop_ids).heldout
        )
        with tempfile.TemporaryDirectory() as scratch:
            return _scorer(found, run, machine, base, rows, Path(scratch)).score(rows), run


def _target(target: str, reference: str | None, outputs: Path) -> Target:
    try:
        run = find(target, outputs)
    except UserError:
        known = lora.base_of(target)
        base = reference or known
        if base is None:
            raise UserError(
                f"{target} is neither a run nor an adapter. A whole model is scored against its reference: "
                "add --reference BASE."
            ) from None
        composed = settings.composed(["model=hub", f"model.name='{base}'", "tracking=none"])
        is_adapter = known is not None
        return Target(composed, target if is_adapter else None, None if is_adapter else target, None)
    if not (run.path / "adapter_config.json").is_file():
        raise UserError(f"{run.path} has no adapter yet (status {run.status()}); 'dpo-lora resume {run.path}' first.")
    return Target(settings.from_plain(run.settings()), str(run.path), None, run)


def _data(data: str, trained: DataSettings | None) -> DataSettings:
    if Path(data).is_file():
        if trained is None:
            return settings.composed(["data=local", f"data.path='{data}'"]).data
        return replace(  # read, cut and put through the template as the training pairs were, and every one of them
            trained, name=Path(data).stem, source=DataSource.local, path=data, revision=None, subset=None, mix=[],
            filter=[], heldout_split=None, heldout_path=None, max_pairs=None, max_heldout=None,
        )  # fmt: skip
    presets = sorted(p.stem for p in (conf_dir() / "data").glob("*.yaml"))
    if data not in presets:
        raise UserError(f"--data {data}: neither a file nor a preset. There are: {', '.join(presets)}.")
    return settings.composed([f"data={data}"]).data


def _scorer(
    target: Target, run: RunSettings, machine: Any, base: model.BaseModel, rows: Any, scratch: Path
) -> PairTrainer:
    """The trainer that made the run's own scores, with the saved adapter in it; it only scores."""
    parent = lineage.resolve(run.parent, Path(run.outputs)) if target.run is not None else None
    policy: Any = base.model
    reference = adapter = None
    if target.policy is not None:
        reference = base.model
        whole = replace(run.model, name=target.policy, source=ModelSource.hub, revision=None)
        policy = model.load(whole, machine).model
    elif parent is not None:
        policy = lineage.adapter(parent, base.model, base.identity)
    else:
        assert target.adapter is not None
        adapter = lora.saved(target.adapter)
    trainer = PairTrainer(
        run=run,
        model=policy,
        ref_model=reference,
        peft_config=adapter,
        args=arguments(run, machine, scratch, max(len(rows), run.train.pairs_per_step)),
        tokenizer=base.tokenizer,
        train_rows=rows,
        heldout_rows=rows,
        binding={},
        record=None,
        sampler=None,
    )
    if target.adapter is not None:
        trainer.load_adapter(target.adapter)
    return trainer
