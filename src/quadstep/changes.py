"""Detects which tensors code outside the optimizer has changed."""

import math
from collections.abc import Iterator
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from quadstep.tensors import any_shard, full_tensor, group_by, is_distributed, local, real_views

UNKNOWN = -1  # checksum of distributed tensors, and of those not recorded

_SMALL = 2**14  # entries of the largest tensors for which a copy is faster than a checksum
_VECTOR_ROWS = 2**10

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


class ChangeDetector:
    """Tells which of some tensors have changed since `record`.

    Writes through `.data` do not raise a tensor's version. So contents are compared: of small
    tensors with a copy, of large ones by a checksum, and by that of distributed ones, as all
    processes must take part, only where the version has changed.

    Args:
        exact: copy all tensors.
    """

    def __init__(self, exact: bool = False) -> None:
        self._exact = exact
        self._versions: dict[Tensor, int] = {}
        self._copies: dict[Tensor, Tensor] = {}
        self._checksums: dict[Tensor, Tensor | int | None] = {}

    def __iter__(self) -> Iterator[Tensor]:
        return iter([*self._versions])

    def __bool__(self) -> bool:
        return bool(self._versions)

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor in self._versions

    def add(self, tensor: Tensor, checksum: int = UNKNOWN) -> None:
        """Adds a tensor; if its checksum is unknown it counts as unchanged until it is recorded."""
        self._versions[tensor] = tensor._version
        self._checksums[tensor] = None if checksum == UNKNOWN else checksum

    def remove(self, tensor: Tensor) -> None:
        """Removes a tensor."""
        for known in (self._versions, self._copies, self._checksums):
            known.pop(tensor, None)

    def record(self) -> None:
        """Records all tensors as they are now."""
        if not self._versions:
            return
        for tensor in [*self._checksums]:
            if self._exact or (tensor.numel() <= _SMALL and not is_distributed(tensor)):
                del self._checksums[tensor]
                self._copies[tensor] = torch.empty_like(tensor)
            else:
                self._checksums[tensor] = _checksum(tensor)
        if self._copies:
            torch._foreach_copy_(local(self._copies.values()), local(self._copies))
        self._versions = {tensor: tensor._version for tensor in self._versions}

    @property
    def version_changed(self) -> bool:
        """Whether the version of any tensor has changed."""
        return any(tensor._version != version for tensor, version in self._versions.items())

    def changed(self) -> set[Tensor]:
        """Compares contents, and waits for each device once."""
        found: set[Tensor] = set()
        for tensors in group_by(self._versions, lambda tensor: tensor.device):
            # Torch has no type for `tolist`.
            flags: Any = torch.stack([self._differs(tensor) for tensor in tensors])
            found.update(compress(tensors, flags.tolist()))
        return found

    def copy(self, tensor: Tensor) -> Tensor:
        """The copy of a tensor that has changed."""
        return self._copies[tensor]

    def checksum(self, tensor: Tensor) -> int:
        """The checksum of a tensor as it was recorded, for a checkpoint."""
        copy = self._copies.get(tensor)
        known = self._checksums.get(tensor) if copy is None else _checksum(copy)
        return UNKNOWN if known is None or is_distributed(tensor) else int(known)

    def _differs(self, tensor: Tensor) -> Tensor:
        copy, checksum = self._copies.get(tensor), self._checksums.get(tensor)
        differs = copy is not None
        if copy is not None and (copy.shape, copy.dtype) == (tensor.shape, tensor.dtype):
            return full_tensor((copy != tensor).any())
        if checksum is not None and not is_distributed(tensor):
            return _checksum(tensor).ne(checksum)
        if checksum is not None and tensor._version != self._versions[tensor]:
            differs = any_shard(int(_checksum(tensor)) != int(checksum), tensor)
        return torch.full((), differs, device=tensor.device)


def _checksum(tensor: Tensor) -> Tensor:
    """The sum of the bits of this process's part, modulo 2**64, in rows with odd weights.

    Pairs of single precision are packed in 64 bits; of other types columns have weights, too. So
    permutations and changes of sign alter the sum.
    """
    (part,) = real_views(local([tensor.detach()]))
    # Memory order; other orders are slow.
    part = part.permute(sorted(range(part.dim()), key=part.stride, reverse=True))
    flat, size = part.reshape(-1), part.element_size()
    packed = size == 4 and flat.numel() % 2 == 0
    if packed and flat.storage_offset() % 2:
        flat = flat.clone()
    entries = flat.view(torch.int64 if packed else _INTEGERS[min(size, 4)])
    # Vectors as rows of some length: one weight for each entry takes memory.
    count = len(part) if part.dim() > 1 else _VECTOR_ROWS
    table = entries.view(max(1, math.gcd(count, entries.numel())), -1)
    rows = _weighted_sum(table.sum(1, dtype=torch.int64))
    return rows if packed else rows + _weighted_sum(table.sum(0, dtype=torch.int64))


def _weighted_sum(sums: Tensor) -> Tensor:
    return (sums * (2 * torch.arange(len(sums), device=sums.device) + 1)).sum()
