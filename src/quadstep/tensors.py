"""Operations on lists of tensors of any device, type and mesh, and on all processes."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

Item = TypeVar("Item")
Groups = list[dict[str, Any]]

_PLAIN = frozenset((Tensor, nn.Parameter))


def is_distributed(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor, without importing DTensor, which takes a second."""
    if type(tensor) in _PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def parameters(groups: Groups) -> list[Tensor]:
    """The parameters of all param groups, in their order."""
    return [param for group in groups for param in group["params"]]


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The shards of this process, which share the memory of the tensors."""
    return [tensor.to_local() if is_distributed(tensor) else tensor for tensor in tensors]


def full_tensor(tensor: Tensor) -> Tensor:
    """A plain tensor with the values of one that a device mesh may hold in shards."""
    return tensor.full_tensor() if is_distributed(tensor) else tensor


def real_views(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Views complex tensors as real ones with a last dimension of two."""
    return [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies tensors, in one launch where they are of one device and type."""
    # Not all sparse and opaque layouts have an `empty_like`.
    fresh = [
        torch.empty_like(tensor) if tensor.layout is torch.strided else tensor.clone()
        for tensor in tensors
    ]
    assign(fresh, tensors)
    return fresh


def assign(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies values into tensors of the same shapes, types and devices."""
    if targets:
        torch._foreach_copy_(local(targets), local(sources))


def group_by(items: Iterable[Item], key: Callable[[Item], Any]) -> list[list[Item]]:
    """Groups items by the value of a key, each group in their order."""
    groups: dict[Any, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return [*groups.values()]


def group_by_device(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Groups tensors by device and mesh, which no foreach operation may mix."""

    def place(tensor: Tensor) -> Any:
        return tensor.device, tensor.device_mesh if is_distributed(tensor) else None

    return group_by(tensors, place)


def inner(one: Tensor, other: Tensor) -> Tensor:
    """The inner product, in single precision at least; for DTensors its mean is over processes."""
    dtype = torch.promote_types(one.dtype, torch.float32)
    one, other = one.to(dtype), other.to(dtype)
    if not (is_distributed(one) and is_distributed(other)):
        return (one * other).sum()
    shards = [
        size
        for placement, size in zip(one.placements, one.device_mesh.shape, strict=True)
        if not placement.is_replicate()
    ]
    return (one.to_local() * other.to_local()).sum() * math.prod(shards)


def norms(tensors: list[Tensor]) -> Sequence[Tensor]:
    """Plain tensors whose joint norm equals that of `tensors`, of one device or mesh."""
    if is_distributed(tensors[0]):
        return [full_tensor(get_total_norm(tensors))]
    return tensor_norms(tensors)


def tensor_norms(tensors: list[Tensor]) -> Sequence[Tensor]:
    """The norm of each of `tensors`, of one device or mesh, as a plain tensor."""
    if is_distributed(tensors[0]):
        return [full_tensor(get_total_norm([tensor])) for tensor in tensors]
    return torch._foreach_norm(tensors)


def any_shard(flag: bool, tensor: Tensor) -> bool:
    """Whether a flag is set on any process that holds a shard of the tensor."""
    if not is_distributed(tensor):
        return flag
    from torch.distributed.tensor import DTensor, Partial

    shard = torch.tensor(float(flag), device=tensor.to_local().device)
    placements = [Partial("max")] * tensor.device_mesh.ndim
    return bool(DTensor.from_local(shard, tensor.device_mesh, placements).full_tensor())


def world_size(group: ProcessGroup | None) -> int:
    """The number of processes in a group; None means all."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size(group)
    return 1


def rank_mean(
    values: Sequence[Tensor | float], like: Tensor, group: ProcessGroup | None
) -> list[float]:
    """Averages scalars over the processes of a group, on the device of `like`.

    Reading them waits for the device once. The sum is formed once and sent to all, so that all
    processes continue with the same bits.
    """
    size = world_size(group)
    numbers = [value for value in values if isinstance(value, float)]
    if len(numbers) == len(values):
        if size == 1:
            return numbers
        stacked = like.new_tensor(numbers)
    else:
        stacked = torch.stack(
            [
                value.to(like.device) if isinstance(value, Tensor) else like.new_tensor(value)
                for value in values
            ]
        )
    if size > 1:
        stacked = stacked.double()
        distributed: Any = torch.distributed
        distributed.all_reduce(stacked, group=group)
    return [value / size for value in as_numbers(stacked)]


def as_numbers(values: Tensor) -> list[float]:
    """The entries of a vector, read in one wait for the device."""
    untyped: Any = values
    return untyped.tolist()
