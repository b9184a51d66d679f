"""Recorded calls: their arguments, where those come from, and what the calls returned."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from quadstep.reshaping import Operation, input_size, operation
from quadstep.snapshot import GeneratorStates

MAX_OPERATIONS = 16  # between what a call returned and what another takes

_Geometry = tuple[Any, Any, Any]  # sizes, strides and offset


class Link(NamedTuple):
    """An argument that an earlier call returned, or that was taken from what it returned."""

    call: Call
    number: int  # among the leaves of what it returned
    geometry: _Geometry | None = None  # of a view, its offset from what was returned
    operations: Sequence[Operation] = ()  # by which it was copied


class _Origin:
    """Which call returned a tensor; the graph of the tensor keeps it alive."""

    def __init__(self, call: Call, number: int, output: Tensor) -> None:
        self.call, self.number, self.kind = weakref.ref(call), number, _kind(output)
        self.geometry = output.size(), output.stride(), output.storage_offset()


@dataclass(eq=False, slots=True, weakref_slot=True)
class Call:
    """One call of a module or function with gradients enabled."""

    function: Callable[..., Any]
    repeat: Callable[..., Any]  # the function, or a compiled module around it
    generators: GeneratorStates | None = None  # before it; None where the step does not measure
    arguments: list[Any] = field(default_factory=list[Any])  # the leaves of both kinds of them
    structure: Any = None
    versions: list[tuple[Tensor, int]] = field(default_factory=list[tuple[Tensor, int]])
    parameter_versions: list[int | None] = field(default_factory=list[int | None])  # before it
    autocast: list[tuple[str, bool, torch.dtype]] = field(
        default_factory=list[tuple[str, bool, torch.dtype]]
    )
    depends: bool = False  # whether an argument depends on the parameters, but is no `Link`
    output: tuple[type, Any] | None = None  # type and shape of what it returned without a loss
    loss: Tensor | None = None  # its value, detached
    loss_number: int | None = None  # among the leaves of what it returned
    weight: Tensor | None = None  # the gradient that has reached the loss
    backward: int = -1  # the number of the backward pass that it came from
    graph: list[weakref.ref[Any]] = field(default_factory=list[Any])  # alive as long as the graph


class Calls:
    """The calls of a step, in their order.

    Attributes:
        recorded: those that may count.
    """

    def __init__(self) -> None:
        self.recorded: list[Call] = []

    def clear_weights(self, task: int = -1) -> None:
        """Takes the weights from the calls that had them of other backward passes."""
        for call in self.recorded:
            if call.backward != task:
                call.weight = None

    def losses(self) -> list[Call]:
        """The calls whose losses have been part of a backward pass."""
        linked = {(leaf.call, leaf.number) for call in self.recorded for leaf in links_of(call)}
        return [
            call
            for call in self.recorded
            if call.weight is not None and (call, call.loss_number) not in linked
        ]

    def needed(self) -> list[Call]:
        """The calls that the losses were computed by, in their order."""
        pending, needed = self.losses(), set[Call]()
        while pending:
            call = pending.pop()
            needed.add(call)
            pending.extend(leaf.call for leaf in links_of(call) if leaf.call not in needed)
        return [call for call in self.recorded if call in needed]

    def readmit(self, call: Call) -> None:
        """Adds a call that was dropped, and those that it depends on."""
        if call not in self.recorded:
            for leaf in links_of(call):
                self.readmit(leaf.call)
            self.recorded.append(call)

    def drop_used(self) -> None:
        """Drops the calls of backward passes whose gradients have been cleared."""
        before_used, before_kept, kept = set[Call](), set[Call](), list[Call]()
        for call in reversed(self.recorded):
            is_used = call.backward >= 0 or call in before_used
            if call.weight is None and is_used and call not in before_kept:
                before_used.update(leaf.call for leaf in links_of(call))
            else:
                before_kept.update(leaf.call for leaf in links_of(call))
                kept.append(call)
        self.recorded = kept[::-1]

    def drop_dead(self) -> None:
        """Drops the calls that no backward pass can reach any more, as of an evaluation."""
        linked = {leaf.call for call in self.recorded for leaf in links_of(call)}
        self.recorded = [
            call
            for call in self.recorded
            if call.weight is not None
            or call in linked
            or any(reference() is not None for reference in call.graph)
        ]

    def clear(self) -> None:
        """Drops all calls."""
        for call in self.recorded:
            # The loss, which refers to it, may live.
            call.generators, call.arguments, call.versions, call.weight = None, [], [], None
        self.recorded = []


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


def links_of(call: Call) -> list[Link]:
    """The arguments that earlier calls returned."""
    return [leaf for leaf in call.arguments if isinstance(leaf, Link)]


def argument(leaf: Any, outputs: dict[Call, list[Tensor]]) -> Any:
    """A recorded argument, taken from what the calls before it have returned this time."""
    if isinstance(leaf, Mapping):
        # Functions may remove entries from the dictionaries that they are given.
        return copy(cast(Mapping[Any, Any], leaf))
    if not isinstance(leaf, Link):
        return leaf
    tensor = outputs[leaf.call][leaf.number]
    if leaf.geometry is not None:
        size, stride, offset = leaf.geometry
        return tensor.as_strided(size, stride, tensor.storage_offset() + offset)
    for step in leaf.operations:
        tensor = step(tensor)
    return tensor


def mark(output: Tensor, call: Call, number: int, key: object) -> None:
    """Marks the graph of what a call has returned, for `link` to find."""
    origin = _Origin(call, number, output)
    call.graph.append(weakref.ref(origin))
    for tensor in (output, output._base):
        node: Any = None if tensor is None else tensor.grad_fn
        if tensor is not None and node is not None:
            node.metadata[key, tensor.output_nr] = origin


def link(tensor: Tensor, key: object) -> Link | None:
    """Finds the call that returned a tensor, or one that it was taken from."""
    base = tensor if tensor._base is None else tensor._base
    origin = _origin(base.grad_fn, base.output_nr, key)
    if origin is not None and (call := origin.call()) is not None:
        if _kind(tensor) != origin.kind:
            return None
        own = tensor.size(), tensor.stride(), tensor.storage_offset()
        is_same = own == origin.geometry
        geometry = None if is_same else (own[0], own[1], own[2] - origin.geometry[2])
        return Link(call, origin.number, geometry)
    return _copied(tensor, key)


def _copied(tensor: Tensor, key: object) -> Link | None:
    """As `link`, where slices, masks, casts and changes of the shape have copied."""
    operations: list[Operation] = []
    node: Any = tensor.grad_fn
    number, size = tensor.output_nr, tensor.size()
    while node is not None and len(operations) < MAX_OPERATIONS:
        step = operation(node, number, size, tensor.dtype)
        if step is None:
            return None
        operations.append(step)
        size = input_size(node, size)
        node, number = node.next_functions[0]
        origin = _origin(node, number, key)
        if origin is not None and (call := origin.call()) is not None:
            return Link(call, origin.number, operations=operations[::-1])
    return None


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    """What views of another kind, as the real part of a complex tensor, do not share."""
    return tensor.dtype, tensor.is_conj(), tensor.is_neg()


def _origin(node: Any, output: int, key: object) -> _Origin | None:
    return None if node is None else node.metadata.get((key, output))


def leaves_of(output: Any) -> list[Tensor]:
    """The tensors in what a call has returned."""
    return tensors_in(pytree.tree_leaves(output))


def tensors_in(value: Any) -> list[Tensor]:
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
    return [tensor for item in items for tensor in tensors_in(item)]


def depends_on(tensor: Tensor, params: list[Tensor]) -> bool:
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


def parts_of(function: Callable[..., Any]) -> set[nn.Module] | None:
    """The modules that a call can run; None where it can run any."""
    return set(function.modules()) if isinstance(function, nn.Module) else None


def autocast_as(states: list[tuple[str, bool, torch.dtype]]) -> ExitStack:
    """Autocast as it was, where it is not now."""
    stack = ExitStack()
    for kind, is_enabled, dtype in states:
        now = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        if (is_enabled, dtype) != now and (is_enabled or now[0]):
            stack.enter_context(torch.autocast(kind, dtype, is_enabled))
    return stack
