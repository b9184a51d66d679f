"""Notices the calls of modules and functions, those within others left out."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import nn

from quadstep.callers import is_running

Function = TypeVar("Function", bound=Callable[..., Any])


class _Hook:
    """A forward hook; in copies of a module it does nothing."""

    def __init__(self, method: Any = None) -> None:
        self._method = None if method is None else weakref.WeakMethod(method)

    # Compiled modules break their graph here, at their very beginning and end.
    @torch._disable_dynamo
    def __call__(self, *args: Any) -> None:
        method = None if self._method is None else self._method()
        if method is not None:
            method(*args)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


class _Local(threading.local):
    """The calls that have not ended, of each thread: another one may evaluate the modules."""

    def __init__(self) -> None:
        self.stack: list[tuple[Callable[..., Any], Any]] = []


class CallHooks:
    """Runs `begin(function, args, kwargs)` before and `end(call, output)` after outermost calls.

    The hooks go with the object. `end` gets what `begin` has returned, and is left out where that
    is None, or where a call fails or returns None.

    Attributes:
        count: the number of calls since it was set to zero.
    """

    def __init__(
        self, begin: Callable[[Callable[..., Any], Any, Any], Any], end: Callable[[Any, Any], None]
    ) -> None:
        self.count = 0
        # The owner of these methods owns this object, too.
        self._begin, self._end = weakref.WeakMethod(begin), weakref.WeakMethod(end)
        self._modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._local = _Local()

    def __contains__(self, module: nn.Module) -> bool:
        return module in self._modules

    def add(self, module: nn.Module) -> None:
        """Notices the calls of a module from now on."""
        self._modules.add(module)
        handles: Iterable[Any] = (
            module.register_forward_pre_hook(_Hook(self._enter_module), with_kwargs=True),
            module.register_forward_hook(
                _Hook(self._leave_module), with_kwargs=True, always_call=True
            ),
        )
        for handle in handles:
            weakref.finalize(self, handle.remove)

    def wrap(self, function: Function) -> Function:
        """Wraps a function, such that its calls are noticed."""

        @wraps(function)
        @torch._disable_dynamo(recursive=False)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            output = None
            self._enter(function, args, kwargs)
            try:
                output = function(*args, **kwargs)
            finally:
                self._leave(output)
            return output

        return cast(Function, wrapper)

    # Hooks are shared by the replicas of a module.
    def _enter_module(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module in self._modules:
            self._enter(module, args, kwargs)

    def _leave_module(self, module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        if module in self._modules and self._local.stack:
            self._leave(output)

    def _enter(self, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        stack = self._local.stack
        if stack:
            outermost = stack[0][0]
            if not is_running(outermost, [function, *(one for one, _ in stack)].count(outermost)):
                stack.clear()
        call = None
        if not stack:
            self.count += 1
            begin = self._begin()
            call = None if begin is None else begin(function, args, kwargs)
        stack.append((function, call))

    def _leave(self, output: Any) -> None:
        _, call = self._local.stack.pop()
        end = self._end()
        if call is not None and output is not None and end is not None:
            end(call, output)
