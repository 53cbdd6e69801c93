"""The sources that data settings name, one by one: a mix is several, a held-out source one more."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from dpo_lora.choices import DataSource
from dpo_lora.errors import UserError, nearest
from dpo_lora.preferences.shapes.filters import Rule, rules
from dpo_lora.schema import ColumnSettings, DataSettings

TRAIN, HELDOUT, UNDECIDED = 0, 1, 2  # where a row goes; undecided rows are placed by their prompt

# What an item of data.mix may say; what it leaves out is as in the data settings themselves.
MIX_KEYS = ("name", "source", "path", "revision", "subset", "split", "columns", "filter", "weight", "max_pairs")


@dataclass(frozen=True)
class Part:
    """One source of rows."""

    name: str
    source: DataSource
    path: str
    revision: str | None
    subset: str | None
    split: str
    columns: dict[str, str]
    filter: tuple[Rule, ...]
    goes: int | None  # TRAIN, HELDOUT or UNDECIDED; None: each row's "split" column decides
    heldout_split: str | None = None  # that column's word for held-out
    weight: float | None = None  # share of the training pairs relative to the other sources'; None: all it has
    max_pairs: int | None = None  # at most so many training pairs of it


def parts(data: DataSettings) -> list[Part]:
    """All sources of ``data``, training ones first.

    Raises:
        UserError: an item of data.mix has an unknown key, lacks a path, or says something impossible.
    """
    if not data.mix:
        return _of(data, {"name": data.name, "path": data.path}, 0)
    found = [part for number, item in enumerate(data.mix) for part in _of(data, _checked(item, number), number)]
    names = [part.name for part in found if part.goes != HELDOUT]
    if len(set(names)) < len(names):
        raise UserError(f"data.mix: two sources have the same name ({', '.join(names)}); give each its own name.")
    weights = [part.weight is None for part in found if part.goes != HELDOUT]
    if any(weights) and not all(weights):
        raise UserError("data.mix: give every source a weight, or none.")
    return found


def _checked(item: dict[str, Any], number: int) -> dict[str, Any]:
    where = f"data.mix[{number}]"
    for key in item:
        if key not in MIX_KEYS:
            raise UserError(
                f"{where} has no setting {key!r}; it may say {', '.join(MIX_KEYS)}.{nearest(key, MIX_KEYS)}"
            )
    if not isinstance(item.get("path"), str):
        raise UserError(f"{where} names no path.")
    for key in ("weight", "max_pairs"):
        value = item.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value <= 0):
            raise UserError(f"{where}.{key}={value} is not valid: it must be a number above 0.")
    for name in item.get("columns", {}):
        if name not in (known := [field.name for field in fields(ColumnSettings)]):
            raise UserError(f"{where}.columns: {name!r} is no column of ours; there are {', '.join(known)}.")
    if item.get("source") is not None and item["source"] not in DataSource.__members__:
        raise UserError(f"{where}.source={item['source']} is none of {', '.join(DataSource.__members__)}.")
    return {"name": item["path"].rstrip("/").rsplit("/", 1)[-1], **item}


def _of(data: DataSettings, item: dict[str, Any], number: int) -> list[Part]:
    source = DataSource[item["source"]] if "source" in item else data.source
    shared: dict[str, Any] = {
        "name": item["name"],
        "source": source,
        "path": item["path"],
        "revision": item.get("revision", data.revision),
        "subset": item.get("subset", data.subset),
        "columns": {k: v for k, v in {**vars(data.columns), **item.get("columns", {})}.items() if v is not None},
        "filter": tuple(rules(list(item.get("filter", data.filter)))),
        "weight": item.get("weight"),
        "max_pairs": item.get("max_pairs"),
    }
    split = item.get("split", data.split)
    if data.heldout_path is not None:
        held = {**shared, "name": f"{item['name']}-heldout", "path": data.heldout_path}
        train = Part(**shared, split=split, goes=TRAIN)
        # One held-out file for all of a mix: the first item brings it, whatever file the others are read from.
        return [train, Part(**held, split=split, goes=HELDOUT)] if number == 0 else [train]
    if data.heldout_split is None:
        return [Part(**shared, split=split, goes=UNDECIDED)]
    if source is DataSource.hub:
        held = {**shared, "name": f"{item['name']}-heldout"}
        return [Part(**shared, split=split, goes=TRAIN), Part(**held, split=data.heldout_split, goes=HELDOUT)]
    return [Part(**shared, split=split, goes=None, heldout_split=data.heldout_split)]
