"""Which engine a trainer runs on, decided by the model's facts and a probe, and the reference it compares with."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray

from dpo_lora.choices import Engine
from dpo_lora.dpo.rows import PairTokens, ReferenceRows, lengths
from dpo_lora.engine.batching import TokenBudget, why_inseparable
from dpo_lora.engine.eligibility import Verdict, judge, sliding_window
from dpo_lora.engine.forward import PackedForward
from dpo_lora.engine.lanes import threads_are_bound
from dpo_lora.engine.proofs import Proofs
from dpo_lora.engine.reference_cache import LogProbs, ReferenceCache, Tokens, scope_of, sequence_log_probs
from dpo_lora.engine.reference_pass import fingerprint_adapter, fingerprint_config, reference_pass
from dpo_lora.errors import UserError
from dpo_lora.resources import proofs_folder, reference_folder
from dpo_lora.schema import RunSettings

if TYPE_CHECKING:
    from dpo_lora.dpo.trainer import PairTrainer

log = logging.getLogger(__name__)

# Tokens in memory at a time to start from and to grow to. On a CPU, where it is for each lane, matrix products gain
# nothing past some hundred rows while buffers leave the cache; a GPU waits for Python below some thousand tokens, and
# above the ceiling time gains little for much memory (measured: docs/performance.md).
CPU_TOKENS = 1280
GPU_TOKENS = (8192, 16384)


@dataclass(frozen=True)
class EngineChoice:
    """The engine a run trains on; ``packed`` is None for TRL's own forward pass."""

    packed: PackedForward | None
    reason: str | None  # why it is not packed
    difference: float | None  # the probe's: packed against stock log-probabilities, relative
    layers: str | None = None  # the model's own or written out; None where it is not packed
    lanes: int = 1  # rows computed at once
    is_known: bool = False  # the probe was passed by an earlier run, on the same bits by the same code

    def describe(self) -> dict[str, Any]:
        return {
            "engine": "stock" if self.packed is None else "packed",
            "attention": None if self.packed is None else self.packed.attention,
            "layers": self.layers,
            "lanes": self.lanes,
            "why_stock": self.reason,
            "probe_difference": self.difference,
            "probe_known": self.is_known,
        }


def choose_engine(trainer: PairTrainer) -> EngineChoice:
    """Install the packed forward pass on the trainer's model where a check finds it equal.

    Raises:
        UserError: ``train.engine=packed`` and the model cannot be packed.
    """
    train = trainer.run.train
    if train.engine is Engine.stock:
        return EngineChoice(None, "train.engine=stock", None)
    rows = _probed(trainer)
    longest = max(longest_sequence(trainer.train_dataset), longest_sequence(trainer.heldout))
    # A kernel that was asked for works in the model's own layers; the written-out ones have theirs.
    kernel: dict[str, Any] = {} if train.attention == "auto" else {"kernel": train.attention, "layers": "plain"}
    with trainer.accelerator.autocast():
        proofs = None if trainer.weights is None else Proofs(proofs_folder(), trainer.weights)
        verdict: Verdict = judge(trainer.model, trainer.batch(rows), longest, proofs, **kernel)
    if not verdict.eligible:
        if train.engine is Engine.packed:
            raise UserError(f"train.engine=packed is not possible: {verdict.reason}. Use train.engine=auto or stock.")
        log.warning("TRL's own forward pass is used: %s.", verdict.reason)
        return EngineChoice(None, verdict.reason, verdict.difference)
    statistics: tuple[str, ...] = ("entropy", "mean_logits", "is_top1")
    if trainer.run.dpo.use_weighting:
        statistics += ("log_sum_sq_probs",)
    packed = PackedForward(trainer.model, statistics, **kernel, recompute=train.recomputes)
    packed.install()
    with trainer.accelerator.autocast():
        layers = "written out" if packed.writes_out() else "the model's"
        lanes = packed.lanes_here()
    when = " (checked by an earlier run)" if verdict.known else ""
    difference = verdict.difference
    if packed.attention == "flash" and threads_are_bound():
        log.warning(
            "There are %d threads and fewer processors that this process may use: rows are computed one by one and by "
            "torch's slower operations. Leave train.threads=null, or set it to the number of processors.",
            torch.get_num_threads(),
        )
    log.info("Pair packing: attention %s; probe differs by %.1e from stock%s.", packed.attention, difference, when)
    return EngineChoice(packed, None, difference, layers, lanes, verdict.known)


