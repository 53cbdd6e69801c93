"""What this machine can do: device, number format, memory, seed, determinism."""

from __future__ import annotations

import os
import resource
import sys
from dataclasses import dataclass, replace

import torch

from dpo_lora.choices import Device, DType
from dpo_lora.errors import UserError
from dpo_lora.schema import TrainSettings


@dataclass(frozen=True)
class Machine:
    """The place a run computes on. Frozen: decided once, before the model is loaded."""

    device: torch.device
    dtype: torch.dtype
    name: str

    def peak_memory(self) -> int:
        """Bytes at the highest: of the accelerator's allocator, or of this process on a CPU."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB on Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def describe(self) -> dict[str, object]:
        return {
            "device": str(self.device),
            "device_name": self.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
        }


def choose(train: TrainSettings, seed: int) -> Machine:
    """Take the device and the number format that the settings ask for, and seed every generator.

    Raises:
        UserError: CUDA or bfloat16 was asked for where there is none.
    """
    cuda = torch.cuda.is_available()
    if train.device is Device.cuda and not cuda:
        built = "this torch is a CPU build" if torch.version.cuda is None else "no usable GPU was found"
        raise UserError(
            f"train.device=cuda, but {built}. Use train=cpu (or train.device=auto), "
            "or install the CUDA build of torch on a machine with a GPU."
        )
    use_cuda = cuda and train.device is not Device.cpu
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "A run trains on one device; torchrun (WORLD_SIZE above 1) would start the same run several times. "
            "Use several GPUs for several runs: 'dpo-lora train -m ...' gives each trial its own."
        )
    if use_cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        name = torch.cuda.get_device_name(device)
    else:
        device, name = torch.device("cpu"), "CPU"
    if train.threads is not None:
        torch.set_num_threads(train.threads)
    _seed(seed)
    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return Machine(device, _dtype(train.dtype, use_cuda), name)


def for_use(train: TrainSettings) -> TrainSettings:
    """The same settings for a machine that only uses what was trained elsewhere: its CPU where it has no GPU."""
    if train.device is Device.cuda and not torch.cuda.is_available():
        return replace(train, device=Device.auto, dtype=DType.auto)
    return train


def processor(train: TrainSettings) -> Machine:
    """This machine without its accelerators, leaving every generator and switch as it is."""
    return Machine(torch.device("cpu"), _dtype(train.dtype, False), "CPU")


def _dtype(wanted: DType, use_cuda: bool) -> torch.dtype:
    if wanted is DType.float32:
        return torch.float32
    has_bf16 = use_cuda and torch.cuda.is_bf16_supported()
    if wanted is DType.bfloat16:
        if use_cuda and not has_bf16:
            raise UserError("train.dtype=bfloat16, but this GPU has no bfloat16. Use train.dtype=float32.")
        return torch.bfloat16
    return torch.bfloat16 if has_bf16 else torch.float32


def _seed(seed: int) -> None:
    from transformers import set_seed

    set_seed(seed)
