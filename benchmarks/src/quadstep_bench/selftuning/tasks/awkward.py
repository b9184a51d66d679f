"""Tasks with data or losses that are hard on an optimizer."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from quadstep_bench.selftuning import data
from quadstep_bench.selftuning.models import derivatives, log_policy, perceptron
from quadstep_bench.selftuning.problem import SPLITS, Columns, Problem, from_splits, task
from quadstep_bench.tasks import CLASSES

GROUP = "awkward"


@task(GROUP, steps=500)
def few_data(root: Path | None) -> Problem:
    """A perceptron with 400,000 weights on 200 images of MNIST."""
    splits = data.images("mnist", root, (200, 500, 1000))
    model = nn.Sequential(nn.Flatten(), perceptron(784, 384, 256, CLASSES))
    return from_splits(model, splits)


@task(GROUP, steps=2000, confirm=True)
def noisy_labels(root: Path | None) -> Problem:
    """Digits with 30% of the training labels wrong."""
    splits = data.split_fifths(data.digits())
    inputs, labels = splits["train"]
    dice = torch.Generator().manual_seed(0)
    wrong = torch.rand(len(labels), generator=dice) < 0.3
    shifts = torch.randint(1, CLASSES, labels.shape, generator=dice)
    splits["train"] = inputs, torch.where(wrong, (labels + shifts) % CLASSES, labels)
    return from_splits(perceptron(64, 100, 100, CLASSES), splits)


@task(GROUP, steps=600)
def rare_words(root: Path | None) -> Problem:
    """Of which module a line of source is, from the words in it, most of them rare."""
    lines = data.lines((1500, 500, 1000))
    # Words that training never sees have their columns, too.
    found = {word for texts, _ in lines.values() for text in texts for word in data.words(text)}
    places = {word: place for place, word in enumerate(sorted(found))}

    def encode(texts: list[str], labels: Tensor) -> Columns:
        inputs = torch.zeros(len(texts), len(places))
        for row, text in zip(inputs, texts, strict=True):
            row[[places[word] for word in data.words(text)]] = 1.0
        return inputs, labels

    splits = {name: encode(*lines[name]) for name in SPLITS}
    return from_splits(perceptron(len(places), 32, len(data.MODULES)), splits)


@task(GROUP, steps=1000)
def unscaled_inputs(root: Path | None) -> Problem:
    """Classification of a table whose columns range from hundredths to thousands."""
    splits = data.split_fifths(data.breast_cancer())
    return from_splits(perceptron(30, 64, 64, 2), splits)


@task(GROUP, steps=3000)
def batches_of_4(root: Path | None) -> Problem:
    """Digits, four at a time."""
    splits = data.split_fifths(data.digits())
    return from_splits(perceptron(64, 100, 100, CLASSES), splits, batch_size=4)


@task(GROUP, steps=600, confirm=True)
def full_batches(root: Path | None) -> Problem:
    """Digits, all of them at each step."""
    splits = data.split_fifths(data.digits())
    return from_splits(perceptron(64, 100, 100, CLASSES), splits, batch_size=None)


@task(GROUP, steps=1500)
def heat_equation(root: Path | None) -> Problem:
    """A physics-informed network for the heat equation, known at its boundary alone."""
    dice = torch.Generator().manual_seed(0)

    def solution(points: Tensor) -> Tensor:
        """Two waves that decay, over a rod of length 1 (first column) and time (second)."""
        place, time = math.pi * points[:, :1], math.pi**2 * points[:, 1:]
        first = place.sin() * (-0.1 * time).exp()
        return first + 0.5 * (3.0 * place).sin() * (-0.9 * time).exp()

    edge = torch.rand(200, 2, generator=dice)
    edge[:100, 1], edge[100:150, 0], edge[150:, 0] = 0.0, 0.0, 1.0
    known = solution(edge)

    def loss(model: nn.Module, batch: Columns) -> Tensor:
        (points,) = batch
        points = points.detach().requires_grad_()
        in_place, in_time = derivatives(model(points), points)
        curvature, _ = derivatives(in_place, points)
        residual = (in_time - 0.1 * curvature).square().mean()
        return residual + 10.0 * functional.mse_loss(model(edge), known)

    def measure(model: nn.Module, batch: Columns) -> tuple[Tensor, Tensor]:
        points, truth = batch
        error = (model(points) - truth).square().mean()
        return error, (error / truth.square().mean()).sqrt()

    points = [torch.rand(size, 2, generator=dice) for size in (2000, 250, 250)]
    measured = {
        name: (part[:250], solution(part[:250])) for name, part in zip(SPLITS, points, strict=True)
    }
    model = perceptron(2, 32, 32, 1, activation=nn.Tanh)
    return Problem(model, (points[0],), measured, measure, loss, batch_size=128)


@task(GROUP, steps=2000)
def bandit_digits(root: Path | None) -> Problem:
    """Policy gradients: to guess the class of a digit, told only whether the guess is right."""
    splits = data.split_fifths(data.digits())

    def draw(model: nn.Module, batch: Columns) -> Columns:
        inputs, labels = batch
        with torch.no_grad():
            actions = log_policy(model, inputs).exp().multinomial(1)
        rewards = (actions.squeeze(1) == labels).float()
        # The mean reward of the batch is the baseline.
        return inputs, actions, rewards - rewards.mean()

    def loss(model: nn.Module, batch: Columns) -> Tensor:
        inputs, actions, advantages = batch
        return -(advantages * log_policy(model, inputs).gather(1, actions).squeeze(1)).mean()

    def measure(model: nn.Module, batch: Columns) -> tuple[Tensor, Tensor]:
        """The expected regret, and how often the most likely guess is wrong."""
        inputs, labels = batch
        chances = log_policy(model, inputs).exp()
        regret = 1.0 - chances.gather(1, labels.unsqueeze(1)).mean()
        return regret, (chances.argmax(1) != labels).float().mean()

    model = perceptron(64, 64, CLASSES)
    return from_splits(model, splits, measure=measure, loss=loss, draw=draw, batch_size=64)
