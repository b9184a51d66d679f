"""The optimizer's state as flat keys and scalars."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, get_type_hints

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
