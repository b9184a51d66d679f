"""The line `theta - rate * direction`, along which the loss is measured.

Moves are written from a snapshot of the start, which costs one transient copy of the parameters
while a line is measured and restores them bit for bit; subtraction would round.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from quadstep.tensors import assign, copies, inner

Loss = TypeVar("Loss")


@dataclass(slots=True)
class ParamBlock:
    """The parameters of one group, and one device or mesh, that have gradients."""

    owners: list[Tensor]  # the parameters themselves, the keys of the optimizer's state
    params: list[Tensor]  # the same as real tensors: views, where a parameter is complex
    direction: list[Tensor]  # what a step subtracts from each at the rate `lr_ratio`
    lr_ratio: float  # the optimizer's rate over that of the group
    weight_decay: float = 0.0
    gradient: list[Tensor] | None = None  # None where it is not known


class Line:
    """The points `theta - rate / lr_ratio * direction` of all blocks together.

    Args:
        blocks: the parameters and their directions.
        start: copies of the parameters at rate zero, block by block, where they are elsewhere now;
            by default the parameters are at rate zero and are copied before the first probe.
    """

    def __init__(self, blocks: list[ParamBlock], start: list[list[Tensor]] | None = None) -> None:
        self.blocks = blocks
        self._start = start
        self._is_moved = start is not None

    def move(self, rate: float) -> None:
        """Moves the parameters from rate zero, to which they return first, to a rate."""
        self.restore()
        self._is_moved = rate != 0.0
        if self._is_moved:
            for block in self.blocks:
                torch._foreach_add_(block.params, block.direction, alpha=-rate / block.lr_ratio)

    def restore(self) -> None:
        """Returns the parameters to rate zero, bit for bit."""
        if self._is_moved and self._start is not None:
            for block, start in zip(self.blocks, self._start, strict=True):
                assign(block.params, start)
        self._is_moved = False

    def slope(self) -> Tensor | float | None:
        """The decrease of the loss per unit of rate by the gradient, `<gradient, direction>`.

        Returns:
            A scalar, to be averaged over the processes; None where a gradient is not known.
        """
        slopes: list[Tensor] = []
        for block in self.blocks:
            if block.gradient is None:
                return None
            # One by one: all products together would be another copy of the parameters.
            products = map(inner, block.gradient, block.direction)
            slopes.append(torch.stack([*products]).sum() / block.lr_ratio)
        if not slopes:
            return 0.0
        slope = torch.stack([part.to(slopes[0].device) for part in slopes]).sum()
        return float(slope) if slope.is_cpu else slope

    def losses(self, evaluate: Callable[[], Loss], rates: Iterable[float]) -> list[Loss]:
        """Evaluates the loss at several rates and returns to rate zero, also after exceptions.

        Args:
            evaluate: returns the loss at the present parameters, as a tensor or a number.
            rates: points of the line; negative ones lie behind the parameters.

        Returns:
            The losses, in the order of the rates.
        """
        if self._start is None:
            self._start = [copies(block.params) for block in self.blocks]
        losses: list[Loss] = []
        try:
            for rate in rates:
                self.move(rate)
                # What the closure itself does to the parameters is undone, too.
                self._is_moved = True
                losses.append(evaluate())
        finally:
            self.restore()
        return losses
