"""What tells which tensors have been changed by someone else."""

# torch.optim itself is built from the foreach operations, private in name alone.
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from quadstep.direction import real
from quadstep.line import any_shard, at_hand, is_distributed, local, parted

SMALL = 2**14
"""Of tensors with at most so many entries a copy is kept, which takes less time than a sum."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The type that has as many bytes."""


class Fingerprints:
    """Tells which of some tensors have changed since they were last recorded.

    A version number costs nothing, but does not rise where `.data` is written to. A look shows
    that: small tensors are compared with a copy, of others the bits are added up as integers. Of
    distributed tensors, of which no process may take a branch of its own, only the version tells.
    """

    def __init__(self) -> None:
        self._versions: dict[Tensor, int] = {}
        self._copies: dict[Tensor, Tensor] = {}
        self._sums: dict[Tensor, Tensor | int | None] = {}

    def __iter__(self) -> Iterator[Tensor]:
        return iter([*self._versions])

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor in self._versions

    def add(self, tensor: Tensor, bits: int | None = None) -> None:
        """Adds a tensor.

        Args:
            tensor: the tensor.
            bits: the sum that a checkpoint tells of it; by default nothing is known until it is
                recorded.
        """
        self._versions[tensor] = tensor._version
        self._sums[tensor] = bits

    def remove(self, tensor: Tensor) -> None:
        """Forgets a tensor."""
        for known in (self._versions, self._copies, self._sums):
            known.pop(tensor, None)

    def record(self) -> None:
        """Records all tensors as they are now."""
        for tensor in [*self._sums]:
            if tensor.numel() <= SMALL and not is_distributed(tensor):
                del self._sums[tensor]
                self._copies[tensor] = torch.empty_like(tensor)
            else:
                self._sums[tensor] = _sum(tensor)
        if self._copies:
            torch._foreach_copy_([*self._copies.values()], [*self._copies])
        for tensor in self._versions:
            self._versions[tensor] = tensor._version

    @property
    def touched(self) -> bool:
        """Whether the version of any has changed."""
        return any(tensor._version != version for tensor, version in self._versions.items())

    def changed(self) -> set[Tensor]:
        """The tensors that have changed; to look at them waits for their device, once."""
        flags = [(tensor, self._differs(tensor)) for tensor in self._versions]
        found = {tensor for tensor, flag in flags if flag is True}
        waiting = [(tensor, flag) for tensor, flag in flags if isinstance(flag, Tensor)]
        for pairs in parted(waiting, lambda pair: pair[1].device):
            # Torch has no types for the way that takes them together.
            untyped: Any = torch.stack([flag for _, flag in pairs])
            found |= {pair[0] for pair, value in zip(pairs, untyped.tolist(), strict=True) if value}
        return found

    def bits(self, tensor: Tensor) -> int | None:
        """What tells a tensor from others in a checkpoint; None where processes share it."""
        copy = self._copies.get(tensor)
        known = self._sums.get(tensor) if copy is None else _sum(copy)
        return None if known is None or is_distributed(tensor) else int(known)

    def _differs(self, tensor: Tensor) -> bool | Tensor:
        copy = self._copies.get(tensor)
        if copy is not None:
            if copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                return True
            return not torch.equal(copy, tensor) if at_hand(tensor) else (copy != tensor).any()
        known = self._sums[tensor]
        if known is None:
            return False
        if is_distributed(tensor):
            touched = tensor._version != self._versions[tensor]
            return touched and any_shard(int(_sum(tensor)) != int(known), tensor)
        differs = _sum(tensor) != known
        return bool(differs) if at_hand(tensor) else differs


def _sum(tensor: Tensor) -> Tensor:
    """The sum of the bits of this process's part, which wraps around.

    Rows have odd weights, and entries go by pairs, or columns have weights, too, so that what
    changes places or signs shows; not where entries are spread over memory, which takes longer.
    """
    part = tensor.detach()
    if is_distributed(part):
        (part,) = local([part])
    (part,) = real([part])
    if not (part.is_contiguous() or part.numel() <= SMALL):
        return part.view(_INTEGERS[part.element_size()]).sum(dtype=torch.int64)
    pairs = part.element_size() == 4 and part.numel() % 2 == 0
    flat = part.reshape(-1)
    if pairs and flat.storage_offset() % 2:
        flat = flat.clone()
    # The exponents of double precision alone would wrap.
    kind = torch.int64 if pairs else _INTEGERS[min(part.element_size(), 4)]
    entries = flat.view(kind)
    count = len(part) if part.dim() > 1 and part.numel() else 1
    if entries.numel() % count:
        count = 1
    table = entries.view(count, -1)
    rows = _weighted(table.sum(1, dtype=torch.int64))
    return rows if pairs else rows + _weighted(table.sum(0, dtype=torch.int64))


def _weighted(sums: Tensor) -> Tensor:
    return (sums * (2 * torch.arange(len(sums), device=sums.device) + 1)).sum()
