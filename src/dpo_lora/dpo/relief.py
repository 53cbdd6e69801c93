"""What training steps give for memory when one does not fit: time, from then on.

First layers keep their inputs alone and compute the rest again in the backward pass (gradient checkpointing). On a GPU
that takes less time than cutting steps of some thousand tokens finer, on a CPU more (docs/performance.md). Then, on a
GPU and where no finer cut is left, what layers keep waits in the host's memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

from dpo_lora.dpo.engines import GPU_TOKENS

if TYPE_CHECKING:
    from dpo_lora.dpo.trainer import PairTrainer

log = logging.getLogger(__name__)

_ADVICE = "Lower data.max_length or use a smaller model."


class _Measure(NamedTuple):
    name: str  # as run.json has it
    told: str
    below: int  # taken before steps of at most so many tokens are cut finer
    take: Callable[[], None]


class Relief:
    """The measures that a run's settings, its model and its device allow, in their order.

    ``taken`` names those that were; ``advice`` is for people where they do not suffice.
    """

    def __init__(self, trainer: PairTrainer) -> None:
        self.trainer = trainer
        self.taken: list[str] = []
        self.advice = _ADVICE
        self._left: list[_Measure] = []
        train, on_gpu = trainer.run.train, trainer.args.device.type == "cuda"
        if train.gradient_checkpointing is False:
            self.advice = f"{_ADVICE[:-1]}, or leave out train.gradient_checkpointing=false."
            return
        if not train.recomputes and (self._writes_out() or trainer.model.supports_gradient_checkpointing):
            told = "layers are computed again in the backward pass"
            self._left.append(_Measure("gradient_checkpointing", told, GPU_TOKENS[0] if on_gpu else 0, self._recompute))
        if on_gpu and self._writes_out():
            told = "what layers keep for the backward pass waits in the host's memory"
            self._left.append(_Measure("activation_offloading", told, 0, self._offload))

    def __call__(self, tokens: int, finest: bool) -> bool:
        """Take the next measure, where there is one and it is due.

        Args:
            tokens: in memory at a time, which did not fit.
            finest: no finer cut is possible.
        """
        if not self._left or not (finest or tokens <= self._left[0].below):
            return False
        measure = self._left.pop(0)
        measure.take()
        self.taken.append(measure.name)
        log.warning("A step did not fit in memory. From here on %s, which takes longer.", measure.told)
        return True

    def take_again(self, names: list[str]) -> None:
        """Take these measures, as the run did before it was cut off."""
        for measure in [m for m in self._left if m.name in names]:
            self._left.remove(measure)
            measure.take()
            self.taken.append(measure.name)

    def _writes_out(self) -> bool:
        packed = self.trainer.engine.packed
        return packed is not None and packed.writes_out()

    def _recompute(self) -> None:
        packed = self.trainer.engine.packed
        if packed is not None and packed.writes_out():
            packed.recompute = True
        else:
            self.trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def _offload(self) -> None:
        self.trainer.maybe_activation_offload_context = torch.autograd.graph.save_on_cpu(pin_memory=True)
