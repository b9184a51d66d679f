"""Models of the self-tuning tasks: what they compute, and what of them is trained."""

import math

import pytest
import torch
from torch import nn

from quadstep_bench.selftuning.models import (
    Denoiser,
    FrozenBatchNorm,
    GraphNetwork,
    LowRank,
    VariationalAutoencoder,
    add_adapters,
    derivatives,
    freeze_body,
    perceptron,
)


def test_a_perceptron_ends_with_a_linear_layer() -> None:
    kinds = [type(layer) for layer in perceptron(3, 5, 4, 2, activation=nn.Tanh)]
    assert kinds == [nn.Linear, nn.Tanh, nn.Linear, nn.Tanh, nn.Linear]


def test_adapters_change_nothing_at_first_and_are_all_that_is_trained() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(6), perceptron(6, 5, 4), nn.Linear(4, 3))
    inputs = torch.randn(7, 6)
    before = model(inputs)
    adapted = add_adapters(model, rank=2)
    assert torch.equal(adapted(inputs), before)
    trained = {name: tuple(p.shape) for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained == {
        "1.0.down.weight": (2, 6),
        "1.0.up.weight": (5, 2),
        "1.2.down.weight": (2, 5),
        "1.2.up.weight": (4, 2),
        "2.down.weight": (2, 4),
        "2.up.weight": (3, 2),
    }


def test_an_adapter_adds_the_product() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 5)
    adapter = LowRank(layer, rank=2)
    nn.init.normal_(adapter.up.weight)
    inputs = torch.randn(7, 6)
    weight = layer.weight + adapter.up.weight @ adapter.down.weight
    assert adapter(inputs).allclose(inputs @ weight.T + layer.bias, atol=1e-5)


def test_the_head_is_the_last_layer() -> None:
    model = freeze_body(perceptron(6, 5, 4))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        *("2.weight", "2.bias")
    ]


def test_statistics_stay_as_they_are_and_everything_else_is_in_training() -> None:
    model = FrozenBatchNorm(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout()))
    before = {name: value.clone() for name, value in model.named_buffers()}
    model.train()
    model(torch.randn(4, 1, 5, 5))
    assert all(torch.equal(before[name], value) for name, value in model.named_buffers())
    assert [module.training for module in model.model.children()] == [True, False, True]
    assert not any(module.training for module in model.eval().modules())


def test_a_graph_network_averages_over_neighbours_and_drops_out_in_training_alone() -> None:
    torch.manual_seed(0)
    features, neighbours = torch.randn(5, 3), torch.tensor([[i, (i + 1) % 5] for i in range(5)])
    model = GraphNetwork(features, neighbours, width=4, classes=2)
    nodes = torch.tensor([3, 0])
    assert not torch.equal(model(nodes), model(nodes))
    model.eval()
    mixing = torch.eye(5).add(torch.eye(5).roll(1, 1)) / 2
    hidden = (mixing @ model.first(features)).relu()
    assert model(nodes).allclose((mixing @ model.second(hidden))[nodes], atol=1e-6)


def test_the_bound_is_that_of_normal_distributions() -> None:
    torch.manual_seed(0)
    model = VariationalAutoencoder(6, 5, latents=2)
    inputs, noise = torch.rand(7, 6), torch.randn(7, 2)
    loss, error = model.bound(inputs, noise)
    mean, log_variance = model.encoder(inputs).chunk(2, dim=1)
    found = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    prior = torch.distributions.Normal(torch.zeros(7, 2), torch.ones(7, 2))
    divergence = torch.distributions.kl_divergence(found, prior).sum()
    chances = model.decoder(found.loc + found.scale * noise).sigmoid()
    entropy = nn.functional.binary_cross_entropy(chances, inputs, reduction="sum")
    assert loss.item() == pytest.approx((entropy + divergence).item() / 42, rel=1e-5)
    assert error.item() == pytest.approx((chances - inputs).abs().mean().item())


@pytest.mark.parametrize(("time", "kept"), [(0.0, 1.0), (1.0, 0.0), (0.5, math.sqrt(0.5))])
def test_a_denoiser_sees_as_much_of_the_input_as_its_time_says(time: float, kept: float) -> None:
    model = Denoiser(3, 4)
    seen: list[torch.Tensor] = []
    model.body.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    inputs, noise = torch.randn(2, 3), torch.randn(2, 3)
    model(inputs, noise, torch.full((2,), time))
    mixed = kept * inputs + math.sqrt(1.0 - kept**2) * noise
    assert seen[0][:, :3].allclose(mixed, atol=1e-6)


def test_derivatives_are_of_each_output_with_respect_to_its_own_input() -> None:
    points = torch.rand(5, 2, requires_grad=True)
    first, second = derivatives(points[:, :1].pow(3) * points[:, 1:], points)
    assert first.allclose(3 * points[:, 0].square() * points[:, 1])
    assert second.allclose(points[:, 0].pow(3))
    curvature, _ = derivatives(first, points)
    assert curvature.allclose(6 * points[:, 0] * points[:, 1])
