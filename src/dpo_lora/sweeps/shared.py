"""What several trials of a sweep need and one of them would otherwise compute for all: done before they fan out.

The base model is fetched and converted, the pairs are read, checked and tokenised, and the
reference's log-probabilities are computed, each into the cache that every run reads. With nothing else running
the one pass has the whole machine; a trial would make the others wait for it on its share.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpo_lora.errors import UserError
from dpo_lora.files import write_json
from dpo_lora.schema import RunSettings
from dpo_lora.settings import from_plain


def key(settings: dict[str, Any]) -> str:
    """16 hex digits, equal for plain settings that share all that :func:`prepare` makes: model, pairs, reference."""
    parts = {name: settings[name] for name in ("model", "data", "parent")}
    parts |= {name: settings["train"][name] for name in ("device", "dtype", "engine", "reference_cache")}
    data = settings["data"]
    if data["mix"] or data["max_pairs"] is not None or data["max_heldout"] is not None:
        parts["seed"] = settings["seed"]  # it chooses the pairs where only some are kept
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _order(settings: dict[str, Any]) -> list[Any]:
    """What decides which pairs a trial of plain settings trains on, and so asks the reference for."""
    train = settings["train"]
    return [settings["seed"], train["max_steps"], train["epochs"], train["pairs_per_step"]]


def write(path: Path, group: list[dict[str, Any]]) -> None:
    """Leave for :func:`run` and :func:`keep` what is to be prepared for a group of trials, given by plain settings."""
    orders = [json.loads(order) for order in sorted({json.dumps(_order(settings)) for settings in group})]
    write_json(path, {"settings": group[0], "orders": orders})


def covers(path: Path, group: list[dict[str, Any]]) -> bool:
    """Whether what ``path`` asks for is enough for these trials."""
    _, orders = _read(path)
    return all(_order(settings) in orders for settings in group)


def _read(path: Path) -> tuple[RunSettings, list[list[Any]]]:
    content = json.loads(path.read_text(encoding="utf-8"))
    return from_plain(content["settings"]), content["orders"]


def prepare(settings: RunSettings, orders: list[list[Any]]) -> None:
    """Fill the caches for one group of trials.

    Args:
        settings: of one of them.
        orders: seed, max_steps, epochs and pairs_per_step of each.

    Raises:
        UserError: as a trial of the group would.
    """
    import numpy as np

    from dpo_lora import device, lineage, lora, model
    from dpo_lora.dpo.arguments import arguments, optimizer_steps
    from dpo_lora.dpo.rows import rows_read
    from dpo_lora.dpo.trainer import PairTrainer
    from dpo_lora.preferences import pairs as preferences

    machine = device.choose(settings.train, settings.seed)
    parent = lineage.resolve(settings.parent, Path(settings.outputs))
    base = model.load(settings.model, machine)
    pairs = preferences.load(settings.data, base.tokenizer, settings.seed, stop_ids=base.stop_ids)
    policy = base.model if parent is None else lineage.adapter(parent, base.model, base.identity)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = PairTrainer(
            run=settings,
            model=policy,
            peft_config=lora.config(settings.lora, base.model) if parent is None else None,
            args=arguments(settings, machine, Path(scratch), len(pairs.train)),
            tokenizer=base.tokenizer,
            train_rows=pairs.train,
            heldout_rows=pairs.heldout,
            binding={},
            record=None,
            sampler=None,
            weights=base.identity["weights"],
        )
        rows = np.zeros(len(pairs.train), dtype=bool)
        for seed, max_steps, epochs, pairs_per_step in orders:
            train = replace(settings.train, max_steps=max_steps, epochs=epochs, pairs_per_step=pairs_per_step)
            rows[rows_read(len(rows), seed, optimizer_steps(train, len(rows)), pairs_per_step)] = True
        trainer.prepare_reference(rows.nonzero()[0])


def keep(path: Path) -> None:
    """In the process that trials are forked from: load the base model of the trials in ``path`` for them all.

    Only what has been loaded before, by :func:`run` in a process of its own: a model that brings the
    process down may not do so here. Nor is a model's own code run here.
    """
    from dpo_lora import device, lifecycle, model
    from dpo_lora.choices import Quantization

    lifecycle.quiet_libraries()  # a progress bar would break into the sweep's live table
    settings, _ = _read(path)
    if settings.model.quantization is Quantization.none and not settings.model.trust_remote_code:
        model.keep(settings.model, device.processor(settings.train))


def run(path: Path) -> int:
    """In a process of its own: prepare for the trials of the JSON file ``path``; the exit code."""
    try:
        prepare(*_read(path))
    except UserError as error:
        print(f"dpo-lora: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1])))
