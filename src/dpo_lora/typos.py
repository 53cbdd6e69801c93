"""From what Hydra and OmegaConf say of a mistyped override to what its author needs to read."""

from __future__ import annotations

import re
from collections.abc import Iterator

from hydra.errors import MissingConfigException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from dpo_lora.errors import UserError, nearest
from dpo_lora.settings import setting_names

_HELP = "'dpo-lora train --help' lists every preset and setting."


def check_names(overrides: list[str]) -> None:
    """Refuse ``dpo.betta=1`` by its name alone: composing everything first would take twice as long.

    Looks at dotted names below our own groups only, which no preset can add to; the rest is Hydra's to judge.

    Raises:
        UserError: there is no such setting.
    """
    names = set(setting_names())
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        group = key.partition(".")[0]
        parents = {key[:i] for i, c in enumerate(key) if c == "."} - {group}
        # Below a setting that is itself a mapping (data.columns.text) any name goes.
        if "." in key and group in names and key not in names and not (parents & names):
            raise UserError(_unknown_setting(key))


def explain(error: BaseException) -> str:
    """One message: what was given, why that does not work, the nearest valid names."""
    for link in _chain(error):
        if isinstance(link, UserError):
            return str(link)
        if isinstance(link, MissingConfigException):
            return _missing_preset(link)
        if isinstance(link, OmegaConfBaseException) and link.full_key:
            return _bad_setting(link, str(link.full_key))
    text = str(error).strip()
    if ambiguous := re.search(r"Ambiguous value for argument '([^']+)'", text):
        return f"{ambiguous[1]} lists several values: add -m to run each, or write a list as NAME=[A,B]."
    unknown = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' is not in struct", text)
    return _unknown_setting(unknown[1].split("@")[0]) if unknown else f"{text.splitlines()[0]}. {_HELP}"


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _bad_setting(error: OmegaConfBaseException, key: str) -> str:
    if isinstance(error, ConfigKeyError | ConfigAttributeError):
        return _unknown_setting(key)
    if isinstance(error, MissingMandatoryValue):
        return f"{key} has no value: give one with {key}=VALUE."
    reason = str(error.msg or error).splitlines()[0]
    if re.search(r"\bnot Optional\b|\bNon optional\b", reason):
        return f"{key} cannot be null: it always has a value. Leave it out for the preset's."
    if isinstance(error, ValidationError):
        return f"{key}: {reason}."
    return f"{key}: {reason}"


def _unknown_setting(key: str) -> str:
    """Suggest by the last name part first: people know the name and forget the group, or misspell one of the two."""
    names = setting_names()
    by_leaf = [n for n in names if n.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    hint = f" Did you mean {', '.join(repr(n) for n in by_leaf[:3])}?" if by_leaf else nearest(key, names)
    return f"There is no setting {key!r}.{hint} {_HELP}"


def _missing_preset(error: MissingConfigException) -> str:
    wanted = str(error.missing_cfg_file or "")
    group, _, name = wanted.rpartition("/")
    options = [str(o) for o in (error.options or [])]
    if not group or not options:
        return f"{str(error).splitlines()[0]} {_HELP}"
    return f"There is no preset {group}={name}.{nearest(name, options)} There are: {', '.join(sorted(options))}."
