"""Exact scores of pairs under policy and reference: every pair once, whatever the batch."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from trl.trainer.utils import use_adapter

from dpo_lora.dpo.engines import EngineChoice
from dpo_lora.dpo.rows import REFERENCE, ReferenceRows, lengths
from dpo_lora.dpo.saving import WholeCheckpoints
from dpo_lora.engine.batching import is_out_of_memory
from dpo_lora.engine.packing import sent
from dpo_lora.errors import UserError
from dpo_lora.evaluation.record import Record
from dpo_lora.evaluation.scores import PairScores, pair_hash
from dpo_lora.schema import RunSettings

log = logging.getLogger(__name__)


class ExactScoring(WholeCheckpoints):
    """A trainer that scores pairs. Its subclass sets what is declared here."""

    run: RunSettings
    heldout: Dataset | ReferenceRows
    record: Record | None
    collate: Any
    engine: EngineChoice
    _reference: dict[str, tuple[float, ...]]  # reference log-probabilities, by pair_hash
    _is_untrained: bool  # no step was taken, and policy and reference are one
    _start_is_open: bool  # that they are one is for the first step to check
    _eval_batch: int | None = None  # pairs scored at a time; less than eval.batch once that did not fit

    def batch(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The collated rows on the device; with their plan where they are packed."""
        return {k: sent(v, self.args.device) for k, v in self.collate(rows).items()}

    def score(self, rows: Dataset | ReferenceRows, *, untrained: bool = False) -> PairScores:
        """Log-probabilities of every pair's answers under policy and reference, without dropout.

        Args:
            untrained: policy and reference are one, as :meth:`check_start` sees to it: one pass does for both.
        """
        was_training = self.model.training
        self.model.eval()
        found: list[tuple[int, tuple[float, ...]]] = []
        # Longest first: the first batch already needs the most memory.
        tokens = lengths(rows).sum(axis=1)
        order = sorted(range(len(rows)), key=lambda i: -tokens[i])
        try:
            while order:
                found += (now := self._as_many_as_fit(rows, order, untrained))
                order = order[len(now) :]
        finally:
            self.model.train(was_training)
        values = np.asarray([v for _, v in sorted(found)], dtype=np.float64).reshape(-1, 4)
        return PairScores.of(rows, values)

    def _as_many_as_fit(
        self, rows: Dataset | ReferenceRows, order: list[int], untrained: bool
    ) -> list[tuple[int, tuple[float, ...]]]:
        """The first of ``order``, scored: eval.batch of them, or as many as have fitted in memory so far."""
        if self._eval_batch is None:
            self._eval_batch = self.run.eval.batch
        while True:
            try:
                return self._scored(rows, order[: self._eval_batch], untrained)
            except Exception as error:
                if not is_out_of_memory(error) or self._eval_batch == 1:
                    raise
            self._eval_batch = min(self._eval_batch, len(order)) // 2 or 1
            told = "eval.batch does not fit in memory: pairs are scored in a batch of %d from here on."
            log.warning(told, self._eval_batch)

    def _scored(
        self, rows: Dataset | ReferenceRows, indices: list[int], untrained: bool
    ) -> list[tuple[int, tuple[float, ...]]]:
        """Number and log-probabilities (chosen, rejected; of the policy, then of the reference) of these rows."""
        batch_rows = [rows[i] for i in indices]
        batch = self.batch(batch_rows)
        reference = self._reference_logps(batch_rows, batch)
        policy = reference if untrained else self._logps(batch)
        return [(i, (*p, *r)) for i, p, r in zip(indices, policy, reference, strict=True)]

    def _reference_logps(self, rows: list[dict[str, Any]], batch: dict[str, Any]) -> list[tuple[float, ...]]:
        """From the rows' own columns, from an earlier evaluation, or by a pass of the reference."""
        if REFERENCE[0] in rows[0]:
            return [tuple(row[column] for column in REFERENCE) for row in rows]
        keys = [pair_hash(row) for row in rows]
        if not all(key in self._reference for key in keys):
            with self.as_reference() as model:
                self._reference.update(zip(keys, self._logps(batch, model), strict=True))
        return [self._reference[key] for key in keys]

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[Any]:
        """The reference model: the base without the adapter, a parent's frozen copy, or a model of its own."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        model = self.accelerator.unwrap_model(self.model)
        with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
            yield self.model

    def adapter_names(self) -> tuple[str, str] | None:
        """PEFT's names of policy and reference, by which one batch asks both; None where PEFT cannot mix them."""
        model = self.accelerator.unwrap_model(self.model)
        parts = list(model.modules())
        # DoRA and its like compute more than the plain update; copies of whole modules are not switched by row.
        is_plain = not any(getattr(part, "lora_variant", None) for part in parts)
        is_plain &= not any(type(part).__name__ in ("ModulesToSaveWrapper", "ParamWrapper") for part in parts)
        if self.ref_model is not None or not is_plain:
            return None
        return model.active_adapter, "ref" if "ref" in model.peft_config else "__base__"

    def _logps(self, batch: dict[str, Any], model: Any = None) -> list[tuple[float, float]]:
        """Plain sums over answer tokens: TRL's own reference pass would weigh them by ld_alpha."""
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        asked = self.model if model is None else model
        packed: dict[str, Any] = {}
        if self.engine.packed is not None and asked is self.model:
            packed = {"only_log_probs": True, "pair_plan": batch.get("pair_plan")}
        with torch.no_grad(), self.accelerator.autocast():
            output = asked(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                use_cache=False,
                labels=labels,
                fused_lm_head=True,
                **packed,
            )
        chosen, rejected = output.log_probs.double().sum(dim=1).chunk(2)
        return list(zip(chosen.tolist(), rejected.tolist(), strict=True))

    def check_start(self) -> None:
        """See to it that before the first update policy and reference are one: each margin 0, the DPO loss ln 2.

        The first step computes both for its own pairs and looks at them before it updates anything, so nothing
        is scored for it here. Only where dropout would show as a difference there, held-out pairs are.

        Raises:
            UserError: they differ, so every number of the run would be measured from a wrong zero.
        """
        if self.run.lora.dropout > 0:
            self._require_start()
        else:
            self._start_is_open = True
        self._is_untrained = True

    def _look_at_start(self, margins: torch.Tensor, tokens: torch.Tensor) -> None:
        """Margins of the first step's pairs and tokens of both their answers; where they are off, held-out pairs,
        scored without what training draws at random, decide. Numbers that are not finite have an error of their own."""
        off = float((margins.abs() / tokens.clamp_min(1)).max())
        if math.isfinite(off) and off > self._rounding():
            self._start_is_open = False
            self._require_start()

    def _require_start(self) -> None:
        scores = self.score(self.heldout.select(range(min(4, len(self.heldout)))))
        off = float(np.max(np.abs(scores.margins) / (scores.tokens_chosen + scores.tokens_rejected)))
        if not off <= self._rounding():
            if self.record is not None:
                self.record.clear()  # of a score that took the two for one
            raise UserError(
                f"Before the first update the policy is not its reference: margins differ by {off:.2g} nats a token. "
                "Some lora.init or a changed base model moves the start; nothing was trained."
            )

    def _rounding(self) -> float:
        """Nats a token that the format the model computes in may be off by; a moved base is off by far more."""
        return 1e-5 if next(self.model.parameters()).dtype is torch.float32 else 1e-2
