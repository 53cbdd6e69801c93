"""TRL's DPO trainer, stepping on exact numbers of pairs, scoring exactly, saving whole checkpoints.

TRL's losses and transformers' loop do the training. What differs from the stock trainer: an
optimizer step is always ``pairs_per_step`` pairs whatever is in memory at a time, held-out scores
are exact over pairs, and checkpoints are whole or absent.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

import numpy as np
import torch
import trl
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PrinterCallback
from trl.trainer.dpo_trainer import DataCollatorForPreference

from dpo_lora.callbacks import NotFiniteError
from dpo_lora.dpo.saving import WholeCheckpoints
from dpo_lora.errors import UserError
from dpo_lora.evaluation.scores import PairScores
from dpo_lora.schema import RunSettings


class PairTrainer(WholeCheckpoints):
    """TRL's trainer over pairs that are tokenised already."""

    # Set by the base class, which types them as optional; here they always are.
    model: Any
    train_dataset: Any

    def __init__(
        self,
        *,
        run: RunSettings,
        args: trl.DPOConfig,
        tokenizer: Any,
        train_rows: Dataset,
        heldout_rows: Dataset,
        **kwargs: Any,
    ):
        self.run = run
        self.heldout = heldout_rows
        self.history: list[dict[str, Any]] = []  # every evaluation's summary, with its step
        self.scores: PairScores | None = None  # of the last evaluation
        self.pairs_seen = 0
        self.tokens_seen = 0
        self._tokens_logged, self._time_logged = 0, time.monotonic()
        self._reference: dict[str, tuple[float, float]] = {}  # held-out reference log-probabilities, by id
        self.collate = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)
        super().__init__(
            keep_checkpoints=run.train.keep_checkpoints,
            args=args,
            processing_class=tokenizer,
            train_dataset=train_rows,
            eval_dataset=heldout_rows,
            data_collator=lambda rows: {"rows": rows},
            **kwargs,
        )
        self.remove_callback(PrinterCallback)  # prints every log row; ProgressLine speaks for us

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        return dataset  # preferences/ has done it

    # -- training

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of one optimizer step's pairs, ``train.micro_batch`` in memory at a time.

        Each micro-batch's mean loss weighs by its share of the pairs, so that the gradient is the
        mean over the step's pairs however they are cut.
        """
        model.train()
        rows = inputs["rows"]
        cuts = self._cut(rows)
        total = torch.zeros((), device=self.args.device)
        for number, cut in enumerate(cuts):
            last = number == len(cuts) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                with self.maybe_activation_offload_context, self.compute_loss_context_manager():
                    loss = self.compute_loss(model, self._batch(cut))
                share = len(cut) / len(rows)
                self._require_finite(loss)
                self.accelerator.backward(loss * share)
                total += loss.detach() * share
        self._merge_metrics([len(cut) for cut in cuts])
        self.pairs_seen += len(rows)
        self.tokens_seen += sum(len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows)
        return total

    def _cut(self, rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """Micro-batches of like lengths, so that little is padded."""
        size = self.run.train.micro_batch
        ordered = sorted(rows, key=lambda r: len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])))
        return [ordered[i : i + size] for i in range(0, len(ordered), size)]

    def _batch(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {k: v.to(self.args.device) for k, v in self.collate(rows).items()}

    def _require_finite(self, loss: torch.Tensor) -> None:
        if not torch.isfinite(loss):
            raise NotFiniteError(
                f"The loss of step {self.state.global_step + 1} is {loss.item()}. The optimizer did not take it: "
                "the last checkpoint is good. Lower train.learning_rate, or look for broken pairs."
            )

    def _merge_metrics(self, sizes: list[int]) -> None:
        """TRL notes each figure once a micro-batch; keep one a step, weighted by pairs."""
        for values in self._metrics["train"].values():
            if len(sizes) > 1 and len(values) >= len(sizes):
                values[-len(sizes) :] = [float(np.average(values[-len(sizes) :], weights=sizes))]

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # transformers' estimate counts padding; throughput is logged in tokens

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            now = time.monotonic()
            logs["pairs"] = self.pairs_seen * self.args.world_size
            logs["tokens"] = self.tokens_seen * self.args.world_size
            elapsed = max(now - self._time_logged, 1e-9)
            logs["tokens_per_second"] = (self.tokens_seen - self._tokens_logged) * self.args.world_size / elapsed
            self._tokens_logged, self._time_logged = self.tokens_seen, now
        self._metrics["train"].pop("num_tokens", None)  # TRL's counts prompts twice; ours is "tokens"
        super().log(logs)

    # -- exact scores

    def score(self, rows: Dataset) -> PairScores:
        """Log-probabilities of every pair's answers under policy and reference, without dropout.

        Each rank takes every world_size-th row and the gathered rows are put back in order, so that
        none is counted twice, as padding for equal batches would.
        """
        was_training = self.model.training
        self.model.eval()
        mine = list(range(self.accelerator.process_index, len(rows), self.accelerator.num_processes))
        found: list[tuple[int, tuple[float, ...]]] = []
        # Longest first: the first batch already needs the most memory.
        mine.sort(key=lambda i: -len(rows[i]["prompt_ids"]) - len(rows[i]["chosen_ids"]) - len(rows[i]["rejected_ids"]))
        for start in range(0, len(mine), self.run.eval.batch):
            indices = mine[start : start + self.run.eval.batch]
            batch_rows = [rows[i] for i in indices]
            batch = self._batch(batch_rows)
            policy = self._logps(batch)
            keys = [str(r["id"]) for r in batch_rows]
            if all(key in self._reference for key in keys):
                reference = [self._reference[key] for key in keys]
            else:
                chosen, rejected = self.compute_ref_log_probs(self.model, batch)
                reference = list(zip(chosen.double().tolist(), rejected.double().tolist(), strict=True))
                self._reference.update(zip(keys, reference, strict=True))
            found += [(i, (*p, *r)) for i, p, r in zip(indices, policy, reference, strict=True)]
        if self.accelerator.num_processes > 1:
            found = gather_object(found)
        self.model.train(was_training)
        values = np.asarray([v for _, v in sorted(found)], dtype=np.float64).reshape(-1, 4)
        policy_chosen, policy_rejected, reference_chosen, reference_rejected = values.T
        return PairScores(
            [str(i) for i in rows["id"]],
            policy_chosen,
            policy_rejected,
            reference_chosen,
            reference_rejected,
            np.asarray([len(ids) for ids in rows["chosen_ids"]], dtype=np.int64),
            np.asarray([len(ids) for ids in rows["rejected_ids"]], dtype=np.int64),
        )

    def _logps(self, batch: dict[str, torch.Tensor]) -> list[tuple[float, float]]:
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        with torch.no_grad(), self.accelerator.autocast():
            output = self.model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                use_cache=False,
                labels=labels,
                fused_lm_head=True,
            )
        chosen, rejected = output.log_probs.sum(dim=1).double().chunk(2)
        return list(zip(chosen.tolist(), rejected.tolist(), strict=True))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Score the held-out pairs exactly, log the figures and keep the summary."""
        self.scores = self.score(self.heldout)
        summary = self.scores.summary(self.run.dpo.beta, self.run.eval.confidence)
        self.history.append({"step": self.state.global_step, **summary})
        low, high = summary["accuracy_interval"]
        metrics = {f"eval/{k}": v for k, v in summary.items() if isinstance(v, int | float)}
        metrics |= {"eval/accuracy_low": low, "eval/accuracy_high": high}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def check_start(self) -> None:
        """Before the first update policy and reference are one: every margin is 0 and the DPO loss ln 2.

        Raises:
            UserError: they differ, so every number of the run would be measured from a wrong zero.
        """
        few = self.train_dataset.select(range(min(4, len(self.train_dataset))))
        scores = self.score(few)
        tokens = scores.tokens_chosen + scores.tokens_rejected
        off = float(np.max(np.abs(scores.margins) / tokens))
        # Rounding of the format the model computes in, per token; a moved base is off by far more.
        tolerance = 1e-5 if next(self.model.parameters()).dtype is torch.float32 else 1e-2
        if not off <= tolerance:
            raise UserError(
                f"Before the first update the policy is not its reference: margins differ by {off:.2g} nats a token. "
                "Some lora.init or a changed base model moves the start; nothing was trained."
            )
