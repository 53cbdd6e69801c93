"""Sizes shared out evenly."""

from __future__ import annotations

from collections.abc import Sequence


def evenly(sizes: Sequence[int], bins: int) -> list[list[int]]:
    """Indices into ``sizes``, in up to ``bins`` groups whose sums are as equal as this finds them; none is empty.

    Deterministic: largest first into the emptiest group. Each group is ascending.
    """
    members: list[list[int]] = [[] for _ in range(min(bins, len(sizes)))]
    loads = [0] * len(members)
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        emptiest = loads.index(min(loads))
        members[emptiest].append(i)
        loads[emptiest] += sizes[i]
    return [sorted(group) for group in members if group]
