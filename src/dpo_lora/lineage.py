"""Versions of an adapter: which one it goes on from, and its number in the line."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import xxhash

from dpo_lora.errors import UserError
from dpo_lora.lora import ALL_LINEAR, require_still_base
from dpo_lora.rundir import FINISHED, find


@dataclass(frozen=True)
class Parent:
    """A finished adapter: a run directory of ours, or an adapter on the hub."""

    name: str
    location: str  # what PEFT loads
    version: int
    base: dict[str, Any] | None  # identity of its base weights, where it is known

    def facts(self, child: Path) -> dict[str, Any]:
        """For the child's manifest; the link is relative where the parent lies on the same disk."""
        local = Path(self.location).is_dir()
        link = (
            f"{os.path.relpath(self.location, child)}/README.md" if local else f"https://huggingface.co/{self.location}"
        )
        return {"name": self.name, "location": self.location, "version": self.version, "link": link}


def resolve(parent: str | None, outputs: Path) -> Parent | None:
    """The parent that the settings name: a run, ``latest``, or a hub id.

    Raises:
        UserError: the run is unknown or has not finished.
    """
    if parent is None:
        return None
    try:
        run = find(parent, outputs)
    except UserError:
        if parent.count("/") == 1 and not parent.startswith((".", "/", str(outputs))):
            return Parent(parent.rsplit("/", 1)[-1], parent, 1, None)
        raise
    manifest = run.manifest()
    if manifest["status"] != FINISHED:
        raise UserError(
            f"parent={parent} has not finished (status {run.status()}); finish it with 'dpo-lora resume {run.path}'."
        )
    return Parent(
        run.path.name,
        str(run.path),
        int(manifest.get("version", 1)),
        manifest["reference"]["base"]["identity"],
    )


def adapter(parent: Parent, model: torch.nn.Module, identity: dict[str, Any]) -> peft.PeftModel:
    """``model`` with the parent's adapter, ready to be trained on; TRL keeps a frozen copy as the reference.

    Raises:
        UserError: the parent was trained on other base weights, or its adapter cannot be loaded.
    """
    if parent.base is not None and parent.base["weights"] != identity["weights"]:
        raise UserError(
            f"The parent {parent.name} was trained on {parent.base['name']}, whose weights differ from those of "
            f"{identity['name']}. Train on the same base, with the same number format and quantisation."
        )
    try:
        require_still_base(parent.location, peft.PeftConfig.from_pretrained(parent.location))
        return peft.PeftModel.from_pretrained(model, parent.location, is_trainable=True)
    except (OSError, ValueError, RuntimeError, json.JSONDecodeError) as error:
        raise UserError(
            f"The adapter of parent={parent.location} could not be loaded onto this base: {error}"
        ) from error


def require_same_shape(parent: Parent, policy: peft.PeftModel, wanted: peft.LoraConfig, linear: set[str]) -> None:
    """An adapter keeps the shape it was made with: refuse ``lora`` settings that say another.

    Args:
        policy: the base with the parent's adapter.
        wanted: the adapter that the settings describe.
        linear: the base's own linear layers, what ``all-linear`` stands for.

    Raises:
        UserError: naming the settings to write instead.
    """
    has = policy.peft_config["default"]
    names = {"r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "rslora": "use_rslora", "dora": "use_dora"}
    differ = {
        setting: getattr(has, field)
        for setting, field in names.items()
        if getattr(has, field) != getattr(wanted, field)
    }
    adapted: Any = policy.base_model.targeted_module_names
    targets = {name.rsplit(".", 1)[-1] for name in adapted}
    asked = linear if wanted.target_modules == ALL_LINEAR else set(wanted.target_modules or ())
    if asked != targets:
        differ["targets"] = f"[{','.join(sorted(targets))}]"
    if differ:
        words = " ".join(f"lora.{setting}={value}" for setting, value in differ.items())
        raise UserError(
            f"parent={parent.name} brings its own adapter, of another shape than the lora settings say. "
            f"Go on with it as it is: {words}"
        )


def fingerprint(policy: peft.PeftModel) -> str:
    """32 hex digits of the adapter's weights: what a run goes on from, whatever its folder is called."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(peft.get_peft_model_state_dict(policy).items()):
        digest.update(name.encode())
        digest.update(memoryview(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()
