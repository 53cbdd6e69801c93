"""TRL's DPO trainer, stepping on exact numbers of pairs, scoring exactly, saving whole checkpoints.

TRL's losses and transformers' loop do the training. What differs from the stock trainer: an
optimizer step is always ``pairs_per_step`` pairs whatever is in memory at a time, held-out scores
are exact over pairs, and checkpoints are whole or absent.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trl
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PrinterCallback
from trl.trainer.dpo_trainer import DataCollatorForPreference

from dpo_lora.callbacks import NotFiniteError
from dpo_lora.dpo import step_metrics
from dpo_lora.dpo.engines import ReferenceUse, attach_reference, choose_engine, warn_inseparable
from dpo_lora.dpo.memory import StepMemory
from dpo_lora.dpo.progress import Progress
from dpo_lora.dpo.rows import REFERENCE, ReferenceRows, SeededOrder, rows_read
from dpo_lora.dpo.scoring import ExactScoring
from dpo_lora.engine.batching import MicroBatch, common_opening, padded_tokens, pair_tokens, separable
from dpo_lora.engine.packing import PairCollator
from dpo_lora.evaluation.record import Record
from dpo_lora.evaluation.sampler import Sampler
from dpo_lora.evaluation.scores import TIE_PER_TOKEN
from dpo_lora.schema import RunSettings


class PairTrainer(ExactScoring):
    """TRL's trainer over pairs that are tokenised already.

    Args:
        weights: fingerprint of the base weights, by which what is known of them is found; None: nothing is looked up.
    """

    # Set by the base class, which types them as optional; here they always are.
    model: Any
    train_dataset: Any
    maybe_activation_offload_context: Any

    def __init__(
        self,
        *,
        run: RunSettings,
        args: trl.DPOConfig,
        tokenizer: Any,
        train_rows: Dataset,
        heldout_rows: Dataset,
        record: Record | None,
        sampler: Sampler | None,
        weights: str | None = None,
        **kwargs: Any,
    ):
        self.run, self.weights = run, weights
        self.heldout: Dataset | ReferenceRows = heldout_rows
        self.record = record  # of every evaluation; None for a trainer that only scores
        self.sampler = sampler
        self._is_untrained = self._start_is_open = False
        self.evaluation_seconds = 0.0  # scores, samples and their figures
        self.reference_seconds = 0.0, 0.0  # of training and held-out pairs, from the cache or computed
        self.progress = Progress()
        self._reference: dict[str, tuple[float, ...]] = {}  # reference log-probabilities, by pair_hash
        self.collate = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)
        super().__init__(
            keep_checkpoints=run.train.keep_checkpoints,
            protected_step=(lambda: None) if record is None else record.best_step,
            args=args,
            processing_class=tokenizer,
            train_dataset=train_rows,
            eval_dataset=heldout_rows,
            data_collator=lambda rows: {"rows": rows},
            **kwargs,
        )
        self.engine = choose_engine(self)
        if self.engine.packed is not None and self.ref_model is None:  # another model knows no plan
            self.collate = PairCollator(self.collate, keep_last=self.aux_loss_enabled)
        self.memory = StepMemory(self)
        self.reference_use: ReferenceUse | None = None
        warn_inseparable(run, self.aux_loss_enabled)
        self.remove_callback(PrinterCallback)  # prints every log row; ProgressLine speaks for us

    def prepare_reference(self, rows: NDArray[np.int64] | None = None) -> None:
        """Take the reference's log-probabilities from the cache, where settings and engine allow.

        Args:
            rows: numbers of the training rows to do it for; None: those that training will read.
        """
        if not self.run.train.reference_cache or self.engine.packed is None:
            return
        ld_alpha = self.run.dpo.ld_alpha
        count = len(self.train_dataset)
        if rows is None:
            rows = rows_read(count, self.run.seed, self.args.max_steps, self.run.train.pairs_per_step)
        begun = time.monotonic()
        self.train_dataset, train = attach_reference(self, self.train_dataset, ld_alpha, rows)
        between = time.monotonic()
        self.heldout, heldout = attach_reference(self, self.heldout, None, np.arange(len(self.heldout)))
        self.reference_seconds = between - begun, time.monotonic() - between
        self.precompute_ref_logps = True  # TRL then reads the columns instead of running the reference
        self.reference_use = ReferenceUse(train.found + heldout.found, train.computed + heldout.computed)

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        return dataset  # preferences/ has done it

    def _get_train_sampler(self, train_dataset: Any = None) -> SeededOrder:
        rows = self.train_dataset if train_dataset is None else train_dataset
        return SeededOrder(len(rows), self.run.seed)

    # -- training

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.progress.start()
        try:
            return super().train(*args, **kwargs)
        finally:
            self.progress.stop()

    def _beside_checkpoint(self, folder: Path) -> None:
        self.progress.save(folder)
        self.memory.save(folder)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of one optimizer step's pairs, as many in memory at a time as fit.

        Each micro-batch's mean loss weighs by its share of the pairs, so that the gradient is the
        mean over the step's pairs however they are cut. Out of memory, the step is cut finer, or its
        layers are computed twice, and it is done again; the optimizer has not moved by then.
        """
        if not model.training:  # it visits every module, and most steps follow a step
            model.train()
        self._is_untrained = False
        rows = inputs["rows"]
        noted = {name: len(values) for name, values in self._metrics["train"].items()}

        def forward_backward(cuts: list[MicroBatch]) -> torch.Tensor:
            total = torch.zeros((), device=self.args.device)
            parts = [part for batch in cuts for part in self._at_most_micro_batch(batch.pairs)]
            for number, part in enumerate(parts):
                last = number == len(parts) - 1
                with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                    with self.maybe_activation_offload_context, self.compute_loss_context_manager():
                        loss = self.compute_loss(model, self.batch([rows[i] for i in part]))
                    share = len(part) / len(rows)
                    self._require_finite(loss)
                    self.accelerator.backward(loss * share)
                    total += loss.detach() * share
            step_metrics.merge(self._metrics["train"], [[rows[i] for i in part] for part in parts])
            return total

        def forget() -> None:
            model.zero_grad()
            for name, values in self._metrics["train"].items():
                del values[noted.get(name, 0) :]

        packed = self.engine.packed is not None
        sizes = [pair_tokens(row) if packed else padded_tokens(row) for row in rows]
        opening = common_opening([row["prompt_ids"] for row in rows]) if packed else 0
        # A loss that looks across pairs sees them all at once, unless micro_batch says otherwise.
        whole = not separable(self.loss_types, self.aux_loss_enabled)
        total = self.memory.run(sizes, forward_backward, forget, opening, whole)
        self._start_is_open = False
        self.progress.pairs += len(rows)
        self.progress.tokens += sum(len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows)
        return total

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """TRL's loss; the accuracy it notes counts ties as wrong, here they count one half."""
        seen: list[torch.Tensor] = []  # log-probabilities [2B, L-1] of the policy, then of the reference

        def note(_module: Any, _arguments: Any, output: Any) -> None:
            seen.append(output.log_probs.detach())

        models = [model] if self.ref_model is None else [model, self.ref_model]
        hooks = [one.register_forward_hook(note) for one in models]
        try:
            loss: torch.Tensor = self._compute_loss(model, inputs, return_outputs)
        finally:
            for hook in hooks:
                hook.remove()
        policy, *computed = (self._sequence_sums(values, inputs["completion_mask"]) for values in seen)
        reference = computed[0] if computed else torch.cat([inputs[column] for column in REFERENCE])
        chosen, rejected = (policy - reference).chunk(2)
        margins = chosen - rejected
        tokens = inputs["completion_mask"].sum(dim=1).view(2, -1).sum(dim=0)
        if self._start_is_open and self.model.training:
            self._look_at_start(margins, tokens)
        wins = torch.where(margins.abs() <= TIE_PER_TOKEN * tokens, 0.5, (margins > 0).float())
        self._metrics["train" if self.model.training else "eval"]["rewards/accuracies"][-1] = wins.mean().item()
        return loss

    def _sequence_sums(self, log_probs: torch.Tensor, completion_mask: torch.Tensor) -> torch.Tensor:
        """[2B, L-1] -> [2B], tokens past the shorter answer of a pair weighed by ld_alpha, as the loss does."""
        if self.ld_alpha is None:
            return log_probs.sum(dim=1)
        position = completion_mask[:, 1:].cumsum(dim=1)
        shorter = position[:, -1].view(2, -1).amin(dim=0).repeat(2)
        return (log_probs * torch.where(position <= shorter[:, None], 1.0, self.ld_alpha)).sum(dim=1)

    def _at_most_micro_batch(self, pairs: Sequence[int]) -> list[Sequence[int]]:
        size = self.run.train.micro_batch or len(pairs)
        return [pairs[i : i + size] for i in range(0, len(pairs), size)]

    def _require_finite(self, loss: torch.Tensor) -> None:
        if not torch.isfinite(loss):
            raise NotFiniteError(
                f"The loss of step {self.state.global_step + 1} is {loss.item()}. The optimizer did not take it: "
                "the last checkpoint is good. Lower train.learning_rate, or look for broken pairs."
            )

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # transformers' estimate counts padding; throughput is logged in tokens

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A row of training takes TRL's averages since the one before it; a row of held-out figures leaves them."""
        self._metrics["train"].pop("num_tokens", None)  # TRL's counts prompts twice; ours is "tokens"
        if "loss" in logs:
            logs.update(self.progress.figures())
        elif "train_runtime" not in logs:
            super(trl.DPOTrainer, self).log(logs)
            return
        super().log(logs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Score the held-out pairs exactly, record the figures and log them."""
        assert self.record is not None
        begun, step = time.monotonic(), self.state.global_step
        metrics = self.record.add(step, self.score(self.heldout, untrained=self._is_untrained))
        self.log(dict(metrics))
        if self.sampler is not None:
            self.sampler.after_evaluation(self)
        took = time.monotonic() - begun
        self.evaluation_seconds += took
        self.progress.pause(took)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
