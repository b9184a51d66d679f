"""The line `theta - rate * direction`, along which the loss is measured.

Probes move from a copy of the start, or, where memory is short, by adding and subtracting, with a
copy of the entries that this would not return bit for bit.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from quadstep.rounding import chunks
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


SMALL = 2**12  # entries of the largest tensors that are always copied, which is faster
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Displacement:
    """A move of one tensor by `alpha * direction`, which the opposite move undoes bit for bit.

    The return rounds to the start, but where the sum left the power of two of the start, as at
    entries smaller than the move, or lay halfway between two numbers. Such entries are found in
    advance and kept.
    """

    def __init__(self, tensor: Tensor, direction: Tensor, alpha: float) -> None:
        self._tensor, self._direction, self._alpha = tensor, direction, alpha
        self._moved: Tensor | None = tensor.clone().add_(direction, alpha=alpha)
        self._places: Tensor | None = None
        self._kept = tensor
        if tensor.numel() > SMALL:
            integers = _INTEGERS[tensor.element_size()]
            returned = self._moved.clone().add_(direction, alpha=-alpha).view(integers)
            differing = returned.bitwise_xor_(tensor.view(integers)).flatten().nonzero()[:, 0]
            if len(differing) * (4 + tensor.element_size()) < tensor.nbytes:
                self._places = differing.to(torch.int32)
                self._kept = tensor.flatten()[differing]
        if self._places is None:
            self._kept = tensor.clone()
        self._resting_version = tensor._version

    def move(self) -> None:
        """Moves the tensor."""
        if self._moved is not None:
            self._tensor.copy_(self._moved)
        self._moved = None

    def undo(self) -> None:
        """Returns the tensor to where it was, unless an interrupt left it there."""
        if self._tensor._version == self._resting_version:
            return
        if self._places is None:
            returned = self._kept
        else:
            # As above, since a sum in place might be rounded by another instruction.
            returned = self._tensor.clone().add_(self._direction, alpha=-self._alpha)
            entries = returned.flatten()
            entries[self._places.long()] = self._kept
            returned = entries.view(returned.shape)
        self._resting_version = self._tensor._version + 1
        self._tensor.copy_(returned)


class Line:
    """The points `theta - rate / lr_ratio * direction` of all blocks together.

    Args:
        blocks: the parameters and their directions.
        start: copies of the parameters at rate zero, block by block, where they are elsewhere now;
            by default the parameters are at rate zero and are copied before the first probe.
        keeps_start: whether they are copied; otherwise what an evaluation itself does to them is
            not undone.
    """

    def __init__(
        self,
        blocks: list[ParamBlock],
        start: list[list[Tensor]] | None = None,
        keeps_start: bool = True,
    ) -> None:
        self.blocks = blocks
        self._start = start
        self._is_moved = start is not None
        self._keeps_start = keeps_start
        self._displacements: list[Displacement] = []

    def move(self, rate: float) -> None:
        """Moves the parameters from rate zero, to which they return first, to a rate."""
        self.restore()
        self._is_moved = rate != 0.0
        if self._is_moved:
            for block in self.blocks:
                torch._foreach_add_(block.params, block.direction, alpha=-rate / block.lr_ratio)

    def restore(self) -> None:
        """Returns the parameters to rate zero, bit for bit."""
        while self._displacements:
            self._displacements[-1].undo()
            self._displacements.pop()
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
        if self._start is None and self._keeps_start:
            self._start = [copies(block.params) for block in self.blocks]
        losses: list[Loss] = []
        try:
            for rate in rates:
                if self._keeps_start:
                    self.move(rate)
                    # What the closure itself does to the parameters is undone, too.
                    self._is_moved = True
                else:
                    self._displace(rate)
                losses.append(evaluate())
        finally:
            self.restore()
        return losses

    def _displace(self, rate: float) -> None:
        """Moves the parameters from rate zero by chunks, without a copy of them all."""
        self.restore()
        for block in self.blocks if rate else ():
            for tensors in zip(block.params, block.direction, strict=True):
                for param, direction in zip(*map(chunks, tensors), strict=True):
                    step = Displacement(param, direction, -rate / block.lr_ratio)
                    self._displacements.append(step)
                    step.move()
