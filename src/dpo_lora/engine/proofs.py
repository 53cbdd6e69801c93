"""Probes that were passed, on disk: a model whose packing was checked on these very bits is not checked again.

    <folder>/<key>.json      the difference that the probe found

The key is the hash of everything a probe's outcome depends on: base weights, model class and settings, every
adapter's configuration and weights, the probed tokens, number format, device, the engine's own source files and
the libraries' versions. A probe that was not passed leaves nothing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from dpo_lora.engine.cache_files import write_atomically
from dpo_lora.engine.decoder import read_layers
from dpo_lora.engine.native import passes as native_passes
from dpo_lora.engine.native.library import loaded_name

_LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "numpy")
_MOST = 1000  # files kept; each some dozens of bytes


class Proofs:
    """The probes in ``folder`` that were passed on one base model.

    weights: what tells its weights, by content, from all others.
    """

    def __init__(self, folder: Path, weights: str) -> None:
        self.folder, self.weights = folder, weights

    def key(self, model: nn.Module, batch: Mapping[str, Tensor], **engine: object) -> str | None:
        """The name of a probe's outcome; None for a model whose code no version names.

        Arguments as for :func:`eligibility.probe`.
        """
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if not type(base).__module__.startswith("transformers.") or getattr(base, "is_quantized", False):
            return None
        digest = hashlib.sha256()
        for fact in (
            _code(), _device(base), _compiled(base, engine), self.weights, type(base).__qualname__, base.dtype,
            base.config.to_json_string(), base.config._attn_implementation, *_adapters(model), sorted(engine.items()),
        ):  # fmt: skip
            digest.update(f"{fact}\n".encode())
        tensors = {**dict(batch), **{n: p for n, p in model.named_parameters() if p.requires_grad or _is_adapters(n)}}
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def find(self, key: str) -> float | None:
        """The difference between packed and stock that the probe found; None where there was none."""
        try:
            return float(json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8"))["difference"])
        except (OSError, ValueError, KeyError, TypeError):  # not there, or not what we wrote: check it
            return None

    def note(self, key: str, difference: float) -> None:
        """Keep a probe that was passed; where the folder cannot be written, the next run checks it again."""
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / f"{key}.json", json.dumps({"difference": difference}).encode())
            kept = sorted(self.folder.glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
            for file in kept[:-_MOST]:
                file.unlink(missing_ok=True)


@functools.cache
def _code() -> str:
    """The engine's source and the versions of what it calls."""
    digest = hashlib.sha256()
    for file in sorted(each for kind in ("py", "h", "cpp") for each in Path(__file__).parent.rglob(f"*.{kind}")):
        digest.update(file.read_bytes())
    return " ".join([digest.hexdigest(), *(f"{name}={version(name)}" for name in _LIBRARIES)])


def _device(base: nn.Module) -> str:
    """What computes, and by which rules."""
    device = next(base.parameters()).device
    cuda = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return str((
        device.type, cuda, platform.node(), torch.backends.cpu.get_cpu_capability(), torch.__config__.show(),
        torch.backends.mkldnn.enabled, torch.get_float32_matmul_precision(), torch.is_autocast_enabled(device.type),
        torch.get_autocast_dtype(device.type), torch.are_deterministic_algorithms_enabled(),
    ))  # fmt: skip


def _compiled(base: nn.Module, engine: Mapping[str, object]) -> str | None:
    """The compiled library, where it is what computes the layers."""
    layers = None if engine.get("layers") == "plain" else read_layers(base.base_model)
    return loaded_name() if layers and layers[0].passes is native_passes else None


def _adapters(model: nn.Module) -> list[str]:
    configs = getattr(model, "peft_config", {})
    return [f"{name} {_plain(config.to_dict())}" for name, config in sorted(configs.items())]


def _plain(value: object) -> object:
    """Equal for equal values: sets have an order of their own in each process."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in sorted(value.items(), key=lambda item: str(item[0]))}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else str(value)


def _is_adapters(name: str) -> bool:
    return "lora_" in name or "modules_to_save" in name
