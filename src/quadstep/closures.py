"""Evaluating the user's loss: once with gradients, and as probes that are free of side effects."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from quadstep import gradients
from quadstep.arguments import check_loss
from quadstep.diagnostics import Diagnostics, is_of_a_library
from quadstep.recorder import Recorder
from quadstep.snapshot import ModuleTracker, Snapshot
from quadstep.tensors import full_tensor

Closure = Callable[[], Tensor]

PROBES_WITH_GRADIENTS = "lqa.probes_with_gradients"  # whether the closure needs them

SAME_LOSS = 0.99999  # cosine above which gradients in place are taken to be of the closure's loss
SAME_MODIFIED_LOSS = 0.1  # the same after clipping, scaling or accumulation
DROPPED_CHECKS = 100  # steps in which gradients in place are compared

_NEEDS_GRADIENTS = re.compile("require.*grad")
_RAN_BACKWARD = "backward through the graph a second time"


def reading(loss: Tensor) -> Tensor | float:
    """The present value of a loss: a number, or a copy where reading waits for the device."""
    value = full_tensor(loss.detach())
    return float(value) if loss.is_cpu else value.reshape(()).clone()


class ClosureEvaluator:
    """Evaluates closures, or what was recorded in their place."""

    def __init__(
        self,
        modules: Iterable[nn.Module] = (),
        criterion: nn.Module | None = None,
        *,
        is_preview: bool = False,
    ) -> None:
        self._is_preview = is_preview
        self.tracker = ModuleTracker()
        self.recorder = Recorder(self.tracker, modules, criterion)
        self.diagnostics = Diagnostics()
        self.runs_backward = False  # whether a closure was seen to run backward itself
        self._dropped_checks = 0

    def gradient_pass(
        self, closure: Closure | None, loss: Tensor | None, params: list[Tensor], before: Snapshot
    ) -> tuple[Tensor, Closure]:
        """Evaluates the loss and its gradients, unless the caller has done so.

        Returns:
            The loss, and what evaluates it: the closure, or a repetition of the recorded calls
            where there is no closure or it runs backward.

        Raises:
            TypeError, ValueError: the closure returned something other than a scalar loss.
            RuntimeError: the loss has no graph, or no parameter has a gradient; without a closure,
                also that no loss was recorded.
        """
        if closure is not None and loss is None:
            loss = self._evaluate(closure, params, before)
            if (loss is None or self.runs_backward) and self.recorder.has_loss:
                closure = None
        if loss is None and closure is not None and not gradients.gradients_of(params):
            # A framework has skipped the batch: nothing moves, as at a loss that is not finite.
            return torch.tensor(math.nan), closure
        if closure is None or loss is None:
            loss, closure = self.recorder.loss(), self.recorder.replay
        if not gradients.gradients_of(params):
            if not any(param.requires_grad for param in params):
                raise RuntimeError(
                    "all parameters of the optimizer are frozen; unfreeze those that are to train, "
                    "param.requires_grad_(True), or construct LQA after the model was given "
                    "adapters (get_peft_model)"
                )
            raise RuntimeError(
                "no parameter of the optimizer has a gradient; compute the loss from the "
                "parameters given to LQA, and in the two-phase use call loss.backward() before "
                "step()"
            )
        self.tracker.note_gradients(params)
        check_loss(loss, "closure")
        return full_tensor(loss.detach()), closure

    def _evaluate(self, closure: Closure, params: list[Tensor], before: Snapshot) -> Tensor | None:
        """Evaluates the closure, and runs backward unless it does.

        Frameworks that run backward before `step`, or skip a batch, give it a closure that returns
        None.

        Gradients that the caller has accumulated are left for a closure that runs backward, to
        clear or to add to.
        """
        found = gradients.new_gradients(params)
        modified = all(map(gradients.is_modified, found.values()))
        if found:
            gradients.mark_used(found.values())
        else:
            gradients.clear_gradients(params)
        with torch.enable_grad(), self.tracker.tracking(before, params):
            returned: Any = closure()
        if returned is None and self.recorder.is_active:
            return None
        check_loss(returned, "closure")
        loss = cast(Tensor, returned)
        if self._has_run_backward(params, found):
            self._note_backward(closure)
        elif not loss.requires_grad:
            raise RuntimeError(
                "the loss that closure returned does not require grad; compute it from the "
                "optimizer's parameters, without torch.no_grad(), .detach() or .item()"
            )
        else:
            zeros = gradients.new_gradients(params)
            gradients.clear_gradients(params)
            try:
                # Other parameters are part of training, but not of a preview.
                inputs = [param for param in params if param.requires_grad]
                torch.autograd.backward(loss, inputs=inputs if self._is_preview else None)
            except RuntimeError as error:
                if not zeros or _RAN_BACKWARD not in str(error):
                    raise
                # The closure has run backward after all, and all its gradients are zero.
                for param, gradient in zeros.items():
                    param.grad = gradient
                self._note_backward(closure)
            self._warn_if_dropped(found, modified)
        return loss

    def _has_run_backward(self, params: list[Tensor], found: dict[Tensor, Tensor]) -> bool:
        """Whether the closure ran backward: there are gradients newer than those found before it.

        A zero gradient counts as cleared, unless a closure is known to run backward.
        """
        if not found and all(param.grad is None for param in params):
            return False
        new = gradients.new_gradients(params).values()
        return any(self.runs_backward or not gradients.is_zero(gradient) for gradient in new)

    def _note_backward(self, closure: Closure) -> None:
        self.runs_backward = True
        if not is_of_a_library(closure) and not self.recorder.has_loss:
            # The closures of frameworks run backward on purpose.
            self.diagnostics.warn("backward")

    def _warn_if_dropped(self, found: dict[Tensor, Tensor], modified: bool) -> None:
        """Warns of gradients of the same loss that the closure's own have replaced.

        Gradients of another loss, as a generator leaves in its discriminator, can be close to the
        closure's own, but nobody clips them.
        """
        if not found or self._dropped_checks == DROPPED_CHECKS:
            return
        self._dropped_checks += 1
        again = {param: param.grad for param in found if param.grad is not None}
        similarity = gradients.cosine([found[param] for param in again], again.values())
        if similarity > (SAME_MODIFIED_LOSS if modified else SAME_LOSS):
            self.diagnostics.warn("dropped")

    @contextmanager
    def probing(
        self,
        closure: Closure,
        params: list[Tensor],
        scalars: dict[str, Any],
        before: Snapshot,
        *,
        is_origin: bool,
    ) -> Generator[Probes]:
        """Provides probes; afterwards generators, buffers and gradients are as they were.

        Probes start from a snapshot, if it `is_origin` that of before the gradient pass.
        """
        after = before
        is_replay = closure == self.recorder.replay
        if is_origin:
            after = self.tracker.capture(params)
            if not is_replay:
                # Probes draw from the generators that the gradient pass drew from.
                before, after = after.pair_advanced(before)
            elif (touched := self.recorder.touched) is not None:
                # Graphs that wait for their backward pass may need the buffers of the others.
                before, after = before.limit(touched), after.limit(touched)
        known = len(before.buffers)
        # Removed, so that a closure can neither clear them nor add to them.
        held = [(param, param.grad) for param in params]
        gradients.clear_gradients(params)
        runs_backward = self.runs_backward and not is_replay
        try:
            with self.recorder.paused():
                yield Probes(self, closure, params, scalars, before, runs_backward)
        finally:
            if not (is_origin or self._is_preview):
                # What the caller's own forward passes call can be repeated next time.
                self.recorder.watch(self.tracker.roots)
                self.recorder.is_active = True
            for param, gradient in held:
                param.grad = gradient
            if after is not before:
                after.buffers.extend(before.buffers[known:])
            after.restore()


@dataclass
class Probes:
    """Evaluations of a closure in the random state and with the buffers of the gradient pass."""

    evaluator: ClosureEvaluator
    closure: Closure
    params: list[Tensor]
    scalars: dict[str, Any]
    before: Snapshot
    runs_backward: bool  # whether the closure does
    with_gradients: bool = False  # enabled for a second try
    dtype: torch.dtype | None = None  # of the first loss
    count: int = 0  # number of losses

    @property
    def have_gradients(self) -> bool:
        """Whether gradients are enabled."""
        needed = self.runs_backward or self.scalars[PROBES_WITH_GRADIENTS]
        return needed or self.with_gradients

    def evaluate(self) -> Tensor | float:
        """Evaluates the loss, with gradients enabled if it must be."""
        try:
            return self.run(self.have_gradients)
        except Exception as error:
            if self.have_gradients or not _needs_gradients(error):
                raise
            try:
                loss = self.run(with_gradients=True)
            except Exception:
                raise error from None
            # It takes derivatives itself, as the residual of a differential equation does.
            self.scalars[PROBES_WITH_GRADIENTS] = True
            return loss

    def has_drawn(self) -> float:
        """Whether the last evaluation drew random numbers: 1 or 0."""
        now = self.evaluator.tracker.capture(self.params)
        return float(bool(now.pair_advanced(self.before)[0].generators))

    def run(self, with_gradients: bool) -> Tensor | float:
        """Evaluates the loss once."""
        self.before.restore()
        torch.clear_autocast_cache()
        with (
            self.evaluator.recorder.counting(),
            torch.set_grad_enabled(with_gradients),
            self.evaluator.tracker.tracking(self.before, self.params),
        ):
            loss = self.closure()
        check_loss(loss, "closure")
        self.dtype, self.count = self.dtype or loss.dtype, self.count + 1
        return reading(loss)


def _needs_gradients(error: Exception) -> bool:
    """Whether a closure may have failed for lack of a graph; its checks may raise any of these."""
    named = isinstance(error, RuntimeError) and _NEEDS_GRADIENTS.search(str(error)) is not None
    return named or isinstance(error, AssertionError | AttributeError | TypeError | ValueError)
