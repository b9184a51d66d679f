"""The line of a step that is not taken."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from quadstep.gradients import clear_gradients
from quadstep.line import Line
from quadstep.measurement import StepSearch
from quadstep.recorder import Recorder
from quadstep.tensors import Groups, assign, copies, parameters, real_views


class Preview:
    """The line that a step would move along, see `LQA.preview`.

    It is valid until the next backward pass that adds to the gradients.

    Attributes:
        rate: the rate of the step; zero where no step would be taken.

    Example:
        >>> line = opt.preview(closure)
        >>> losses = line.losses([0.0, line.rate, 2.0 * line.rate])
    """

    def __init__(self, search: StepSearch, recorder: Recorder) -> None:
        self.rate = search.decision.step
        self._search, self._recorder = search, recorder

    @torch.no_grad()
    def losses(self, rates: Iterable[float]) -> list[float]:
        """Evaluates the loss at several rates, free of side effects, and moves nothing.

        Args:
            rates: points of the line; zero is where the parameters are now.

        Returns:
            The losses, in the order of the rates.

        Raises:
            Exception: whatever the closure raises.

        Example:
            >>> losses = opt.preview(closure).losses([0.0, 0.01, 0.1])
        """
        search = self._search
        assert search.closure is not None  # previews have one
        now = search.evaluator.tracker.capture(search.params)
        blocks = [] if search.line is None else search.line.blocks
        # Views of complex parameters are of the storage that they had.
        blocks = [replace(block, params=real_views(block.owners)) for block in blocks]
        line = Line(blocks, keeps_start=search.strategies.direction.keeps_start)
        try:
            probing = search.evaluator.probing(
                search.closure, search.params, search.scalars, search.before, is_origin=False
            )
            with self._recorder.paused(), probing as probes:
                return [*map(float, line.losses(probes.evaluate, rates))]
        finally:
            now.restore()


@contextmanager
def restored(groups: Groups, state: Any, base: Optimizer | None) -> Generator[None]:
    """Restores groups, state, gradients and the attributes of a wrapped optimizer at the end."""
    params = parameters(groups)
    gradients = [param.grad for param in params]
    saved_groups, saved_state = [copy.copy(group) for group in groups], dict(state)
    saved_base = {} if base is None else dict(vars(base))
    tensors = [value for group in groups for value in group.values() if isinstance(value, Tensor)]
    values = copies(tensors)
    state.update({param: copy.deepcopy(entry) for param, entry in saved_state.items()})
    clear_gradients(params)
    try:
        yield
    finally:
        for group, saved in zip(groups, saved_groups, strict=True):
            group.clear()
            group.update(saved)
        assign(tensors, values)
        state.clear()
        state.update(saved_state)
        if base is not None:
            vars(base).update(saved_base)
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient
