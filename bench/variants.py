"""The same optimizer steps made in different ways: stock TRL, tuned stock TRL, and the pair engine."""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING
from unittest.mock import patch

import torch

from bench.workloads import PAIRS_PER_STEP, make_trainer

if TYPE_CHECKING:
    from dpo_lora.engine.forward import PackedForward


AUTO = -1  # as budget: what the product takes by itself


@contextmanager
def replaced(products: bool, native: bool):
    """The engine's float32 products by the other one of oneDNN and torch's BLAS, its C++ by torch's operations."""
    from dpo_lora.engine import products as own
    from dpo_lora.engine.native import passes

    other = not own.by_onednn()
    with ExitStack() as stack:
        if products:
            stack.enter_context(patch.object(own, "by_onednn", lambda: other))
        if native:
            stack.enter_context(patch.object(passes, "serve", lambda *_: False))
        yield


class Bench:
    """One model, one trainer; every variant is a way to make the same optimizer steps with it."""

    def __init__(
        self,
        shape: str,
        rows: list[dict],
        device: str,
        dtype: torch.dtype,
        budget: int | None,
        pairs_per_step: int = PAIRS_PER_STEP,
    ) -> None:
        self.rows, self.device, self.budget, self.pairs_per_step = rows, device, budget, pairs_per_step
        self.dtype = dtype
        self.trainer = make_trainer(shape, rows, tempfile.mkdtemp(), device, dtype)
        self.model = self.trainer.model
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.start = [p.detach().clone() for p in self.parameters]

    def autocast(self):
        """What transformers' trainer computes losses under: autocast, where the weights are in bfloat16."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    @contextmanager
    def checkpointing(self, on: bool):
        if on:
            self.model.gradient_checkpointing_enable()
        else:
            self.model.gradient_checkpointing_disable()
        yield

    def reference(self, batch_size: int = 8) -> float:
        """TRL's precomputed reference log-probs as columns of the rows; seconds it took, rows sorted by length."""
        self.model.gradient_checkpointing_disable()
        order = self.by_length()
        for row in self.rows:
            row.pop("ref_chosen_logps", None), row.pop("ref_rejected_logps", None)
        began = self.now()
        for at in range(0, len(order), batch_size):
            part = [self.rows[i] for i in order[at : at + batch_size]]
            with self.autocast():
                found = self.trainer.compute_ref_log_probs(self.model, self.batch(part))
            for row, chosen, rejected in zip(part, *found, strict=True):
                row["ref_chosen_logps"], row["ref_rejected_logps"] = chosen.item(), rejected.item()
        return self.now() - began

    def by_length(self) -> list[int]:
        return sorted(range(len(self.rows)), key=lambda i: sum(map(len, list(self.rows[i].values())[:3])))

    def batch(self, rows: list[dict]) -> dict:
        return {k: v.to(self.device) for k, v in self.trainer.data_collator(rows).items()}

    def planned_batch(self, rows: list[dict]) -> dict:
        """What the product's trainer makes of the rows: the plan beside them, nothing waits for the device."""
        from dpo_lora.engine.packing import PairCollator, sent

        return {k: sent(v, self.device) for k, v in PairCollator(self.trainer.data_collator)(rows).items()}

    def epoch(self, steps: list[list[list[int]]], cached: bool, planned: bool = False) -> tuple[float, list[float]]:
        """Seconds for the steps, and their losses. A step is a list of micro-batches of row numbers."""
        made = self.planned_batch if planned else self.batch
        with torch.no_grad():
            for p, start in zip(self.parameters, self.start, strict=True):
                p.copy_(start)
        optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)  # the default of TRL and of ours
        self.trainer.precompute_ref_logps = cached
        losses = []
        began, worked = self.now(), time.process_time()
        for step in steps:
            count = sum(len(micro) for micro in step)
            total = 0.0
            for micro in step:
                batch = made([self.rows[i] for i in micro])
                with self.autocast():
                    loss = self.trainer._compute_loss(self.model, batch, False) * (len(micro) / count)
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
        self.processor_seconds = time.process_time() - worked
        return self.now() - began, losses

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def stock(self) -> tuple[float, list[float]]:
        with self.checkpointing(True):
            return self.epoch([[step] for step in self.steps()], cached=False)

    def tuned(self, batch_size: int) -> tuple[float, list[float]]:
        """The same number of pairs a step, over rows sorted by length (so its steps hold other pairs)."""
        order = self.by_length()
        steps = [order[i : i + self.pairs_per_step] for i in range(0, len(order), self.pairs_per_step)]
        cut = [[s[i : i + batch_size] for i in range(0, len(s), batch_size)] for s in steps]
        with self.checkpointing(False):
            return self.epoch(cut, cached=True)

    def ours(
        self, cached: bool, budget: int | None = AUTO, other_products: bool = False, native: bool = True, **engine
    ) -> tuple[float, list[float]]:
        from dpo_lora.engine.batching import common_opening, cut, pair_tokens
        from dpo_lora.engine.forward import PackedForward

        packed = PackedForward(self.model, **engine)
        lanes = packed.lanes_here()
        budget = self.budget if budget == AUTO else budget
        budget = self.auto_budget(packed) if budget == AUTO else budget
        steps = []
        for step in self.steps():
            opening = common_opening([self.rows[i]["prompt_ids"] for i in step])
            micros = cut([pair_tokens(self.rows[i]) for i in step], budget, opening=opening, lanes=lanes)
            steps.append([[step[i] for i in m.pairs] for m in micros])
        packed.install()
        try:
            with self.checkpointing(False), replaced(products=other_products, native=not native):
                spent = 0.0 if cached else self.own_reference(packed)
                seconds, losses = self.epoch(steps, cached=True, planned=True)
                return spent + seconds, losses
        finally:
            packed.detach()

    def auto_budget(self, packed: PackedForward) -> int:
        """Tokens in memory at a time that train.tokens_per_batch=auto starts from."""
        from dpo_lora.dpo.engines import CPU_TOKENS, GPU_TOKENS

        return GPU_TOKENS[0] if self.device == "cuda" else packed.lanes_here() * CPU_TOKENS

    def own_reference(self, packed: PackedForward) -> float:
        """The engine's reference pass over all rows, as a run with an empty cache makes it; seconds it took."""
        from dpo_lora.dpo.engines import GPU_TOKENS
        from dpo_lora.engine.batching import TokenBudget
        from dpo_lora.engine.reference_cache import sequence_log_probs
        from dpo_lora.engine.reference_pass import reference_pass

        tokens = [
            tuple(([*row["prompt_ids"], *row[side]], len(row["prompt_ids"])) for side in ("chosen_ids", "rejected_ids"))
            for row in self.rows
        ]
        began = self.now()
        start = self.auto_budget(packed)
        ceiling = GPU_TOKENS[1] if self.device == "cuda" else start
        compute = reference_pass(packed, TokenBudget(start, ceiling, lanes=packed.lanes_here()))
        with self.autocast():
            computed = compute(tokens)
        for row, values in zip(self.rows, computed, strict=True):
            row["ref_chosen_logps"], row["ref_rejected_logps"] = map(float, sequence_log_probs(values, None))
        return self.now() - began

    def adapter(self) -> torch.Tensor:
        """All trained weights as they are now, one flat vector."""
        return torch.cat([p.detach().flatten() for p in self.parameters])

    def steps(self) -> list[list[int]]:
        numbers = list(range(len(self.rows)))
        return [numbers[i : i + self.pairs_per_step] for i in range(0, len(numbers), self.pairs_per_step)]

    def real_tokens(self) -> int:
        return sum(len(r[k]) for r in self.rows for k in ("prompt_ids", "chosen_ids", "rejected_ids"))

    def useful_flops(self, cached: bool) -> float:
        """Matrix-product work nobody can avoid: base and LoRA products of real tokens, the head where labels
        are."""
        base = sum(
            p.numel() for n, p in self.model.named_parameters() if "layers" in n and p.dim() == 2 and "lora" not in n
        )
        lora = sum(p.numel() for p in self.parameters)
        head = self.model.get_output_embeddings().weight.numel()
        labels = sum(len(r[k]) for r in self.rows for k in ("chosen_ids", "rejected_ids"))
        forward = 2 * base * self.real_tokens() + 2 * head * labels
        return 2 * forward + 6 * lora * self.real_tokens() + (0 if cached else forward)
