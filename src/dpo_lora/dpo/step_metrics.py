"""TRL's metrics of a step that was cut into micro-batches, as if it had not been cut."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def merge(metrics: dict[str, list[float]], parts: list[list[dict[str, Any]]]) -> None:
    """Replace the last ``len(parts)`` values of each metric by their mean over what the metric is a mean over.

    Args:
        metrics: values by name, to which TRL has added one per micro-batch.
        parts: the tokenised pairs of each micro-batch.
    """
    if len(parts) < 2:
        return

    def tokens(side: str) -> NDArray[np.float64]:
        return np.asarray([sum(len(row[side]) for row in part) for part in parts], dtype=np.float64)

    pairs = np.asarray([len(part) for part in parts], dtype=np.float64)
    chosen, rejected = tokens("chosen_ids"), tokens("rejected_ids")
    weights = {
        "entropy": chosen + rejected,
        "mean_token_accuracy": chosen,
        "logits/chosen": chosen,
        "logits/rejected": rejected,
    }
    for name, values in metrics.items():
        if len(values) >= len(parts):
            mean = np.average(values[-len(parts) :], weights=weights.get(name, pairs))
            values[-len(parts) :] = [float(mean)]
