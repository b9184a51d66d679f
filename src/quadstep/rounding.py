"""Arithmetic on tensors of low precision: in single precision, rounded without bias, by chunks."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from functools import reduce

import torch
from torch import Tensor

from quadstep.tensors import local

CHUNK = 2**18  # entries of the copies that are made at a time, 16 times as many on accelerators


def chunks(tensor: Tensor) -> Sequence[Tensor]:
    """Views of this process's part, cut along the first dimension."""
    (part,) = local([tensor if tensor.dim() else tensor.reshape(1)])
    entries = CHUNK if part.is_cpu else 16 * CHUNK
    return torch.split(part, max(1, entries * len(part) // max(1, part.numel())))


def single(*dtypes: torch.dtype) -> torch.dtype:
    """A type that holds those of all, single precision at least."""
    return reduce(torch.promote_types, dtypes, torch.float32)


def parts(
    state_dtype: torch.dtype | None, stream: str, *lists: list[Tensor]
) -> Iterator[tuple[slice, tuple[list[Tensor], ...]]]:
    """Yields the tensors to compute with in place; those of the last list are only read.

    Without a `state_dtype` these are the lists themselves. Otherwise they are chunks in single
    precision, and what was computed is rounded afterwards, with the random numbers of the stream.

    Yields:
        Which tensors of the lists these are parts of, and the parts.
    """
    if state_dtype is None:
        yield slice(None), lists
        return
    for number, tensors in enumerate(zip(*lists, strict=True)):
        generator = seeded(f"{stream}.{number}", tensors[0].device)
        for chunk in zip(*map(chunks, tensors), strict=True):
            wide = [part.to(single(*(part.dtype for part in chunk))) for part in chunk]
            yield slice(number, number + 1), tuple([part] for part in wide)
            for part, value in zip(chunk[:-1], wide[:-1], strict=True):
                if value is not part:
                    part.copy_(rounded(value, part.dtype, generator))


def rounded(value: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Rounds to bfloat16 up or down at random, so that the mean is exact; may overwrite `value`.

    Means with a decay of 0.999 and small steps would stall if rounded to nearest. To other types
    it does so.
    """
    if dtype is not torch.bfloat16:
        return value.to(dtype)
    value = value.float()
    # Four numbers of 16 bits in each of 64, which takes a quarter of the time.
    draws = torch.empty((value.numel() + 3) // 4, dtype=torch.int64, device=value.device)
    noise = draws.random_(-(2**63), None, generator=generator).view(torch.int16)
    # A number below 2**16 is added to the bits of the magnitude, and the lower 16 are cut off.
    bits = value.view(torch.int32).add_(noise[: value.numel()].view(value.shape))
    bits.add_(2**15).bitwise_and_(-(2**16))
    return value.to(dtype)


def seeded(stream: str, device: torch.device) -> torch.Generator:
    """A generator of equal numbers on all processes and after a checkpoint, the user's apart."""
    # Torch seeds the generator of the CPU by 32 bits.
    return torch.Generator(device).manual_seed(zlib.crc32(stream.encode()))
