"""The measurement of a step: gradient pass, direction, probes on the line, and the rate."""

from __future__ import annotations

import math
import re
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quadstep.checkpoint import CONTROLLER_STATE, DETERMINISM, flatten
from quadstep.closures import PROBES_WITH_GRADIENTS, Closure, ClosureEvaluator, Probes, reading
from quadstep.controllers import Decision, Reason
from quadstep.gradients import gradients_of, inspect, is_untouched
from quadstep.groups import Strategies, rate_in_force
from quadstep.line import Line
from quadstep.quadratic import LineSamples
from quadstep.schedule import OUT_OF_MEMORY, WAIT
from quadstep.tensors import Groups, parameters, rank_mean, world_size

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MEAN_ERROR = 1 / 64  # part of a value's rounding error that is left in the mean of many, the loss

START_FAILURES = 3  # measurements in a row in which no start was found, and none is looked for

_NO_MEMORY = re.compile("out of memory|not enough memory|can't allocate memory|_ALLOC_FAILED")


@dataclass(frozen=True, slots=True)
class ProbePlan:
    """What a measurement evaluates."""

    distance: float  # of the probes from the parameters, as a rate
    slope: Tensor | float | None  # of the gradient along the line, where it is needed and known
    behind: bool  # whether the loss behind the parameters is evaluated, or the slope replaces it
    is_audit: bool  # whether the loss is compared with itself at the same parameters
    repeats_center: bool  # whether the loss of the gradient pass is not that of the probes
    gradient_unmodified: bool  # whether nobody but autograd has had access to the gradient

    @property
    def rates(self) -> dict[str, float]:
        """The rates to evaluate, by name, in their order."""
        again = {"again": 0.0} if self.is_audit or self.repeats_center else {}
        behind = {"behind": -self.distance} if self.behind else {}
        return {"ahead": self.distance} | again | behind


def measure(
    line: Line,
    plan: ProbePlan,
    probes: Probes,
    loss: Tensor,
    recent_losses: list[Tensor | float],
    process_group: ProcessGroup | None,
) -> tuple[LineSamples, tuple[float, float] | None]:
    """Evaluates the closure as planned, averaged over the processes, in one wait for the device.

    `loss` is that of the gradient pass, and `recent_losses` are as many on every process.

    Returns:
        The samples, and two losses at the same parameters if an audit found them unequal.
    """
    center = reading(loss)
    losses = line.losses(probes.evaluate, plan.rates.values())
    sent = {"center": center, **dict(zip(plan.rates, losses, strict=True))}
    if plan.slope is not None:
        sent["slope"] = plan.slope
    if plan.is_audit and plan.repeats_center:
        sent["compared"] = center
        if any(rank_mean([probes.has_drawn()], loss, process_group)):
            # In the caller's forward pass it drew other numbers than in the probes.
            sent["compared"] = probes.run(with_gradients=True)
    values = rank_mean([*sent.values(), *recent_losses], loss, process_group)
    seen = dict(zip(sent, values, strict=False))
    given, repeated = seen["center"], seen.get("again", seen["center"])
    expected = seen.get("compared", given)
    samples = LineSamples(
        distance=plan.distance,
        loss_ahead=seen["ahead"],
        loss_center=repeated if plan.repeats_center else given,
        loss_behind=seen.get("behind"),
        resolution=_resolution(probes),
        recent_losses=tuple(value for value in values[len(sent) :] if not math.isnan(value)),
        slope=seen.get("slope", math.nan),
        gradient_unmodified=plan.gradient_unmodified,
    )
    is_unequal = plan.is_audit and _differ(expected, repeated, samples.resolution)
    return samples, (expected, repeated) if is_unequal else None


def _differ(expected: float, repeated: float, resolution: float) -> bool:
    """Whether two losses at the same parameters differ by more than rounding makes them."""
    tolerance = min(100.0 * resolution, 0.05) * max(abs(expected), abs(repeated))
    return abs(expected - repeated) > tolerance


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


