"""The record of a step as a flat dict of floats, for loggers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from quadstep.controllers import Reason
from quadstep.groups import rate_in_force
from quadstep.tensors import Groups

if TYPE_CHECKING:
    from quadstep.optimizer import Report

_NAMES = ("loss", "rate", "slope", "curvature", "forwards", "backwards")


def flat_metrics(report: Report, groups: Groups) -> dict[str, float]:
    """Names the values of a report, and the rates of several groups.

    No name is the first part of the path of another: MLflow has a file for each.
    """
    values: dict[str, float] = {name: getattr(report, name) for name in _NAMES}
    if len(groups) > 1:
        for number, group in enumerate(groups):
            values[f"rate_{number}"] = rate_in_force([group])
    for reason in Reason:
        if reason is not Reason.INITIAL:
            values[f"reason/{reason.value}"] = report.counts.get(reason, 0)
    return {
        f"lqa/{name}": float(value) if math.isfinite(value) else math.nan
        for name, value in values.items()
    }
