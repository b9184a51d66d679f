"""The rules for the rate that are compared with those of the library."""

import math

import pytest
import torch
from torch import Tensor

from quadstep import LQA
from quadstep.directions import Gradient
from quadstep_bench.optimizers import CONSTANT_RATES, builders
from quadstep_bench.optimizers.controllers import AuthorsController
from quadstep_bench.tasks import models


def authors_rate(loss: Tensor, ahead: Tensor, behind: Tensor, distance: float, epoch: int) -> float:
    """The rule as their code has it, with the losses at a distance along and against the step."""
    rate = distance * (behind - ahead).item() / (2.0 * (ahead + behind - 2.0 * loss).item() + 1e-12)
    if rate <= 0:
        rate = distance * 1.05
    if rate > 1:
        rate = 0.05 if epoch < 10 else 0.01
    return rate


@pytest.mark.parametrize("epoch", [0, 9, 10, 50, 90])
@pytest.mark.parametrize("slope", [0.7, -0.7])
@pytest.mark.parametrize("curvature", [4.0, 0.1, -0.2])
def test_the_authors_rules(epoch: int, slope: float, curvature: float) -> None:
    theta = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

    def loss(value: Tensor) -> Tensor:
        # Beyond the second order, so that the gradient does not decide everything.
        return slope * value + 0.5 * curvature * value**2 + 0.3 * value**3

    controller = AuthorsController(epoch)
    opt = LQA([theta], direction=Gradient(), averaging=None, controller=controller)
    opt.step(lambda: loss(theta))
    distance = max(0.05 * (1 - 0.01 * epoch), 0.01)
    start = torch.zeros((), dtype=torch.float64)
    expected = authors_rate(
        loss(start), loss(start - distance * slope), loss(start + distance * slope), distance, epoch
    )
    assert opt.report.rate == pytest.approx(expected, rel=1e-9)
    assert theta.item() == pytest.approx(-expected * slope, rel=1e-9)


def test_the_authors_rules_leave_a_loss_that_is_not_finite() -> None:
    theta = torch.nn.Parameter(torch.ones(()))
    opt = LQA([theta], direction=Gradient(), averaging=None, controller=AuthorsController())
    # The probe ahead leaves the domain of the logarithm.
    opt.step(lambda: (theta - 0.99).log())
    assert theta.item() == 1.0
    assert math.isfinite(opt.report.rate)


def test_the_epoch_is_set_before_each_step() -> None:
    model = models.build("mlp-digits")
    opt = builders.build("lqa-authors", model)
    assert isinstance(opt, LQA)
    controller = opt.strategies.controller
    assert isinstance(controller, AuthorsController)
    for epochs, epoch in [(0.0, 0), (0.99, 0), (12.5, 12)]:
        builders.schedule("lqa-authors", opt, epochs, 50)
        assert controller.epoch == epoch


@pytest.mark.parametrize("name", CONSTANT_RATES)
def test_constant_rates_differ_from_the_default_in_the_rate_alone(name: str) -> None:
    torch.manual_seed(0)
    inputs, labels = torch.randn(64, 1, 8, 8), torch.randint(10, (64,))
    model = models.build("mlp-digits")
    opt = builders.build(name, model)
    assert isinstance(opt, LQA)
    measured = 0
    for _ in range(30):
        opt.step(lambda: torch.nn.functional.cross_entropy(model(inputs), labels))
        assert opt.report.rate == CONSTANT_RATES[name]
        measured += opt.report.forwards > 1
    assert measured >= 3
    default = LQA(models.build("mlp-digits").parameters())
    for strategy in ("direction", "update", "schedule"):
        assert repr(type(getattr(opt.strategies, strategy))) == repr(
            type(getattr(default.strategies, strategy))
        )
