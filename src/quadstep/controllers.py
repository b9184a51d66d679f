"""From losses on a line to the rate of a step: the rule of Zhu et al. (CIKM 2020), a trust region.

Controllers hold configuration alone; their state, of plain scalars, is passed in and returned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, ClassVar, Protocol, TypeVar

from quadstep.quadratic import LineSamples, Quadratic, divide
from quadstep.statistics import Ema, LossStatistics, NoiseEstimate, SlopeCheck

SMALLEST_RATE, LARGEST_RATE = 1e-30, 1e30
OVERFLOW = 3.4e38  # beyond this a rate is not finite in single precision
WIDENING = 10.0  # factor of the probe distance where rounding hides the curvature
SETTLED = 1.1  # growth up to which the rate is reused before the next measurement


class Reason(StrEnum):
    """Why the rate of a step is what it is.

    Example:
        >>> Reason("minimum").name
        'MINIMUM'
    """

    INITIAL = "initial"  # no step was taken yet: the first rate, or that of a loaded state
    MINIMUM = "minimum"  # the minimizer of the quadratic
    RADIUS = "radius"  # the trust region, or the growth, ends before the minimizer
    POLYAK = "polyak"  # a larger rate would predict a loss below zero
    REUSED = "reused"  # not measured, not being due or all gradients being zero
    REJECTED = "rejected"  # the loss rises far: a contraction
    CONCAVE = "concave"  # no minimum (b <= 0): the rate is at the radius
    ASCENT = "ascent"  # the loss rises along the direction (a <= 0): a contraction
    UNRESOLVED = "unresolved"  # the losses differ by less than rounding: the probes move out
    NON_FINITE = "non_finite"  # a loss, a gradient or the rate is not finite: no step was taken


@dataclass(frozen=True, slots=True)
class Decision:
    """What a measurement decides.

    Example:
        >>> Decision(rate=0.1, step=0.0, reason=Reason.ASCENT).settled
        False
    """

    rate: float  # from now on
    step: float  # the rate to step with now: `rate`, a smaller one, or zero for a rejected step
    reason: Reason
    settled: bool = False  # whether the rate may be reused before the next measurement


@dataclass(frozen=True, slots=True)
class VertexState:
    """The last quadratic that was used, and how many were."""

    quadratic: Quadratic = field(default=Quadratic(0.0, 0.0))
    fits: int = 0
    slope_check: ClassVar[None] = None
    determinism: ClassVar[float] = 0.0


@dataclass(frozen=True, slots=True)
class TrustRegionState:
    """What is known of the line, of the losses and of the measurements."""

    quadratic: Quadratic = field(default=Quadratic(0.0, 0.0))  # averaged
    fits: int = 0  # number of fits in it
    measurements: int = 0  # number of losses
    contraction: int = 0  # `measurements` at the last rejected step, or the first rate
    adapted: int = 0  # `measurements` at the last expansion or contraction of the radius
    has_decreased: bool = False  # whether there was a sufficient decrease
    losses: LossStatistics = field(default=LossStatistics())
    reference: float = -math.inf  # the level of the losses from which a decrease counts
    reduction: Ema = field(default=Ema())  # predicted, of one step
    total_reduction: float = 0.0  # predicted since the radius was adapted
    radius: float = 0.0  # of the trust region, a rate; zero before the first rate was estimated
    minimum_distance: float = 0.0  # of the probes, for the losses to resolve the curvature
    rejections: int = 0  # steps in a row that were rejected
    accepted: float = 0.0  # the rate of the last step that was not
    noise: NoiseEstimate = field(default=NoiseEstimate())
    slope_check: SlopeCheck = field(default=SlopeCheck())

    @property
    def determinism(self) -> float:
        """How free of noise the losses are, from 0 to 1."""
        return self.noise.determinism


S = TypeVar("S", VertexState, TrustRegionState)


class StepController(Protocol[S]):
    """Chooses where to probe, and from the losses there the rate.

    Example:
        >>> controller: StepController[VertexState] = VertexController()
        >>> controller.probe_distance(VertexState(), rate=0.1)
        0.1
    """

    state_type: ClassVar[type[Any]]  # its default is the state before the first measurement
    needs_slope: ClassVar[bool]  # whether a line without a slope is not measured

    def probe_distance(self, state: S, rate: float) -> float:
        """The distance of the probes, in units of the rate."""
        ...

    def update(self, state: S, rate: float, samples: LineSamples) -> tuple[S, Decision]:
        """Chooses the next rate, given that in force and the losses."""
        ...


@dataclass(frozen=True, slots=True)
class VertexController:
    """Algorithm 1 as printed: the rate is the vertex (equation 3), whatever it is.

    Example:
        >>> samples = LineSamples(0.5, loss_ahead=2.0, loss_center=1.0, loss_behind=1.0)
        >>> VertexController().update(VertexState(), 0.5, samples)[1].rate
        -0.25
    """

    state_type: ClassVar[type[VertexState]] = VertexState
    needs_slope: ClassVar[bool] = False

    def probe_distance(self, state: VertexState, rate: float) -> float:
        """delta0, the last minimizer (section 3.2)."""
        return rate

    def update(
        self, state: VertexState, rate: float, samples: LineSamples
    ) -> tuple[VertexState, Decision]:
        """Takes the vertex, unless it is not finite."""
        fit = Quadratic.fit(samples)
        minimizer = fit.minimizer
        if not samples.is_finite or not abs(minimizer) <= OVERFLOW:
            return state, Decision(rate, 0.0, Reason.NON_FINITE)
        reason = Reason.ASCENT if fit.slope <= 0.0 else Reason.MINIMUM
        reason = Reason.CONCAVE if fit.curvature <= 0.0 else reason
        return VertexState(fit, state.fits + 1), Decision(minimizer, minimizer, reason)


@dataclass(frozen=True, slots=True)
class TrustRegionConfig:
    """The constants of `TrustRegionController`; docs/research.md has what each of them is worth.

    Lengths of time are in measurements.
    """

    memory: float = 20.0  # of the averaged quadratic and of the statistics of the losses
    start: float = 50.0  # the first rate is the first minimizer over this
    growth: float = 2.0  # n measurements after a rejection the rate grows by 1 + growth / n
    contraction: float = 0.1  # smallest factor of the rate at a measurement
    rejection: float = 0.5  # factor of the rate below which the step is rejected
    significance: float = 1.0  # decrease of the loss that is sufficient, in spreads
    expansion: float = 1.7  # the radius after a sufficient decrease, in rates
    window: float = 12.0  # steps within which a predicted reduction would be visible
    failure: float = 10.0  # predicted reductions without a decrease that contract, in spreads
    converged: float = 0.01  # gap of the losses, in peak gaps, from which on there is no expansion
    polyak: float = 2.0  # largest rate, in gap / slope: an exact parabola above zero allows two
    restart: int = 10  # rejected steps in a row after which the search starts over

    def __post_init__(self) -> None:
        for names, low, high in (
            ("contraction rejection converged", 0.0, 1.0),
            ("memory start expansion restart", 1.0, math.inf),
            ("growth significance window failure polyak", 0.0, math.inf),
        ):
            for name in names.split():
                if not low <= getattr(self, name) <= high:
                    value = getattr(self, name)
                    raise ValueError(f"{name} must be in [{low}, {high}], not {value}")


@dataclass(frozen=True, slots=True)
class TrustRegionController:
    """The smallest of the minimizer of an averaged quadratic, a radius and Polyak's step.

    The radius of the trust region expands after a sufficient decrease of the loss, one beyond its
    spread. It contracts where many times the spread was predicted, and would have been seen by
    now, and the loss is not lower. Where a predicted reduction is too small to be seen beside the
    spread, it does not bind before the first sufficient decrease, and holds the rate after it.
    Slope and curvature are averaged one by one, so that steep batches count for more. Source: Zhu
    et al. (equation 3); Conn, Gould and Toint, "Trust-Region Methods" (2000); Polyak, "Introduction
    to Optimization" (1987).

    Example:
        >>> controller = TrustRegionController()
        >>> samples = LineSamples(0.5, loss_ahead=0.75, loss_center=1.0, loss_behind=1.75)
        >>> controller.update(TrustRegionState(), 0.5, samples)[1].rate
        0.01
    """

    config: TrustRegionConfig = field(default_factory=TrustRegionConfig)
    state_type: ClassVar[type[TrustRegionState]] = TrustRegionState
    needs_slope: ClassVar[bool] = True

    def probe_distance(self, state: TrustRegionState, rate: float) -> float:
        """The rate in force, or further out where rounding hides the curvature there."""
        # The ratio of the two multiplies a wrapped optimizer's step in single precision.
        return _clamp(max(rate, min(state.minimum_distance, LARGEST_RATE * rate)))

    def update(
        self, state: TrustRegionState, rate: float, samples: LineSamples
    ) -> tuple[TrustRegionState, Decision]:
        """Chooses a finite rate; a step is rejected along a rising line or a non-finite one."""
        config, rate, center = self.config, _clamp(rate), samples.loss_center
        state = replace(state, slope_check=state.slope_check.update(samples))
        if state.slope_check.passes and samples.is_finite:
            # Only fits of one kind are averaged.
            samples = replace(samples, loss_behind=None)
        fit, spread = Quadratic.fit(samples), state.losses.spread
        if math.isfinite(center):
            state = self._observe(state, rate, samples, fit)
        if not (samples.is_finite and math.isfinite(fit.slope) and math.isfinite(fit.curvature)):
            return self._contract(state, rate, samples, 0.0, Reason.NON_FINITE)
        rise = samples.loss_ahead - center
        if rise > max(config.failure * spread, fit.slope * samples.distance, samples.signal):
            # So far out a quadratic does not fit: its minimizer gives the order of magnitude.
            hint = fit.minimizer if fit.slope > 0.0 and fit.curvature > 0.0 else 0.0
            why = Reason.REJECTED if fit.slope > 0.0 else Reason.ASCENT
            return self._contract(state, rate, samples, hint, why)
        if samples.curvature_unresolved:
            is_flat = samples.slope_unresolved and not samples.contradicts_gradient
            if not state.radius and is_flat:
                rate = max(rate, _clamp(samples.distance))
            state = replace(state, minimum_distance=_clamp(WIDENING * samples.distance))
            return state, Decision(rate, rate, Reason.UNRESOLVED)
        state = replace(state, minimum_distance=samples.resolved_distance)
        if state.radius:
            return self._choose(self._average(state, fit), rate, samples.signal)
        return self._start(state, rate, samples, fit)

    def _observe(
        self, state: TrustRegionState, rate: float, samples: LineSamples, fit: Quadratic
    ) -> TrustRegionState:
        """Adds a loss and the predicted reduction, and adapts the radius."""
        config, loss, resolved = self.config, samples.loss_center, not samples.curvature_unresolved
        linear, curved = (rate * fit.slope, rate**2 * fit.curvature) if resolved else (0.0, 0.0)
        reduction = max(0.0, linear - curved) if math.isfinite(linear - curved) else 0.0
        losses, noise = state.losses.update(loss, config.memory), state.noise
        if samples.is_finite:
            noise = noise.update((*samples.recent_losses, loss), reduction, abs(linear))
        now, level = state.measurements + 1, losses.mean.mean
        reference = max(state.reference, level)
        if now > config.memory:
            # Later levels raise it slowly.
            reference = state.reference + (reference - state.reference) / config.memory
        total, adapted, radius = state.total_reduction + reduction, state.adapted, state.radius
        has_decreased = level < reference - config.significance * losses.spread
        is_lower = state.has_decreased and level <= reference
        is_visible = now - adapted > 2.0 * config.memory and total > config.failure * losses.spread
        expanded = rate if losses.gap < config.converged * losses.peak else config.expansion * rate
        if has_decreased:
            reference, total, adapted, radius = level, 0.0, now, max(radius, expanded)
        elif is_visible and not is_lower:
            total, adapted, radius = 0.0, now, rate / config.expansion
        else:
            radius = max(radius, rate)
        return replace(
            state,
            measurements=now,
            adapted=adapted,
            has_decreased=state.has_decreased or has_decreased,
            losses=losses,
            noise=noise,
            reference=reference,
            reduction=state.reduction.update(reduction, config.memory),
            total_reduction=total,
            radius=radius if state.radius else 0.0,
        )

    def _start(
        self, state: TrustRegionState, rate: float, samples: LineSamples, fit: Quadratic
    ) -> tuple[TrustRegionState, Decision]:
        """Estimates the first rate from the first minimizer, whatever the first probe distance."""
        if fit.slope <= 0.0:
            return self._contract(state, rate, samples, 0.0, Reason.ASCENT)
        if state.minimum_distance > 2.0 * samples.distance:
            # The first estimate decides on many steps: it is not to be one of rounding errors.
            return state, Decision(rate, rate, Reason.UNRESOLVED)
        reach = _clamp(rate * (1.0 + self.config.growth))
        if fit.curvature <= 0.0:
            return state, Decision(reach, reach, Reason.CONCAVE)
        first = _clamp(fit.minimizer / self.config.start)
        state = self._average(state, fit)
        state = replace(state, radius=first, contraction=state.measurements)
        # The step stays within reach of the rate in force.
        return replace(state, accepted=first, rejections=0), Decision(
            first, min(first, reach), Reason.MINIMUM
        )

    def _average(self, state: TrustRegionState, fit: Quadratic) -> TrustRegionState:
        """Averages the fit; the first ones weigh equally."""
        past, fits = state.quadratic, state.fits + 1
        weight = 1.0 / min(fits, self.config.memory)
        slope = (1.0 - weight) * past.slope + weight * fit.slope
        curvature = (1.0 - weight) * past.curvature + weight * fit.curvature
        return replace(state, quadratic=Quadratic(slope, curvature), fits=fits)

    def _choose(
        self, state: TrustRegionState, rate: float, resolution: float
    ) -> tuple[TrustRegionState, Decision]:
        """Takes the smallest of the terms, which gives the reason."""
        config, quadratic, losses = self.config, state.quadratic, state.losses
        if quadratic.slope <= 0.0:
            # Once in a row: no rate descends then, and growth makes up for one contraction.
            factor = 1.0 if state.rejections else 1.0 / (1.0 + config.growth)
            return self._reject(state, factor * rate, Reason.ASCENT)
        growth = 1.0 + config.growth / max(1, state.measurements - state.contraction)
        invisible = rate * divide(losses.spread, config.window * state.reduction.mean)
        # Without any predicted reduction there is no noise to hide it either.
        invisible = 0.0 if math.isnan(invisible) else invisible
        # After a decrease the loss shows what to expect: what is invisible no more than holds.
        radius = max(state.radius, min(rate, invisible) if state.has_decreased else invisible)
        # Where rounding hides the gap it bounds nothing.
        gap = losses.gap if losses.gap > resolution else math.inf
        convex = quadratic.curvature > 0.0
        terms = {
            Reason.MINIMUM: quadratic.minimizer if convex else math.inf,
            Reason.POLYAK: config.polyak * gap / quadratic.slope,
            Reason.RADIUS if convex else Reason.CONCAVE: min(radius, rate * growth),
        }
        reason = min(terms, key=terms.__getitem__)
        new = _clamp(max(terms[reason], config.contraction * rate))
        if new < config.rejection * rate:
            return self._reject(state, new, reason)
        settled = reason is Reason.MINIMUM or growth <= SETTLED
        return replace(state, rejections=0, accepted=new), Decision(new, new, reason, settled)

    def _contract(
        self, state: TrustRegionState, rate: float, samples: LineSamples, hint: float, why: Reason
    ) -> tuple[TrustRegionState, Decision]:
        """Contracts the rate toward a hint; a probe beyond the rate tells nothing of the rate."""
        if samples.distance <= rate:
            rate *= min(max(hint / rate, self.config.contraction), self.config.rejection)
        return self._reject(replace(state, minimum_distance=0.0), rate, why)

    def _reject(
        self, state: TrustRegionState, rate: float, reason: Reason
    ) -> tuple[TrustRegionState, Decision]:
        """Rejects a step; after many the search starts over, at the last rate that was accepted."""
        rejections, rate = state.rejections + 1, _clamp(rate)
        if rejections >= self.config.restart:
            rejections, rate = 0, max(rate, state.accepted)
            state = replace(state, quadratic=Quadratic(0.0, 0.0), fits=0)
        state = replace(state, rejections=rejections, contraction=state.measurements)
        return state, Decision(rate, 0.0, reason)


def _clamp(rate: float) -> float:
    return min(max(rate, SMALLEST_RATE), LARGEST_RATE)
