"""Tasks that begin with random weights."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from quadstep_bench.selftuning import data
from quadstep_bench.selftuning.models import (
    Denoiser,
    GraphNetwork,
    VariationalAutoencoder,
    perceptron,
)
from quadstep_bench.selftuning.problem import (
    NO_ERROR,
    SPLITS,
    Columns,
    Problem,
    from_splits,
    regression,
    task,
)
from quadstep_bench.tasks import CLASSES
from quadstep_bench.tasks.models import augmented_lenet, gru, transformer

GROUP = "from scratch"


@task(GROUP, steps=800)
def lenet_augmented(root: Path | None) -> Problem:
    """LeNet-5 on 5,000 images of CIFAR-10, mirrored and shifted."""
    splits = data.images("cifar10", root, (5000, 500, 1000))
    return from_splits(augmented_lenet((3, 32, 32)), splits, batch_size=32)


@task(GROUP, steps=800)
def gpt_text(root: Path | None) -> Problem:
    """A transformer that reads Python sources once, a character at a time."""
    splits = data.text(data.CODE, (8000, 250, 250))
    return from_splits(transformer(width=64, layers=2), splits, batch_size=8)


@task(GROUP, steps=2000)
def diffusion_digits(root: Path | None) -> Problem:
    """A denoising diffusion model of the digits."""
    splits = data.split_fifths(data.digits()[:1])
    dice = torch.Generator().manual_seed(0)
    # Noise and times of the examples that are evaluated are always the same.
    measured = {
        name: (
            2.0 * splits[name][0] - 1.0,
            torch.randn(splits[name][0].shape, generator=dice),
            torch.rand(len(splits[name][0]), generator=dice),
        )
        for name in SPLITS
    }

    def measure(model: nn.Module, batch: Columns) -> tuple[Tensor, Tensor]:
        inputs, noise, times = batch
        return functional.mse_loss(model(inputs, noise, times), noise), NO_ERROR

    def loss(model: nn.Module, batch: Columns) -> Tensor:
        (inputs,) = batch
        return measure(model, (inputs, torch.randn_like(inputs), torch.rand(len(inputs))))[0]

    training = measured["train"][:1]
    return Problem(Denoiser(64, 128), training, measured, measure, loss, batch_size=64)


@task(GROUP, steps=2000, confirm=True)
def autoencoder_digits(root: Path | None) -> Problem:
    """A variational autoencoder of the digits."""
    splits = data.split_fifths(data.digits()[:1])
    latents = 8
    measured = {
        name: (*splits[name], torch.zeros(len(splits[name][0]), latents)) for name in SPLITS
    }

    def measure(model: nn.Module, batch: Columns) -> tuple[Tensor, Tensor]:
        assert isinstance(model, VariationalAutoencoder)
        return model.bound(*batch)

    def loss(model: nn.Module, batch: Columns) -> Tensor:
        (inputs,) = batch
        return measure(model, (inputs, torch.randn(len(inputs), latents)))[0]

    model = VariationalAutoencoder(64, 128, latents)
    return Problem(model, splits["train"], measured, measure, loss, batch_size=64)


@task(GROUP, steps=1000)
def table_diabetes(root: Path | None) -> Problem:
    """Regression on a table, the progress of 442 patients."""
    splits = data.split_fifths(data.diabetes())
    data.standardise(splits, (0, 1))
    return from_splits(perceptron(10, 64, 64, 1), splits, measure=regression, batch_size=16)


@task(GROUP, steps=1000, confirm=True)
def table_breast_cancer(root: Path | None) -> Problem:
    """Classification of a table, 569 tumours."""
    splits = data.split_fifths(data.breast_cancer())
    data.standardise(splits)
    return from_splits(perceptron(30, 64, 64, 2), splits, batch_size=16)


@task(GROUP, steps=400)
def graph_digits(root: Path | None) -> Problem:
    """A graph network on digits joined to those most like them, 200 of them with a label."""
    inputs, labels = data.digits()
    # A node is its own first neighbour.
    neighbours = torch.cdist(inputs, inputs).topk(8, largest=False).indices
    splits = data.split((torch.arange(len(inputs)), labels), (200, 500, 1000))
    return from_splits(GraphNetwork(inputs, neighbours, 64, CLASSES), splits, batch_size=None)


@task(GROUP, steps=600, confirm=True)
def gru_digits(root: Path | None) -> Problem:
    """A recurrent network that reads digits row by row."""
    inputs, labels = data.digits()
    splits = data.split_fifths((inputs.view(-1, 1, 8, 8), labels))
    return from_splits(gru((1, 8, 8)), splits, batch_size=64)