@dataclass(eq=False)
class StepSearch:
    """Finds the line of a step, or of one that is only previewed, and how far to go."""

    strategies: Strategies
    evaluator: ClosureEvaluator
    groups: Groups
    state: Any
    closure: Closure | None  # None where the caller's calls were recorded
    loss: Tensor | None  # given by the caller, who has run backward
    is_preview: bool
    center: Tensor = field(init=False)  # the loss before the step
    line: Line | None = None  # at rate zero; None where nothing is to move
    decision: Decision = field(init=False)
    forwards: int = 0  # evaluations of the closure in `step`
    backwards: int = 0  # backward passes in `step`
    is_moved: bool = False  # whether parameters have changed since a recorded forward pass

    def __post_init__(self) -> None:
        self.scalars, self.params = self.groups[0], parameters(self.groups)
        self.rate, self.is_due = rate_in_force(self.groups), self.scalars[WAIT] == 0
        sources = self.params if self.is_due or self.is_preview else None
        self.evaluator.tracker.start_step()
        self.before = self.evaluator.tracker.capture(sources)

    @property
    def determinism(self) -> float | None:
        """How free of noise the losses are, from 0 to 1; None where they are not finite."""
        if self.decision.reason is Reason.NON_FINITE:
            return None
        return self.scalars[DETERMINISM]

    def run(self, rollback: ExitStack) -> None:
        """Searches; `rollback` undoes what the closure and a wrapped optimizer have changed."""
        direction, controller, update, _, process_group = self.strategies
        rollback.callback(self.before.restore)
        self.forwards = self.backwards = int(self.closure is not None and self.loss is None)
        center, self.closure = self.evaluator.gradient_pass(
            self.closure, self.loss, self.params, self.before
        )
        if self.loss is not None and self._is_last_of_several(center):
            self.closure, self.loss = self.evaluator.recorder.replay, None
            center = self.evaluator.recorder.loss()
        # Closures may return one tensor each time, as replayed graphs do.
        self.center = center.clone() if self.is_due else center
        self.decision = Decision(self.rate, 0.0, Reason.REUSED)
        # Elsewhere the check waits for the device, which a step without a measurement does not.
        is_finite, is_sloping = True, True
        if self.is_due or center.is_cpu:
            is_finite, is_sloping = inspect(center, self.params, process_group)
        if not is_finite:
            self.before.restore_buffers()
            self.decision = Decision(self.rate, 0.0, Reason.NON_FINITE)
            return
        if controller.needs_slope and not is_sloping:
            # There is nothing to measure: only a wrapped optimizer moves.
            if direction.base is None:
                return
            self.is_due = False
        if self.is_due and self.is_recorded:
            self._check_record(process_group)
        if not self.is_preview:
            update.observe(self.groups, self.state, look=self.is_due)
        is_kept = self.is_due or update.averages or self.is_preview
        line = self.line = direction.line(self.groups, self.state, self.rate, is_kept)
        rollback.callback(line.restore)
        self.decision = Decision(self.rate, self.rate, Reason.REUSED)
        if not self.is_due:
            return
        state = self.strategies.controller_state(self.scalars)
        samples = self._measure(line, state)
        if samples is None:
            return
        state, self.decision = controller.update(state, self.rate, samples)
        self.scalars |= flatten(state, CONTROLLER_STATE) | {DETERMINISM: state.determinism}
        if self.decision.reason is Reason.NON_FINITE and math.isfinite(samples.loss_center):
            self.before.restore()

    @property
    def is_recorded(self) -> bool:
        """Whether probes repeat what was recorded, and not a closure."""
        return self.closure == self.evaluator.recorder.replay

    def _is_last_of_several(self, loss: Tensor) -> bool:
        """Whether gradients of other losses were accumulated, which the closure does not return."""
        recorder, process_group = self.evaluator.recorder, self.strategies.process_group
        if self.is_due:
            (fraction,) = rank_mean([float(recorder.completes(loss))], loss, process_group)
            recorder.replaces_closure = fraction == 1.0
        return recorder.replaces_closure and recorder.has_loss

    def _check_record(self, process_group: ProcessGroup | None) -> None:
        """Skips the measurement on all processes where one of them cannot repeat its calls."""
        recorder = self.evaluator.recorder
        changed = recorder.arguments_changed
        flags = [float(changed or not recorder.is_complete), float(recorder.parameters_changed)]
        lost, moved = rank_mean(flags, self.center, process_group)
        if changed:
            self.evaluator.diagnostics.warn("changed")
        if moved:
            self.evaluator.diagnostics.warn("moved")
        self.is_due, self.is_moved = lost == 0.0, moved > 0.0

    def _measure(self, line: Line, state: Any) -> LineSamples | None:
        """Measures the line; None where memory runs out repeatedly, to continue without."""
        schedule, scalars = self.strategies.schedule, self.scalars
        diagnostics = self.evaluator.diagnostics
        try:
            samples, unequal = self._probe(line, state)
        except Exception as error:
            # One process of several cannot continue on its own.
            if (
                not is_out_of_memory(error)
                or world_size(self.strategies.process_group) > 1
                or not schedule.record_memory_failure(scalars)
            ):
                raise
            diagnostics.warn("memory", failures=scalars[OUT_OF_MEMORY], rate=self.rate)
            return None
        schedule.record_measurement(scalars)
        if samples.contradicts_gradient and not state.fits:
            change = samples.slope * samples.distance
            diagnostics.warn("constant", loss=samples.loss_center, change=change)
        if self.is_recorded and self.evaluator.recorder.slopes.differ(samples):
            diagnostics.warn("partial")
        if unequal is not None:
            expected, repeated = unequal
            self.evaluator.recorder.is_inexact = self.is_recorded
            name = "unrepeatable" if self.loss is None else "unequal"
            name = "unrecorded" if self.is_recorded else name
            diagnostics.warn(name, expected=expected, repeated=repeated)
        return samples

    def _probe(self, line: Line, state: Any) -> tuple[LineSamples, tuple[float, float] | None]:
        """Plans a measurement, and evaluates it."""
        _, controller, _, schedule, process_group = self.strategies
        scalars, evaluator, two_phases = self.scalars, self.evaluator, self.loss is not None
        before, closure = self.before, self.closure
        if self.is_recorded:
            # A caller who has access to the gradients may have clipped them.
            gradient_unmodified = all(map(is_untouched, gradients_of(self.params)))
            before = evaluator.recorder.before or before
        else:
            gradient_unmodified = not (two_phases or evaluator.runs_backward)
        check = state.slope_check
        slope = None if check is None else line.slope()
        has_warned = evaluator.diagnostics.given & {"unequal", "unrepeatable", "unrecorded"}
        assert closure is not None
        with evaluator.probing(
            closure, self.params, scalars, before, is_origin=not two_phases
        ) as probes:
            known = self._loss_as_started(line, probes) if two_phases else None
            is_inexact = self.is_recorded and evaluator.recorder.is_inexact
            repeats_center = known is None and (two_phases or self.is_moved or is_inexact)
            is_comparable = known is None and not (self.is_moved or has_warned)
            plan = ProbePlan(
                distance=controller.probe_distance(state, self.rate),
                slope=slope,
                behind=slope is None or check is None or check.due or not gradient_unmodified,
                is_audit=is_comparable and schedule.is_audit(scalars),
                repeats_center=repeats_center,
                gradient_unmodified=gradient_unmodified,
            )
            center = self.center if known is None else self.center.new_tensor(known)
            losses = schedule.padded_losses(scalars)
            samples, unequal = measure(line, plan, probes, center, losses, process_group)
            if unequal is not None and not probes.have_gradients:
                # The loss may repeat itself only with gradients enabled.
                probes.with_gradients = True
                samples, unequal = measure(line, plan, probes, center, losses, process_group)
                scalars[PROBES_WITH_GRADIENTS] = unequal is None
        self.forwards += probes.count
        self.backwards += probes.count if probes.runs_backward else 0
        return samples, unequal

    def _loss_as_started(self, line: Line, probes: Probes) -> float | None:
        """The loss under the random numbers of the caller's forward pass, None if none is known.

        It is that from which the closure returns the caller's loss. Probes start from it then.
        """
        recorder, process_group = self.evaluator.recorder, self.strategies.process_group
        own = probes.before
        for start in recorder.starts if recorder.start_failures < START_FAILURES else ():
            probes.before = own if start is None else replace(own, generators=start)
            advanced = bool(own.pair_advanced(probes.before)[0].generators)
            # All processes must take the same branch.
            if not any(rank_mean([float(advanced)], self.center, process_group)):
                continue
            (loss,) = line.losses(probes.evaluate, [0.0])
            given, repeated = rank_mean([reading(self.center), loss], self.center, process_group)
            if not _differ(given, repeated, _resolution(probes)):
                recorder.start_failures = 0
                return repeated
        recorder.start_failures += 1
        probes.before = own
        return None
