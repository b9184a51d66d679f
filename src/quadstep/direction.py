"""Where an update direction comes from: the gradient, the normalised gradient, any optimizer.

A direction returns a `Line` in units of the optimizer's rate. The learning rates of the groups
enter as ratios to that rate, so that one number, measured along all groups together, moves all.
"""

# torch.optim itself is built from the foreach operations, private in name alone.
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from quadstep.arguments import check_shape
from quadstep.line import Block, Line, at_hand, copies, is_distributed, local, parted, whole

Group = dict[str, Any]
State = Any


class Direction(Protocol):
    """What gives each step its line."""

    def line(self, groups: list[Group], state: State, rate: float, kept: bool) -> Line:
        """Builds the line of this step from the gradients.

        Args:
            groups: the param groups; `lr` of each is its rate in force.
            state: the per-parameter state of the optimizer, advanced once.
            rate: the rate in force of the optimizer.
            kept: whether the line is needed for more than the move along it that the base makes:
                to be probed, or to be averaged.
        """
        ...


class Gradient:
    """The gradient itself: the line of Algorithm 1 of the paper."""

    def line(self, groups: list[Group], state: State, rate: float, kept: bool) -> Line:
        """Takes the gradients as they are, or copies where a probe might write over them."""
        blocks = gather(groups, rate)
        if kept:
            for block in blocks:
                # Where losses are replayed graphs, which accelerators have, so are the gradients.
                if not all(map(at_hand, block.direction)):
                    block.direction = copies(block.direction)
        return Line(blocks)


class NormalisedGradient:
    """The gradient divided by the root of its running mean square, as in RMSProp and Adam, centred.

    Where inputs share a sign, as pixels do and whatever a ReLU lets through, so do the gradients of
    the weights that they meet, and entries of one size then add up: they shift an output as far as
    its bias would with as many times the rate, which silences units for good and keeps the rate of
    all others small. So the mean over the inputs (all dimensions but the first) is taken out of the
    weights of each output, but for the part that moves an output as far as its bias does.

    Its own root mean square, about one, is kept from exceeding one: a batch with far larger
    gradients than those before it would take a step that no measurement vouched for, and does so
    where the gradients have all but vanished. Weight decay is added to what is left.

    Args:
        decay: of the running mean square; unbiased from the first step on, as Adam's.
        eps: the gradient that counts as none: its square is added to the mean square.
    """

    def __init__(self, decay: float = 0.999, eps: float = 1e-8) -> None:
        self.decay = decay
        self.eps = eps

    def line(self, groups: list[Group], state: State, rate: float, kept: bool) -> Line:
        """Advances the running mean square, divides by its root and centres."""
        blocks = gather(groups, rate)
        for block in blocks:
            states = [state[owner] for owner in block.owners]
            for own, param in zip(states, block.params, strict=True):
                if "square" not in own:
                    own["step"] = 0
                    own["square"] = torch.zeros_like(param)
                check_shape(param, own["square"])
            for own in states:
                own["step"] += 1
            # A weight that falls from 1 to (1 - decay) keeps the mean unbiased at every step.
            weights = [(1.0 - self.decay) / (1.0 - self.decay ** own["step"]) for own in states]
            squares = [own["square"] for own in states]
            torch._foreach_mul_(squares, [1.0 - weight for weight in weights])
            torch._foreach_addcmul_(squares, block.direction, block.direction, weights)
            # In half precision the square of eps is zero, and so is that of a small gradient.
            floors = [max(self.eps**2, _smallest(square.dtype)) for square in squares]
            # Every pass through memory counts: this is one fewer than by way of the root.
            scales = torch._foreach_add(squares, floors)
            torch._foreach_rsqrt_(scales)
            torch._foreach_mul_(scales, block.direction)
            block.direction = list(scales)
            _centre(block)
        _limit(blocks)
        for block in blocks:
            if block.weight_decay:
                torch._foreach_add_(block.direction, block.params, alpha=block.weight_decay)
        return Line(blocks)


class Displacement:
    """The displacement of exactly one step of another optimizer, whatever that does.

    Weight decay, momentum, preconditioning and the ratios of its groups come along.

    Args:
        base: the optimizer; it steps with the rate in force.
    """

    def __init__(self, base: Optimizer) -> None:
        self.base = base

    def line(self, groups: list[Group], state: State, rate: float, kept: bool) -> Line:
        """Steps the base once; the line leads from before the step through where it arrived."""
        if not kept:
            self.base.step()
            return Line([])
        blocks = gather(groups, rate, sparse=True)
        versions = [_versions(block) for block in blocks]
        start = [copies(block.params) for block in blocks]
        line = Line(blocks, start)
        try:
            self.base.step()
        except BaseException:
            line.restore()
            raise
        for block, origin, version in zip(blocks, start, versions, strict=True):
            block.direction = list(torch._foreach_sub(origin, block.params))
            block.unit = rate or 1.0
            if _versions(block) != version:
                # Some optimizers make the gradients into their own steps.
                block.gradient = None
        return line


