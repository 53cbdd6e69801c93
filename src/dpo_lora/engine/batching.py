"""Micro-batches by token budget: one optimizer step's pairs cut so that each row fits, whatever the pair
count.

The optimizer steps on exactly the pairs it was given. For a loss that is a mean over pairs the gradient of
the step is sum_m share_m * grad(mean loss of micro-batch m) with share_m = pairs in m / pairs in the step, so
the cut changes nothing but rounding. Losses that look across pairs say so through `separable`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from dpo_lora.engine.packing import LEAST_OPENING, positions_needed
from dpo_lora.engine.partition import evenly
from dpo_lora.errors import UserError

Result = TypeVar("Result")

_ACROSS_PAIRS = {
    "aot": "it sorts the log-ratios of the batch",
    "aot_unpaired": "it sorts the log-ratios of the batch",
    "sft": "it is a mean over the batch's tokens, not over its pairs",
}


def separable(loss_types: Sequence[str], router_aux_loss: bool = False) -> bool:
    """Whether the loss of a batch is the mean of its pairs' losses, so that any cut gives the same
    gradient."""
    return not router_aux_loss and not set(loss_types) & set(_ACROSS_PAIRS)


def why_inseparable(loss_types: Sequence[str], router_aux_loss: bool = False) -> str | None:
    """One line for people, or None."""
    if router_aux_loss:
        return "the router's load-balancing loss is computed over the whole batch"
    name = next((t for t in loss_types if t in _ACROSS_PAIRS), None)
    return None if name is None else f"loss {name!r}: {_ACROSS_PAIRS[name]}"


@dataclass(frozen=True)
class MicroBatch:
    """Which pairs of the step (indices into the list given), and how many positions they take besides an opening."""

    pairs: tuple[int, ...]
    tokens: int


def pair_tokens(row: dict) -> int:
    """Row positions a tokenised pair needs at most (`prompt_ids`, `chosen_ids`, `rejected_ids`)."""
    return positions_needed(*(len(row[k]) for k in ("prompt_ids", "chosen_ids", "rejected_ids")))


def padded_tokens(row: dict) -> int:
    """Positions of a tokenised pair as TRL's own forward pass computes it: two rows as long as the longer one."""
    return 2 * (len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])))


def common_opening(prompts: Sequence[list[int]]) -> int:
    """Tokens that several prompts all begin with and that a row of any of these pairs holds once."""
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)  # by their tokens: whatever lies between begins as these two do
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    shared -= shared == len(first)  # the last token of a prompt predicts: it stays the pair's own
    return shared if shared >= LEAST_OPENING else 0


