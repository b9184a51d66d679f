"""Records the forward passes of the caller, to replay them as probes."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import wraps
from types import FrameType
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.utils import _pytree as pytree

from quadstep.gradients import gradients_of, mark_arrived
from quadstep.snapshot import GeneratorStates, ModuleTracker, Snapshot, set_generators
from quadstep.tensors import full_tensor

_UNTYPED: Any = torch._C
_MODULE_CALL = cast(Any, nn.Module)._call_impl.__code__

Function = TypeVar("Function", bound=Callable[..., Any])


_Geometry = tuple[Any, Any, Any]  # sizes, strides and offset


class _Link(NamedTuple):
    """An argument that an earlier call returned, or a view of it."""

    call: Call
    number: int  # among the leaves of what it returned
    geometry: _Geometry | None = None  # of a view, its offset from what was returned
    dtype: torch.dtype | None = None  # that it was cast to


class _Origin:
    """Which call returned a tensor; the graph of the tensor keeps it alive."""

    KEY = "quadstep"

    def __init__(self, call: Call, number: int, geometry: _Geometry) -> None:
        self.call, self.number, self.geometry = weakref.ref(call), number, geometry


@dataclass(eq=False, slots=True, weakref_slot=True)
class Call:
    """One call of a module or function with gradients enabled."""

    function: Callable[..., Any]
    repeat: Callable[..., Any]  # the function, or a compiled module around it
    generators: GeneratorStates | None = None  # before it; None where the step does not measure
    arguments: list[Any] = field(default_factory=list[Any])  # the leaves of both kinds of them
    structure: Any = None
    versions: list[tuple[Tensor, int]] = field(default_factory=list[tuple[Tensor, int]])
    autocast: list[tuple[str, bool, torch.dtype]] = field(
        default_factory=list[tuple[str, bool, torch.dtype]]
    )
    depends: bool = False  # whether an argument depends on the parameters, but is no `_Link`
    output: Any = None  # the type of what it returned
    loss: Tensor | None = None  # its value, detached
    weight: Tensor | None = None  # the gradient that has reached the loss
    backward: int = -1  # the number of the backward pass that it came from
    graph: list[weakref.ref[Any]] = field(default_factory=list[Any])  # alive as long as the graph


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


class Recorder:
    """Records the calls of modules and functions, and replays those that made the gradients.

    On steps that measure it keeps the arguments of each call, by reference, and the random state;
    on others the losses alone.

    Args:
        tracker: finds the state that calls leave behind.
        modules: return the loss or, with a criterion, what it makes a loss of.
        criterion: the module that computes the loss, if that is another.
    """

    def __init__(
        self,
        tracker: ModuleTracker,
        modules: Iterable[nn.Module] = (),
        criterion: nn.Module | None = None,
    ) -> None:
        self.modules, self.criterion = tuple(modules), criterion
        self.is_given = bool(self.modules)  # whether steps need no closure
        self.is_active = self.is_given  # whether calls are recorded, and not only where they start
        self.is_inexact = False  # whether a repetition was seen to return another loss
        self.is_trusted = False  # in place of the closure, where gradients are accumulated
        self.measures = True  # whether the next step does
        self.marks = True  # whether the random state is kept at the end of a step and `zero_grad`
        self.count = 0  # of the calls since it was set to zero, with gradients enabled or not
        self.calls_per_closure = 0
        self.before: Snapshot | None = None  # of before the first call
        self.start_failures = 0  # measurements in a row in which none of the `starts` was right
        self._mark: GeneratorStates | None = None
        self._tracker = tracker
        self._watched: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._stack: list[tuple[Callable[..., Any], Call | None]] = []
        self._calls: list[Call] = []
        self._params: list[Tensor] = []
        self._versions: list[tuple[Tensor, int]] = []
        self._is_replaying = False
        self._scale = 1.0  # of the gradients in the backward passes
        self._owners: list[nn.Module] = []
        self.watch([*self.modules, *([] if criterion is None else [criterion])])

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles record the copied modules."""
        return Recorder, (self._tracker, self.modules, self.criterion)

    def watch(self, modules: Iterable[nn.Module]) -> None:
        """Records the calls of modules from now on."""
        for module in modules:
            if module not in self._watched:
                self._watched.add(module)
                self._own(module)
                handles = (
                    module.register_forward_pre_hook(_Hook(self._enter_module), with_kwargs=True),
                    module.register_forward_hook(
                        _Hook(self._leave_module), with_kwargs=True, always_call=True
                    ),
                )
                for handle in handles:
                    weakref.finalize(self, handle.remove)

    def recorded(self, function: Function) -> Function:
        """Wraps a function that returns the loss, such that its calls are recorded."""
        self.is_given = self.is_active = True
        owner = getattr(function, "__self__", None)
        if isinstance(owner, nn.Module):
            self._own(owner)

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

    def restart(self, params: list[Tensor], measures: bool) -> None:
        """Drops what is recorded, for the next step."""
        self._params, self.measures = params, measures
        self._keep(lambda call: False)
        self.before = None
        self._set_mark()

    def note_zero_grad(self) -> None:
        """Drops the calls whose gradients have been cleared."""
        self._keep(lambda call: call.weight is None)
        self._set_mark()

    @property
    def starts(self) -> tuple[GeneratorStates | None, GeneratorStates | None]:
        """The random states from which a closure that the caller has run may have started.

        Those are the state before the first call that it made, and that at the end of the last step
        or at `zero_grad`.
        """
        calls = self._calls[-self.calls_per_closure :] if self.calls_per_closure else []
        return calls[0].generators if calls else None, self._mark

    @property
    def has_loss(self) -> bool:
        """Whether a recorded loss was part of a backward pass."""
        return bool(self._losses())

    @property
    def is_complete(self) -> bool:
        """Whether the arguments of all calls were recorded."""
        return all(call.generators is not None for call in self._needed())

    def completes(self, loss: Tensor) -> bool:
        """Whether a loss that the caller gave is the last of several, all of which can be repeated.

        The gradients of the others were accumulated before.
        """
        calls = self._losses()
        if len(calls) < 2 or not self.is_complete or self.arguments_changed:
            return False
        if any(call.depends for call in self._needed()):
            return False
        given, last, total = (
            float(value) for value in (loss, _single(calls[-1].loss), self.loss())
        )
        return math.isclose(given, last, rel_tol=1e-5) and not math.isclose(
            given, total, rel_tol=1e-5
        )

    @property
    def arguments_changed(self) -> bool:
        """Whether a tensor among the arguments was written to after its call began."""
        needed = self._needed()
        return any(tensor._version != old for call in needed for tensor, old in call.versions)

    @property
    def parameters_changed(self) -> bool:
        """Whether a parameter that trains was written to after the first call began.

        Forward passes themselves write to others, as to the running means of Keras.
        """
        return any(param._version != version for param, version in self._versions)

    def loss(self) -> Tensor:
        """The function that the gradients are of: the losses times what backward was called with.

        Raises:
            RuntimeError: no call was recorded, or none with a loss that backward was called on.
        """
        calls = self._losses()
        if not calls or any(call.depends for call in self._needed()):
            raise RuntimeError(self._reason())
        self._scale = _gradient_scale()
        return self._sum(calls, [call.loss for call in calls])

    def replay(self) -> Tensor:
        """Repeats the calls that the loss was computed by, and returns it."""
        calls, losses = self._losses(), dict[Call, Any]()
        outputs = dict[Call, list[Any]]()
        self._is_replaying = True
        try:
            for call in self._needed():
                arguments = [_argument(leaf, outputs) for leaf in call.arguments]
                args, kwargs = pytree.tree_unflatten(arguments, call.structure)
                set_generators(call.generators or [])
                with _autocast(call.autocast):
                    output = call.repeat(*args, **kwargs)
                outputs[call] = pytree.tree_leaves(output)
                losses[call] = loss_of(output)
        finally:
            self._is_replaying = False
        return self._sum(calls, [losses[call] for call in calls])

    def note_parameters(self, unless: bool = False) -> None:
        """Takes the present parameters for those of the recorded calls, as they are again."""
        if not unless:
            self._versions = self._parameter_versions()

    @contextmanager
    def paused(self) -> Generator[None]:
        """Records nothing meanwhile."""
        before, self._is_replaying = self._is_replaying, True
        try:
            yield
        finally:
            self._is_replaying = before

    def _keep(self, wanted: Callable[[Call], bool]) -> None:
        """Drops the other calls, and what they keep: the loss, which refers to them, may live."""
        for call in self._calls:
            if not wanted(call):
                call.arguments, call.versions = [], []
        self._calls = [call for call in self._calls if wanted(call)]

    def _set_mark(self) -> None:
        is_kept = self.marks and self.measures
        self._mark = self._tracker.generators(self._params) if is_kept else None

    def _own(self, module: nn.Module) -> None:
        self._owners.append(module)
        self._tracker.add(module.modules())

    def _losses(self) -> list[Call]:
        """The calls whose losses have been part of a backward pass."""
        linked = {leaf.call for call in self._calls for leaf in _links(call)}
        return [call for call in self._calls if call.weight is not None and call not in linked]

    def _needed(self) -> list[Call]:
        """The calls that the losses were computed by, in their order."""
        pending, needed = self._losses(), set[Call]()
        while pending:
            call = pending.pop()
            needed.add(call)
            pending.extend(leaf.call for leaf in _links(call) if leaf.call not in needed)
        return [call for call in self._calls if call in needed]

    def _sum(self, calls: list[Call], losses: list[Any]) -> Tensor:
        """The sum of the losses, in their own type, each times its weight."""
        terms = [
            _single(call.weight) / self._scale * _single(loss)
            for call, loss in zip(calls, losses, strict=True)
        ]
        total = terms[0] if len(terms) == 1 else torch.stack(terms).sum()
        return total.to(losses[0].dtype)

    def _reason(self) -> str:
        """Why there is no loss, and what to do."""
        names = ", ".join(type(module).__name__ for module in self.modules)
        source = f"the model ({names})" if names else "the function that opt.recorded wrapped"
        otherwise = (
            "or wrap the function that computes the loss, loss_fn = opt.recorded(loss_fn) (of a "
            "Trainer: its compute_loss), or pass a closure, opt.step(closure)"
        )
        if not any(call.function is not self.criterion for call in self._calls):
            fix = (
                "the object that was given as model=, not its forward() or a copy, give the "
                "compiled module if there is one"
            )
            return (
                f"step() without a closure found no call of {source} with gradients enabled "
                "since the last step; call "
                f"{fix if names else 'what opt.recorded returned'}, {otherwise}"
            )
        if any(call.depends for call in self._needed()):
            if not names:
                return (
                    f"{source} was given a tensor that was computed from the parameters, and LQA "
                    "cannot repeat how; give LQA the model as well, LQA(params, model=model), or "
                    "wrap a function that calls the model itself, or pass a closure, "
                    "opt.step(closure)"
                )
            return (
                "the criterion or a module was given a tensor that was computed from what the "
                "model returned, and LQA cannot repeat what happened in between; "
                "move it into the model or the criterion, give LQA the module that did it, "
                f"model=[model, other], {otherwise}"
            )
        if any(call.loss is not None for call in self._calls):
            if not gradients_of(self._params):
                return "no gradient has arrived; call loss.backward() before step()"
            return (
                "backward() was not called on the loss that the model or the criterion returned, "
                f"but on another; call it on that loss, {otherwise}"
            )
        if self.criterion is not None:
            name = type(self.criterion).__name__
            outputs = [call.output for call in self._calls if call.function is self.criterion]
            if outputs:
                return (
                    f"criterion ({name}) returned {outputs[-1]}, not a scalar loss; leave its "
                    f'reduction at "mean", {otherwise}'
                )
            return (
                f"criterion ({name}) was not called with what the model "
                f"returned; call the object that was given as criterion=, {otherwise}"
            )
        give = "give the loss module that the loop calls, LQA(..., criterion=criterion)"
        return (
            f"{source} returned {self._calls[-1].output}, in which there is no loss: a scalar "
            'tensor, .loss, ["loss"] or the first element of a tuple; '
            f"{give if names else 'return the loss first'}, {otherwise}"
        )

    def _enter_module(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module in self._watched:
            self._enter(module, args, kwargs)
            if (call := self._stack[-1][1]) is not None and call.generators is not None:
                call.repeat = _as_compiled(module)

    def _leave_module(self, module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        if module in self._watched and self._stack:
            self._leave(output)

    def _enter(self, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        if self._stack:
            outermost = self._stack[0][0]
            calls = [function, *(entry[0] for entry in self._stack)].count(outermost)
            if not _is_running(outermost, calls):
                self._stack.clear()
        call = None
        if not self._stack:
            self.count += 1
            wanted = (self.is_active or self.measures) and not self._is_replaying
            if wanted and torch.is_grad_enabled() and not _is_within_torch():
                call = Call(function, function)
                if self.measures:
                    self._record(call, args, kwargs)
        self._stack.append((function, call))

    def _leave(self, output: Any) -> None:
        _, call = self._stack.pop()
        if call is None or output is None:
            return
        call.output = _describe(output)
        self._drop_dead()
        self._calls.append(call)
        if not self.is_active:
            return
        if self.criterion is None or call.function not in self.modules:
            loss = loss_of(output)
            # Some loops scale the loss in place.
            call.loss = None if loss is None else full_tensor(loss.detach()).clone()
            if loss is not None and loss.requires_grad:

                def weigh(gradient: Tensor) -> None:
                    self._weigh(call, gradient)

                cast(Any, loss).register_hook(weigh)
                call.graph.append(weakref.ref(weigh))
        if call.generators is not None:
            for number, leaf in enumerate(pytree.tree_leaves(output)):
                if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                    _mark(leaf, call, number)

    def _record(self, call: Call, args: Any, kwargs: Any) -> None:
        if self.before is None:
            self.before = self._tracker.capture(self._params)
            self._versions = self._parameter_versions()
            call.generators = self.before.generators
            if self._tracker.is_due and _is_compiled(self._owners):
                # What is looked for would run eagerly, and draw other random numbers.
                self._tracker.is_due = False
        else:
            call.generators = self._tracker.generators(self._params)
        kinds = {param.device.type for param in self._params} | {"cpu"}
        call.autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in sorted(kinds)
        ]
        self._tracker.autocast_dtypes |= {
            dtype for _, is_enabled, dtype in call.autocast if is_enabled
        }
        if not self.is_active:
            return
        call.arguments, call.structure = pytree.tree_flatten((args, kwargs))
        for number, leaf in enumerate(call.arguments):
            if isinstance(leaf, Tensor) and leaf.requires_grad and leaf.grad_fn is not None:
                link = _link(leaf)
                call.depends |= link is None and _depends_on(leaf, self._params)
                call.arguments[number] = leaf if link is None else link
            elif isinstance(leaf, Mapping):
                call.arguments[number] = copy(cast(Mapping[Any, Any], leaf))
        call.versions = [
            (tensor, tensor._version)
            for tensor in _tensors(call.arguments)
            if not tensor.is_inference()
        ]

    def _weigh(self, call: Call, gradient: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if all(param.grad is None for param in self._params):
            # The gradients of earlier backward passes have been cleared.
            self._keep(lambda other: other.weight is None or other.backward == task)
            if call not in self._calls:
                self._calls.append(call)
        gradient = full_tensor(gradient.detach())
        call.weight = gradient if call.weight is None else call.weight + gradient
        if self.measures and call.backward != task:
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: mark_arrived(gradients_of(self._params)))
        call.backward = task

    def _drop_dead(self) -> None:
        """Drops the calls that no backward pass can reach any more, as of an evaluation."""
        linked = {leaf.call for call in self._calls for leaf in _links(call)}
        self._keep(
            lambda call: (
                call.weight is not None
                or call in linked
                or any(reference() is not None for reference in call.graph)
            )
        )

    def _parameter_versions(self) -> list[tuple[Tensor, int]]:
        params = {param for owner in self._owners for param in owner.parameters()}
        trained = (param for param in params if param.requires_grad and not param.is_inference())
        return [(param, param._version) for param in trained]


def loss_of(output: Any) -> Tensor | None:
    """The loss in what a model has returned, None if there is none."""
    found = output
    if not isinstance(output, Tensor):
        found = getattr(output, "loss", None)
        if found is None and isinstance(output, Mapping):
            found = cast(Mapping[Any, Any], output).get("loss")
        elif found is None and isinstance(output, tuple | list) and output:
            found = cast(tuple[Any, ...], output)[0]
    if not isinstance(found, Tensor) or not found.is_floating_point():
        return None
    return found if found.shape in ((), (1,)) else None


def _is_within_torch() -> bool:
    """Whether a transform of functions calls, or a checkpoint that computes again in backward."""
    transform = _UNTYPED._functorch.peek_interpreter_stack() is not None
    return transform or torch._C._current_graph_task_id() != -1


def _single(value: Any) -> Tensor:
    """A loss or its weight, in single precision at least."""
    return value.reshape(()).to(torch.promote_types(value.dtype, torch.float32))


def _gradient_scale() -> float:
    """The scale of the `GradScaler` that calls `step`, after it has unscaled the gradients."""
    for frame in _frames():
        if frame.f_code is GradScaler._maybe_opt_step.__code__:
            return frame.f_locals["self"].get_scale()
    return 1.0


def _links(call: Call) -> list[_Link]:
    return [leaf for leaf in call.arguments if isinstance(leaf, _Link)]


def _argument(leaf: Any, outputs: dict[Call, list[Any]]) -> Any:
    """A recorded argument, taken from what the calls before it have returned this time."""
    if isinstance(leaf, Mapping):
        # Functions may remove entries from the dictionaries that they are given.
        return copy(cast(Mapping[Any, Any], leaf))
    if not isinstance(leaf, _Link):
        return leaf
    tensor = outputs[leaf.call][leaf.number]
    if leaf.geometry is None:
        return tensor if leaf.dtype is None else tensor.to(leaf.dtype)
    size, stride, offset = leaf.geometry
    return tensor.as_strided(size, stride, tensor.storage_offset() + offset)


def _mark(output: Tensor, call: Call, number: int) -> None:
    """Marks the graph of what a call has returned, for `_link` to find."""
    geometry = output.size(), output.stride(), output.storage_offset()
    origin = _Origin(call, number, geometry)
    call.graph.append(weakref.ref(origin))
    for tensor in (output, output._base):
        node: Any = None if tensor is None else tensor.grad_fn
        if tensor is not None and node is not None:
            node.metadata[_Origin.KEY, tensor.output_nr] = origin


def _link(tensor: Tensor) -> _Link | None:
    """Finds the call that returned a tensor, or one of which it is a view or a cast."""
    base = tensor if tensor._base is None else tensor._base
    origin = _origin(base.grad_fn, base.output_nr)
    if origin is not None and (call := origin.call()) is not None:
        own = tensor.size(), tensor.stride(), tensor.storage_offset()
        is_same = own == origin.geometry
        geometry = None if is_same else (own[0], own[1], own[2] - origin.geometry[2])
        return _Link(call, origin.number, geometry)
    node: Any = tensor.grad_fn
    if node.name() == "ToCopyBackward0":
        origin = _origin(*node.next_functions[0])
        if origin is not None and (call := origin.call()) is not None:
            return _Link(call, origin.number, dtype=tensor.dtype)
    return None


def _origin(node: Any, output: int) -> _Origin | None:
    return None if node is None else node.metadata.get((_Origin.KEY, output))


def _describe(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    return type(output).__name__


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in arguments, and in objects among them, as batches of graphs are."""
    if isinstance(value, Tensor):
        return [value]
    items: Iterable[Any] = ()
    if isinstance(value, Mapping):
        items = cast(Mapping[Any, Any], value).values()
    elif isinstance(value, list | tuple):
        items = cast(list[Any], value)
    elif not isinstance(value, nn.Module | type):
        own: dict[str, Any] = getattr(value, "__dict__", {})
        items = [item for item in own.values() if isinstance(item, Tensor)]
    return [tensor for item in items for tensor in _tensors(item)]


def _depends_on(tensor: Tensor, params: list[Tensor]) -> bool:
    """Whether the graph of a tensor reaches one of the parameters."""
    wanted = {id(param) for param in params}
    nodes, seen = [tensor.grad_fn], set[Any]()
    while nodes:
        node: Any = nodes.pop()
        if node is None or node in seen:
            continue
        if id(getattr(node, "variable", None)) in wanted:
            return True
        seen.add(node)
        nodes.extend(following for following, _ in node.next_functions)
    return False


def _autocast(states: list[tuple[str, bool, torch.dtype]]) -> ExitStack:
    """Autocast as it was, where it is not now."""
    stack = ExitStack()
    for kind, is_enabled, dtype in states:
        now = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        if (is_enabled, dtype) != now and (is_enabled or now[0]):
            stack.enter_context(torch.autocast(kind, dtype, is_enabled))
    return stack


def _frames() -> Iterable[FrameType]:
    """The frames of the callers; to read their locals is to keep them, so only torch's are read."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_running(function: Callable[..., Any], calls: int) -> bool:
    """Whether so many calls have not ended: an interrupt leaves a module without its hooks."""
    if not isinstance(function, nn.Module):
        return True
    running = sum(
        frame.f_code is _MODULE_CALL and frame.f_locals.get("self") is function
        for frame in _frames()
    )
    return running >= calls


def _as_compiled(module: nn.Module) -> Callable[..., Any]:
    """A module as the caller runs it: compiled alone, or within a compiled function."""
    callers = (frame.f_locals.get("self") for frame in _frames() if frame.f_code is _MODULE_CALL)
    modules = (caller for caller in callers if isinstance(caller, nn.Module))
    compiled = (one for one in modules if one._modules.get("_orig_mod") is module)
    if (found := next(compiled, None)) is not None:
        return found
    is_within = _is_called_by_compiler() and cast(Any, module)._compiled_call_impl is None
    return cast(Any, torch).compile(module) if is_within else module


def _is_compiled(modules: list[nn.Module]) -> bool:
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
