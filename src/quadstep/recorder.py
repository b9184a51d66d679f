"""Records the forward passes of the caller, to replay them as probes."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from quadstep.callers import as_compiled, gradient_scale, is_compiled, is_within_torch
from quadstep.calls import (
    Call,
    Calls,
    argument,
    autocast_as,
    depends_on,
    leaves_of,
    link,
    loss_of,
    mark,
    parts_of,
    tensors_in,
)
from quadstep.diagnostics import SlopeComparison, missing_loss
from quadstep.gradients import gradients_of, mark_arrived
from quadstep.hooks import CallHooks, Function
from quadstep.snapshot import GeneratorStates, ModuleTracker, Snapshot, set_generators
from quadstep.tensors import full_tensor, is_distributed


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
        self.slopes = SlopeComparison()
        self.replaces_closure = False  # which returns the last loss of several accumulated ones
        self.measures = True  # whether the next step does
        self.is_two_phase = True  # whether the caller may run a closure; unknown at first
        self.before: Snapshot | None = None  # of before the first call
        self.start_failures = 0  # measurements in a row in which none of the `starts` was right
        self._generators: GeneratorStates | None = None  # at the last step or `zero_grad`
        self._calls_per_closure = 0
        self._tracker = tracker
        self._hooks = CallHooks(self._begin, self._end)
        self._calls = Calls()
        self._params: list[Tensor] = []
        self._is_replaying = False
        self._had_changed = False  # whether parameters had changed before they were moved
        self._scale = 1.0  # of the gradients in the backward passes
        self._owners: list[nn.Module] = []
        self._key = object()  # of its marks in graphs, which other recorders mark, too
        self.watch([*self.modules, *([] if criterion is None else [criterion])])

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles record the copied modules."""
        return Recorder, (self._tracker, self.modules, self.criterion)

    @contextmanager
    def counting(self) -> Generator[None]:
        """Counts the calls that a closure makes, with gradients enabled or not."""
        self._hooks.count = 0
        yield
        self._calls_per_closure = self._hooks.count

    def watch(self, modules: Iterable[nn.Module]) -> None:
        """Records the calls of modules from now on."""
        for module in modules:
            if module not in self._hooks:
                self._hooks.add(module)
                self._own(module)

    def recorded(self, function: Function) -> Function:
        """Wraps a function that returns the loss, such that its calls are recorded."""
        self.is_given = self.is_active = True
        owner = getattr(function, "__self__", None)
        if isinstance(owner, nn.Module):
            self._own(owner)
        return self._hooks.wrap(function)

    def prepare(self, params: list[Tensor], measures: bool) -> None:
        """Sets what the next step moves, and whether it measures."""
        self._params, self.measures = params, measures
        self._keep_generators()

    def restart(self) -> None:
        """Drops what is recorded, for the next step."""
        self._calls.clear()
        self.before = None

    def note_zero_grad(self) -> None:
        """Drops the calls whose gradients have been cleared."""
        self._calls.clear_weights()
        self._calls.drop_used()
        self._keep_generators()

    @property
    def starts(self) -> tuple[GeneratorStates | None, GeneratorStates | None]:
        """The random states from which a closure that the caller has run may have started.

        Those are the state before the first call that it made, and that at the end of the last step
        or at `zero_grad`.
        """
        count = self._calls_per_closure
        calls = self._calls.recorded[-count:] if count else []
        return calls[0].generators if calls else None, self._generators

    @property
    def has_loss(self) -> bool:
        """Whether a recorded loss was part of a backward pass."""
        return bool(self._calls.losses())

    @property
    def is_complete(self) -> bool:
        """Whether the arguments of all calls were recorded."""
        return all(call.generators is not None for call in self._calls.needed())

    def completes(self, loss: Tensor) -> bool:
        """Whether a loss that the caller gave is the last of several, all of which can be repeated.

        The gradients of the others were accumulated before.
        """
        calls = self._calls.losses()
        can_replay = self.is_complete and not (self.arguments_changed or self._is_computed_outside)
        if len(calls) < 2 or not can_replay:
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
        needed = self._calls.needed()
        return any(tensor._version != old for call in needed for tensor, old in call.versions)

    @property
    def parameters_changed(self) -> bool:
        """Whether a parameter of a called module was written to after its call began.

        Those that do not train are left out: forward passes write to them, as Keras does.
        """
        return any(
            old not in (None, new)
            for call in self._calls.needed()
            for old, new in zip(
                call.parameter_versions, self._parameter_versions(call.function), strict=False
            )
        )

    @property
    def touched(self) -> set[nn.Module] | None:
        """The modules that `replay` calls; None stands for all."""
        parts = [parts_of(call.function) for call in self._calls.needed()]
        known = [part for part in parts if part is not None]
        return set[nn.Module]().union(*known) if len(known) == len(parts) else None

    def loss(self) -> Tensor:
        """The function that the gradients are of: the losses times what backward was called with.

        Raises:
            RuntimeError: no call was recorded, or none with a loss that backward was called on.
        """
        calls = self._calls.losses()
        if not calls or self._is_computed_outside:
            names = [type(module).__name__ for module in self.modules]
            raise RuntimeError(
                missing_loss(
                    names,
                    self.criterion,
                    self._calls.recorded,
                    is_computed_outside=self._is_computed_outside,
                    has_gradients=bool(gradients_of(self._params)),
                )
            )
        (first, *others), self._scale = calls, 1.0
        if not others and _is_one(first.weight) and first.loss is not None:
            return first.loss
        self._scale = gradient_scale()
        return self._sum(calls, [call.loss for call in calls])

    def replay(self) -> Tensor:
        """Repeats the calls that the loss was computed by, and returns it."""
        calls, losses = self._calls.losses(), dict[Call, Any]()
        outputs = dict[Call, list[Tensor]]()
        self._is_replaying = True
        try:
            for call in self._calls.needed():
                arguments = [argument(leaf, outputs) for leaf in call.arguments]
                args, kwargs = pytree.tree_unflatten(arguments, call.structure)
                set_generators(call.generators or [])
                with autocast_as(call.autocast):
                    output = call.repeat(*args, **kwargs)
                outputs[call] = leaves_of(output)
                losses[call] = loss_of(output)
        finally:
            self._is_replaying = False
        return self._sum(calls, [losses[call] for call in calls])

    def accept_parameters(self) -> None:
        """Takes the present parameters for those of the recorded calls: their values are equal."""
        for call in self._calls.recorded:
            call.parameter_versions = self._parameter_versions(call.function)

    def hold(self) -> None:
        """Expects that parameters move, and return to their values before `release`."""
        self._had_changed = self.parameters_changed

    def release(self) -> None:
        """Accepts the parameters after their return, unless they had changed before."""
        if not self._had_changed:
            self.accept_parameters()

    @contextmanager
    def paused(self) -> Generator[None]:
        """Records nothing meanwhile; parameters that move are returned."""
        before, self._is_replaying = self._is_replaying, True
        self.hold()
        try:
            yield
        finally:
            self._is_replaying = before
            self.release()

    def _are_cleared(self) -> bool:
        """Whether the gradients of earlier backward passes have been cleared.

        FSDP holds them back until it synchronizes them.
        """
        is_cleared = all(param.grad is None for param in self._params)
        return is_cleared and not any(map(is_distributed, self._params))

    def _keep_generators(self) -> None:
        is_kept = self.is_two_phase and self.measures
        self._generators = self._tracker.generators(self._params) if is_kept else None

    def _own(self, module: nn.Module) -> None:
        self._owners.append(module)
        self._tracker.add(module.modules())

    @property
    def _is_computed_outside(self) -> bool:
        """Whether code between the calls has made an argument, which cannot be repeated."""
        return self.measures and any(call.depends for call in self._calls.needed())

    def _sum(self, calls: list[Call], losses: list[Any]) -> Tensor:
        """The sum of the losses, in their own type, each times its weight."""
        terms = [
            _single(call.weight) / self._scale * _single(loss)
            for call, loss in zip(calls, losses, strict=True)
        ]
        total = terms[0] if len(terms) == 1 else torch.stack(terms).sum()
        return total.to(losses[0].dtype)

    def _begin(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Call | None:
        wanted = (self.is_active or self.measures) and not self._is_replaying
        if not wanted or not torch.is_grad_enabled() or is_within_torch():
            return None
        call = Call(function, function)
        if self.measures:
            self._record(call, args, kwargs)
            if isinstance(function, nn.Module):
                call.repeat = as_compiled(function)
        return call

    def _end(self, call: Call, output: Any) -> None:
        if self._calls.recorded:
            self._calls.drop_dead()
        self._calls.recorded.append(call)
        if not self.is_active:
            return
        is_loss = self.criterion is None or call.function not in self.modules
        loss = loss_of(output) if is_loss else None
        if loss is None:
            call.output = type(output), getattr(output, "shape", None)
        else:
            # Some loops scale the loss in place.
            call.loss = full_tensor(loss.detach()).clone()
        if loss is not None and loss.requires_grad:

            def weigh(gradient: Tensor) -> None:
                self._weigh(call, gradient)

            cast(Any, loss).register_hook(weigh)
            call.graph.append(weakref.ref(weigh))
        if call.generators is not None:
            for number, leaf in enumerate(leaves_of(output)):
                if leaf is loss:
                    call.loss_number = number
                if leaf.grad_fn is not None:
                    mark(leaf, call, number, self._key)

    def _record(self, call: Call, args: Any, kwargs: Any) -> None:
        if self._are_cleared():
            self._calls.clear_weights()
        self._calls.drop_used()
        self._calls.drop_dead()
        if self.is_active:
            self._record_arguments(call, args, kwargs)
        call.generators = self._capture(call.function)
        call.parameter_versions = self._parameter_versions(call.function)
        kinds = {param.device.type for param in self._params} | {"cpu"}
        call.autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in sorted(kinds)
        ]
        self._tracker.autocast_dtypes |= {
            dtype for _, is_enabled, dtype in call.autocast if is_enabled
        }

    def _record_arguments(self, call: Call, args: Any, kwargs: Any) -> None:
        call.arguments, call.structure = pytree.tree_flatten((args, kwargs))
        for number, leaf in enumerate(call.arguments):
            if isinstance(leaf, Tensor) and leaf.requires_grad and leaf.grad_fn is not None:
                found = link(leaf, self._key)
                call.depends |= found is None and depends_on(leaf, self._params)
                if found is not None:
                    self._calls.readmit(found.call)
                    call.arguments[number] = found
            elif not isinstance(leaf, Tensor):
                call.depends |= any(
                    tensor.grad_fn is not None and depends_on(tensor, self._params)
                    for tensor in tensors_in(leaf)
                )
                if isinstance(leaf, Mapping):
                    call.arguments[number] = copy(cast(Mapping[Any, Any], leaf))
        call.versions = [
            (tensor, tensor._version)
            for tensor in tensors_in(call.arguments)
            if not tensor.is_inference()
        ]

    def _capture(self, function: Callable[..., Any]) -> GeneratorStates:
        """Takes a snapshot of before the first call; of a module's part, before its own first.

        Calls that no longer count may have changed it in between.
        """
        if self.before is None or not self._calls.recorded:
            self.before = self._tracker.capture(self._params)
            if self._tracker.is_due and is_compiled(self._owners):
                # What is looked for would run eagerly, and draw other random numbers.
                self._tracker.is_due = False
            return self.before.generators
        own = parts_of(function)
        others = [parts_of(call.function) for call in self._calls.recorded]
        if own and all(other is not None and own.isdisjoint(other) for other in others):
            self.before.renew(own)
        return self._tracker.generators(self._params)

    def _weigh(self, call: Call, gradient: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        self._calls.readmit(call)
        if self._are_cleared():
            self._calls.clear_weights(task)
        gradient = full_tensor(gradient.detach())
        call.weight = gradient if call.weight is None else call.weight + gradient
        if self.measures and call.backward != task:
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: mark_arrived(gradients_of(self._params)))
        call.backward = task

    def _parameter_versions(self, function: Callable[..., Any]) -> list[int | None]:
        """None where a parameter does not train, has no values yet, or counts no versions."""
        owners = [function] if isinstance(function, nn.Module) else self._owners
        return [
            param._version if _counts_versions(param) else None
            for owner in owners
            for param in owner.parameters()
        ]


def _single(value: Any) -> Tensor:
    """A loss or its weight, in single precision at least."""
    return value.reshape(()).to(torch.promote_types(value.dtype, torch.float32))


def _is_one(weight: Tensor | None) -> bool:
    """Whether backward was called on the loss itself, where reading that is free."""
    return weight is not None and weight.is_cpu and weight.item() == 1.0


def _counts_versions(param: Tensor) -> bool:
    return param.requires_grad and not is_lazy(param) and not param.is_inference()
