"""A finished adapter onto the hub: only when asked, private unless told otherwise, and only what others can use."""

from __future__ import annotations

import json
import shutil
import tempfile
from json import JSONDecodeError
from pathlib import Path

from dpo_lora.adapters.loading import require_finished
from dpo_lora.errors import UserError
from dpo_lora.files import write_atomic
from dpo_lora.reports import card
from dpo_lora.rundir import RunDir

# Settings, manifest, log and pairs stay here: they name this machine's paths and hold the data's texts.
_PUBLISHED = (
    "adapter_model.safetensors",
    "eval.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


def push(run: RunDir, hub_id: str, *, base: str | None, public: bool) -> str:
    """Upload the adapter, its tokenizer, scores and card; the address of the new commit.

    Args:
        hub_id: ``OWNER/NAME``; made if it is not there.
        base: hub id that others load the base model from; None: the one the run was trained on.
        public: everyone may read a repository that this call makes.

    Raises:
        UserError: no login, no network, no right to write, a base model that only this machine has, or a card
            that the hub does not take.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    require_finished(run)
    base = base or _base_on_the_hub(run)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _stage(run, folder, hub_id, base)
        hub = HfApi()
        try:
            hub.create_repo(hub_id, private=not public, exist_ok=True)
            commit = hub.upload_folder(
                repo_id=hub_id, folder_path=folder, commit_message=f"Adapter of {run.path.name}, trained with dpo-lora"
            )
        except HFValidationError as error:
            raise UserError(f"{hub_id} cannot be a repository's name: {error} Write it as OWNER/NAME.") from error
        except (LocalTokenNotFoundError, HTTPError, OfflineModeIsEnabled, ConnectionError, JSONDecodeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"{hub_id} was not written: {reason} Log in with 'hf auth login' (or set HF_TOKEN) with a token that "
                "may write there, check the network, and push again: what arrived is not sent twice."
            ) from error
        except ValueError as error:  # how the hub's client says what the hub has against the card's head
            raise UserError(
                f"{hub_id} was not written: {error}\nThat is the head of the card. What it says of the base model's "
                f"licence stands in {run.manifest_file} (reference, base, license): correct it there, and push again."
            ) from error
    return str(commit.commit_url)


def _stage(run: RunDir, folder: Path, hub_id: str, base: str) -> None:
    for name in _PUBLISHED:
        if (run.path / name).is_file():
            shutil.copy2(run.path / name, folder / name)
    adapter = json.loads((run.path / "adapter_config.json").read_text(encoding="utf-8"))
    adapter["base_model_name_or_path"] = base
    write_atomic(folder / "adapter_config.json", json.dumps(adapter, indent=2) + "\n")
    write_atomic(folder / "README.md", card.render(run, hub_id, base))


def _base_on_the_hub(run: RunDir) -> str:
    base = run.manifest()["reference"]["base"]
    with run.in_its_folder():
        is_here = Path(base["name"]).exists()
    if is_here:
        raise UserError(
            f"The base model is {base['name']}, a folder on this machine: nobody else could load the adapter. "
            "Say with --base OWNER/NAME where its weights are on the hub."
        )
    return str(base["name"])
