"""DPO training of LoRA adapters: composed by Hydra, exact in its numbers, safe to interrupt."""


def __getattr__(name: str) -> str:
    """``dpo_lora.__version__``, looked up when asked: the metadata machinery costs a typo its quick answer."""
    if name != "__version__":
        raise AttributeError(name)
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("dpo-lora")
    except PackageNotFoundError:  # run from a source tree that was never installed (a lent GPU box)
        return "0+source"
