"""The precision of a run: autocast, at float32's pace where a processor has no bfloat16."""

# Torch is not typed throughout.
# pyright: reportUnknownMemberType=false

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from quadstep_bench.tasks import Precision


@contextmanager
def computing_in(precision: Precision, device: str) -> Generator[None]:
    """Runs models in a precision, by autocast where that is not float32.

    Args:
        precision: What convolutions and matrix products compute in.
        device: Where the model lives, in torch's words.
    """
    kind = torch.device(device).type
    with ExitStack() as stack:
        if precision != "float32":
            stack.enter_context(torch.autocast(kind, dtype=getattr(torch, precision)))
            if kind == "cpu" and not _multiplies_in_bfloat16():
                stack.enter_context(Rounding())
        yield


class Rounding(TorchFunctionMode):
    """Multiplies what is rounded to bfloat16 in float32, and rounds the sums.

    This is what instructions for bfloat16 do, forward and backward, up to the order of the sums.
    With torch's own stand-in for them a step of ResNet-18 takes ten times as long.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func not in (torch.conv2d, functional.linear):
            return func(*args, **(kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            rounded = [_round(value) for value in args]
            return func(*rounded, **(kwargs or {})).bfloat16()


def _round(value: Any) -> Any:
    return value.bfloat16().float() if isinstance(value, Tensor) else value


def _multiplies_in_bfloat16() -> bool:
    # What torch itself asks before it hands a convolution to oneDNN.
    operations: Any = torch.ops.mkldnn
    return torch.backends.mkldnn.is_available() and operations._is_mkldnn_bf16_supported()
