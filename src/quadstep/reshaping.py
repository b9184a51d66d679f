"""Repeats slices, masks, casts and changes of the shape of a tensor, found in the graph."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Operation = Callable[[Tensor], Tensor]

_ATEN: Any = torch.ops.aten
_SHAPES = re.compile(r"(View|UnsafeView|ReshapeAlias|Squeeze|Unsqueeze)Backward\d")


def operation(node: Any, number: int, size: Any, dtype: torch.dtype) -> Operation | None:
    """The operation of a node, None if it is of another kind.

    Args:
        node: of the graph.
        number: which of its outputs is wanted.
        size: of that output, None if it is not known.
        dtype: of what comes out at the end, which a cast casts to.
    """
    name: str = node.name()
    if _SHAPES.fullmatch(name):
        return None if size is None else lambda x: x.reshape(size)
    match name.removesuffix("Backward0"):
        case "Clone":
            return lambda x: x
        case "ToCopy":
            return lambda x: x.to(dtype)
        case "Expand":
            return None if size is None else lambda x: x.expand(size)
        case "Slice":
            bounds = node._saved_dim, node._saved_start, node._saved_end, node._saved_step
            arguments = [*map(_signed, bounds)]
            return lambda x: _ATEN.slice(x, *arguments)
        case "Select":
            dim, index = _signed(node._saved_dim), _signed(node._saved_index)
            return lambda x: x.select(dim, index)
        case "Transpose":
            first, second = _signed(node._saved_dim0), _signed(node._saved_dim1)
            return lambda x: x.transpose(first, second)
        case "T":
            return lambda x: x.t()
        case "Permute":
            dims = tuple(map(_signed, node._saved_dims))
            return lambda x: x.permute(dims)
        case "Split":
            length, dim = node._saved_split_size, _signed(node._saved_dim)
            return lambda x: _ATEN.split(x, length, dim)[number]
        case "Unbind":
            dim = _signed(node._saved_dim)
            return lambda x: x.unbind(dim)[number]
        case "Index":
            indices = [slice(None) if index is None else index for index in node._saved_indices]
            return lambda x: x[tuple(indices)]
        case "IndexSelect":
            dim, index = _signed(node._saved_dim), node._saved_index
            return lambda x: x.index_select(dim, index)
        case _:
            return None


def input_size(node: Any, size: Any) -> Any:
    """The size of what an operation takes, given that of its output; None if it is not known."""
    name: str = node.name().removesuffix("Backward0")
    if size is not None and name in ("Clone", "ToCopy"):
        return size
    if size is not None and name in ("Transpose", "T", "Permute"):
        dims = [*range(len(size))]
        if name == "Permute":
            dims = [_signed(dim) % len(size) for dim in node._saved_dims]
        else:
            pair = (0, 1) if name == "T" else (_signed(node._saved_dim0), _signed(node._saved_dim1))
            first, second = (dim % len(size) for dim in pair)
            dims[first], dims[second] = second, first
        return [size[dims.index(dim)] for dim in range(len(size))]
    return getattr(node, "_saved_self_sym_sizes", None)


def _signed(value: int) -> int:
    """Nodes show negative numbers as unsigned ones."""
    return value - 2**64 if value >= 2**63 else value
