"""The warnings of an optimizer: each once, at the line of the caller."""

from __future__ import annotations

import sys
import sysconfig
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch

_INSIDE = tuple(f"{Path(file).parent}/" for file in (__file__, torch.__file__))


class Diagnostics:
    """Gives each warning once.

    Attributes:
        given: the names of the warnings that have been given.
    """

    def __init__(self) -> None:
        self.given: set[str] = set()

    def warn_lr(self, written: object, rate: float) -> None:
        """Someone has set the lr of a group."""
        self._warn(
            "lr",
            f"lr was set to {written!r} from outside, as a learning-rate scheduler does, and is "
            f"ignored: LQA measures the rate, which stays at {rate:.3g}; leave the scheduler out",
        )

    def warn_backward(self, closure: Any) -> None:
        """The closure runs backward; those of frameworks do so on purpose."""
        if not _is_of_a_library(closure):
            self._warn(
                "backward",
                "the closure calls backward() itself, so each probe pays for a backward pass; "
                "return the loss alone, LQA runs backward",
            )

    def warn_dropped(self) -> None:
        """The closure's gradients have replaced those of the same loss."""
        self._warn(
            "dropped",
            "gradients were in place when step(closure) was called, and the closure's own took "
            "their place: what was clipped, scaled or accumulated is lost; give the loss that "
            "backward was called on, step(closure, loss=loss), or leave that backward out",
        )

    def warn_memory(self, failures: int, rate: float) -> None:
        """Measurements run out of memory."""
        self._warn(
            "memory",
            f"the last {failures} measurements ran out of memory, so training goes on "
            f"at the rate in force, {rate:.3g}: a probe holds one more copy of the parameters "
            "and runs the model forward; make the batches smaller, or free memory before step()",
        )

    def warn_constant(self, loss: float, change: float) -> None:
        """The loss was computed before the closure was called."""
        self._warn(
            "constant",
            f"the closure returned {loss:.6g} wherever the parameters were, although "
            f"the gradient tells a change of {change:.3g}; compute the "
            "loss in the closure, from the optimizer's parameters, and not before step()",
        )

    def warn_unrepeatable(self, expected: float, repeated: float, two_phases: bool) -> None:
        """The closure returns two losses at the same parameters."""
        self._warn(
            "unrepeatable",
            f"loss is {expected:.6g}, but at the same parameters the closure returned "
            f"{repeated:.6g}; give as loss what the closure returns: the same batch, unscaled, "
            "drawn before step() and not in the closure"
            if two_phases
            else f"the closure returned {expected:.6g} and then {repeated:.6g} at the same "
            "parameters and under the same random state, so the measured rates are noise; draw "
            "batches, and numbers from generators of your own, before step() and not in the "
            "closure",
        )

    def _warn(self, name: str, message: str) -> None:
        if name not in self.given:
            self.given.add(name)
            warnings.warn(message, UserWarning, stacklevel=_caller_level())


def _caller_level() -> int:
    """The stacklevel, seen from `Diagnostics._warn`, of the first frame outside LQA and torch."""
    frame, level = sys._getframe(1), 1  # pyright: ignore[reportPrivateUsage]
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    return level


def _is_of_a_library(closure: Any) -> bool:
    """Whether a closure is defined in an installed package."""
    while isinstance(closure, partial):
        closure = closure.func
    function: Any = getattr(closure, "__func__", closure)
    if not hasattr(function, "__code__"):
        function = type(closure).__call__
    file = getattr(getattr(function, "__code__", None), "co_filename", "")
    return file.startswith(tuple(sysconfig.get_path(kind) for kind in ("purelib", "platlib")))
