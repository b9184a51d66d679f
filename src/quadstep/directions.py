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

STEPPING_RATE = "lqa.stepping_rate"  # that a wrapped optimizer sees: the largest so far


class Direction(Protocol):
    """What computes the line of each step from the gradients."""

    base: Optimizer | None = None  # the wrapped optimizer, if there is one
    has_weight_decay: ClassVar[bool] = True  # whether groups may have a weight decay
    state_dtypes: Mapping[str, torch.dtype] = {}  # by key of the state, if not the parameter's
    keeps_start: bool = True  # whether lines are probed from a copy of the parameters

    def initial_scalars(self) -> dict[str, float]:
        """Returns what the first param group must hold."""
        return {}

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


class Normalized(Direction):
    """The gradient in units of its running root mean square, centralized and clipped.

    With g the gradient, s its root mean square, w the parameters and n the inputs of an output (all
    dimensions but the first), in each row of a weight::

        h = g + weight_decay * s * w
        d = (h - (1 - n ** -0.5) * s * sum(h) / sum(s + eps)) / (s + eps)

    The second line is gradient centralization (Yong et al. 2020) of h / s with a mean that is
    weighted by s: so `<g, d> >= 0` whatever g and s are, weight decay apart, and an entry whose
    gradient has always been zero does not move: the decay is in proportion to s / (s + eps).
    Parameters of one dimension, as biases and scales, are decayed and not centralized. A part of
    the mean is left, so that what has a mean can be learned; where inputs share a sign, as pixels
    and outputs of a ReLU do, the full mean would bound the rate. Update clipping comes last, decay
    included: it keeps the root mean square of all directions together at most 1, as Adafactor does
    with d = 1.

    Args:
        decay: of the running mean square, per step; unbiased as Adam's.
        eps: is added to the root mean square, in units of the gradient.
    """

    def __init__(self, decay: float = 0.999, eps: float = 1e-8) -> None:
        self.decay = decay
        self.eps = eps

    def line(self, groups: Groups, state: Any, rate: float, is_kept: bool) -> Line:
        """Advances the running mean squares, and normalizes, centralizes, decays and clips."""
        blocks = gather_blocks(groups, rate)
        for block in blocks:
            states = [state[owner] for owner in block.owners]
            for entry, param in zip(states, block.params, strict=True):
                self.initialize(entry, param)
            for entry in states:
                entry["step"] += 1
            # A weight that falls from 1 to (1 - decay) keeps the mean unbiased at every step.
            weights = [(1.0 - self.decay) / (1.0 - self.decay ** entry["step"]) for entry in states]
            self._normalize(block, self.roots(block, states, weights))
        _clip(blocks)
        return Line(blocks, keeps_start=self.keeps_start)

    def initialize(self, entry: dict[str, Any], param: Tensor) -> None:
        """Makes the state of a parameter that has none, and checks that it fits."""
        raise NotImplementedError

    def roots(
        self, block: ParamBlock, states: list[dict[str, Any]], weights: list[float]
    ) -> list[Tensor]:
        """Advances the mean squares; returns their roots, zero for entries that are not to move."""
        raise NotImplementedError

    def _normalize(self, block: ParamBlock, roots: list[Tensor]) -> None:
        # Squares overflow before gradients do, and an infinite root makes a row not a number.
        torch._foreach_clamp_max_(roots, [torch.finfo(root.dtype).max ** 0.5 for root in roots])
        for i, (owner, param) in enumerate(zip(block.owners, block.params, strict=True)):
            gradient, root = block.direction[i], roots[i]
            # In half precision the squares of small gradients are zero.
            floor = max(self.eps, _smallest_subnormal(root.dtype) ** 0.5)
            if block.weight_decay:
                gradient = torch.addcmul(gradient, root, param, value=block.weight_decay)
            inputs = math.prod(owner.shape[1:])
            if inputs > 1:
                dims = tuple(range(1, owner.dim()))
                mean = gradient.mean(dims, keepdim=True) / (root.mean(dims, keepdim=True) + floor)
                gradient = torch.addcmul(gradient, mean, root, value=inputs**-0.5 - 1.0)
            # One after the other: two copies of all parameters would be the peak of a step.
            roots[i] = gradient / root.add_(floor)
        block.direction = roots