def _versions(block: Block) -> list[int]:
    return [gradient._version for gradient in block.gradient or ()]


@cache
def _smallest(dtype: torch.dtype) -> float:
    """The smallest positive number of a type, below its normal ones."""
    kind = torch.finfo(dtype)
    return kind.tiny * kind.eps


def _centre(block: Block) -> None:
    """Takes the mean over the n inputs out of the weights of each output, all but an n-th of it."""
    for owner, part in zip(block.owners, block.direction, strict=True):
        inputs = math.prod(owner.shape[1:])
        if inputs > 1:
            mean = part.mean(dim=tuple(range(1, owner.dim())), keepdim=True)
            part.sub_(mean, alpha=1.0 - 1.0 / inputs)


def _limit(blocks: list[Block]) -> None:
    """Scales the directions together to a root mean square of at most one."""
    root = max(1, sum(part.numel() for block in blocks for part in block.direction)) ** 0.5
    # All of a block are on one device or mesh.
    firsts = [block.direction[0] for block in blocks]
    if all(at_hand(first) and not is_distributed(first) for first in firsts):
        norms = [norm for block in blocks for norm in torch._foreach_norm(block.direction)]
        excess = math.hypot(*map(float, norms)) / root
        if excess > 1.0:
            for block in blocks:
                torch._foreach_div_(block.direction, excess)
        return
    norms = [norm.to(firsts[0].device) for block in blocks for norm in _norms(block.direction)]
    (norm,) = torch._foreach_norm([torch.stack(norms)])
    excess = (norm / root).clamp(min=1.0)
    for block, first in zip(blocks, firsts, strict=True):
        torch._foreach_div_(local(block.direction), excess.to(first.device))


def _norms(tensors: list[Tensor]) -> Iterable[Tensor]:
    """Plain tensors whose norm together is that of the tensors, which are of one device or mesh."""
    if is_distributed(tensors[0]):
        return [whole(get_total_norm(tensors))]
    return torch._foreach_norm(tensors)


def gather(groups: list[Group], rate: float, sparse: bool = False) -> list[Block]:
    """Builds a block along the gradients for each group (and device or mesh) that has any.

    Args:
        groups: the param groups.
        rate: the optimizer's rate, to which the groups' rates are set in proportion.
        sparse: whether sparse gradients may pass.

    Raises:
        RuntimeError: a gradient is sparse and may not be.
    """
    blocks: list[Block] = []
    for group in groups:
        owners = [param for param in group["params"] if param.grad is not None]
        if not owners:
            continue
        grads = [owner.grad for owner in owners]
        if not sparse and any(grad.layout is not torch.strided for grad in grads):
            raise RuntimeError(
                "LQA got a sparse gradient, which has no dense direction to measure along; "
                "use a dense layer (sparse=False) or wrap an optimizer for sparse gradients: "
                "LQA(torch.optim.SparseAdam(params))"
            )
        lr = float(group["lr"])
        unit = (rate / lr if lr != 0.0 else math.inf) if rate else 1.0
        weight_decay = float(group.get("weight_decay", 0.0))
        for part in _by_device(owners):
            grads = real([_placed(owner.grad, owner) for owner in part])
            blocks.append(
                Block(
                    owners=part,
                    params=real(part),
                    direction=grads,
                    unit=unit,
                    weight_decay=weight_decay,
                    gradient=grads,
                )
            )
    return blocks


def _by_device(tensors: list[Tensor]) -> Iterable[list[Tensor]]:
    """Parts tensors by their devices and meshes, which no foreach operation may mix."""

    def place(tensor: Tensor) -> Any:
        return tensor.device, tensor.device_mesh if is_distributed(tensor) else None

    return parted(tensors, place)


def _placed(grad: Any, owner: Tensor) -> Tensor:
    """The gradient, laid out on the mesh as its parameter is: autograd may leave partial sums."""
    if is_distributed(owner) and grad.placements != owner.placements:
        return grad.redistribute(placements=owner.placements)
    return grad


def real(tensors: list[Tensor]) -> list[Tensor]:
    """Views complex tensors as real ones with a last dimension of two."""
    return [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]
