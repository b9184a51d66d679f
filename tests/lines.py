"""Losses of an exact quadratic along a line."""

from __future__ import annotations

from quadstep.quadratic import LineSamples, Quadratic


def sample_line(
    quadratic: Quadratic, distance: float, floor: float = 1.0, resolution: float = 2.0**-52
) -> LineSamples:
    """The losses of a quadratic that is `floor` at rate zero."""

    def at(rate: float) -> float:
        return floor - quadratic.slope * rate + quadratic.curvature * rate**2

    return LineSamples(distance, at(distance), at(0.0), at(-distance), resolution)
