"""Search spaces in Hydra's own words, as Optuna's distributions.

``interval(a, b)`` is continuous, ``int(interval(a, b))`` whole, ``tag(log, ...)`` logarithmic,
``range(a, b, step)`` whole steps with b left out, and ``choice(x, y)`` or ``x,y`` a list of values,
presets of a group included: ``dpo=sigmoid,ipo``.
"""

from __future__ import annotations

from typing import Any

from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from dpo_lora.errors import UserError


def distribution(override: Override) -> BaseDistribution:
    """What ``override`` may be sampled from.

    Raises:
        UserError: bounds in the wrong order, or a logarithmic interval that reaches 0.
    """
    value = override.value()
    try:
        if isinstance(value, IntervalSweep):
            assert value.start is not None and value.end is not None
            whole = isinstance(value.start, int) and isinstance(value.end, int)
            kind: Any = IntDistribution if whole else FloatDistribution
            return kind(value.start, value.end, log="log" in value.tags)
        if isinstance(value, RangeSweep):
            assert value.start is not None and value.stop is not None
            return _range(value)
        assert isinstance(value, ChoiceSweep)
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    except ValueError as error:
        raise UserError(f"{override.input_line} cannot be searched: {error}") from error


def _range(value: RangeSweep) -> BaseDistribution:
    start, stop, step = value.start, value.stop, value.step
    assert start is not None and stop is not None
    if isinstance(start, int) and isinstance(stop, int) and isinstance(step, int):
        last = start + (stop - 1 - start) // step * step  # Hydra leaves the end out
        return IntDistribution(start, last, step=step)
    return CategoricalDistribution([str(v) for v in value.range()])


def words(dist: BaseDistribution) -> str:
    """A distribution as it could have been typed."""
    if isinstance(dist, CategoricalDistribution):
        return ",".join(str(choice) for choice in dist.choices)
    assert isinstance(dist, IntDistribution | FloatDistribution)
    if isinstance(dist, IntDistribution) and dist.step > 1:
        return f"range({dist.low},{dist.high + 1},{dist.step})"
    interval = f"interval({dist.low},{dist.high})"
    whole = f"int({interval})" if isinstance(dist, IntDistribution) else interval
    return f"tag(log,{whole})" if dist.log else whole


def typed(name: str, value: Any) -> str:
    """A sampled value as an override."""
    return f"{name}={value!r}" if isinstance(value, float) else f"{name}={value}"
