"""Which steps measure the line."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from quadstep.closures import reading
from quadstep.controllers import Decision, Reason

Scalars = dict[str, Any]

WAIT = "lqa.wait"  # steps until the next measurement
AUDITED = "lqa.audited"  # the last interval of steps that had an audit
FAILED = "lqa.failed_measurements"  # in a row, without a step or a vertex
OUT_OF_MEMORY = "lqa.out_of_memory"  # measurements in a row that ran out of memory
RECENT_LOSSES = "lqa.recent_losses"  # since the last measurement
COUNTS = {reason: f"lqa.count.{reason.value}" for reason in Reason}

AUDIT_INTERVAL = 100  # the first measurement in so many steps is an audit
FAILED_AUDIT = 3  # so is the one after so many failed ones
MEMORY_FAILURES = 3  # so many in a row, and training continues without a measurement
MEMORY_RETRY = 10  # steps until the next measurement then, at the least
MAX_RECENT_LOSSES = 100

_GOLDEN_SECTION = (3.0 - math.sqrt(5.0)) / 2.0


class Schedule:
    """Decides which steps measure the line.

    Args:
        every: the steps from one measurement to the next, or one less by turns.
        keeps_losses: whether the losses between measurements are kept, for their noise.
    """

    def __init__(self, every: int, keeps_losses: bool) -> None:
        self.every = every
        self.kept_losses = min(every, MAX_RECENT_LOSSES) if keeps_losses else 0

    def initial_scalars(self) -> Scalars:
        """The scalars of the state before the first step."""
        scalars: Scalars = dict.fromkeys((WAIT, FAILED, OUT_OF_MEMORY, *COUNTS.values()), 0)
        return scalars | {AUDITED: -1, RECENT_LOSSES: []}

    def padded_losses(self, scalars: Scalars) -> list[Tensor | float]:
        """The losses since the last measurement, padded with nan to as many as there can be.

        A process that took over the state of another may know fewer than the others.
        """
        losses = _known_losses(scalars)
        return [*losses, *[math.nan] * (self.kept_losses - len(losses))]

    def save(self, saved: Scalars) -> None:
        """Converts the losses of a state dict to numbers, as many as a fresh optimizer has."""
        losses = map(float, self.padded_losses(saved))
        saved[RECENT_LOSSES] = [None if math.isnan(loss) else loss for loss in losses] or [None]

    def is_audit(self, scalars: Scalars) -> bool:
        """Whether the next measurement compares the loss with itself at the same parameters."""
        interval = steps_taken(scalars) // AUDIT_INTERVAL
        return interval > scalars[AUDITED] or scalars[FAILED] == FAILED_AUDIT

    def record_measurement(self, scalars: Scalars) -> None:
        """Records that a measurement has succeeded."""
        scalars |= {OUT_OF_MEMORY: 0, AUDITED: steps_taken(scalars) // AUDIT_INTERVAL}

    def record_memory_failure(self, scalars: Scalars) -> bool:
        """Records that one ran out of memory; whether to continue without it."""
        scalars[OUT_OF_MEMORY] += 1
        if scalars[OUT_OF_MEMORY] < MEMORY_FAILURES:
            return False
        scalars[WAIT] = max(self.every, MEMORY_RETRY)
        return True

    def record_step(self, scalars: Scalars, decision: Decision, loss: Tensor) -> None:
        """Records a step, and when to measure next: at once until the rate has settled."""
        losses = _known_losses(scalars)
        if decision.reason is not Reason.REUSED:
            losses = []
            scalars[WAIT] = self._interval(scalars) - 1 if decision.settled else 0
            succeeded = decision.step and decision.reason is not Reason.CONCAVE
            scalars[FAILED] = 0 if succeeded else scalars[FAILED] + 1
        elif scalars[WAIT] and decision.step:
            # A measurement that is due stays so, and a step that moves nothing does not count.
            scalars[WAIT] -= 1
        if self.kept_losses:
            scalars[RECENT_LOSSES] = [*losses, reading(loss)][-self.kept_losses :]
        scalars[COUNTS[decision.reason]] += 1

    def _interval(self, scalars: Scalars) -> int:
        """By the golden section, so that measurements do not alias with periodic batches."""
        measured = steps_taken(scalars) - scalars[COUNTS[Reason.REUSED]]
        now, then = ((measured + ahead) * _GOLDEN_SECTION for ahead in (0, 1))
        return max(1, self.every - math.floor(then) + math.floor(now))


def _known_losses(scalars: Scalars) -> list[Tensor | float]:
    """The losses since the last measurement; those that a checkpoint is padded with are None."""
    return [loss for loss in scalars[RECENT_LOSSES] if loss is not None]


def steps_taken(scalars: Scalars) -> int:
    """The number of steps since the optimizer was made."""
    return sum(scalars.get(key, 0) for key in COUNTS.values())
