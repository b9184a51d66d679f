"""Running statistics of the losses: level and spread, noise, and the check of the slope."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from quadstep.quadratic import LineSamples, Quadratic, divide


@dataclass(frozen=True, slots=True)
class Ema:
    """An exponential moving average that starts as the plain mean of its first values.

    Example:
        >>> Ema().update(1.0, memory=10.0).update(3.0, memory=10.0).mean
        2.0
    """

    mean: float = 0.0
    count: int = 0  # number of values

    def update(self, value: float, memory: float) -> Ema:
        """Adds a value; equal values leave the mean equal to the last bit."""
        count = self.count + 1
        mean = value if count == 1 else self.mean + (value - self.mean) / min(count, memory)
        return Ema(mean, count)


@dataclass(frozen=True, slots=True)
class LossStatistics:
    """The level and the spread of the losses.

    A constant added to all losses changes the level alone.
    """

    mean: Ema = field(default=Ema())
    deviation: Ema = field(default=Ema())  # of the losses from the mean before them, absolute
    lowest: float = math.inf  # of the losses
    highest: float = -math.inf  # of the means, slowly forgotten

    @property
    def spread(self) -> float:
        """The mean absolute deviation."""
        return self.deviation.mean

    @property
    def gap(self) -> float:
        """How far the mean is above the lowest loss there can be: zero, or one that was lower."""
        return max(self.mean.mean - min(self.lowest, 0.0), self.spread)

    @property
    def peak(self) -> float:
        """How far the highest mean was above the lowest loss there can be."""
        return self.highest - min(self.lowest, 0.0)

    def update(self, loss: float, memory: float) -> LossStatistics:
        """Adds a loss; starts over where the numbers overflow."""
        mean, deviation = self.mean.update(loss, memory), self.deviation
        if self.mean.count:
            deviation = deviation.update(abs(loss - self.mean.mean), memory)
        if not math.isfinite(mean.mean + deviation.mean):
            mean, deviation = Ema().update(loss, memory), Ema()
        # An early outlier is not to stop all expansion for good.
        faded = self.highest + (mean.mean - self.highest) / memory**2
        highest = max(mean.mean, faded) if self.mean.count else mean.mean
        return LossStatistics(mean, deviation, min(self.lowest, loss), highest)


@dataclass(frozen=True, slots=True)
class NoiseEstimate:
    """How much of the change of the loss from step to step is mini-batch noise.

    Without noise the losses lie on a smooth curve, or alternate between two where the steps
    oscillate across a valley. So the third differences of every second loss are small beside the
    predicted reduction of a step and the change over all steps. With mini-batches they are not.
    """

    ratio: Ema = field(default=Ema(1.0, 1))  # of the noise over these changes; noisy at first

    MEMORY: ClassVar[float] = 5.0  # of the ratio
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
        return NoiseEstimate(self.ratio.update(ratio if ratio < 1.0 else 1.0, self.MEMORY))

    @property
    def determinism(self) -> float:
        """How free of noise the losses are, from 0 to 1."""
        margin = (self.STOCHASTIC - self.ratio.mean) / (self.STOCHASTIC - self.DETERMINISTIC)
        return min(max(margin, 0.0), 1.0)


@dataclass(frozen=True, slots=True)
class SlopeCheck:
    """Whether the directional derivative that the gradient gives is the slope of the losses.

    If so, one probe is enough; straight-through estimators fail. An error of the slope changes the
    curvature, the more the closer the probe. So curvatures are compared, relative to the larger or,
    if that is larger still, to one whose damped minimizer is at the probe.
    """

    difference: Ema = field(default=Ema())  # relative; their number is that of the checks
    last_difference: float = 0.0  # the newest
    measurements: int = 0  # checked or not

    INITIAL_CHECKS: ClassVar[int] = 10  # before one probe may be enough
    INTERVAL: ClassVar[int] = 10  # measurements, of which one is checked from then on
    MEMORY: ClassVar[float] = 10.0  # of the difference
    TOLERANCE: ClassVar[float] = 0.3  # largest difference that passes: at the vertex 0.15 of slope
    CAP: ClassVar[float] = 2.0  # of a difference: that of opposite curvatures

    @property
    def passes(self) -> bool:
        """Whether one probe is enough."""
        known = self.difference.count >= self.INITIAL_CHECKS
        return known and self.difference.mean <= self.TOLERANCE

    @property
    def due(self) -> bool:
        """Whether the next measurement takes two probes."""
        failed = not self.passes or self.last_difference > self.TOLERANCE
        return failed or self.measurements % self.INTERVAL == 0

    def update(self, samples: LineSamples) -> SlopeCheck:
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
        scale = max(largest, divide(steepest, 2.0 * samples.distance))
        difference = abs(divide(measured.curvature - implied.curvature, scale))
        if math.isnan(difference):
            return counted
        difference = min(difference, self.CAP)
        average = self.difference.update(difference, self.MEMORY)
        return replace(counted, difference=average, last_difference=difference)
