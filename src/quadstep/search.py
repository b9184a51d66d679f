"""The search of a step: gradient pass, direction, probes on the line, and the rate to step at."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quadstep.checkpoint import CONTROLLER_STATE, flatten
from quadstep.closures import PROBES_WITH_GRADIENTS, Closure, ClosureEvaluator
from quadstep.controllers import Decision, Reason
from quadstep.gradients import inspect
from quadstep.groups import Strategies, rate_in_force
from quadstep.line import Line
from quadstep.measurement import (
    OUT_OF_MEMORY,
    WAIT,
    Measurement,
    ProbePlan,
    is_out_of_memory,
    measure,
)
from quadstep.tensors import Groups, parameters, world_size


class StepSearch:
    """Finds the line of a step, or of one that is only previewed, and how far to go."""

    center: Tensor  # the loss before the step
    line: Line | None = None  # at rate zero; None where nothing is to move
    decision: Decision
    probes: int = 0  # evaluations of the closure after the gradient pass

    def __init__(
        self,
        strategies: Strategies,
        evaluator: ClosureEvaluator,
        groups: Groups,
        state: Any,
        closure: Closure,
        loss: Tensor | None,
        *,
        is_preview: bool = False,
    ) -> None:
        self.strategies, self.evaluator = strategies, evaluator
        self.groups, self.state, self.scalars = groups, state, groups[0]
        self.closure, self.loss, self.is_preview = closure, loss, is_preview
        self.params, self.rate = parameters(groups), rate_in_force(groups)
        self.is_due = self.scalars[WAIT] == 0
        sources = self.params if self.is_due or is_preview else None
        self.before = evaluator.tracker.capture(sources)

    @property
    def determinism(self) -> float | None:
        """How free of noise the losses are, from 0 to 1; None where they are not finite."""
        if self.decision.reason is Reason.NON_FINITE:
            return None
        return self.strategies.controller_state(self.scalars).determinism

    def run(self, rollback: ExitStack) -> None:
        """Searches; `rollback` undoes what the closure and a wrapped optimizer have changed."""
        direction, controller, update, _, process_group = self.strategies
        rollback.callback(self.before.restore)
        center = self.evaluator.gradient_pass(self.closure, self.loss, self.params, self.before)
        # Closures may return one tensor each time, as replayed graphs do.
        self.center = center.clone() if self.is_due else center
        self.decision = Decision(self.rate, 0.0, Reason.HELD)
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
        if not self.is_preview:
            update.observe(self.groups, self.state, look=self.is_due)
        is_kept = self.is_due or update.averages or self.is_preview
        line = self.line = direction.line(self.groups, self.state, self.rate, is_kept)
        rollback.callback(line.restore)
        measurement = self._measure(line) if self.is_due else None
        if measurement is None:
            self.decision = Decision(self.rate, self.rate, Reason.HELD)
            return
        samples, self.probes = measurement.samples, measurement.evaluations
        state, self.decision = controller.update(
            self.strategies.controller_state(self.scalars), self.rate, samples
        )
        self.scalars.update(flatten(state, CONTROLLER_STATE))
        if self.decision.reason is Reason.NON_FINITE and math.isfinite(samples.loss_center):
            self.before.restore()

    def _measure(self, line: Line) -> Measurement | None:
        """Measures the line; None where memory runs out repeatedly, to continue without."""
        schedule, process_group = self.strategies.schedule, self.strategies.process_group
        scalars, diagnostics = self.scalars, self.evaluator.diagnostics
        state = self.strategies.controller_state(scalars)
        try:
            found = self._probe(line, state)
        except Exception as error:
            # One process of several cannot continue on its own.
            if not is_out_of_memory(error) or world_size(process_group) > 1:
                raise
            if not schedule.record_memory_failure(scalars):
                raise
            diagnostics.warn_memory(scalars[OUT_OF_MEMORY], self.rate)
            return None
        schedule.record_measurement(scalars)
        samples = found.samples
        if samples.contradicts_gradient and not state.fits:
            diagnostics.warn_constant(samples.loss_center, samples.slope * samples.distance)
        if found.unequal is not None:
            diagnostics.warn_unrepeatable(*found.unequal, two_phases=self.loss is not None)
        return found

    def _probe(self, line: Line, state: Any) -> Measurement:
        """Plans the probes of a measurement, and evaluates them."""
        _, controller, _, schedule, process_group = self.strategies
        scalars, evaluator, two_phases = self.scalars, self.evaluator, self.loss is not None
        # A caller who has access to the gradients may have clipped them, if only now and then.
        gradient_unmodified = not (two_phases or evaluator.runs_backward)
        check = state.slope_check
        slope = None if check is None else line.slope()
        is_audit = schedule.is_audit(scalars) and "unrepeatable" not in evaluator.diagnostics.given
        plan = ProbePlan(
            distance=controller.probe_distance(state, self.rate),
            slope=slope,
            behind=slope is None or check is None or check.due or not gradient_unmodified,
            is_audit=is_audit,
            two_phases=two_phases,
            gradient_unmodified=gradient_unmodified,
        )
        losses = schedule.padded_losses(scalars)
        with evaluator.probing(
            self.closure, self.params, scalars, self.before, two_phases=two_phases
        ) as probes:
            found = measure(line, plan, probes, self.center, losses, process_group)
            if found.unequal is None or probes.have_gradients:
                return found
            # The loss may repeat itself only with gradients enabled.
            probes.with_gradients = True
            again = measure(line, plan, probes, self.center, losses, process_group)
            scalars[PROBES_WITH_GRADIENTS] = again.unequal is None
            return replace(again, evaluations=found.evaluations + again.evaluations)


class Preview:
    """The line that a step would move along, see `LQA.preview`.

    It is valid until a gradient is computed in place of its own.

    Attributes:
        rate: the rate of the step; zero where no step would be taken.

    Example:
        >>> line = opt.preview(closure)
        >>> losses = line.losses([0.0, line.rate, 2.0 * line.rate])
    """

    def __init__(self, search: StepSearch) -> None:
        self.rate = search.decision.step
        self._search = search

    @torch.no_grad()
    def losses(self, rates: Iterable[float]) -> list[float]:
        """Evaluates the loss at several rates, free of side effects, and moves nothing.

        Args:
            rates: points of the line; zero is where the parameters are now.

        Returns:
            The losses, in the order of the rates.
        """
        search = self._search
        now = search.evaluator.tracker.capture(search.params)
        line = Line([] if search.line is None else search.line.blocks)
        try:
            with search.evaluator.probing(
                search.closure, search.params, search.scalars, search.before, two_phases=True
            ) as probes:
                return [*map(float, line.losses(probes.evaluate, rates))]
        finally:
            now.restore()