def _probed(trainer: PairTrainer) -> list[dict[str, Any]]:
    """What the check reads: how two pairs begin; and the longest whole, where a sliding window hides some of it."""
    rows = trainer.train_dataset
    found = [_beginning(rows[i]) for i in range(min(2, len(rows)))]
    window = sliding_window(trainer.accelerator.unwrap_model(trainer.model).config.get_text_config())
    if window is not None and longest_sequence(rows) > window:
        found[0] = rows[int(_sequences(rows).argmax())]
    return found


def _beginning(row: dict[str, Any]) -> dict[str, Any]:
    """A pair's first words: what length alone decides the facts say, and a run pays for its probe."""
    chosen, rejected = row["chosen_ids"], row["rejected_ids"]
    shorter = min(len(chosen), len(rejected))
    alike = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
    cuts = {"prompt_ids": 48, "chosen_ids": alike + 32, "rejected_ids": alike + 32}
    return {**row, **{side: row[side][:tokens] for side, tokens in cuts.items()}}


def token_budget(trainer: PairTrainer) -> TokenBudget:
    """The budget that ``train.tokens_per_batch`` asks for: auto grows while steps fit, a number is the upper limit."""
    lanes, asked = trainer.engine.lanes, trainer.run.train.tokens_per_batch
    if asked != "auto":
        start = ceiling = int(asked)
    elif trainer.args.device.type == "cpu":
        start = ceiling = lanes * CPU_TOKENS
    else:
        start, ceiling = GPU_TOKENS
    return TokenBudget(start, ceiling, floor=1, lanes=lanes)


def warn_inseparable(run: RunSettings, router_aux_loss: bool) -> None:
    """Say that memory settings move the result, for the losses where they do."""
    reason = why_inseparable(run.dpo.loss_type, router_aux_loss)
    if reason is not None and run.train.micro_batch is not None:
        log.warning("%s: train.micro_batch=%d changes the result.", reason, run.train.micro_batch)


def longest_sequence(rows: Dataset) -> int:
    """Tokens of the longest prompt + answer."""
    return int(_sequences(rows).max())


def _sequences(rows: Dataset) -> NDArray[np.int32]:
    """Tokens of each row's prompt and longer answer, [N]."""
    prompt, chosen, rejected = lengths(rows).T
    return prompt + np.maximum(chosen, rejected)


@dataclass(frozen=True)
class ReferenceUse:
    """Where the reference's log-probabilities came from, for the manifest."""

    found: int
    computed: int

    def describe(self) -> dict[str, int]:
        return {"pairs_found": self.found, "pairs_computed": self.computed}


def attach_reference(
    trainer: PairTrainer,
    rows: Dataset,
    ld_alpha: float | None,
    numbers: NDArray[np.int64],
) -> tuple[ReferenceRows, ReferenceUse]:
    """``rows`` with the reference's log-probabilities, from the cache or computed into it.

    Args:
        ld_alpha: weight of tokens past the shorter answer, as the loss takes it; None for plain sums.
        numbers: of the rows that will be asked for.
    """
    weights = trainer.weights
    assert trainer.engine.packed is not None and weights is not None
    packed, run = trainer.engine.packed, trainer.run
    adapter = fingerprint_adapter(trainer.model)
    scope = scope_of(
        base=weights,
        config=fingerprint_config(trainer.model),
        adapter=adapter,
        dtype=str(trainer.model.dtype),
        autocast=bool(trainer.args.bf16),
        device=trainer.args.device.type,
    )
    cache = ReferenceCache(reference_folder(), int(run.train.reference_cache_gb * 1e9))
    budget = token_budget(trainer)
    compute = reference_pass(packed, budget)

    def computed(part: list[Tokens]) -> list[LogProbs]:
        with trainer.accelerator.autocast():
            return compute(part)

    about = {"base": run.model.name, "weights": weights, "adapter": adapter, "data": run.data.name}
    sums = np.full((len(rows), 2), np.nan)

    known = np.zeros(len(rows), dtype=bool)
    known[numbers] = True

    def note(number: int, values: LogProbs) -> None:
        sums[numbers[number]] = sequence_log_probs(values, ld_alpha)

    wanted = rows if known.all() else rows.select(numbers)
    found, made = cache.visit(scope, PairTokens(wanted), computed, note, about)
    return ReferenceRows(rows, sums, known), ReferenceUse(found, made)
