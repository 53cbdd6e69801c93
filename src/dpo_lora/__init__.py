"""DPO training of LoRA adapters: composed by Hydra, exact in its numbers, safe to interrupt."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("dpo-lora")
except PackageNotFoundError:  # run from a source tree that was never installed (a lent GPU box)
    __version__ = "0+source"
