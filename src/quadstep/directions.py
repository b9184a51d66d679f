"""Update directions: the gradient, the normalized gradient, the step of any optimizer.

A direction returns a `Line` in units of the optimizer's rate. The rates of the groups enter as
ratios to it, so that one number, measured along all groups together, moves all.
"""

import math
from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from quadstep import tensors
from quadstep.arguments import check_state
from quadstep.line import Line, ParamBlock
from quadstep.rounding import parts, single
from quadstep.tensors import Groups


class Direction(Protocol):
    """What computes the line of each step from the gradients."""

    base: Optimizer | None = None  # the wrapped optimizer, if there is one
    has_weight_decay: ClassVar[bool] = True  # whether groups may have a weight decay
    state_dtypes: Mapping[str, torch.dtype] = {}  # by key of the state, if not the parameter's
    keeps_start: bool = True  # whether lines are probed from a copy of the parameters

    def line(self, groups: Groups, state: Any, rate: float, is_kept: bool) -> Line:
        """Computes the line of this step, and advances the per-parameter state once.

        The line stays valid after a move only if it `is_kept`: to be probed or averaged. Raises
        RuntimeError for sparse gradients and ValueError for a parameter of another shape than its
        state.
        """
        ...


class Gradient(Direction):
    """The gradient: the direction of Algorithm 1."""

    has_weight_decay: ClassVar[bool] = False

    def line(self, groups: Groups, state: Any, rate: float, is_kept: bool) -> Line:
        """Takes the gradients, or copies where a probe could overwrite them."""
        blocks = gather_blocks(groups, rate)
        for block in blocks:
            # CUDA graphs, whose replays overwrite gradients, exist on accelerators alone.
            if is_kept and not all(part.is_cpu for part in block.direction):
                block.direction = tensors.copies(block.direction)
        return Line(blocks, keeps_start=self.keeps_start)


class RMSNormalized(Direction):
    """The gradient over its running root mean square (RMSProp, Adam), centralized and clipped.

    `square_avg <- decay * square_avg + (1 - decay) * g**2`, unbiased as Adam's;
    `d = g / sqrt(square_avg + eps**2)`, centralized, clipped; `d <- d + weight_decay * theta`.

    Gradient centralization (Yong et al. 2020), here of the normalized gradient, subtracts (1 - 1/n)
    of the mean over the n inputs of each output (all dimensions but the first). The part that is
    left moves an output as far as its bias does. Where inputs share a sign, as pixels and outputs
    of a ReLU do, the full mean would bound the rate. Update clipping keeps the root mean square of
    the direction at most 1, as Adafactor does with d = 1.

    The state of a parameter is `step` and `square_avg`.

    Args:
        decay: of the running mean square, per step.
        eps: its square is added to the mean square, in units of the gradient's.
        state_dtype: type of the mean square; the direction is then in single precision at least.
    """

    def __init__(
        self, decay: float = 0.999, eps: float = 1e-8, state_dtype: torch.dtype | None = None
    ) -> None:
        self.decay = decay
        self.eps = eps
        self.state_dtype = state_dtype
        self.state_dtypes = {} if state_dtype is None else {"square_avg": state_dtype}

    def line(self, groups: Groups, state: Any, rate: float, is_kept: bool) -> Line:
        """Advances the running mean square, and normalizes, centralizes, clips and decays."""
        blocks = gather_blocks(groups, rate)
        for block in blocks:
            self._normalize(block, state)
            _centralize(block)
        _clip(blocks)
        for block in blocks:
            if block.weight_decay:
                torch._foreach_add_(block.direction, block.params, alpha=block.weight_decay)
        return Line(blocks, keeps_start=self.keeps_start)

    def _normalize(self, block: ParamBlock, state: Any) -> None:
        states = [state[owner] for owner in block.owners]
        for entry, param in zip(states, block.params, strict=True):
            if "square_avg" not in entry:
                entry["step"] = 0
                entry["square_avg"] = torch.zeros_like(param, dtype=self.state_dtype)
            check_state(param, entry["square_avg"], self.state_dtype)
        for entry in states:
            entry["step"] += 1
        # A weight that falls from 1 to (1 - decay) keeps the mean unbiased at every step.
        weights = [(1.0 - self.decay) / (1.0 - self.decay ** entry["step"]) for entry in states]
        squares = [entry["square_avg"] for entry in states]
        stream = f"square {states[0]['step']}"
        for part, (means, gradients) in parts(self.state_dtype, stream, squares, block.direction):
            torch._foreach_mul_(means, [1.0 - weight for weight in weights[part]])
            torch._foreach_addcmul_(means, gradients, gradients, weights[part])
        # In half precision the square of eps is zero, and so is that of a small gradient.
        floors = [max(self.eps**2, _smallest_subnormal(square.dtype)) for square in squares]
        if self.state_dtype is None:
            scales = torch._foreach_add(squares, floors)
        else:
            pairs = zip(squares, block.params, floors, strict=True)
            scales = [s.to(single(p.dtype)) + floor for s, p, floor in pairs]
        # A reciprocal root and a product take one pass through memory less than a quotient.
        torch._foreach_rsqrt_(scales)
        torch._foreach_mul_(scales, block.direction)
        block.direction = list(scales)


