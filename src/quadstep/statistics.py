"""Running statistics of the losses: level and spread, noise, and the check of the slope."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from quadstep.quadratic import LineSamples, Quadratic, divide


def ema(mean: float, value: float, weight: float) -> float:
    """Updates a moving average; a value equal to the mean leaves it equal to the last bit."""
    return mean + weight * (value - mean)


def weighted_mean(past: float, value: float, weight: float) -> float:
    """Updates a moving average; a weight of one gives the value to the last bit."""
    return (1.0 - weight) * past + weight * value


@dataclass(frozen=True, slots=True)
class LossStatistics:
    """The level of the losses of about the last ten measurements."""

    mean: float  # moving average of the loss
    spread: float  # moving average of its absolute deviation from the mean

    WEIGHT: ClassVar[float] = 0.1  # of the newest loss
    INITIAL_SPREAD: ClassVar[float] = 0.1  # fraction of the first loss, more than usual noise

    @classmethod
    def initial(cls, loss: float) -> LossStatistics:
        """Starts with the first loss."""
        return cls(loss, spread=cls.INITIAL_SPREAD * abs(loss))

    def update(self, loss: float, decay: float) -> LossStatistics:
        """Adds a loss; `decay` is the weight of a deviation below the spread."""
        mean, deviation = ema(self.mean, loss, self.WEIGHT), abs(loss - self.mean)
        spread = ema(self.spread, deviation, self.WEIGHT if deviation > self.spread else decay)
        finite = math.isfinite(mean + spread)
        return LossStatistics(mean, spread) if finite else LossStatistics.initial(loss)


@dataclass(frozen=True, slots=True)
class NoiseEstimate:
    """How much of the change of the loss from step to step is mini-batch noise.

    Without noise the losses lie on a smooth curve, or alternate between two where the steps
    oscillate across a valley. So the third differences of every second loss are small beside the
    predicted reduction of a step and the change over all steps. With mini-batches they are not.
    """

    ratio: float = 1.0  # moving average of the noise over these changes, in [0, 1]
    count: int = 0  # number of ratios in it

    WEIGHT: ClassVar[float] = 0.2  # of the newest ratio
    DETERMINISTIC: ClassVar[float] = 0.02  # ratio up to which there is no noise
    STOCHASTIC: ClassVar[float] = 0.06  # ratio from which on there is nothing but noise

    def update(self, losses: Sequence[float], reduction: float, linear: float) -> NoiseEstimate:
        """Adds seven or more losses of successive steps, and what the last predicts.

        A rise by more than the linear term of its predicted reduction is noise.
        """
        strided = zip(losses, losses[2:], losses[4:], losses[6:], strict=False)
        differences = [d - 3.0 * c + 3.0 * b - a for a, b, c, d in strided]
        if not differences or not all(map(math.isfinite, losses)):
            return self
        # The third difference of independent numbers has 1 + 9 + 9 + 1 times their variance.
        deviation = math.hypot(*differences) / math.sqrt(20.0 * len(differences))
        change = losses[-1] - losses[0]
        ratio = divide(deviation, reduction + abs(change)) if change < linear else 1.0
        # Also where it overflows, or is zero over zero.
        ratio = ratio if ratio < 1.0 else 1.0
        count = self.count + 1
        return NoiseEstimate(ema(self.ratio, ratio, max(self.WEIGHT, 1.0 / (count + 1))), count)

    @property
    def determinism(self) -> float:
        """How free of noise the losses are, from 0 to 1."""
        margin = (self.STOCHASTIC - self.ratio) / (self.STOCHASTIC - self.DETERMINISTIC)
        return min(max(margin, 0.0), 1.0)


@dataclass(frozen=True, slots=True)
class SlopeCheck:
    """Whether the directional derivative that the gradient gives is the slope of the losses.

    If so, one probe is enough; straight-through estimators fail. An error of the slope changes the
    curvature, the more the closer the probe. So curvatures are compared, relative to the larger or,
    if that is larger still, to one whose damped minimizer is at the probe.
    """

    mean_difference: float = 0.0  # moving average of the relative difference
    last_difference: float = 0.0  # the newest
    checks: int = 0  # number of differences in the average
    measurements: int = 0  # checked or not

    INITIAL_CHECKS: ClassVar[int] = 10  # before one probe may be enough
    INTERVAL: ClassVar[int] = 10  # measurements, of which one is checked from then on
    WEIGHT: ClassVar[float] = 0.1  # of the newest difference
    TOLERANCE: ClassVar[float] = 0.3  # largest difference that passes: at the vertex 0.15 of slope
    CAP: ClassVar[float] = 2.0  # of a difference: that of opposite curvatures

    @property
    def passes(self) -> bool:
        """Whether one probe is enough."""
        return self.checks >= self.INITIAL_CHECKS and self.mean_difference <= self.TOLERANCE

    @property
    def due(self) -> bool:
        """Whether the next measurement takes two probes."""
        failed = not self.passes or self.last_difference > self.TOLERANCE
        return failed or self.measurements % self.INTERVAL == 0

    def update(self, samples: LineSamples, damping: float) -> SlopeCheck:
        """Adds a measurement; starts over where the gradient is modified or not finite."""
        if not (samples.gradient_unmodified and math.isfinite(samples.slope)):
            return SlopeCheck()
        counted = replace(self, measurements=self.measurements + 1)
        if samples.loss_behind is None or samples.slope_unresolved:
            return counted
        measured = Quadratic.fit(samples)
        implied = Quadratic.fit(replace(samples, loss_behind=None))
        steepest = max(abs(measured.slope), abs(implied.slope))
        largest = max(abs(measured.curvature), abs(implied.curvature))
        scale = max(largest, damping * divide(steepest, 2.0 * samples.distance))
        difference = abs(divide(measured.curvature - implied.curvature, scale))
        if math.isnan(difference):
            return counted
        difference, checks = min(difference, self.CAP), self.checks + 1
        mean = ema(self.mean_difference, difference, max(self.WEIGHT, 1.0 / checks))
        return SlopeCheck(mean, difference, checks, counted.measurements)


@dataclass
class SlopeComparison:
    """Compares the slopes that gradients give with those of the losses, in sums.

    Probes so far out that the curvature decides are left out, and so is low precision: there the
    sums differ on ordinary networks, too.
    """

    measured: float = 0.0
    given: float = 0.0  # by the gradients
    count: int = 0

    MEASUREMENTS: ClassVar[int] = 20  # before they are compared
    TOLERANCE: ClassVar[float] = 0.7  # relative to the sum of those given
    RESOLUTION: ClassVar[float] = 1e-6  # relative, of the coarsest losses that are compared

    def differ(self, samples: LineSamples) -> bool:
        """Adds a measurement; whether the gradients are clearly those of another function."""
        is_known = samples.gradient_unmodified and math.isfinite(samples.slope)
        if not is_known or samples.loss_behind is None or not samples.is_finite:
            return False
        is_near = abs(samples.second_difference) < 0.5 * abs(samples.slope) * samples.distance
        if not is_near or samples.slope_unresolved or samples.resolution > self.RESOLUTION:
            return False
        self.measured += (samples.loss_behind - samples.loss_ahead) / (2.0 * samples.distance)
        self.given, self.count = self.given + samples.slope, self.count + 1
        difference = abs(self.measured - self.given)
        return self.count >= self.MEASUREMENTS and difference > self.TOLERANCE * abs(self.given)
