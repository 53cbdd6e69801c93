"""A finished adapter on its base model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dpo_lora.choices import Quantization
from dpo_lora.errors import UserError
from dpo_lora.rundir import FINISHED, RunDir


def require_finished(run: RunDir) -> None:
    """Stop where there is no adapter to take.

    Raises:
        UserError: the run has not finished.
    """
    if run.status() != FINISHED:
        raise UserError(
            f"{run.path} has no finished adapter (status {run.status()}); 'dpo-lora resume {run.path}' first."
        )


def load(run: RunDir, *, quantized: bool = True) -> tuple[Any, Any]:
    """Model with the run's adapter, and tokenizer.

    Args:
        quantized: load the base as the run did; False: always with whole weights, for merging.

    Raises:
        UserError: the run has no adapter yet, or its base model is not to be had.
    """
    require_finished(run)
    import peft
    from transformers import AutoTokenizer

    from dpo_lora import device, model
    from dpo_lora.settings import from_plain

    settings = from_plain(run.settings())
    base_settings = settings.model if quantized else replace(settings.model, quantization=Quantization.none)
    # The base is made from its identity, not from the path in adapter_config.json: a run copied from
    # another machine names a folder that is not here.
    with run.in_its_folder():
        base = model.load(base_settings, device.choose(device.for_use(settings.train), settings.seed))
    policy = peft.PeftModel.from_pretrained(base.model, str(run.path))
    policy.eval()
    return policy, AutoTokenizer.from_pretrained(str(run.path))
