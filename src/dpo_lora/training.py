"""The order of one training: score, guard, train, score, save, report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from dpo_lora import checkpoints, lineage
from dpo_lora.callbacks import BestCheckpoint, FiniteGuard, MetricsLog, ProgressLine, StopAtStepEnd, StopSignal
from dpo_lora.device import Machine
from dpo_lora.dpo.arguments import arguments
from dpo_lora.dpo.trainer import PairTrainer
from dpo_lora.errors import UserError
from dpo_lora.evaluation.record import Record
from dpo_lora.evaluation.sampler import Sampler
from dpo_lora.lineage import Parent
from dpo_lora.model import BaseModel
from dpo_lora.preferences.pairs import Pairs
from dpo_lora.reports import card, closing
from dpo_lora.rundir import RunDir, trim_jsonl
from dpo_lora.schema import RunSettings
from dpo_lora.settings import fingerprint
from dpo_lora.tracking import Tracker


@dataclass
class Training:
    """Everything one training needs, built; :meth:`execute` runs it."""

    settings: RunSettings
    run: RunDir
    machine: Machine
    base: BaseModel
    pairs: Pairs
    adapter: Any  # peft.LoraConfig
    parent: Parent | None
    stop: StopSignal
    console: Console
    callbacks: Sequence[Any] = ()  # besides the usual ones
    timings: dict[str, float] = field(default_factory=dict)

    def execute(self, tracker: Tracker) -> None:
        """Train to the end, or to the signal that stops it."""
        record = Record(self.run, self.settings, writes=self.machine.is_main)
        texts = self.pairs.heldout_texts
        sampler = Sampler(self.run, self.settings, texts, self.base.tokenizer, record, tracker)
        trainer = self._trainer(tracker, record, sampler)
        checkpoint = self._checkpoint()
        trainer.prepare_reference(self.base.identity["weights"])
        self.run.write_manifest(self._facts(tracker) | self._engine_facts(trainer))
        if checkpoint is None:
            self.run.metrics_file.unlink(missing_ok=True)
            record.clear()
            self.run.samples_file.unlink(missing_ok=True)
            trainer.check_start()
            if self.settings.eval.before:
                trainer.evaluate()
        else:
            step = checkpoints.step_of(checkpoint)
            self.run.trim_metrics(step)
            record.restore(step)
            trim_jsonl(self.run.samples_file, step)
            trainer.count_on(checkpoint)
        begun = time.monotonic()
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        self.timings["training_seconds"] = round(time.monotonic() - begun, 3)
        if self.stop.received is None:
            self._finish(trainer, record, sampler, tracker)

    def _trainer(self, tracker: Tracker, record: Record, sampler: Sampler) -> PairTrainer:
        is_fresh = self.parent is None
        policy = (
            self.base.model
            if self.parent is None
            else lineage.adapter(self.parent, self.base.model, self.base.identity)
        )
        return PairTrainer(
            run=self.settings,
            model=policy,
            peft_config=self.adapter if is_fresh else None,
            args=arguments(self.settings, self.machine, self.run.checkpoints, len(self.pairs.train)),
            tokenizer=self.base.tokenizer,
            train_rows=self.pairs.train,
            heldout_rows=self.pairs.heldout,
            binding=self._binding(),
            record=record,
            sampler=sampler,
            callbacks=[
                FiniteGuard(),
                StopAtStepEnd(self.stop),
                BestCheckpoint(record, self.settings.train.patience),
                MetricsLog(self.run, tracker),
                ProgressLine(self.console),
                *self.callbacks,
            ],
        )

    def _binding(self) -> dict[str, str]:
        return {
            "settings": fingerprint(self.settings),
            "weights": self.base.identity["weights"],
            "data": self.pairs.facts["train"]["tokens"],
        }

    def _checkpoint(self) -> Path | None:
        """The checkpoint to go on from: the newest whole one, of this very run.

        Raises:
            UserError: settings, base weights or data changed since it was written.
        """
        checkpoints.clear_staging(self.run.checkpoints)
        newest = checkpoints.newest_whole(self.run.checkpoints)
        if newest is None:
            return None
        written, now = checkpoints.binding(newest), self._binding()
        changed = [name for name in now if written.get(name) != now[name]]
        if changed:
            raise UserError(
                f"{newest} cannot be resumed: its {' and '.join(changed)} differ from what is here now, so the result "
                "would be neither run. Restore them, or start a new run with 'dpo-lora train'."
            )
        return newest

    def _finish(self, trainer: PairTrainer, record: Record, sampler: Sampler, tracker: Tracker) -> None:
        if not record.has(trainer.state.global_step):
            trainer.evaluate()
        kept = self._take_best(trainer, record)
        begun = time.monotonic()
        sampler.take(trainer, kept)
        self.timings["samples_seconds"] = round(time.monotonic() - begun, 3)
        self.timings["evaluation_seconds"] = round(trainer.evaluation_seconds + self.timings["samples_seconds"], 3)
        if not trainer.is_world_process_zero():
            return
        self.base.tokenizer.save_pretrained(self.run.path)
        trainer.save_adapter(self.run.path)
        seconds, here = self.timings["training_seconds"], trainer.tokens_seen - trainer.tokens_before
        self.run.write_manifest(
            {
                "training": {
                    "steps": trainer.state.global_step,
                    "pairs": trainer.pairs_seen * self.machine.world_size,
                    "tokens": trainer.tokens_seen * self.machine.world_size,
                    "tokens_per_second": round(here * self.machine.world_size / max(seconds, 1e-9), 1),
                    "trainable_weights": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
                    "peak_memory_bytes": self.machine.peak_memory(),
                },
                "timings": self.timings,
            }
        )
        card.write(self.run)
        if self.settings.tracking.log_adapter:
            tracker.adapter(self.run.path, self.run.path.name)
        closing.show(self.run, self.console)

    def _take_best(self, trainer: PairTrainer, record: Record) -> int:
        """Go back to the best evaluation's adapter where train.keep_best asks for it; the step of the one kept."""
        best = record.best_step()
        if best is None:
            return trainer.state.global_step
        if best != trainer.state.global_step:
            trainer.load_adapter(str(checkpoints.at_step(self.run.checkpoints, best)))
        record.keep_best()
        return best

    def _engine_facts(self, trainer: PairTrainer) -> dict[str, Any]:
        use = None if trainer.reference_use is None else trainer.reference_use.describe()
        return {"engine": {**trainer.engine.describe(), "reference_cache": use}}

    def _facts(self, tracker: Tracker) -> dict[str, Any]:
        base = {"name": self.base.name, "license": self.base.license, "identity": self.base.identity}
        parent = None if self.parent is None else self.parent.facts(self.run.path)
        return {
            "settings_fingerprint": fingerprint(self.settings),
            "data": self.pairs.facts,
            "reference": {"base": base, "adapter": parent},
            "parent": parent,
            "version": 1 if self.parent is None else self.parent.version + 1,
            "compute": self.machine.describe(),
            "tracker": tracker.link(),
        }
