"""Ratios of losses, and their means over tasks."""

import math
from collections.abc import Iterable

import numpy as np

FLOOR = 1e-4
"""A loss below this counts as this: how far a model that fits its data has gone does not matter."""

CAP = 100.0
"""What a ratio and its inverse count as at most in a mean over the tasks, so that none decides."""


def ratio(loss: float, other: float) -> float:
    """Compares two losses, each counted as `FLOOR` at least; two runs that diverged are level."""
    if math.isinf(other):
        return 1.0 if math.isinf(loss) else 0.0
    return max(loss, FLOOR) / max(other, FLOOR)


def geometric_mean(ratios: Iterable[float]) -> float:
    """Takes the mean of ratios, each of which and its inverse count as `CAP` at most."""
    return float(np.exp(np.mean(np.log(np.clip(list(ratios), 1.0 / CAP, CAP)))))