def cut(
    sizes: Sequence[int], tokens_per_batch: int | None, whole: bool = False, opening: int = 0, lanes: int = 1
) -> list[MicroBatch]:
    """Cut one step's pairs into few micro-batches within the budget, evenly filled.

    sizes: row positions of each pair (`pair_tokens`). A pair larger than the budget gets its own micro-batch.
    With tokens_per_batch None, or whole (a loss that is not separable), all pairs stay together.
    opening: tokens counted in each of the sizes that a row holds once (`common_opening`). Its keys are gathered for
    each pair, which takes about a sixteenth of the memory that as many positions take.
    lanes: rows that are computed at once (`lanes.py`). A micro-batch takes as long as the longest of them, so its pairs
    fill them alike; there may be a few more micro-batches for it than the budget asks for.
    Deterministic: pairs are shared out evenly (`evenly`), the number of micro-batches raised until all fit.
    """
    count = len(sizes)
    if count == 0:
        raise ValueError("an optimizer step needs at least one pair")
    if tokens_per_batch is not None and tokens_per_batch < 1:
        raise UserError(f"tokens_per_batch is {tokens_per_batch}; give a positive number of tokens, or None")
    sizes = [size - opening + opening // 16 for size in sizes]
    total = sum(sizes)
    if whole or tokens_per_batch is None or total <= (budget := max(1, tokens_per_batch - opening)):
        return [MicroBatch(tuple(range(count)), total)]
    for number in range(min(count, -(-total // budget)), count + 1):
        groups = [MicroBatch(tuple(g), sum(sizes[i] for i in g)) for g in evenly(sizes, lanes * number)]
        if all(group.tokens <= budget or len(group.pairs) == 1 for group in groups):
            break
    return sorted(_side_by_side(groups, lanes, budget), key=lambda batch: batch.pairs)


def _side_by_side(groups: list[MicroBatch], lanes: int, budget: int) -> list[MicroBatch]:
    """Groups of about the same size together, up to ``lanes`` of them where they fit the budget at once."""
    batches: list[MicroBatch] = []
    taken = lanes
    for group in sorted(groups, key=lambda group: -group.tokens):
        if taken < lanes and batches[-1].tokens + group.tokens <= budget:
            before = batches.pop()
            group = MicroBatch(tuple(sorted(before.pairs + group.pairs)), before.tokens + group.tokens)
            taken += 1
        else:
            taken = 1
        batches.append(group)
    return batches


def is_out_of_memory(error: BaseException) -> bool:
    """Out of memory on a GPU (its own exception) or on a CPU (a RuntimeError of torch's allocator, or
    Python's)."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # the CPU's allocator; page-locked memory of the host
    told = ("can't allocate memory", "CUDA error: out of memory")
    return isinstance(error, RuntimeError) and any(each in str(error) for each in told)


class TokenBudget:
    """A budget that finds itself: starts at `start`, doubles after `patience` clean steps, halves on
    out-of-memory.

    Once it was halved it never grows again to the size that failed. `ceiling` bounds the growth: on a
    CPU there is no reason to grow past the point where products are efficient and buffers still fit the
    cache. `lanes` as `cut` takes them.
    """

    def __init__(self, start: int, ceiling: int, floor: int = 64, patience: int = 2, lanes: int = 1) -> None:
        self.tokens, self.ceiling, self.floor, self.patience, self.lanes = start, ceiling, floor, patience, lanes
        self.clean = 0

    def run(
        self,
        sizes: Sequence[int],
        step: Callable[[list[MicroBatch]], Result],
        reset: Callable[[], None],
        opening: int = 0,
        whole: bool = False,
        relieve: Callable[[int, bool], bool] = lambda tokens, finest: False,
        advice: str = "Lower data.max_length or use a smaller model.",
    ) -> Result:
        """Call step(micro-batches) for one optimizer step; on out-of-memory reset() (drop gradients) and cut
        finer.

        opening, whole: as `cut` takes them.
        relieve: called with the tokens that did not fit and whether no finer cut is possible. It makes steps take
        less memory another way, or returns False and the step is cut finer.
        advice: what people can do where nothing helps.
        step must not have moved the optimizer when it raises. Any other error passes; so does out-of-memory
        when nothing more can be done, as a `UserError`.
        """
        while True:
            batches = cut(sizes, self.tokens, whole, opening, self.lanes)
            # A small step does not fill the budget: what did not fit is what was there.
            tokens = min(self.tokens, opening + max(batch.tokens for batch in batches))
            try:
                result = step(batches)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                finest = whole or len(batches) == len(sizes) or tokens // 2 < self.floor
                relieved = relieve(tokens, finest)
                if finest and not relieved:
                    raise UserError(f"{_does_not_fit(sizes, whole)} {advice}") from error
            else:
                self._grow()
                return result
            # outside the except block: the traceback would keep the failed step's tensors alive
            reset()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.clean = 0
            if not relieved:
                self.tokens = self.ceiling = tokens // 2

    def _grow(self) -> None:
        self.clean += 1
        if self.clean >= self.patience and self.tokens * 2 <= self.ceiling:
            self.tokens *= 2
            self.clean = 0


def _does_not_fit(sizes: Sequence[int], whole: bool) -> str:
    if whole:
        return (
            f"The {len(sizes)} pairs of a step do not fit in memory, and this loss looks across them. Lower "
            "train.pairs_per_step, or train.micro_batch, which changes what the loss computes."
        )
    return f"A single pair of up to {max(sizes)} tokens does not fit in memory."
