"""From LoRA settings to a ``peft.LoraConfig`` that fits the model at hand."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft

from dpo_lora.errors import UserError, nearest
from dpo_lora.schema import LoraSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"
# What PEFT calls them; each starts with a zero update, so the adapter switched off is the reference.
INITS: dict[str, Any] = {"default": True, "gaussian": "gaussian"}
# These fold part of the base weights into the adapter: switching it off no longer gives the reference.
MOVE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def config(settings: LoraSettings, model: PreTrainedModel) -> peft.LoraConfig:
    """The adapter to train on ``model``.

    Raises:
        UserError: a target that the model lacks, or an initialisation that would move the reference.
    """
    if settings.init.startswith(MOVE_THE_BASE):
        raise UserError(
            f"lora.init={settings.init} rewrites the base weights, so the model with the adapter switched off "
            "would no longer be the reference that DPO compares with. Use lora.init=default or gaussian."
        )
    if settings.init not in INITS:
        raise UserError(f"lora.init={settings.init} is unknown; choose from {', '.join(INITS)}.")
    return peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # annotated int, works and is saved as float
        lora_dropout=settings.dropout,
        target_modules=_targets(settings.targets, model),
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        init_lora_weights=INITS[settings.init],
    )


def _targets(targets: list[str], model: PreTrainedModel) -> str | list[str]:
    if targets == [ALL_LINEAR]:
        return ALL_LINEAR
    present = linear_names(model)
    missing = [t for t in targets if t not in present]
    if missing:
        raise UserError(
            f"lora.targets names {', '.join(missing)}, which this model lacks.{nearest(missing[0], present)} "
            f"It has: {', '.join(sorted(present))}. Or use lora.targets=[{ALL_LINEAR}]."
        )
    return list(targets)


def linear_names(model: PreTrainedModel) -> set[str]:
    """Last name parts of the layers LoRA can adapt, the output head left out (DPO reads its weight directly)."""
    head = model.get_output_embeddings()
    return {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if module is not head and hasattr(module, "weight") and type(module).__name__ in _ADAPTABLE
    }


_ADAPTABLE = {"Linear", "Conv1D", "Linear4bit", "Linear8bitLt"}


def base_of(location: str) -> str | None:
    """Name of the base model of a saved adapter; None where ``location`` is no adapter."""
    folder = Path(location)
    if folder.is_dir() and not (folder / "adapter_config.json").is_file():
        return None
    try:
        return str(peft.PeftConfig.from_pretrained(location).base_model_name_or_path)
    except (OSError, ValueError):
        return None


def saved(location: str) -> peft.PeftConfig:
    """The configuration of a saved adapter, to make one of the same shape.

    Raises:
        UserError: it was initialised by rewriting its base, which would be rewritten again.
    """
    found = peft.PeftConfig.from_pretrained(location)
    require_still_base(location, found)
    found.inference_mode = False  # PEFT saves every adapter as one to infer with; TRL trains what it is given
    return found


def require_still_base(location: str, found: peft.PeftConfig) -> None:
    """Refuse an adapter whose initialisation rewrites the base: switched off, it would not leave the reference.

    Raises:
        UserError: saying how PEFT makes a plain adapter of it.
    """
    init = getattr(found, "init_lora_weights", True)
    if isinstance(init, str) and init.startswith(MOVE_THE_BASE):
        raise UserError(
            f"The adapter {location} was initialised by {init}, which rewrites the base weights, so the model with the "
            "adapter switched off would not be the reference. Convert it first: PEFT's save_pretrained(FOLDER, "
            "path_initial_model_for_weight_conversion=...) writes it as a plain LoRA adapter."
        )