class RMSNormalized(Normalized):
    """Normalizes each entry by its own root mean square, as RMSProp and Adam do.

    The state of a parameter is `step` and `square_avg`, as large as itself.

    Args:
        decay: as in `Normalized`.
        eps: as in `Normalized`.
        state_dtype: type of the mean square; the direction is then in single precision at least.
    """

    def __init__(
        self, decay: float = 0.999, eps: float = 1e-8, state_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(decay, eps)
        self.state_dtype = state_dtype
        self.state_dtypes = {} if state_dtype is None else {"square_avg": state_dtype}

    def initialize(self, entry: dict[str, Any], param: Tensor) -> None:
        """Makes or checks the mean square of each entry."""
        if "square_avg" not in entry:
            entry["step"] = 0
            entry["square_avg"] = torch.zeros_like(param, dtype=self.state_dtype)
        check_state(param, entry["square_avg"], self.state_dtype)

    def roots(
        self, block: ParamBlock, states: list[dict[str, Any]], weights: list[float]
    ) -> list[Tensor]:
        """Advances the mean square of each entry; returns the roots."""
        squares = [entry["square_avg"] for entry in states]
        stream = f"square {states[0]['step']}"
        for part, (means, gradients) in parts(self.state_dtype, stream, squares, block.direction):
            torch._foreach_mul_(means, [1.0 - weight for weight in weights[part]])
            torch._foreach_addcmul_(means, gradients, gradients, weights[part])
        if self.state_dtype is None:
            return list(torch._foreach_sqrt(squares))
        pairs = zip(squares, block.params, strict=True)
        return [s.to(single(p.dtype)).sqrt() for s, p in pairs]


class TensorNormalized(Normalized):
    """Normalizes each tensor by one number, the root mean square of its entries.

    Within a tensor this is the gradient, centralized; entries whose gradient is zero at a step
    stay, without decay. The state of a parameter is `step` and `square_avg`, two numbers.
    """

    state_dtypes: Mapping[str, torch.dtype] = {"square_avg": torch.float32}

    def initialize(self, entry: dict[str, Any], param: Tensor) -> None:
        """Makes or checks the mean square of a tensor."""
        if "square_avg" not in entry:
            entry["step"] = 0
            entry["square_avg"] = torch.zeros((), dtype=torch.float32, device=param.device)
        mean_square = entry["square_avg"]
        check_state(mean_square.new_empty((), device=param.device), mean_square, torch.float32)

    def roots(
        self, block: ParamBlock, states: list[dict[str, Any]], weights: list[float]
    ) -> list[Tensor]:
        """Advances the mean square of each tensor; returns its root where the gradient is not 0."""
        norms, found = tensors.tensor_norms(block.direction), list[Tensor]()
        for entry, gradient, norm, weight in zip(
            states, block.direction, norms, weights, strict=True
        ):
            square = norm.to(torch.float32).square() / max(1, gradient.numel())
            square = square.clamp(max=torch.finfo(torch.float32).max)
            root = entry["square_avg"].lerp_(square, weight).sqrt()
            found.append((gradient != 0).to(gradient.dtype).mul_(root))
        return found


class OptimizerStep(Direction):
    """The displacement of exactly one step of another optimizer.

    Its weight decay, momentum, preconditioning and the ratios of its groups are part of it. It
    steps at the largest rate that was in force so far, and its displacement is scaled: so a
    momentum that holds the rate, as that of Keras does, is in the same unit at all steps.
    """

    def __init__(self, base: Optimizer) -> None:
        self.base = self._base = base

    def initial_scalars(self) -> dict[str, float]:
        """The rate at which the base steps."""
        return {STEPPING_RATE: 0.0}

    def line(self, groups: Groups, state: Any, rate: float, is_kept: bool) -> Line:
        """Steps the base once; the line starts before the step and passes through its end."""
        largest = groups[0][STEPPING_RATE] = max(rate, groups[0][STEPPING_RATE])
        # At rate zero, as torch initializes optimizers, nothing is to move.
        largest = largest if rate else 0.0
        if not is_kept and largest == rate:
            self._base.step()
            return Line([])
        blocks = gather_blocks(groups, rate, allow_sparse=True)
        versions = [_versions(block) for block in blocks]
        start = [tensors.copies(block.params) for block in blocks]
        line = Line(blocks, start)
        rates = [group["lr"] for group in groups]
        try:
            if largest != rate:
                for group in groups:
                    group["lr"] = group["lr"] * (largest / rate)
            self._base.step()
        except BaseException:
            line.restore()
            raise
        finally:
            for group, lr in zip(groups, rates, strict=True):
                group["lr"] = lr
        for block, origin, version in zip(blocks, start, versions, strict=True):
            block.direction = list(torch._foreach_sub(origin, block.params))
            block.lr_ratio = largest or 1.0
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
