"""Slow, plain references, written from the paper's text and knowing nothing of the package."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator
from types import SimpleNamespace

import torch
from torch import Tensor


def algorithm_1(
    loss: Callable[[list[Tensor], int], Tensor], theta: list[Tensor], delta0: float, steps: int
) -> tuple[list[Tensor], list[float]]:
    """Algorithm 1 with equations (3), (6) and (7); returns the parameters and every delta*."""
    rates = []
    for k in range(steps):
        point = [t.detach().clone().requires_grad_() for t in theta]
        at_theta = loss(point, k)
        gradient = torch.autograd.grad(at_theta, point)
        with torch.no_grad():
            minus = loss([t - delta0 * g for t, g in zip(theta, gradient, strict=True)], k)
            plus = loss([t + delta0 * g for t, g in zip(theta, gradient, strict=True)], k)
        l_0, l_minus, l_plus = at_theta.item(), minus.item(), plus.item()
        b = (l_plus + l_minus - 2.0 * l_0) / (2.0 * delta0**2)
        a = (l_plus - l_minus) / (2.0 * delta0)
        delta = a / (2.0 * b)
        theta = [t - delta * g for t, g in zip(theta, gradient, strict=True)]
        rates.append(delta)
        delta0 = delta
    return theta, rates


def schedule_free(
    gradient: Callable[[Tensor], Tensor],
    start: Tensor,
    rates: list[float],
    betas: list[float],
    z_step_scales: list[float],
    power: float,
    decay: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The averaged iterates along the normalised gradient, x, y and z each kept for itself.

    A larger beta draws y towards x, a smaller one z.
    """
    x, y, z, grads, before = start.clone(), start.clone(), start.clone(), [], betas[0]
    for t, (rate, beta, scale) in enumerate(zip(rates, betas, z_step_scales, strict=True), start=1):
        if beta > before:
            y = (1.0 - beta) * z + beta * x
        elif beta < before:
            z = (y - beta * x) / (1.0 - beta)
        before = beta
        grads.append(gradient(y))
        d = normalised(grads, decay, eps, weight_decay * y)
        z = z - scale * rate * d
        x = x + (z - x) * (1.0 + power) / (t + power)
        y = (1.0 - beta) * z + beta * x
    return x, y, z


def normalised(
    grads: list[Tensor],
    decay: float = 0.999,
    eps: float = 1e-8,
    decayed: Tensor | float = 0.0,
    by_tensor: bool = False,
) -> Tensor:
    """The direction after these gradients of one parameter; `decayed` is its decay times itself."""
    mean_square = torch.zeros_like(grads[0])
    for grad in grads:
        square = grad * grad
        if by_tensor and square.numel():
            square = square.mean().expand_as(square)
        mean_square = decay * mean_square + (1.0 - decay) * square
    root = (mean_square / (1.0 - decay ** len(grads))).sqrt()
    if by_tensor:
        root = root * (grads[-1] != 0.0)
    d = centred(grads[-1], root, eps, decayed * torch.ones_like(root))
    return d / max(1.0, d.square().mean().nan_to_num().sqrt().item())


def centred(grad: Tensor, root: Tensor, eps: float, decayed: Tensor) -> Tensor:
    """The normalised gradient and the decay, without their mean over the n inputs of each output.

    The decay is a part of the gradient, in units of its root: it needs no step where that is zero.
    The mean is weighted by the roots, and a part of it is left, one over the root of n.
    """
    d = (grad + root * decayed) / (root + eps)
    if d.dim() < 2 or not d.numel():
        return d
    means = [
        (g + s * w).sum() / (s + eps).sum() for g, s, w in zip(grad, root, decayed, strict=True)
    ]
    part = 1.0 - d[0].numel() ** -0.5
    return torch.stack(
        [q - part * m * s / (s + eps) for q, m, s in zip(d, means, root, strict=True)]
    )


def lqa(
    loss: Callable[[Tensor, int], Tensor],
    theta: Tensor,
    delta0: float,
    steps: int,
    constants: dict[str, float],
    by_tensor: bool,
    weight_decay: float,
) -> tuple[Tensor, list[float]]:
    """Steps of one parameter along its normalised gradient; returns it and the rates."""
    rule, grads, rates = trust_region(delta0, constants), [], []
    rate, _ = next(rule)
    for k in range(steps):
        point = theta.clone().requires_grad_()
        grads += torch.autograd.grad(loss(point, k), point)
        d = normalised(grads, decayed=weight_decay * theta, by_tensor=by_tensor)
        losses = [loss(theta - at * d, k).item() for at in (rate, 0.0, -rate)]
        rate, step = rule.send(losses)
        theta = theta - step * d
        rates.append(rate)
    return theta, rates


