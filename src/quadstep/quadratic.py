"""Losses on a line and the quadratic through them; equations of Zhu et al. (CIKM 2020)."""

from __future__ import annotations

import math
from dataclasses import dataclass

LARGE_CHANGE = 0.25  # fraction of the loss from which on a change of it is large
SIGNAL = 1e3  # rounding errors in a second difference that resolves the curvature
ROUNDINGS = 4.0  # of the largest loss in a second difference of losses, twice half an ulp of four


@dataclass(frozen=True, slots=True)
class LineSamples:
    """The losses at three points of a line, or at two and the slope at the center.

    Example:
        >>> LineSamples(0.5, loss_ahead=0.75, loss_center=1.0, loss_behind=1.75).second_difference
        0.5
    """

    distance: float  # of the outer points from the center, in units of the rate (delta0)
    loss_ahead: float  # at theta - distance * d, where a step at that rate ends
    loss_center: float  # at theta
    loss_behind: float | None  # at theta + distance * d; None where it was not measured
    resolution: float = 2.0**-52  # relative rounding error of one loss, the epsilon of its dtype
    recent_losses: tuple[float, ...] = ()  # of the steps since the last measurement
    slope: float = math.nan  # decrease per unit of rate, from the gradient; NaN if unknown
    gradient_unmodified: bool = True  # autograd's own gradient, not clipped or scaled since

    @property
    def implied_loss_behind(self) -> float:
        """`loss_behind`, or its value on the quadratic through the other losses and the slope."""
        behind = self.loss_behind
        return self.loss_ahead + 2.0 * self.distance * self.slope if behind is None else behind

    @property
    def is_finite(self) -> bool:
        """Whether the losses are finite, and the slope where it replaces one."""
        return all(
            map(math.isfinite, (self.loss_ahead, self.loss_center, self.implied_loss_behind))
        )

    @property
    def rounding_error(self) -> float:
        """The rounding error to expect in a difference of the losses."""
        largest = max(abs(self.loss_ahead), abs(self.loss_center), abs(self.implied_loss_behind))
        return ROUNDINGS * self.resolution * largest

    @property
    def slope_unresolved(self) -> bool:
        """Whether the outer losses differ by no more than the rounding error."""
        return abs(self.implied_loss_behind - self.loss_ahead) <= self.rounding_error

    @property
    def second_difference(self) -> float:
        """The sum of the outer losses less twice that at the center."""
        return (self.implied_loss_behind - self.loss_center) + (self.loss_ahead - self.loss_center)

    @property
    def curvature_unresolved(self) -> bool:
        """Whether the second difference is no more than the rounding error."""
        return abs(self.second_difference) <= self.rounding_error

    @property
    def signal(self) -> float:
        """The second difference that resolves the curvature, a quarter of the loss at most."""
        return min(SIGNAL, LARGE_CHANGE / (ROUNDINGS * self.resolution)) * self.rounding_error

    @property
    def resolved_distance(self) -> float:
        """Where the second difference resolves the curvature."""
        return self.distance * math.sqrt(self.signal / abs(self.second_difference))

    @property
    def contradicts_gradient(self) -> bool:
        """Whether all losses are equal although the gradient predicts a large change."""
        center, predicted = self.loss_center, abs(self.slope) * self.distance
        constant = self.loss_ahead == center and self.loss_behind in (None, center)
        return constant and predicted > LARGE_CHANGE * abs(center) > 0.0


@dataclass(frozen=True, slots=True)
class Quadratic:
    """The change of the loss with the rate, `-slope * rate + curvature * rate**2` (equation 2).

    Example:
        >>> Quadratic.fit(LineSamples(0.5, 0.75, 1.0, 1.75))
        Quadratic(slope=1.0, curvature=1.0)
    """

    slope: float  # decrease of the loss per unit of rate at rate zero: a of equation (7)
    curvature: float  # half the second derivative along the line: b of equation (6)

    @classmethod
    def fit(cls, samples: LineSamples) -> Quadratic:
        """Interpolates three losses (equations 6 and 7), or two and the slope."""
        width = 2.0 * samples.distance
        slope = divide(samples.implied_loss_behind - samples.loss_ahead, width)
        return cls(slope, divide(divide(samples.second_difference, width), samples.distance))

    @property
    def minimizer(self) -> float:
        """The rate at the vertex, `slope / (2 * curvature)` (equation 3); infinite if linear."""
        return divide(self.slope, 2.0 * self.curvature)


def divide(numerator: float, denominator: float) -> float:
    """IEEE division: x / 0 is infinite and 0 / 0 is not a number, neither an exception."""
    if denominator != 0.0:
        return numerator / denominator
    if numerator == 0.0 or math.isnan(numerator):
        return math.nan
    return math.copysign(math.inf, numerator) * math.copysign(1.0, denominator)
