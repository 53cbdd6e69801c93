"""The order of one training: score, guard, train, score, save, report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from dpo_lora import checkpoints, lineage, lora
from dpo_lora.callbacks import (
    BestCheckpoint,
    FiniteGuard,
    MetricsLog,
    ProgressLine,
    StopAtStepEnd,
    StopSignal,
)
from dpo_lora.device import Machine
from dpo_lora.dpo.arguments import arguments
from dpo_lora.dpo.trainer import PairTrainer
from dpo_lora.errors import Interrupted, UserError
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

    def __post_init__(self) -> None:
        self.progress_line = ProgressLine(self.console)
        self.parent_adapter = "none"  # fingerprint of the adapter that this run goes on from

    def execute(self, tracker: Tracker) -> None:
        """Train to the end, or to the signal that stops it."""
        record = Record(self.run, self.settings)
        texts = self.pairs.heldout_texts
        sampler = Sampler(self.run, self.settings, texts, self.base.tokenizer, record, tracker)
        trainer = self._trainer(tracker, record, sampler)
        checkpoint = self._checkpoint()
        trainer.prepare_reference()
        for name, seconds in zip(("reference", "heldout_reference"), trainer.reference_seconds, strict=True):
            self.timings[f"{name}_seconds"] = round(seconds, 3)
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
            # The answers of the last step come after its checkpoint and are taken again.
            trim_jsonl(self.run.samples_file, step - 1 if step >= trainer.args.max_steps else step)
        self._train(trainer, checkpoint)
        self.timings["training_seconds"] = round(trainer.progress.seconds, 3)
        if self.stop.received is not None:
            raise Interrupted(self.stop.exit_code)  # past the tracker, which closes as what the run became
        self._finish(trainer, record, sampler, tracker)

    def _train(self, trainer: PairTrainer, checkpoint: Path | None) -> None:
        if checkpoint is not None:
            trainer.progress.restore(checkpoint)
            trainer.memory.restore(checkpoint)
            step = checkpoints.step_of(checkpoint)
            if step >= trainer.args.max_steps:  # cut off after the last step: transformers would take one more
                trainer.load_adapter(str(checkpoint))
                trainer.state.global_step = step
                return
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            self.progress_line.close()  # an exception must not leave a live line behind

    def _trainer(self, tracker: Tracker, record: Record, sampler: Sampler) -> PairTrainer:
        is_fresh = self.parent is None
        policy: Any = self.base.model
        if self.parent is not None:
            linear = lora.linear_names(self.base.model)
            policy = lineage.adapter(self.parent, self.base.model, self.base.identity)
            lineage.require_same_shape(self.parent, policy, self.adapter, linear)
            self.parent_adapter = lineage.fingerprint(policy)
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
            weights=self.base.identity["weights"],
            callbacks=[
                FiniteGuard(),
                StopAtStepEnd(self.stop),
                BestCheckpoint(record, self.settings.train.patience),
                MetricsLog(self.run, tracker),
                self.progress_line,
                *self.callbacks,
            ],
        )

    def _binding(self) -> dict[str, str]:
        return {
            "settings": fingerprint(self.settings),
            "weights": self.base.identity["weights"],
            "data": self.pairs.facts["train"]["tokens"],
            "parent": self.parent_adapter,
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
        self.base.tokenizer.save_pretrained(self.run.path)
        trainer.save_adapter(self.run.path)
        begun = time.monotonic()
        sampler.take(trainer, kept)
        self.timings["samples_seconds"] = round(time.monotonic() - begun, 3)
        self.timings["evaluation_seconds"] = round(trainer.evaluation_seconds + self.timings["samples_seconds"], 3)
        seconds = self.timings["training_seconds"]
        self.run.write_manifest(
            {
                "training": {
                    "steps": trainer.state.global_step,
                    "pairs": trainer.progress.pairs,
                    "tokens": trainer.progress.tokens,
                    "tokens_per_second": round(trainer.progress.tokens / max(seconds, 1e-9), 1),
                    "trainable_weights": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
                    "peak_memory_bytes": self.machine.peak_memory(),
                    "relief": trainer.memory.relief.taken,
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
