"""The one door from a composed config to settings, and from settings to plain values and back."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict, fields, is_dataclass
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpo_lora import rules
from dpo_lora.errors import UserError
from dpo_lora.resources import conf_dir
from dpo_lora.schema import RunSettings


def from_hydra(cfg: DictConfig) -> RunSettings:
    """The one door from a composed config to settings.

    Composition alone lets ``+key=value`` past the schema, so the resolved values are merged into a
    fresh schema: unknown keys, wrong types and missing values all stop here.

    Raises:
        omegaconf.errors.OmegaConfBaseException: an unknown key, a wrong type or a value left out.
        UserError: a rule between settings is broken.
    """
    values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    merged = OmegaConf.merge(OmegaConf.structured(RunSettings), values)
    settings = OmegaConf.to_object(merged)
    assert isinstance(settings, RunSettings)
    rules.check(settings)
    return settings


def register_schema() -> None:
    """Make the schema known to Hydra under the name that conf/config.yaml lists first."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="run_schema", node=RunSettings)


def setting_names(schema: type = RunSettings, prefix: str = "") -> list[str]:
    """Every dotted name a command line may set, groups included: ``dpo``, ``dpo.beta``, ..."""
    names = []
    hints = get_type_hints(schema)
    for field in fields(schema):
        name = prefix + field.name
        names.append(name)
        if is_dataclass(hints[field.name]):
            names += setting_names(hints[field.name], name + ".")
    return names


def plain(settings: Any) -> dict[str, Any]:
    """Settings as plain containers (enums by value), for YAML, JSON, W&B and checkpoints."""
    return json.loads(json.dumps(asdict(settings), default=lambda value: value.value))


def from_plain(values: dict[str, Any]) -> RunSettings:
    """The settings of a saved run; the inverse of :func:`plain`.

    What a run of an earlier version does not say is as in the default run: enough to read the run by, not to
    train on (:func:`added_since`).

    Raises:
        UserError: they name, or give a value, that this version does not know.
    """
    try:
        whole = OmegaConf.merge(defaults(), values) if added_since(values) else OmegaConf.create(values)
        return from_hydra(whole)  # type: ignore[arg-type]  # a merge of mappings is one
    except OmegaConfBaseException as error:
        raise UserError(
            f"The saved settings are of another version of dpo-lora: {str(error.msg or error).splitlines()[0]} "
            f"({error.full_key}). Use the version that run.json names."
        ) from error


def added_since(values: dict[str, Any], schema: type = RunSettings, prefix: str = "") -> list[str]:
    """Names of settings that these saved ones lack: there was no such setting when they were saved."""
    found = []
    hints = get_type_hints(schema)
    for field in fields(schema):
        name = prefix + field.name
        if field.name not in values:
            found.append(name)
        elif is_dataclass(hints[field.name]):
            found += added_since(values[field.name], hints[field.name], name + ".")
    return found


def composed(overrides: list[str]) -> RunSettings:
    """The run that these overrides make, outside Hydra's own program; one that Hydra runs is left undisturbed.

    Raises:
        hydra.errors.HydraException, UserError: as for a command line.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    register_schema()
    program = GlobalHydra.instance()
    running = program.hydra
    program.clear()  # Hydra composes for one program at a time
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return from_hydra(compose("config", overrides))
    finally:
        program.hydra = running


@functools.cache
def _default_run() -> str:
    return json.dumps(plain(composed([])))


def defaults() -> dict[str, Any]:
    """The run that no override changes, as plain containers."""
    return dict(json.loads(_default_run()))


def fingerprint(settings: RunSettings) -> str:
    """16 hex digits that name what a run computes: equal for equal results, blind to where they go.

    The tracker, the output folders, the sweep around it and the logging cadence are left out; everything
    that can move a weight or a score is in.
    """
    values = plain(settings)
    for blind in ("tracking", "outputs", "run_dir", "sweep"):
        values.pop(blind)
    for blind in ("log_every", "save_every", "keep_checkpoints", "threads"):
        values["train"].pop(blind)
    values["eval"].pop("report")
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
