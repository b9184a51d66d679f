"""Warnings: each kind once for an optimizer, at the line of the caller."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

_INSIDE = tuple(f"{Path(file).parent}/" for file in (__file__, torch.__file__))


class Diagnostics:
    """Gives each kind of warning once.

    Attributes:
        given: the kinds that have been given.
    """

    def __init__(self) -> None:
        self.given: set[str] = set()

    def warn(self, kind: str, message: str) -> None:
        """Warns, unless a warning of this kind has been given.

        Args:
            kind: names the warning.
            message: what is wrong, and how to fix it.
        """
        if kind not in self.given:
            self.given.add(kind)
            warnings.warn(message, UserWarning, stacklevel=_callers_level())


def _callers_level() -> int:
    """The stacklevel, seen from `Diagnostics.warn`, of the first frame outside of LQA and torch."""
    frame, level = sys._getframe(1), 1  # pyright: ignore[reportPrivateUsage]
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    return level
