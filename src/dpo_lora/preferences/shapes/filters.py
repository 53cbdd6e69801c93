"""A filter that is data: rules of column, operation and value, all of which a row must meet."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dpo_lora.errors import UserError, nearest

_MISSING = object()


def _ordered(compare: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    def apply(have: Any, want: Any) -> bool:
        try:
            return have is not None and compare(have, want)
        except TypeError as error:
            raise TypeError(f"{have!r} and {want!r} cannot be compared") from error

    return apply


def _contains(have: Any, want: Any) -> bool:
    return isinstance(have, str | list | dict) and want in have


OPERATIONS: dict[str, Callable[[Any, Any], bool]] = {
    "==": lambda have, want: have == want,
    "!=": lambda have, want: have != want,
    "<": _ordered(lambda have, want: have < want),
    "<=": _ordered(lambda have, want: have <= want),
    ">": _ordered(lambda have, want: have > want),
    ">=": _ordered(lambda have, want: have >= want),
    "in": lambda have, want: have in want,
    "not in": lambda have, want: have not in want,
    "contains": _contains,
    "lacks": lambda have, want: not _contains(have, want),
    "matches": lambda have, want: isinstance(have, str) and re.search(want, have) is not None,
}


@dataclass(frozen=True)
class Rule:
    column: str  # dots reach into objects: meta.language
    operation: str
    value: Any

    def holds(self, row: dict[str, Any]) -> bool:
        """Whether ``row`` meets it.

        Raises:
            KeyError: the row has no such column.
            TypeError: its value and the rule's cannot be compared.
        """
        have: Any = row
        for key in self.column.split("."):
            have = have.get(key, _MISSING) if isinstance(have, dict) else _MISSING
            if have is _MISSING:
                raise KeyError(self.column)
        return OPERATIONS[self.operation](have, self.value)


def rules(values: list[dict[str, Any]]) -> list[Rule]:
    """The rules of ``data.filter``.

    Raises:
        UserError: one lacks a part, names an unknown operation, or has a value that it cannot take.
    """
    return [_rule(value) for value in values]


def _rule(value: dict[str, Any]) -> Rule:
    if set(value) != {"column", "op", "value"}:
        raise UserError(f"data.filter: {value} is not valid: a rule has column, op and value, no more and no less.")
    operation = value["op"]
    if operation not in OPERATIONS:
        raise UserError(
            f"data.filter: op={operation!r} is not known; there are {', '.join(OPERATIONS)}."
            f"{nearest(str(operation), OPERATIONS)}"
        )
    want = value["value"]
    if operation in ("in", "not in") and not isinstance(want, list):
        raise UserError(f"data.filter: {operation!r} needs a list of values, not {want!r}.")
    if operation == "matches":
        try:
            re.compile(want)
        except (re.error, TypeError) as error:
            raise UserError(f"data.filter: {want!r} is no regular expression: {error}.") from error
    return Rule(str(value["column"]), operation, want)
