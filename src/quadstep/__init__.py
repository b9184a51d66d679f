"""Training with no learning rate to choose.

quadstep implements LQA (Zhu et al., "Automatic, Dynamic, and Nearly Optimal Learning Rate
Specification by Local Quadratic Approximation"): along a given update direction the loss is nearly
a parabola in the rate, one or two forward passes measure it, and its minimiser is the rate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quadstep.controllers import Reason
    from quadstep.optimizer import LQA, Report

__all__ = ["LQA", "Reason", "Report", "__version__"]

__version__ = "0.1.0"

_HOMES = {
    "LQA": "quadstep.optimizer",
    "Report": "quadstep.optimizer",
    "Reason": "quadstep.controllers",
}


if not TYPE_CHECKING:  # type checkers would take every unknown name for `Any`

    def __getattr__(name: str) -> Any:
        """Imports on first use: what only reads records does not pay for torch."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
