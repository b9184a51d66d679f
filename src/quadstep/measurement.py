"""When and how the line is measured: the schedule, the plan of a measurement, its outcome."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quadstep.closures import Probes, reading
from quadstep.controllers import Decision, Reason
from quadstep.line import Line
from quadstep.quadratic import LineSamples
from quadstep.tensors import rank_mean

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

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
MEAN_ERROR = 1 / 64  # part of a value's rounding error that is left in the mean of many, the loss

_GOLDEN_SECTION = (3.0 - math.sqrt(5.0)) / 2.0
_NO_MEMORY = re.compile("out of memory|not enough memory|can't allocate memory|_ALLOC_FAILED")


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
        if decision.reason is not Reason.HELD:
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
        measured = steps_taken(scalars) - scalars[COUNTS[Reason.HELD]]
        now, then = ((measured + ahead) * _GOLDEN_SECTION for ahead in (0, 1))
        return max(1, self.every - math.floor(then) + math.floor(now))


def _known_losses(scalars: Scalars) -> list[Tensor | float]:
    """The losses since the last measurement; those that a checkpoint is padded with are None."""
    return [loss for loss in scalars[RECENT_LOSSES] if loss is not None]


def steps_taken(scalars: Scalars) -> int:
    """The number of steps since the optimizer was made."""
    return sum(scalars.get(key, 0) for key in COUNTS.values())


@dataclass(frozen=True, slots=True)
class ProbePlan:
    """What a measurement evaluates."""

    distance: float  # of the probes from the parameters, as a rate
    slope: Tensor | float | None  # of the gradient along the line, where it is needed and known
    behind: bool  # whether the loss behind the parameters is evaluated, or the slope replaces it
    is_audit: bool  # whether the loss is compared with itself at the same parameters
    two_phases: bool  # whether the gradient pass was the caller's
    gradient_unmodified: bool  # whether nobody but autograd has had access to the gradient

    @property
    def rates(self) -> dict[str, float]:
        """The rates to evaluate, by name, in their order."""
        again = {"again": 0.0} if self.is_audit or self.two_phases else {}
        behind = {"behind": -self.distance} if self.behind else {}
        return {"ahead": self.distance} | again | behind


@dataclass(frozen=True, slots=True)
class Measurement:
    """The outcome of a plan."""

    samples: LineSamples
    evaluations: int  # of the closure
    unequal: tuple[float, float] | None  # two losses at the same parameters, found by an audit


def measure(
    line: Line,
    plan: ProbePlan,
    probes: Probes,
    loss: Tensor,
    recent_losses: list[Tensor | float],
    process_group: ProcessGroup | None,
) -> Measurement:
    """Evaluates the closure as planned, averaged over the processes, in one wait for the device.

    `loss` is that of the gradient pass, and `recent_losses` are as many on every process.
    """
    center = reading(loss)
    losses = line.losses(probes.evaluate, plan.rates.values())
    sent = {"center": center, **dict(zip(plan.rates, losses, strict=True))}
    evaluations = len(losses)
    if plan.slope is not None:
        sent["slope"] = plan.slope
    if plan.is_audit and plan.two_phases:
        sent["compared"] = center
        if any(rank_mean([probes.has_drawn()], loss, process_group)):
            # In the caller's forward pass it drew other numbers than in the probes.
            sent["compared"] = probes.run(with_gradients=True)
            evaluations += 1
    values = rank_mean([*sent.values(), *recent_losses], loss, process_group)
    seen = dict(zip(sent, values, strict=False))
    given, repeated = seen["center"], seen.get("again", seen["center"])
    expected = seen.get("compared", given)
    samples = LineSamples(
        distance=plan.distance,
        loss_ahead=seen["ahead"],
        loss_center=repeated if plan.two_phases else given,
        loss_behind=seen.get("behind"),
        resolution=_resolution(probes),
        recent_losses=tuple(value for value in values[len(sent) :] if not math.isnan(value)),
        slope=seen.get("slope", math.nan),
        gradient_unmodified=plan.gradient_unmodified,
    )
    tolerance = min(100.0 * samples.resolution, 0.05) * max(abs(expected), abs(repeated))
    is_unequal = plan.is_audit and abs(expected - repeated) > tolerance
    return Measurement(samples, evaluations, (expected, repeated) if is_unequal else None)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory has run out; of the CPU's only the message says so."""
    named = isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None
    return named or isinstance(error, torch.OutOfMemoryError | MemoryError)


def _resolution(probes: Probes) -> float:
    """The relative rounding error of a loss, whatever type it was cast to in the end."""
    dtypes = {param.dtype for param in probes.params} | probes.evaluator.tracker.autocast_dtypes
    # Frozen parameters may be quantized to integers.
    inexact = [dtype for dtype in dtypes if dtype.is_floating_point or dtype.is_complex]
    computed = max(torch.finfo(dtype).eps for dtype in inexact)
    return max(torch.finfo(probes.dtype or torch.float64).eps, MEAN_ERROR * computed)
