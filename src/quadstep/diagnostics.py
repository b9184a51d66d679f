"""The warnings of an optimizer: each once, at the line of the caller."""

import math
import sys
import sysconfig
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import torch

from quadstep.quadratic import LineSamples

_INSIDE = tuple(f"{Path(file).parent}/" for file in (__file__, torch.__file__))


_MESSAGES = {
    "lr": "lr was set to {written!r} from outside, as a learning-rate scheduler does, and is "
    "ignored: LQA measures the rate, which stays at {rate:.3g}; leave the scheduler out",
    "backward": "the closure calls backward() itself, so each probe pays for a backward pass; "
    "return the loss alone, LQA runs backward",
    "dropped": "gradients were in place when step(closure) was called, and the closure's own took "
    "their place: what was clipped, scaled or accumulated is lost; give the loss that "
    "backward was called on, step(closure, loss=loss), or leave that backward out",
    "memory": "the last {failures} measurements ran out of memory, so training goes on "
    "at the rate in force, {rate:.3g}: a probe holds one more copy of the parameters "
    "and runs the model forward; make the batches smaller, or free memory before step()",
    "constant": "the closure returned {loss:.6g} wherever the parameters were, although "
    "the gradient tells a change of {change:.3g}; compute the "
    "loss in the closure, from the optimizer's parameters, and not before step()",
    "unequal": "loss is {expected:.6g}, but at the same parameters the closure returned "
    "{repeated:.6g}; give as loss what the closure returns: the same batch, unscaled, "
    "drawn before step() and not in the closure",
    "unrecorded": "the model returned a loss of {expected:.6g}, and {repeated:.6g} when it was "
    "called again with the same arguments, parameters and random state, so the measured rates are "
    "noise; change the arguments, and whatever else it depends on, after step()",
    "changed": "a tensor that the model was called with has been changed before step(), so the "
    "loss cannot be measured, and the rate stays; change it after step(), or pass the model a copy",
    "moved": "parameters have changed since the model's forward pass, as by another optimizer that "
    "steps in between, so the loss is evaluated anew at each measurement; put all parameters into "
    "one LQA, or run forward and backward passes for each optimizer",
    "partial": "the gradients are not those of the loss that the model returned: zero_grad() is "
    "missing, backward() was called on more than that loss, as on a penalty added to it, or the "
    "model replaces gradients; compute all of the loss in the model, or wrap the function that "
    "does, loss_fn = opt.recorded(loss_fn)",
    "unrepeatable": "the closure returned {expected:.6g} and then {repeated:.6g} at the same "
    "parameters and under the same random state, so the measured rates are noise; draw "
    "batches, and numbers from generators of your own, before step() and not in the closure",
}


class Diagnostics:
    """Gives each warning once.

    Attributes:
        given: the names of the warnings that have been given.
    """

    def __init__(self) -> None:
        self.given: set[str] = set()

    def warn(self, name: str, **values: object) -> None:
        """Gives a warning, completed by what was found, unless it has been given."""
        if name not in self.given:
            self.given.add(name)
            message = _MESSAGES[name].format(**values)
            warnings.warn(message, UserWarning, stacklevel=_caller_level())


def _caller_level() -> int:
    """The stacklevel, seen from `Diagnostics.warn`, of the first frame outside LQA and torch."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    return level


def is_of_a_library(closure: Any) -> bool:
    """Whether a closure is defined in an installed package."""
    while isinstance(closure, partial):
        closure = closure.func
    function: Any = getattr(closure, "__func__", closure)
    if not hasattr(function, "__code__"):
        function = type(closure).__call__
    file = getattr(getattr(function, "__code__", None), "co_filename", "")
    return file.startswith(tuple(sysconfig.get_path(kind) for kind in ("purelib", "platlib")))


def makes_schedulers() -> bool:
    """Whether the training loop is the Trainer of Transformers, which always has a scheduler."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _package(frame) in ("quadstep", "torch", "accelerate"):
        frame = frame.f_back
    return _package(frame) == "transformers"


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def missing_loss(
    names: list[str],
    criterion: object,
    calls: Sequence[Any],
    *,
    is_computed_outside: bool,
    has_gradients: bool,
) -> str:
    """Why recorded calls tell no loss, and what to do.

    Args:
        names: of the classes of the modules.
        criterion: the loss module, if there is one.
        calls: what was recorded.
        is_computed_outside: whether code between the calls has made an argument.
        has_gradients: whether a parameter has one.
    """
    source = (
        f"the model ({', '.join(names)})" if names else "the function that opt.recorded wrapped"
    )
    otherwise = (
        "or wrap the function that computes the loss, loss_fn = opt.recorded(loss_fn) (of a "
        "Trainer: its compute_loss), or pass a closure, opt.step(closure)"
    )
    if not any(call.function is not criterion for call in calls):
        fix = (
            "the object that was given as model=, not its forward() or a copy, give the compiled "
            "module if there is one"
        )
        return (
            f"step() without a closure found no call of {source} with gradients enabled since the "
            f"last step; call {fix if names else 'what opt.recorded returned'}, {otherwise}"
        )
    if is_computed_outside and not names:
        return (
            f"{source} was given a tensor that was computed from the parameters, and LQA cannot "
            "repeat how; give LQA the model as well, LQA(params, model=model), or wrap a function "
            "that calls the model itself, or pass a closure, opt.step(closure)"
        )
    if is_computed_outside:
        return (
            "the criterion or a module was given a tensor that was computed from what the "
            "model returned, and LQA cannot repeat what happened in between; move it into the "
            "model or the criterion, give LQA the module that did it, model=[model, other], "
            f"{otherwise}"
        )
    if any(call.loss is not None for call in calls):
        if not has_gradients:
            return "no gradient has arrived; call loss.backward() before step()"
        return (
            "backward() was not called on the loss that the model or the criterion returned, "
            f"but on another; call it on that loss, {otherwise}"
        )
    if criterion is not None:
        name = type(criterion).__name__
        outputs = [call.output for call in calls if call.function is criterion]
        if outputs:
            return (
                f"criterion ({name}) returned {_described(outputs[-1])}, not a scalar loss; leave "
                f'its reduction at "mean", {otherwise}'
            )
        return (
            f"criterion ({name}) was not called with what the model returned; call the object that "
            f"was given as criterion=, {otherwise}"
        )
    give = "give the loss module that the loop calls, LQA(..., criterion=criterion)"
    return (
        f"{source} returned {_described(calls[-1].output)}, in which there is no loss: a scalar "
        'tensor, .loss, ["loss"] or the first element of a tuple; '
        f"{give if names else 'return the loss first'}, {otherwise}"
    )


def _described(output: tuple[type, Any] | None) -> str:
    """The type and shape of what a call has returned."""
    kind, shape = output or (type(None), None)
    return kind.__name__ if shape is None else f"a tensor of shape {tuple(shape)}"


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
