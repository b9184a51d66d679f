"""The record of a step, typed and as a flat dict of floats for loggers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from quadstep.controllers import Reason
from quadstep.groups import rate_in_force
from quadstep.tensors import Groups

_NAMES = ("loss", "rate", "slope", "curvature", "forwards", "backwards")


@dataclass(frozen=True, slots=True)
class Report:
    """What the last step measured and did.

    Attributes:
        loss: the loss before the step; not a number before the first.
        slope: a of equation (2), in units of the loss per rate; smoothed where measurements are.
        curvature: b of equation (2), in units of the loss per squared rate, likewise.
        rate: the rate in force after the step.
        reason: why the rate is what it is.
        forwards: forward passes that `step` ran: calls of the closure, or repetitions of the
            loop's own forward passes, which do not count themselves.
        backwards: backward passes that `step` ran.
        counts: how many steps ended for each reason since the optimizer was made.

    Example:
        >>> opt.step(closure)
        >>> print(opt.report.rate, opt.report.reason)
    """

    loss: float
    slope: float
    curvature: float
    rate: float
    reason: Reason
    forwards: int
    backwards: int
    counts: Mapping[Reason, int] = field(default_factory=dict[Reason, int])


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
