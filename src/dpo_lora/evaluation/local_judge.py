"""A judge on this machine: a reward model that scores each answer, or a chat model that is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dpo_lora import model as models
from dpo_lora.errors import UserError
from dpo_lora.evaluation.duels import Duel
from dpo_lora.evaluation.judge import BOTH_ORDERS, Judge, Verdict, winner

if TYPE_CHECKING:
    from dpo_lora.device import Machine

_LETTERS = ("A", "B", "T")


def load(location: str, machine: Machine) -> Judge:
    """The model in ``location`` (a folder or hub id) as a judge, by what its configuration says it is.

    Raises:
        UserError: there is no such model, it has no chat template, or it classifies instead of scoring.
    """
    from transformers import AutoConfig

    try:
        kinds = AutoConfig.from_pretrained(location).architectures or []
    except (OSError, ValueError) as error:
        raise UserError(f"--local {location} could not be loaded as a model: {error}") from error
    if any(kind.endswith("ForSequenceClassification") for kind in kinds):
        return _RewardModel(location, machine)
    return _ChatModel(location, machine)


class _RewardModel:
    """Scores each answer by itself, so there is no order to ask in; the higher score wins."""

    orders: tuple[bool, ...] = (False,)

    def __init__(self, location: str, machine: Machine):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(location)
        self._model: Any = AutoModelForSequenceClassification.from_pretrained(location, dtype=machine.dtype)
        self._model.to(machine.device).eval()
        if self._model.config.num_labels != 1:
            raise UserError(
                f"--local {location} has {self._model.config.num_labels} outputs; a reward model has one, the score."
            )
        if self._tokenizer.chat_template is None:
            raise UserError(f"--local {location} has no chat template, so an answer cannot be put to it.")
        self.model = _named(location, self._model)

    def decide(self, duel: Duel, swapped: bool) -> Verdict:
        first, second = (self._score(duel, answer) for answer in (duel.first, duel.second))
        better = "tie" if first[0] == second[0] else "second" if second[0] > first[0] else "first"
        usage = {"prompt_tokens": first[1] + second[1], "completion_tokens": 0}
        return Verdict(better, f"{first[0]:.6g} against {second[0]:.6g}", usage)

    def _score(self, duel: Duel, answer: str) -> tuple[float, int]:
        """The reward and how many tokens were read."""
        import torch

        turns = [*duel.turns, {"role": "assistant", "content": answer}]
        inputs = self._tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            logits = self._model(**inputs.to(self._model.device)).logits
        return float(logits[0, 0]), int(inputs["input_ids"].shape[1])


class _ChatModel:
    """Asked in both orders; its verdict is the likeliest of the three letters, so that it always has one."""

    orders = BOTH_ORDERS

    def __init__(self, location: str, machine: Machine):
        from dpo_lora import settings

        chosen = settings.composed(["model=hub", f"model.name='{location}'"]).model
        loaded = models.load(chosen, machine)
        self._model: Any = loaded.model.eval()
        self._tokenizer: Any = loaded.tokenizer
        self._ids = [self._tokenizer.encode(letter, add_special_tokens=False)[0] for letter in _LETTERS]
        self.model = _named(location, self._model)

    def decide(self, duel: Duel, swapped: bool) -> Verdict:
        import torch

        inputs = self._tokenizer.apply_chat_template(
            duel.messages(swapped), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            logits = self._model(**inputs.to(self._model.device)).logits[0, -1].float()
        letter = _LETTERS[int(logits[self._ids].argmax())]
        usage = {"prompt_tokens": int(inputs["input_ids"].shape[1]), "completion_tokens": 1}
        return Verdict(winner(letter, swapped), letter, usage)


def _named(location: str, loaded: Any) -> str:
    """With the weights' fingerprint: a folder may hold another model tomorrow."""
    return f"{location}@{models.weights_fingerprint(loaded)[:12]}"
