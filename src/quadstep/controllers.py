"""From losses on a line to the rate of a step: the rule of Zhu et al. (CIKM 2020), a trust region.

Controllers hold configuration alone; their state, of plain scalars, is passed in and returned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, ClassVar, Protocol, TypeVar

from quadstep.quadratic import LARGE_CHANGE, LineSamples, Quadratic, divide
from quadstep.statistics import LossStatistics, NoiseEstimate, SlopeCheck, ema, weighted_mean

SMALLEST_RATE, LARGEST_RATE = 1e-30, 1e30
OVERFLOW = 3.4e38  # beyond this a rate is not finite in single precision


class Reason(StrEnum):
    """Why the rate of a step is what it is.

    Example:
        >>> Reason("minimum").name
        'MINIMUM'
    """

    INITIAL = "initial"  # no step was taken yet: the first rate, or that of a loaded state
    MINIMUM = "minimum"  # the minimizer of the quadratic
    HELD = "held"  # not measured, not being due or all gradients being zero: the rate is reused
    GROWN = "grown"  # the minimizer is beyond the trust region: the rate is at its radius
    SHRUNK = "shrunk"  # the minimizer is far below the rate, or the loss rises: a contraction
    CONCAVE = "concave"  # no minimum (b <= 0): an expansion, where the trust region allows
    ASCENT = "ascent"  # the loss rises along the direction (a <= 0): a contraction
    NOISE = "noise"  # the losses differ by less than rounding resolves: the probes move out
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
class RegionState:
    """How the loss has changed on successive batches, and the bounds of the rate that follow."""

    losses: LossStatistics
    second_mean: float  # moving average of the loss, slower or faster than that of `losses`
    peak_loss: float  # largest absolute mean of the losses, slowly forgotten
    reference_loss: float  # the loss from which a decrease counts
    predicted_reduction: float = 0.0  # moving average, of one step
    total_predicted_reduction: float = 0.0  # sum over all steps
    updates: int = 0  # number of losses
    last_success: int = 0  # `updates` at the last sufficient decrease; zero before
    radius: float = 0.0  # of the trust region, a rate; zero before the first success
    damping: float = 1.0  # fraction of the minimizer to take

    REDUCTION_WEIGHT: ClassVar[float] = 0.1  # of the newest predicted reduction

    @classmethod
    def initial(cls, loss: float) -> RegionState:
        """Starts with the first loss."""
        return cls(LossStatistics.initial(loss), loss, abs(loss), loss)

    def record(self, loss: float, reduction: float, weight: float, decay: float) -> RegionState:
        """Adds a loss and a predicted reduction, by the weights of `second_mean` and spread."""
        past = self.predicted_reduction
        return replace(
            self,
            losses=self.losses.update(loss, decay),
            second_mean=ema(self.second_mean, loss, weight),
            predicted_reduction=weighted_mean(past, reduction, self.REDUCTION_WEIGHT),
            total_predicted_reduction=self.total_predicted_reduction + reduction,
            updates=self.updates + 1,
        )


@dataclass(frozen=True, slots=True)
class TrustRegionState:
    """What is known of the line, of the losses and of the measurements."""

    region: RegionState = field(default=RegionState.initial(0.0))
    quadratic: Quadratic = field(default=Quadratic(0.0, 0.0))  # averaged
    fits: int = 0  # number of fits in it
    steps_since_contraction: int = 0  # in measurements
    loss_scale: float = 0.0  # moving average of the absolute loss
    minimum_distance: float = 0.0  # of the probes, for the losses to resolve the curvature
    outlier_count: int = 0  # fits in a row that contradict the averaged quadratic
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


def _check(config: object, names: str, low: float, high: float) -> None:
    for name in names.split():
        if not low <= getattr(config, name) <= high:
            raise ValueError(f"{name} must be in [{low}, {high}], not {getattr(config, name)}")


@dataclass(frozen=True, slots=True)
class Damping:
    """Damps the minimizer while the loss rises: the rule for iterates that are not averaged.

    The noise of a batch also decreases along a direction computed from it, so the minimizer of one
    batch is too far out. A loss that rises on the batches that follow shows this.
    """

    decrease: float = 0.98  # factor of the damping at a measurement while the loss rises
    increase: float = 1.01  # and while it falls; 1.002 around an optimizer that has momentum
    minimum: float = 0.1  # of the damping
    significance: float = 3.0  # decrease of the loss that is sufficient, in spreads
    window: float = 50.0  # steps after which a predicted reduction would be visible
    initial_growth: float = 0.02  # fraction of the growth before the first sufficient decrease
    contraction: float = 0.9  # factor of the rate while the loss rises along a concave line
    mean_weight: float = 0.01  # of the newest loss in the second mean, a slow one
    spread_decay: float = 0.1  # weight of a deviation below the spread

    def __post_init__(self) -> None:
        fractions = "decrease minimum initial_growth contraction mean_weight spread_decay"
        _check(self, fractions, 0.0, 1.0)
        _check(self, "significance window", 0.0, math.inf)
        _check(self, "increase", 1.0, math.inf)

    def update(self, state: RegionState, loss: float, rate: float, reduction: float) -> RegionState:
        """Adds the loss before a step at a rate, and the reduction predicted of the step."""
        state = state.record(loss, reduction, self.mean_weight, self.spread_decay)
        mean, highest = state.losses.mean, max(state.reference_loss, state.losses.mean)
        factor = self.decrease if mean > state.second_mean else self.increase
        damping = min(max(state.damping * factor, self.minimum), 1.0)
        sufficient = highest - mean > self.significance * state.losses.spread
        success = state.updates if sufficient else state.last_success
        return replace(state, reference_loss=highest, last_success=success, damping=damping)

    def clip(self, state: RegionState, rate: float, proposed: float, convex: bool = True) -> float:
        """Clips a proposed rate; without a minimum to damp, a damped rate stays or contracts."""
        invisible = self.window * state.predicted_reduction <= state.losses.spread
        if state.damping < 1.0 and not (convex or invisible):
            return self.contraction * rate if state.losses.mean > state.second_mean else rate
        free = state.last_success or invisible
        return proposed if free else rate + self.initial_growth * (proposed - rate)


@dataclass(frozen=True, slots=True)
class SufficientDecrease:
    """Expands the trust region at each sufficient decrease: the rule for averaged iterates.

    It does not bind where predicted reductions are too small to be visible beside the spread. The
    rate contracts if many were predicted before any success, and if the loss rises long after one.
    """

    significance: float = 1.0  # decrease of the loss that is sufficient, in spreads
    window: float = 12.0  # steps after which a predicted reduction would be visible
    failure: float = 10.0  # predicted reductions without success that contract, in spreads
    contraction: float = 0.95  # factor of the rate for these
    warmup: int = 10  # measurements in which the reference is the highest mean
    reference_weight: float = 0.01  # of a mean above the reference, so that an outlier fades
    overdue: int = 20  # measurements since a success from which on a higher loss contracts
    decay_power: float = 3.0  # the rate then falls with the updates to this negative power
    expansion: float = 1.7  # factor of the rate for each success
    converged: float = 0.01  # fraction of the peak loss below which the radius expands no more
    peak_decay: float = 0.999  # factor of the peak loss at a measurement
    mean_weight: float = 0.3  # of the newest loss in the second mean, a fast one
    spread_decay: float = 0.03  # weight of a deviation below the spread, against false positives

    def __post_init__(self) -> None:
        fractions = "contraction reference_weight converged peak_decay mean_weight spread_decay"
        _check(self, fractions, 0.0, 1.0)
        _check(self, "significance window failure warmup overdue", 0.0, math.inf)
        _check(self, "decay_power", 0.0, self.overdue)
        _check(self, "expansion", 1.0, math.inf)

    def update(self, state: RegionState, loss: float, rate: float, reduction: float) -> RegionState:
        """Adds the loss before a step at a rate, and the reduction predicted of the step."""
        state = state.record(loss, reduction, self.mean_weight, self.spread_decay)
        mean, reference = state.losses.mean, max(state.reference_loss, state.losses.mean)
        if state.updates >= self.warmup:
            reference = ema(state.reference_loss, reference, self.reference_weight)
        peak = max(self.peak_decay * state.peak_loss, abs(mean))
        state = replace(state, peak_loss=peak, reference_loss=reference)
        if not mean < reference - self.significance * state.losses.spread:
            return state
        radius = rate if self._has_converged(state) else self.expansion * rate
        # The mean lags behind, and would show the same decrease again.
        reference = min(mean, state.second_mean)
        return replace(state, reference_loss=reference, last_success=state.updates, radius=radius)

    def clip(self, state: RegionState, rate: float, proposed: float, convex: bool = True) -> float:
        """Clips a proposed rate to the radius, or contracts."""
        spread = state.losses.spread
        invisible = rate * divide(spread, self.window * state.predicted_reduction)
        if not state.radius:
            failed = state.total_predicted_reduction > self.failure * spread
            return min(proposed, max(self.contraction * rate if failed else rate, invisible))
        smallest = largest = max(rate, state.radius)
        overdue = state.updates - state.last_success > self.overdue
        if overdue and not self._has_converged(state) and state.losses.mean > state.reference_loss:
            smallest = rate * (1.0 - self.decay_power / state.updates)
        return min(proposed, max(smallest, min(invisible, largest)))

    def _has_converged(self, state: RegionState) -> bool:
        return abs(state.losses.mean) < self.converged * state.peak_loss


@dataclass(frozen=True, slots=True)
class TrustRegionConfig:
    """The constants of `TrustRegionController`, by default those for averaged iterates."""

    rule: SufficientDecrease | Damping = field(default=SufficientDecrease())
    smoothing: float = 0.97  # weight of the past in the averaged quadratic; 0 takes the last alone
    growth: float = 3.0  # largest factor by which a measurement raises the rate
    growth_decays: bool = True  # to 1 + (growth - 1) / (measurements since the last contraction)
    contraction: float = 0.1  # smallest factor by which a measurement lowers the rate
    rejection: float = 0.5  # fraction of the rate: a minimizer below it rejects the step
    step_cap: float = math.inf  # Polyak step cap, in loss / slope: 2 allows a minimum of zero loss
    catch_up: float = 300.0  # the rate is at least the minimizer over this, where the rule allows
    settled_growth: float = 1.1  # growth up to which the rate may be reused
    outliers: int = 10  # fits in a row that contradict the averaged one and then replace it
    outlier_ratio: float = 10.0  # ratio of minimizers that contradict each other
    loss_cap: float = 10.0  # largest loss that counts in the loss scale, in loss scales
    signal: float = 1e3  # second difference at the minimum distance, in rounding errors
    largest_change: float = LARGE_CHANGE  # bound of the same for coarse dtypes, in losses
    widening: float = 10.0  # factor of the distance where the curvature is unresolved

    def __post_init__(self) -> None:
        _check(self, "smoothing contraction rejection largest_change", 0.0, 1.0)
        _check(self, "step_cap", 0.0, math.inf)
        factors = "growth catch_up settled_growth outliers outlier_ratio loss_cap signal widening"
        _check(self, factors, 1.0, math.inf)


@dataclass(frozen=True, slots=True)
class TrustRegionController:
    """The minimizer of an averaged quadratic, clipped to a trust region.

    Slope and curvature are averaged one by one, so that steep batches count for more. The first
    fits weigh equally, since the slope at the start is many times that of later.

    Example:
        >>> controller = TrustRegionController(TrustRegionConfig())
        >>> samples = LineSamples(0.5, loss_ahead=0.75, loss_center=1.0, loss_behind=1.75)
        >>> controller.update(TrustRegionState(), 0.5, samples)[1].rate
        0.5
    """

    config: TrustRegionConfig
    state_type: ClassVar[type[TrustRegionState]] = TrustRegionState
    needs_slope: ClassVar[bool] = True

    def probe_distance(self, state: TrustRegionState, rate: float) -> float:
        """The rate in force, or further out where rounding hides the curvature there."""
        # The ratio of the two multiplies a wrapped optimizer's step in single precision.
        return _clamp(max(rate, min(state.minimum_distance, LARGEST_RATE * rate)))

    def update(
        self, state: TrustRegionState, rate: float, samples: LineSamples
    ) -> tuple[TrustRegionState, Decision]:
        """Chooses a finite rate in [contraction * rate, growth * rate], or beyond by `catch_up`.

        A step is rejected after a large contraction, along a rising line or a non-finite one.
        """
        config, rate = self.config, _clamp(rate)
        check = state.slope_check.update(samples, state.region.damping)
        if check.passes and samples.is_finite:
            # Only fits of one kind are averaged.
            samples = replace(samples, loss_behind=None)
        fit, center = Quadratic.fit(samples), samples.loss_center
        unresolved, is_finite = samples.curvature_unresolved, samples.is_finite
        region, noise = state.region, state.noise
        if math.isfinite(center):
            slope, curvature = (0.0, 0.0) if unresolved else (fit.slope, fit.curvature)
            reduction = rate * (slope - curvature * rate)
            reduction = max(0.0, reduction) if math.isfinite(reduction) else 0.0
            if is_finite:
                losses = (*samples.recent_losses, center)
                noise = noise.update(losses, reduction, rate * abs(slope))
            region = region if state.loss_scale else RegionState.initial(center)
            region = config.rule.update(region, center, rate, reduction)
        state = replace(state, region=region, noise=noise, slope_check=check)
        if not (is_finite and math.isfinite(fit.slope) and math.isfinite(fit.curvature)):
            reason, hint = Reason.NON_FINITE, 0.0
        elif samples.loss_ahead - center > max(abs(center), state.loss_scale):
            # So far out a quadratic does not fit: its minimizer gives the order of magnitude.
            reason, hint = Reason.SHRUNK, fit.minimizer if fit.has_minimum_ahead else 0.0
        elif unresolved:
            if not state.fits and samples.slope_unresolved and not samples.contradicts_gradient:
                rate = max(rate, _clamp(samples.distance))
            distance = _clamp(config.widening * samples.distance)
            return replace(state, minimum_distance=distance), Decision(rate, rate, Reason.NOISE)
        else:
            return self._choose(self._average(state, fit, samples), rate)
        # Probes beyond the rate tell nothing of the rate itself.
        if samples.distance <= rate:
            rate = _clamp(rate * min(max(hint / rate, config.contraction), config.rejection))
        state = replace(state, minimum_distance=0.0, steps_since_contraction=0)
        return state, Decision(rate, 0.0, reason)

    def _average(
        self, state: TrustRegionState, fit: Quadratic, samples: LineSamples
    ) -> TrustRegionState:
        """Averages the fit and the scales; the last of many outliers replaces the average."""
        config, past, outliers, fits = self.config, state.quadratic, 0, state.fits + 1
        if fit.has_minimum_ahead and state.fits:
            near, far = sorted((past.minimizer, fit.minimizer))
            if far > config.outlier_ratio * near or not past.has_minimum_ahead:
                outliers = state.outlier_count + 1
        if outliers == config.outliers:
            fits, outliers = 1, 0
        weight = max(1.0 - config.smoothing, 1.0 / fits)
        slope = weighted_mean(past.slope, fit.slope, weight)
        curvature = weighted_mean(past.curvature, fit.curvature, weight)
        scale = loss = abs(samples.loss_center)
        if state.loss_scale != 0.0:
            capped = min(loss, config.loss_cap * state.loss_scale)
            scale = config.smoothing * state.loss_scale + (1.0 - config.smoothing) * capped
        largest = config.largest_change * max(loss, scale)
        signal = min(config.signal * samples.rounding_error, largest)
        return replace(
            state,
            quadratic=Quadratic(slope, curvature),
            fits=fits,
            steps_since_contraction=state.steps_since_contraction + 1,
            loss_scale=scale,
            minimum_distance=samples.distance * math.sqrt(signal / abs(samples.second_difference)),
            outlier_count=outliers,
        )

    def _choose(self, state: TrustRegionState, rate: float) -> tuple[TrustRegionState, Decision]:
        """Clips the damped minimizer to the trust region."""
        config, region, quadratic = self.config, state.region, state.quadratic
        decay = state.steps_since_contraction if config.growth_decays else 1
        growth = 1.0 + (config.growth - 1.0) / decay
        convex, settled = quadratic.curvature > 0.0, growth <= config.settled_growth
        proposed = _clamp(rate * growth)
        limit = _clamp(config.rule.clip(region, rate, proposed, convex))
        shrunk = Reason.SHRUNK if limit < rate else None
        contracted = replace(state, steps_since_contraction=0)
        if quadratic.slope <= 0.0:
            return contracted, Decision(_clamp(rate / config.growth), 0.0, Reason.ASCENT)
        if not convex:
            return state, Decision(limit, limit, shrunk or Reason.CONCAVE)
        loss = max(state.loss_scale, region.losses.spread)
        cap = config.step_cap * loss / quadratic.slope if loss else math.inf
        minimizer = _clamp(min(region.damping * quadratic.minimizer, cap))
        if minimizer > limit:
            # The step stays within the probed distance; the next probe is further out.
            distant = minimizer / config.catch_up
            distant = config.rule.clip(region, rate, distant) if limit == proposed else 0.0
            rate = max(limit, distant)
            return state, Decision(rate, limit, shrunk or Reason.GROWN, settled)
        if minimizer < rate * config.contraction:
            return contracted, Decision(_clamp(rate * config.contraction), 0.0, Reason.SHRUNK)
        if minimizer < config.rejection * rate:
            return contracted, Decision(minimizer, 0.0, Reason.MINIMUM)
        return state, Decision(minimizer, minimizer, Reason.MINIMUM, settled=True)


def _clamp(rate: float) -> float:
    return min(max(rate, SMALLEST_RATE), LARGEST_RATE)
