"""What runs inside a trial's process: one trial, from the trial.json in its directory."""

from __future__ import annotations

import faulthandler
import shutil
import sys
from pathlib import Path

from dpo_lora.errors import UserError
from dpo_lora.provenance import record_command
from dpo_lora.rundir import FINISHED
from dpo_lora.settings import from_plain
from dpo_lora.sweeps import endings, pruning
from dpo_lora.sweeps.trial import Trial


def run(path: Path) -> int:
    """Train the trial in ``path``, from its last whole checkpoint where there is one; the exit code.

    Everything but the user's own mistake is raised: the interpreter's traceback goes to output.log.
    """
    from dpo_lora.train import train

    faulthandler.enable()
    trial = Trial.read(path)
    record_command("train", *trial.overrides)
    settings = from_plain(trial.settings)
    try:
        if not trial.run.manifest_file.exists():
            _clear_claim(trial)
            train(settings, trial=path, sweep=path.parent, overrides=trial.overrides, callbacks=pruning.asking(path))
        elif trial.run.manifest()["status"] != FINISHED:
            train(settings, resume=path, sweep=path.parent, callbacks=pruning.asking(path))
    except UserError as error:
        print(f"{endings.TOLD}{error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


def _clear_claim(trial: Trial) -> None:
    """A process killed while it claimed the directory leaves settings without a manifest: no run at all."""
    trial.run.settings_file.unlink(missing_ok=True)
    shutil.rmtree(trial.path / ".hydra", ignore_errors=True)


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1])))
