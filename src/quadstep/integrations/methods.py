"""Methods of objects of a framework, replaced for a time."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, cast


@contextmanager
def replaced(owner: Any, name: str, function: Callable[..., Any]) -> Generator[None]:
    """Gives an object another method inside the context.

    Args:
        owner: the object; its class keeps its method.
        name: of the method.
        function: is called instead, without `self`.

    Example:
        >>> with replaced(module, "training_step", opt.recorded(module.training_step)):
        ...     fit(module)
    """
    attributes = cast(dict[str, Any], vars(owner))
    has_own, own = name in attributes, attributes.get(name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        if has_own:
            setattr(owner, name, own)
        else:
            delattr(owner, name)
