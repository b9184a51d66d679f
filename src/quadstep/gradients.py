"""Whose gradients there are: a step's, the caller's, or those of another backward pass.

A step marks the gradients that it has used. What comes later, or is added to, is new.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from quadstep.line import inner, whole

_USED = "_quadstep_used"
"""The attribute of a gradient that keeps the version at which a step has used it."""


def of(params: Iterable[Tensor]) -> list[Tensor]:
    """The gradients of the parameters that have one."""
    return [param.grad for param in params if param.grad is not None]


def clear(params: Iterable[Tensor]) -> None:
    """Clears them as `zero_grad` does, whose notes for the profiler take ten times as long."""
    for param in params:
        param.grad = None


def mark_used(gradients: Iterable[Tensor]) -> None:
    """Marks gradients as they are now, for later ones to be told from them."""
    for gradient in gradients:
        setattr(gradient, _USED, gradient._version)


def is_changed(gradient: Tensor) -> bool:
    """Whether a gradient that no step has used was written to after a backward pass had left it.

    As by clipping, scaling and further backward passes, which accumulate.
    """
    return not hasattr(gradient, _USED) and gradient._version > 0


def new(params: Iterable[Tensor]) -> dict[Tensor, Tensor]:
    """The parameters whose gradient has come, or has changed, since all were used; and these."""
    return {
        param: gradient
        for param in params
        if (gradient := param.grad) is not None
        and getattr(gradient, _USED, None) != gradient._version
    }


def is_zero(gradient: Tensor) -> bool:
    """Whether all entries are zero; not those of a gradient that is not finite."""
    values: Any = gradient.coalesce().values() if gradient.is_sparse else gradient
    return not bool(whole(values.abs().sum()))


def cosine(one: Iterable[Tensor], other: Iterable[Tensor]) -> float:
    """The cosine of the angle between two lists of gradients, as this process has them.

    Not a number if either is zero, not finite or sparse.
    """
    products = [0.0, 0.0, 0.0]
    for a, b in zip(one, other, strict=True):
        if a.is_sparse or b.is_sparse:
            return math.nan
        for place, (left, right) in enumerate(((a, b), (a, a), (b, b))):
            products[place] += float(inner(left, right))
    mixed, *squares = products
    return mixed / math.sqrt(squares[0] * squares[1]) if all(squares) else math.nan
