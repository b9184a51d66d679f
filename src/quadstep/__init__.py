"""Training with no learning rate to choose.

quadstep implements LQA (Zhu et al., "Automatic, Dynamic, and Nearly Optimal Learning Rate
Specification by Local Quadratic Approximation"): along a given update direction the loss is nearly
a parabola in the rate, one or two forward passes measure it, and its minimizer is the rate.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quadstep.controllers import Reason
    from quadstep.optimizer import LQA
    from quadstep.report import Report

__all__ = ["LQA", "Reason", "Report", "__version__"]

__version__ = "0.1.0"

_MODULES = {"LQA": "optimizer", "Reason": "controllers", "Report": "report"}

if not TYPE_CHECKING:  # type checkers would take every unknown name for `Any`

    def __getattr__(name: str) -> Any:
        """Imports on first use: reading the version does not pay for torch."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"quadstep.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
