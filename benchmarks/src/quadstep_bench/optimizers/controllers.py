"""Rules for the rate that are compared with those of the library."""

from dataclasses import dataclass
from typing import ClassVar

from quadstep.controllers import (
    Decision,
    Reason,
    TrustRegionController,
    TrustRegionState,
    VertexState,
)
from quadstep.quadratic import LineSamples, Quadratic


@dataclass
class AuthorsController:
    """The rules of the code that the authors of the paper published, which differ from Algorithm 1.

    The probe distance falls with the epochs and does not follow the rate. A vertex that is not
    positive, or above 1, is replaced by a rate that the epoch determines.

    Attributes:
        epoch: How many epochs have ended; to be set before each step.

    Example:
        >>> opt = LQA(params, direction=Gradient(), averaging=None, controller=AuthorsController())
    """

    epoch: int = 0
    state_type: ClassVar[type[VertexState]] = VertexState
    needs_slope: ClassVar[bool] = False

    def probe_distance(self, state: VertexState, rate: float) -> float:
        """From 0.05 down to 0.01."""
        return max(0.05 * (1.0 - 0.01 * self.epoch), 0.01)

    def update(
        self, state: VertexState, rate: float, samples: LineSamples
    ) -> tuple[VertexState, Decision]:
        """Takes the vertex where it lies between 0 and 1."""
        ahead, center, behind = samples.loss_ahead, samples.loss_center, samples.loss_behind
        if behind is None or not samples.is_finite:
            return state, Decision(rate, 0.0, Reason.NON_FINITE)
        # Their code adds this to the denominator.
        difference = 2.0 * (ahead + behind - 2.0 * center) + 1e-12
        rate, reason = samples.distance * (behind - ahead) / difference, Reason.MINIMUM
        if rate <= 0.0:
            rate, reason = 1.05 * samples.distance, Reason.RADIUS
        if rate > 1.0:
            rate, reason = 0.05 if self.epoch < 10 else 0.01, Reason.REJECTED
        return VertexState(Quadratic.fit(samples), state.fits + 1), Decision(rate, rate, reason)


class ConstantRateController(TrustRegionController):
    """Measures as the default does, and keeps the first rate."""

    def update(
        self, state: TrustRegionState, rate: float, samples: LineSamples
    ) -> tuple[TrustRegionState, Decision]:
        """Learns how noisy the losses are, which the averaging needs, and decides nothing."""
        state, _ = super().update(state, rate, samples)
        if not samples.is_finite:
            return state, Decision(rate, 0.0, Reason.NON_FINITE)
        return state, Decision(rate, rate, Reason.MINIMUM, settled=True)
