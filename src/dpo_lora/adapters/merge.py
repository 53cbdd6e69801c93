"""From base model and adapter to one model that needs no PEFT: for servers, converters and quantisers."""

from __future__ import annotations

import tempfile
from pathlib import Path

from dpo_lora.adapters.loading import load
from dpo_lora.errors import UserError
from dpo_lora.rundir import RunDir


def merge(run: RunDir, target: Path) -> None:
    """Write the merged model and its tokenizer into ``target``, whole or not at all.

    The weights are W + scale * B A in the number format that the run computed in. A base that the run
    quantised is loaded whole: merging into quantised weights would round the adapter away.

    Raises:
        UserError: ``target`` holds something, or the run has no adapter.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is there already, and nothing is overwritten. Name a new folder.")
    policy, tokenizer = load(run, quantized=False)
    merged = policy.merge_and_unload(safe_merge=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".merging-") as scratch:
        whole = Path(scratch) / "model"
        merged.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        whole.replace(target)  # an empty folder gives way
