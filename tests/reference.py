"""Slow, plain references, written from the paper's text and knowing nothing of the package."""

from __future__ import annotations

from collections.abc import Callable

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

    The mean is weighted by the roots, and a part of it is left, one over the root of n.
    """
    d = grad / (root + eps) + decayed
    if d.dim() < 2 or not d.numel():
        return d
    means = [
        (g + s * w).sum() / (s + eps).sum() for g, s, w in zip(grad, root, decayed, strict=True)
    ]
    part = 1.0 - d[0].numel() ** -0.5
    return torch.stack(
        [q - part * m * s / (s + eps) for q, m, s in zip(d, means, root, strict=True)]
    )
