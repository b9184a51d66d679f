"""The models of the tasks that other benchmarks do not have."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional


def perceptron(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Builds linear layers of these widths with an activation between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


class VariationalAutoencoder(nn.Module):
    """A perceptron that encodes inputs from 0 to 1 in a few normal variables, and decodes them."""

    def __init__(self, size: int, width: int, latents: int) -> None:
        super().__init__()
        self.encoder = perceptron(size, width, 2 * latents)
        self.decoder = perceptron(latents, width, size)

    def forward(self, inputs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the logits of the inputs, and the divergence of the latents from the prior."""
        mean, log_variance = self.encoder(inputs).chunk(2, dim=1)
        logits = self.decoder(mean + (0.5 * log_variance).exp() * noise)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum(1)
        return logits, divergence

    def bound(self, inputs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The negative evidence lower bound in nats an entry, and the mean absolute error.

        With zero noise they are those at the mean of the latents, no bound.
        """
        logits, divergence = self(inputs, noise)
        entropy = functional.binary_cross_entropy_with_logits(logits, inputs, reduction="sum")
        return (entropy + divergence.sum()) / inputs.numel(), functional.l1_loss(
            logits.sigmoid(), inputs
        )


class Denoiser(nn.Module):
    """A perceptron that tells the noise in an input, given how much of it there is."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.body = perceptron(size + 16, width, width, size)

    def forward(self, inputs: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Mixes inputs with noise, by a cosine schedule of times from 0 to 1."""
        angles = 0.5 * math.pi * times.unsqueeze(1)
        waves = angles * torch.arange(1, 9, device=times.device)
        mixed = angles.cos() * inputs + angles.sin() * noise
        return self.body(torch.cat([mixed, waves.sin(), waves.cos()], dim=1))


class GraphNetwork(nn.Module):
    """Two layers that average over the neighbours of each node of one graph, with dropout.

    It holds the graph: its input is which nodes to classify.
    """

    features: Tensor
    neighbours: Tensor

    def __init__(self, features: Tensor, neighbours: Tensor, width: int, classes: int) -> None:
        super().__init__()
        self.register_buffer("features", features)
        self.register_buffer("neighbours", neighbours)
        self.first = nn.Linear(features.shape[1], width)
        self.second = nn.Linear(width, classes)
        self.dropout = nn.Dropout(0.5)

    def forward(self, nodes: Tensor) -> Tensor:
        """Returns the logits of nodes, given by their numbers."""
        hidden = self.first(self.dropout(self.features))[self.neighbours].mean(1).relu()
        return self.second(self.dropout(hidden))[self.neighbours[nodes]].mean(1)


class LowRank(nn.Module):
    """A linear layer that stays as it is, and a product of two thin matrices beside it."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        """Adds the product to what the layer returns."""
        return self.layer(inputs) + self.up(self.down(inputs))


def add_adapters(model: nn.Module, rank: int) -> nn.Module:
    """Puts low-rank adapters beside all linear layers; nothing else is trained from then on."""
    model.requires_grad_(False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and not isinstance(module, LowRank):
                setattr(module, name, LowRank(child, rank))
    return model


def freeze_body(model: nn.Sequential) -> nn.Module:
    """Trains the last layer alone."""
    model.requires_grad_(False)
    model[-1].requires_grad_(True)
    return model


class FrozenBatchNorm(nn.Module):
    """A model whose batch normalisation keeps the statistics that it was pretrained with."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        """Runs the model."""
        return self.model(inputs)

    def train(self, mode: bool = True) -> "FrozenBatchNorm":
        """Sets the mode of all but the layers of batch normalisation."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


class TextClassifier(nn.Module):
    """A pretrained encoder and a linear layer on the mean of its outputs."""

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Returns the logits of texts; the mask is 1 where there is a token."""
        outputs = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(2).to(outputs.dtype)
        return self.head((outputs * weights).sum(1) / weights.sum(1))


def log_policy(model: nn.Module, inputs: Tensor) -> Tensor:
    """The logarithms of the probabilities of the actions, a row an input."""
    return model(inputs).log_softmax(1)


def derivatives(outputs: Tensor, inputs: Tensor) -> Sequence[Tensor]:
    """The gradient of each output with respect to its own input, with a graph."""
    (gradient,) = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)
    return gradient.unbind(1)