class OptimizerStep(Direction):
    """The displacement of exactly one step of another optimizer, at the rate in force.

    Its weight decay, momentum, preconditioning and the ratios of its groups are part of it.
    """

    def __init__(self, base: Optimizer) -> None:
        self.base = self._base = base

    def line(self, groups: Groups, state: Any, rate: float, is_kept: bool) -> Line:
        """Steps the base once; the line starts before the step and passes through its end."""
        if not is_kept:
            self._base.step()
            return Line([])
        blocks = gather_blocks(groups, rate, allow_sparse=True)
        versions = [_versions(block) for block in blocks]
        start = [tensors.copies(block.params) for block in blocks]
        line = Line(blocks, start)
        try:
            self._base.step()
        except BaseException:
            line.restore()
            raise
        for block, origin, version in zip(blocks, start, versions, strict=True):
            block.direction = list(torch._foreach_sub(origin, block.params))
            block.lr_ratio = rate or 1.0
            if _versions(block) != version:
                # Some optimizers write their steps into the gradients.
                block.gradient = None
        return line


def _versions(block: ParamBlock) -> list[int]:
    return [gradient._version for gradient in block.gradient or ()]


@cache
def _smallest_subnormal(dtype: torch.dtype) -> float:
    info = torch.finfo(dtype)
    return info.tiny * info.eps


def _centralize(block: ParamBlock) -> None:
    """Subtracts the mean over the n inputs from the weights of each output, but an n-th of it."""
    for owner, part in zip(block.owners, block.direction, strict=True):
        inputs = math.prod(owner.shape[1:])
        if inputs > 1:
            mean = part.mean(dim=tuple(range(1, owner.dim())), keepdim=True)
            part.sub_(mean, alpha=1.0 - 1.0 / inputs)


def _clip(blocks: list[ParamBlock]) -> None:
    """Scales the directions together to a root mean square of at most one."""
    root = max(1, sum(part.numel() for block in blocks for part in block.direction)) ** 0.5
    firsts = [block.direction[0] for block in blocks]
    parts = [norm for block in blocks for norm in tensors.norms(block.direction)]
    if all(first.is_cpu and not tensors.is_distributed(first) for first in firsts):
        # Reading numbers is free here, and saves most steps a pass through memory: for a perceptron
        # 142 us beside the 117 us of the norms.
        excess = math.hypot(*map(float, parts)) / root
        if excess > 1.0:
            for block in blocks:
                torch._foreach_div_(block.direction, excess)
        return
    (norm,) = torch._foreach_norm([torch.stack([part.to(firsts[0].device) for part in parts])])
    excess = (norm / root).clamp(min=1.0)
    for block, first in zip(blocks, firsts, strict=True):
        torch._foreach_div_(tensors.local(block.direction), excess.to(first.device))


def gather_blocks(groups: Groups, rate: float, allow_sparse: bool = False) -> list[ParamBlock]:
    """Collects the gradients of each group, and device or mesh, in a block.

    Raises:
        RuntimeError: a gradient is sparse and must not be.
    """
    blocks: list[ParamBlock] = []
    for group in groups:
        owners = [param for param in group["params"] if param.grad is not None]
        if not allow_sparse and any(owner.grad.layout is not torch.strided for owner in owners):
            raise RuntimeError(
                "LQA got a sparse gradient, which has no dense direction to measure along; "
                "use a dense layer (sparse=False) or wrap an optimizer for sparse gradients: "
                "LQA(torch.optim.SparseAdam(params))"
            )
        lr = float(group["lr"])
        lr_ratio = (rate / lr if lr != 0.0 else math.inf) if rate else 1.0
        for part in tensors.group_by_device(owners):
            gradients = tensors.real_views([_with_placements(owner.grad, owner) for owner in part])
            blocks.append(
                ParamBlock(
                    owners=part,
                    params=tensors.real_views(part),
                    direction=gradients,
                    lr_ratio=lr_ratio,
                    weight_decay=float(group.get("weight_decay", 0.0)),
                    gradient=gradients,
                )
            )
    return blocks


def _with_placements(gradient: Any, owner: Tensor) -> Tensor:
    """The gradient, placed on the mesh as its parameter is: autograd may leave partial sums."""
    if tensors.is_distributed(owner) and gradient.placements != owner.placements:
        return gradient.redistribute(placements=owner.placements)
    return gradient
