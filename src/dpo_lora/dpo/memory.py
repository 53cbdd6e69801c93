"""How much of a step is in memory at a time, and what was given up for it.

Both are found out by trying. Checkpoints carry what was found, so that a run that is resumed cuts its steps as it would
have without the stop, and does not run out of memory a second time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dpo_lora.dpo.engines import token_budget
from dpo_lora.dpo.relief import Relief
from dpo_lora.engine.batching import MicroBatch
from dpo_lora.files import write_json

if TYPE_CHECKING:
    from dpo_lora.dpo.trainer import PairTrainer

_FILE = "memory.json"


class StepMemory:
    """The token budget of a trainer's steps, and its relief. Made once the trainer has its engine."""

    def __init__(self, trainer: PairTrainer) -> None:
        device = trainer.args.device
        self.budget = token_budget(trainer)
        self.relief = Relief(trainer)
        self._device = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

    def run(
        self,
        sizes: Sequence[int],
        step: Callable[[list[MicroBatch]], torch.Tensor],
        reset: Callable[[], None],
        opening: int,
        whole: bool,
    ) -> torch.Tensor:
        """One optimizer step, as :meth:`TokenBudget.run` makes it, with this trainer's relief.

        Raises:
            UserError: it does not fit, whatever is tried.
        """
        return self.budget.run(sizes, step, reset, opening, whole, self.relief, self.relief.advice)

    def save(self, checkpoint: Path) -> None:
        budget = {"tokens": self.budget.tokens, "ceiling": self.budget.ceiling, "clean": self.budget.clean}
        known = {"device": self._device, "lanes": self.budget.lanes, "budget": budget, "relief": self.relief.taken}
        write_json(checkpoint / _FILE, known)

    def restore(self, checkpoint: Path) -> None:
        """Go on from what a checkpoint carries, unless it was written beside another device's memory, or for another
        number of rows at once."""
        file = checkpoint / _FILE
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if (known.get("device"), known.get("lanes")) == (self._device, self.budget.lanes):
            vars(self.budget).update(known["budget"])
            self.relief.take_again(known["relief"])
