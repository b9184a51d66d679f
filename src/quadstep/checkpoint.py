"""The optimizer's state as flat keys and scalars."""

from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, cast, get_type_hints

from quadstep.arguments import rate
from quadstep.gradients import gradients_of, is_zero
from quadstep.tensors import Groups, parameters

T = TypeVar("T")


def flatten(state: object, prefix: str) -> dict[str, float]:
    """Names the scalars of a dataclass, nested ones included, by their dotted paths."""
    flat: dict[str, float] = {}
    for name, key, nested in _layout(type(state), prefix):
        value = getattr(state, name)
        flat |= flatten(value, f"{key}.") if nested else {key: value}
    return flat


def unflatten(kind: type[T], flat: dict[str, float], prefix: str) -> T:
    """Builds the dataclass that `flatten` took apart; a missing key raises `KeyError`."""
    layout = _layout(kind, prefix)
    return kind(*(unflatten(type_, flat, f"{k}.") if type_ else flat[k] for _, k, type_ in layout))


@cache
def _layout(kind: Any, prefix: str) -> tuple[tuple[str, str, type[Any] | None], ...]:
    """Name, key and, where it is a dataclass itself, type of each field."""
    hints, names = get_type_hints(kind), [field.name for field in fields(kind)]
    return tuple((n, prefix + n, hints[n] if is_dataclass(hints[n]) else None) for n in names)


STATE_VERSION = 6
PREFIX = "lqa."  # of the keys of all scalars of the state
RATE = "lqa.rate"  # the rate of each param group, whatever others write into its lr
VERSION, TRAINING = "lqa.version", "lqa.training"
DIRECTION, CONTROLLER, UPDATE = "lqa.direction", "lqa.controller", "lqa.update"
CONTROLLER_STATE = "lqa.controller."
DETERMINISM = "lqa.determinism"  # of the losses, from 0 to 1: a copy of the controller's


def check(state_dict: dict[str, Any], scalars: dict[str, Any]) -> None:
    """Refuses a state dict of another optimizer, version or configuration.

    Raises:
        ValueError: says which, and what to do.
    """
    groups: list[dict[str, Any]] = state_dict.get("param_groups", [])
    if not groups or VERSION not in groups[0]:
        raise ValueError(
            f"state_dict was not saved by LQA: its first param group has no entry {VERSION!r}; "
            "load it into the optimizer that saved it"
        )
    saved = groups[0]
    if saved[VERSION] != STATE_VERSION:
        raise ValueError(
            f"state_dict has version {saved[VERSION]}, and this quadstep reads version "
            f"{STATE_VERSION}; load it with the quadstep that saved it"
        )
    for key in (DIRECTION, CONTROLLER, UPDATE):
        if saved[key] != scalars[key]:
            name = key.removeprefix(PREFIX)
            raise ValueError(
                f"state_dict was saved with {name} = {saved[key]!r}, this optimizer has "
                f"{name} = {scalars[key]!r}; construct LQA as it was when it was saved"
            )


def scalars_of(group: dict[str, Any]) -> dict[str, Any]:
    """The scalars of the state in a group."""
    return {key: group[key] for key in group if key.startswith(PREFIX) and key != RATE}


def clear_scalars(group: dict[str, Any]) -> None:
    """Removes the scalars of the state from a group."""
    for key in scalars_of(group):
        del group[key]


def move_scalars(known: dict[str, Any], groups: Groups) -> dict[str, Any]:
    """Moves the known scalars to the first group, unless that has its own; returns the group.

    A group that another has taken the place of keeps none, so that it may come back.
    """
    first = groups[0]
    if first is not known and (VERSION not in first or any(group is known for group in groups)):
        scalars = scalars_of(known)
        clear_scalars(known)
        first.update(scalars)
    return first


def to_python_numbers(value: Any) -> Any:
    """Replaces NumPy's numbers, which `torch.load(weights_only=True)` refuses."""
    if isinstance(value, dict):
        entries = cast(dict[Any, Any], value)
        return {key: to_python_numbers(entry) for key, entry in entries.items()}
    if type(value) in (list, tuple):
        return type(value)(map(to_python_numbers, value))
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return value.tolist()
    return value


def is_state_request(groups: Groups, state: Any) -> bool:
    """Whether `torch.distributed.checkpoint` calls `step` to have the state created.

    It steps a fresh optimizer at a rate of zero, with gradients of zero.
    """
    if state or any(rate(group["lr"]) for group in groups):
        return False
    gradients = gradients_of(parameters(groups))
    return bool(gradients) and all(map(is_zero, gradients))
