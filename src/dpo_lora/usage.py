"""``dpo-lora train --help``: groups, presets and settings.

Hydra's own help composes the configuration again for each group that it lists, which takes longer than
everything else together; folders tell the same at once.
"""

from __future__ import annotations

import string
from pathlib import Path

import hydra
from omegaconf import OmegaConf, open_dict

from dpo_lora.resources import conf_dir


def text(overrides: list[str], config_dir: Path | None) -> str:
    """Hydra's help template, filled in for the run that ``overrides`` make.

    Args:
        config_dir: a folder of the user's own presets, listed beside the shipped ones.

    Raises:
        hydra.errors.HydraException: an override names what does not exist.
    """
    folders = [conf_dir()] if config_dir is None else [conf_dir(), config_dir.resolve()]
    search = [f"hydra.searchpath=[{','.join(f'file://{folder}' for folder in folders[1:])}]"] if folders[1:] else []
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        cfg = hydra.compose("config", overrides=[*overrides, *search], return_hydra_config=True)
    template = OmegaConf.select(cfg, "hydra.help.template")
    with open_dict(cfg):
        del cfg["hydra"]
    return string.Template(template).substitute(
        APP_CONFIG_GROUPS="".join(
            f"{group}: {', '.join(names)}\n" for group, names in sorted(presets(folders).items())
        ),
        CONFIG=OmegaConf.to_yaml(cfg),
    )


def presets(folders: list[Path]) -> dict[str, list[str]]:
    """The preset names of each group (``model``, ``hydra/sweeper``) in these folders."""
    found: dict[str, set[str]] = {}
    for folder in folders:
        for file in folder.glob("*/**/*.yaml"):
            found.setdefault(file.parent.relative_to(folder).as_posix(), set()).add(file.stem)
    return {group: sorted(names) for group, names in found.items()}
