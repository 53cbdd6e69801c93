"""Answers taken during a run: into samples.jsonl, the tracker's table and eval.json's summary."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dpo_lora.evaluation import samples
from dpo_lora.evaluation.record import Record
from dpo_lora.files import append_jsonl, read_jsonl
from dpo_lora.rundir import RunDir
from dpo_lora.schema import RunSettings
from dpo_lora.tracking import Tracker


class Sampler:
    """Asks the same prompts each time, so that answers of different steps can be laid side by side."""

    def __init__(
        self,
        run: RunDir,
        settings: RunSettings,
        heldout: Iterable[dict[str, Any]],
        tokenizer: Any,
        record: Record,
        tracker: Tracker,
    ):
        self.run, self.settings, self.tokenizer = run, settings.eval, tokenizer
        self.record, self.tracker = record, tracker
        self.seed = settings.seed
        self.prompts = samples.prompts(settings.eval, heldout)
        self._taken: set[int] = set()  # steps

    def after_evaluation(self, trainer: Any) -> None:
        """Answers at this evaluation, where eval.sample_each asks for them; before training both sides are one."""
        step = trainer.state.global_step
        if self.settings.sample_each and step > 0:
            self.take(trainer, step)

    def take(self, trainer: Any, step: int) -> None:
        """Answers of the adapter of ``step``, asked for once; the summary is of the step asked for last."""
        if not self.prompts:
            return
        if step in self._taken:
            rows = [row for row in read_jsonl(self.run.samples_file) if row["step"] == step]
            self.record.add_samples(samples.summary(rows, self.record.confidence))
            return
        taken = samples.take(trainer, self.tokenizer, self.prompts, self.settings, self.seed)
        if not taken:
            return
        self._taken.add(step)
        rows = [{"step": step, **row} for row in taken]
        append_jsonl(self.run.samples_file, rows)
        summary = samples.summary(rows, self.record.confidence)
        self.record.add_samples(summary)
        trainer.log({f"eval/{name}": value for name, value in _numbers(summary).items()})
        self.tracker.table("samples", [_flat(row) for row in rows], step)


def _numbers(summary: dict[str, Any]) -> dict[str, float]:
    numbers = {} if summary["kl_per_token"] is None else {"kl_per_token": summary["kl_per_token"]}
    for decoding in samples.DECODINGS:
        for side in samples.SIDES:
            numbers |= {f"samples/{decoding}/{side}/{k}": v for k, v in summary[decoding][side].items()}
    return numbers


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
    return {
        "id": row["id"],
        "prompt": prompt,
        "decoding": row["decoding"],
        "reference": row["reference"]["text"],
        "policy": row["policy"]["text"],
        "preferred": row["preferred"],
    }
