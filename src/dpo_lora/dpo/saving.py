"""What a trainer leaves on the disk: the adapter alone, and checkpoints that are whole or absent."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import trl

from dpo_lora import checkpoints


class WholeCheckpoints(trl.DPOTrainer):
    """TRL's trainer, saving through :mod:`dpo_lora.checkpoints`.

    Args:
        keep_checkpoints: how many of the newest stay.
        binding: what a checkpoint belongs to; written into its manifest.
        protected_step: asked at each save for the step whose checkpoint stays whatever its age.
    """

    model: Any

    def __init__(
        self,
        *args: Any,
        keep_checkpoints: int,
        binding: dict[str, str],
        protected_step: Callable[[], int | None],
        **kwargs: Any,
    ):
        self.protected_step = protected_step
        self.keep_checkpoints = keep_checkpoints
        self.binding = binding
        super().__init__(*args, **kwargs)

    def save_adapter(self, folder: Path) -> None:
        """The trained adapter, loadable from ``folder`` by transformers and PEFT."""
        model = self.accelerator.unwrap_model(self.model)
        # save_embedding_layers: PEFT would ask the hub whether the vocabulary changed; it did not.
        model.save_pretrained(folder, selected_adapters=["default"], save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; ours follows
        for file in folder.glob("adapter_*"):
            file.chmod(0o644)  # safetensors makes files that only their owner reads

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        assert output_dir is not None
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        self.save_adapter(Path(output_dir))  # and no training_args.bin: a pickle, with the hub token in clear

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        assert self.args.output_dir is not None
        folder = Path(self.args.output_dir)
        with self._staging(folder) as staging:
            # The grandparent's: TRL's would write a model card template into each checkpoint.
            super(trl.DPOTrainer, self)._save_checkpoint(model, trial)
        if self.args.should_save:
            staged = staging / f"checkpoint-{self.state.global_step}"
            self._beside_checkpoint(staged)
            checkpoints.seal(staged, folder, self.binding)
            best = self.protected_step()
            protected = None if best is None else checkpoints.at_step(folder, best)
            checkpoints.rotate(folder, self.keep_checkpoints, protected)
            checkpoints.clear_staging(folder)

    def _beside_checkpoint(self, folder: Path) -> None:
        """What else belongs into a checkpoint; written before it is sealed."""

    @contextlib.contextmanager
    def _staging(self, folder: Path) -> Iterator[Path]:
        staging = folder / checkpoints.STAGING
        checkpoints.clear_staging(folder)
        staging.mkdir(parents=True, exist_ok=True)
        self.args.output_dir = str(staging)
        try:
            yield staging
        finally:
            self.args.output_dir = str(folder)

    def load_adapter(self, location: str) -> None:
        """Replace the trained adapter by the one saved in a folder or on the hub."""
        self._load_from_checkpoint(location)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # Only the trained adapter: the reference copy of a parent's adapter is the parent's, not the checkpoint's.
        self.model.load_adapter(resume_from_checkpoint, "default", is_trainable=True)
        self.model.set_adapter("default")
