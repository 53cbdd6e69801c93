"""TRL's configuration of a run."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import trl
from transformers.training_args import OptimizerNames

from dpo_lora.device import Machine
from dpo_lora.errors import UserError, nearest
from dpo_lora.schema import RunSettings, TrainSettings


def optimizer_steps(train: TrainSettings, training_pairs: int) -> int:
    """Steps that these settings make over so many pairs."""
    return train.max_steps or math.floor(train.epochs * (training_pairs // train.pairs_per_step))


def arguments(run: RunSettings, machine: Machine, folder: Path, training_pairs: int) -> trl.DPOConfig:
    """TRL's configuration for these settings.

    Args:
        folder: where checkpoints go.
        training_pairs: how many there are; fewer than one step's worth cannot train.

    Raises:
        UserError: too few pairs for one optimizer step, or an optimizer that transformers does not have.
    """
    train, dpo = run.train, run.dpo
    if training_pairs < train.pairs_per_step:
        raise UserError(
            f"train.pairs_per_step={train.pairs_per_step}, but there are only {training_pairs} training pairs. "
            f"Set train.pairs_per_step={training_pairs} or lower."
        )
    optimizers = [name.value for name in OptimizerNames]
    if train.optimizer not in optimizers:
        raise UserError(
            f"train.optimizer={train.optimizer} is unknown.{nearest(train.optimizer, optimizers)} "
            f"There are: {', '.join(optimizers)}."
        )
    steps = optimizer_steps(train, training_pairs)
    if steps < 1:
        raise UserError(f"train.epochs={train.epochs} over {training_pairs} pairs is less than one optimizer step.")
    config = trl.DPOConfig(
        output_dir=str(folder),
        # The loss, by TRL's own names
        loss_type=list(dpo.loss_type),
        loss_weights=None if dpo.loss_weights is None else list(dpo.loss_weights),
        beta=dpo.beta,
        label_smoothing=dpo.label_smoothing,
        f_divergence_type=dpo.f_divergence_type,
        f_alpha_divergence_coef=dpo.f_alpha_divergence_coef,
        discopop_tau=dpo.discopop_tau,
        ld_alpha=dpo.ld_alpha,
        use_weighting=dpo.use_weighting,
        # lora_dropout is a dropout of the model: TRL would silence it. One setting, one meaning.
        disable_dropout=run.lora.dropout == 0,
        max_length=None,  # the pairs are cut to data.max_length already
        # The steps
        per_device_train_batch_size=train.pairs_per_step,
        gradient_accumulation_steps=1,  # the trainer below cuts a step's pairs itself
        dataloader_drop_last=True,  # a step is never fewer pairs; what an epoch leaves over changes with its shuffle
        max_steps=steps,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.schedule.value,
        warmup_steps=math.ceil(train.warmup * steps),
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim=train.optimizer,
        gradient_checkpointing=train.recomputes,
        # The machine
        use_cpu=machine.device.type == "cpu",
        bf16=machine.dtype is torch.bfloat16,
        seed=run.seed,
        # What it says and keeps: our own callbacks do the talking
        report_to="none",
        disable_tqdm=True,
        logging_steps=train.log_every,
        logging_nan_inf_filter=False,  # a NaN loss would be logged as the mean of earlier ones
        eval_strategy="steps" if run.eval.every else "no",
        eval_steps=run.eval.every or None,
        save_strategy="steps" if train.save_every else "no",
        save_steps=train.save_every or 500,
        remove_unused_columns=False,
        dataloader_pin_memory=machine.device.type == "cuda",
    )
    # Where a process sees several GPUs transformers would spread it over all of them, which DPO does not allow.
    config._n_gpu = min(config.n_gpu, 1)
    return config
