"""Schedule-free averaging: a greedy iterate, its average, and the point between them.

Defazio et al., "The Road Less Scheduled" (2024): the fast iterate z takes the steps, x is the
average of its path, and gradients are taken at y = (1 - beta) z + beta x. The parameters hold y
while training and x while evaluating; z is kept, and whichever of x and y is not held follows
from the other and z, so that only one copy of the parameters is stored.
"""

# torch.optim itself is built from the foreach operations, private in name alone.
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from quadstep.direction import real
from quadstep.line import Block


class ScheduleFree:
    """The iterates of schedule-free averaging.

    Args:
        beta: weight of the average in the point where gradients are taken.
        kappa: how far the fast iterate steps, in units of the measured rate. The line is measured
            at y, which moves by a fraction of what z moves.
        power: the n-th iterate counts in the average with about the power of n, so that the average
            forgets where a long run began.
        furthest: how many times as far z steps at most, see `adapt`.

    Attributes:
        stretch: how many times as far z steps at present.
    """

    def __init__(
        self, beta: float = 0.9, kappa: float = 4.0, power: float = 3.0, furthest: float = 3.0
    ) -> None:
        self.power = power
        self.stretch = 1.0
        self._beta = beta
        self._kappa = kappa
        self._furthest = furthest

    @property
    def beta(self) -> float:
        """The weight of the average in y at present."""
        return 1.0 - (1.0 - self._beta) / self.stretch

    @property
    def kappa(self) -> float:
        """How far the fast iterate steps at present, in units of the measured rate."""
        return self._kappa * self.stretch

    def weight(self, moves: int) -> float:
        """The share of the newest iterate in the average of so many, in (0, 1]."""
        return (1.0 + self.power) / (moves + self.power)

    def move(self, blocks: list[Block], state: Any, rate: float, weight: float) -> None:
        """Moves z against the direction, x towards z, and y with both.

        Written for y and z alone, with `s = kappa * rate` and c the weight:
        `y <- (1 - c) y + c z - (1 - beta (1 - c)) s d` and `z <- z - s d`.

        Args:
            blocks: the parameters, at y, and their directions.
            state: the per-parameter state, where z lives.
            rate: the measured rate.
            weight: share of the new z in the average x, in (0, 1].
        """
        for block in blocks:
            fast: list[Tensor] = []
            for owner, param in zip(block.owners, block.params, strict=True):
                if "z" not in state[owner]:
                    state[owner]["z"] = param.clone()
                fast.append(state[owner]["z"])
            step = self.kappa * rate / block.unit
            torch._foreach_lerp_(block.params, fast, weight)
            torch._foreach_add_(
                block.params, block.direction, alpha=-step * (1.0 - self.beta * (1.0 - weight))
            )
            torch._foreach_add_(fast, block.direction, alpha=-step)

    def adapt(self, quiet: float, moves: int, params: list[Tensor], state: Any) -> None:
        """Lets z step further where the losses are free of noise.

        As many times less of it is then in y, which a step by itself moves no further. That is what
        more momentum is to gradient descent: along a valley the steps add up, across it they
        cancel. But the average draws y after z, too, and much so while it is young: no further than
        where that moves y by as much as a step itself. Where the weights change x stays, and moved
        is whichever of y and z comes nearer to it.

        Args:
            quiet: how free of noise the losses are, from 0 to 1.
            moves: how many steps there were.
            params: all parameters, at y.
            state: the per-parameter state, where z lives.
        """
        most = min(max((1.0 - self._beta) / self.weight(moves), 1.0), self._furthest)
        stretch = most**quiet
        if stretch == self.stretch:
            return
        before, self.stretch = self.beta, stretch
        if self.beta > before:
            self._towards_fast(params, state, 1.0 - self.beta / before)
            return
        left = self.beta / (1.0 - self.beta) * (1.0 - before) / before
        for held, fast in _pairs(params, state):
            fast.lerp_(held, 1.0 - left)

    def average(self, params: list[Tensor], state: Any) -> None:
        """Replaces y by x in the parameters."""
        self._towards_fast(params, state, 1.0 - 1.0 / self.beta)

    def resume(self, params: list[Tensor], state: Any) -> None:
        """Replaces x by y in the parameters."""
        self._towards_fast(params, state, 1.0 - self.beta)

    def _towards_fast(self, params: list[Tensor], state: Any, weight: float) -> None:
        for held, fast in _pairs(params, state):
            held.lerp_(fast, weight)


def _pairs(params: list[Tensor], state: Any) -> Iterable[tuple[Tensor, Tensor]]:
    """What each parameter that has moved holds, and its z."""
    moved = [param for param in params if "z" in state[param]]
    return zip(real(moved), (state[param]["z"] for param in moved), strict=True)