def trust_region(
    rate: float, constants: dict[str, float]
) -> Generator[tuple[float, float], list[float]]:
    """The rates of the trust region on lines whose losses are finite and well resolved.

    It yields the rate, at which to probe next, and that of the step, and takes the losses ahead
    of, at and behind the parameters. Averages are computed anew from all that has been measured.
    """
    c = SimpleNamespace(**constants)
    losses, levels, deviations, reductions, slopes, curvatures = [], [], [], [], [], []
    radius, total, reference, accepted = None, 0.0, 0.0, 0.0
    adapted = contracted = rejected = 0
    has_decreased, step, reach = False, 0.0, math.inf
    for n in itertools.count(1):
        ahead, center, behind = yield rate, step
        slope = (behind - ahead) / (2.0 * rate)
        curvature = (ahead + behind - 2.0 * center) / (2.0 * rate**2)
        spread_before = smoothed(deviations, c.memory)
        if losses:
            deviations.append(abs(center - levels[-1]))
        losses.append(center)
        levels.append(smoothed(losses, c.memory))
        level, spread, bound = levels[-1], smoothed(deviations, c.memory), min(0.0, *losses)
        gap, peak = max(level - bound, spread), max(levels) - bound
        reductions.append(max(0.0, slope * rate - curvature * rate**2))
        reduction, total = smoothed(reductions, c.memory), total + reductions[-1]
        if level > reference or n == 1:
            part = 1.0 / c.memory if n > c.memory else 1.0
            reference += part * (level - reference)
        is_higher = not has_decreased or level > reference
        if level < reference - c.significance * spread:
            factor = 1.0 if gap < c.converged * peak else c.expansion
            radius = radius and max(radius, factor * rate)
            reference, total, has_decreased, adapted = level, 0.0, True, n
        elif n - adapted > 2.0 * c.memory and total > c.failure * spread and is_higher:
            radius, total, adapted = radius and rate / c.expansion, 0.0, n
        else:
            radius = radius and max(radius, rate)
        if ahead - center > max(c.failure * spread_before, slope * rate, 0.0):
            hint = slope / (2.0 * curvature) if slope > 0.0 < curvature else 0.0
            rate, is_accepted = min(max(hint, c.contraction * rate), c.rejection * rate), False
        elif radius is None and slope <= 0.0:
            rate, is_accepted = c.contraction * rate, False
        elif radius is None and curvature <= 0.0:
            rate, is_accepted = (1.0 + c.growth) * rate, None
        elif radius is None:
            reach = (1.0 + c.growth) * rate
            radius = rate = accepted = slope / (2.0 * curvature) / c.start
            contracted, is_accepted, slopes, curvatures = n, None, [slope], [curvature]
        else:
            slopes.append(slope)
            curvatures.append(curvature)
            slope, curvature = smoothed(slopes, c.memory), smoothed(curvatures, c.memory)
            hidden = rate * spread / (c.window * reduction) if reduction else math.inf
            hidden = 0.0 if reduction == spread == 0.0 else hidden
            far = max(radius, min(rate, hidden) if has_decreased else hidden)
            vertex = slope / (2.0 * curvature) if curvature > 0.0 else math.inf
            growth = 1.0 + c.growth / max(1, n - contracted)
            if slope > 0.0:
                cap = c.polyak * gap / slope if gap else math.inf
                new = min(vertex, cap, far, growth * rate)
                new = max(new, c.contraction * rate)
                is_accepted = new >= c.rejection * rate
            else:
                new, is_accepted = rate if rejected else rate / (1.0 + c.growth), False
            rate = new
        if is_accepted:
            accepted, rejected = rate, 0
        elif is_accepted is False:
            contracted, rejected = n, rejected + 1
            if rejected >= c.restart:
                rate, rejected, slopes, curvatures = max(rate, accepted), 0, [], []
        step = 0.0 if is_accepted is False else rate
        step, reach = min(step, reach), math.inf


def smoothed(values: list[float], memory: float) -> float:
    """The mean of the first values, then an exponential moving average; zero of none."""
    mean = 0.0
    for number, value in enumerate(values, start=1):
        mean += (value - mean) / min(number, memory)
    return mean
