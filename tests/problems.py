"""Problems with a known optimum, and small networks that exercise what a closure can do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass
class Quadratic:
    """`0.5 (theta - optimum)^T hessian (theta - optimum) + floor`, strictly convex, float64."""

    hessian: Tensor
    optimum: Tensor
    floor: float
    theta: nn.Parameter

    @classmethod
    def random(cls, size: int = 6, seed: int = 0, floor: float = 1.0) -> Quadratic:
        generator = torch.Generator().manual_seed(seed)
        factor = torch.randn(size, size, dtype=torch.float64, generator=generator)
        hessian = factor @ factor.T + 0.5 * torch.eye(size, dtype=torch.float64)
        optimum = torch.randn(size, dtype=torch.float64, generator=generator)
        start = torch.randn(size, dtype=torch.float64, generator=generator)
        return cls(hessian, optimum, floor, nn.Parameter(start))

    def __call__(self) -> Tensor:
        return self.at(self.theta)

    def at(self, theta: Tensor) -> Tensor:
        offset = theta - self.optimum
        return 0.5 * offset @ self.hessian @ offset + self.floor

    def line_minimizer(self, theta: Tensor, direction: Tensor) -> float:
        """The exact rate that minimizes the loss at `theta - rate * direction`."""
        gradient = self.hessian @ (theta - self.optimum)
        return float(gradient @ direction / (direction @ self.hessian @ direction))


@dataclass
class Task:
    """A model, its data, and the closures of its batches."""

    model: nn.Module
    inputs: Tensor
    labels: Tensor

    def closure(self, step: int = 0, size: int = 32) -> Callable[[], Tensor]:
        picked = torch.arange(step * size, (step + 1) * size) % len(self.inputs)
        inputs, labels = self.inputs[picked], self.labels[picked]
        return lambda: functional.cross_entropy(self.model(inputs), labels)

    def to(self, device: str) -> Task:
        """Moves all of it to a device."""
        return Task(self.model.to(device), self.inputs.to(device), self.labels.to(device))


def classification(
    *layers: nn.Module, dtype: torch.dtype = torch.float32, seed: int = 0, features: int = 8
) -> Task:
    """Three learnable classes; by default a perceptron with one hidden layer."""
    torch.manual_seed(seed)
    model = nn.Sequential(*(layers or (nn.Linear(features, 16), nn.Tanh(), nn.Linear(16, 3))))
    for layer in model:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(256, features, generator=generator).to(dtype)
    labels = (inputs[:, :3] + 0.5 * torch.randn(256, 3, generator=generator).to(dtype)).argmax(1)
    return Task(model.to(dtype), inputs, labels)


def noisy_classification(dtype: torch.dtype = torch.float32) -> Task:
    """A network with dropout and batch normalization: random numbers and buffers in the closure."""
    layers = (nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3))
    return classification(*layers, nn.Linear(16, 3), dtype=dtype)


class RecordingDropout(nn.Dropout):
    """Keeps the masks that it has drawn in `masks`."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(p)
        self.masks: list[Tensor] = []

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        self.masks.append((output == 0.0).clone())
        return output


def values(model: nn.Module) -> list[Tensor]:
    """Copies of all parameters and buffers."""
    return [tensor.detach().clone() for tensor in [*model.parameters(), *model.buffers()]]


def identical(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether two lists of tensors are equal bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
