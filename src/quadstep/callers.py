"""Who calls: a compiled function, a transform, a `GradScaler`; and which calls have not ended."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, cast

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

_UNTYPED: Any = torch._C
_MODULE_CALL = cast(Any, nn.Module)._call_impl.__code__


def is_within_torch() -> bool:
    """Whether torch calls: a transform, the tracer, or a checkpoint that computes again."""
    transform = _UNTYPED._functorch.peek_interpreter_stack() is not None
    is_tracing = _UNTYPED._get_tracing_state() is not None
    return transform or is_tracing or torch._C._current_graph_task_id() != -1


def gradient_scale() -> float:
    """The scale of the `GradScaler` that calls `step`, after it has unscaled the gradients."""
    for frame in _frames():
        if frame.f_code is GradScaler._maybe_opt_step.__code__:
            return frame.f_locals["self"].get_scale()
    return 1.0


def _frames() -> Iterable[FrameType]:
    """The frames of the callers; to read their locals is to keep them, so only torch's are read."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def is_running(function: Callable[..., Any], calls: int) -> bool:
    """Whether so many calls have not ended: an interrupt leaves a module without its hooks."""
    if not isinstance(function, nn.Module):
        return True
    running = sum(
        frame.f_code is _MODULE_CALL and frame.f_locals.get("self") is function
        for frame in _frames()
    )
    return running >= calls


def as_compiled(module: nn.Module) -> Callable[..., Any]:
    """A module as the caller runs it: compiled alone, or within a compiled function."""
    callers = (frame.f_locals.get("self") for frame in _frames() if frame.f_code is _MODULE_CALL)
    modules = (caller for caller in callers if isinstance(caller, nn.Module))
    compiled = (one for one in modules if one._modules.get("_orig_mod") is module)
    if (found := next(compiled, None)) is not None:
        return found
    is_within = _is_called_by_compiler() and cast(Any, module)._compiled_call_impl is None
    return cast(Any, torch).compile(module) if is_within else module


def is_compiled(modules: list[nn.Module]) -> bool:
    """Whether one of the modules, a part of one, or what calls it, is compiled."""
    parts: list[Any] = [part for module in modules for part in module.modules()]
    compiled = ("_orig_mod" in part._modules or part._compiled_call_impl for part in parts)
    return any(compiled) or _is_called_by_compiler()


def _is_called_by_compiler() -> bool:
    """Whether a compiled function runs; functions that it leaves out have other frames there."""
    return any(
        frame.f_code.co_filename.endswith("_dynamo/eval_frame.py")
        and (frame.f_code.co_name == "compile_wrapper" or frame.f_locals.get("callback"))
        for frame in _frames()
    )
