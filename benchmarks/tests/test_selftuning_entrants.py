"""Settings: what each entrant is told, schedules, and the trials of the baseline."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from quadstep import LQA
from quadstep_bench.optimizers import CONSTANT_RATES, SCHEDULED, WARM_UP, builders
from quadstep_bench.runner.environment import version
from quadstep_bench.runner.training import passes_of, take_step
from quadstep_bench.selftuning import entrants
from quadstep_bench.selftuning.entrants import (
    BASELINE,
    CONSTANTS,
    ENTRANTS,
    SETTINGS,
    SPACE,
    TRIALS,
    WARM_UPS,
    constant,
    cosine,
    warmed_up,
)

# Some of the packages are not written for the torch that is installed.
pytestmark = pytest.mark.filterwarnings("default")


def skip_without_package(name: str) -> None:
    for package in SETTINGS[name].needs:
        if version(package) is None:
            pytest.skip(f"{package} is not installed")


# Schedules ----------------------------------------------------------------------------------------


def test_a_cosine_rises_and_falls_to_zero() -> None:
    schedule = partial(cosine, warm_up=0.2)
    found = [schedule(progress) for progress in (0.0, 0.05, 0.2, 0.6, 1.0)]
    assert found == pytest.approx([0.0, 0.25, 1.0, 0.5, 0.0])
    assert [cosine(progress) for progress in (0.0, 1 / 3, 1.0)] == pytest.approx([1.0, 0.75, 0.0])


def test_a_rate_that_is_warmed_up_stays() -> None:
    found = [warmed_up(progress, 0.2) for progress in (0.0, 0.05, 0.2, 0.6, 1.0)]
    assert found == pytest.approx([0.0, 0.25, 1.0, 1.0, 1.0])
    assert [warmed_up(progress, 0.0) for progress in (0.0, 1.0)] == [1.0, 1.0]
    assert [constant(progress) for progress in (0.0, 1.0)] == [1.0, 1.0]


def test_the_cosine_of_the_suite_is_the_one_here() -> None:
    model = nn.Linear(2, 2)
    setting = ENTRANTS["adamw-cosine"]
    optimizer = builders.build("adamw-cosine-0.01", model)
    (rate,) = (group["lr"] for group in setting.build(model, 100).param_groups)
    assert rate == SCHEDULED["adamw-cosine-0.01"].rate
    for progress in (0.005, WARM_UP, 0.3, 0.995):
        builders.schedule("adamw-cosine-0.01", optimizer, progress, 1)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate * setting.schedule(progress))


# The baseline -------------------------------------------------------------------------------------


def test_the_trials_are_always_the_same() -> None:
    again = entrants._trials()
    assert [setting.text for setting in again.values()] == [s.text for s in BASELINE.values()]
    assert list(BASELINE) == [f"trial-{index:02}" for index in range(TRIALS)]
    # Another order of the draws, or another generator, would make other trials of these names.
    assert BASELINE["trial-00"].text == (
        "AdamW at 0.0081, weight decay 0.32, beta2 0.995, warm-up 0%, cosine"
    )
    assert BASELINE["trial-23"].text == (
        "AdamW at 0.00014, weight decay 0.00021, beta2 0.997, warm-up 0%, constant"
    )
    assert len({setting.text for setting in BASELINE.values()}) == TRIALS == 24


def test_the_trials_lie_in_their_space() -> None:
    found: list[tuple[float, float, float]] = []
    for setting in BASELINE.values():
        optimizer = setting.build(nn.Linear(2, 2), 100)
        assert type(optimizer) is AdamW
        (group,) = optimizer.param_groups
        assert group["betas"][0] == 0.9
        found.append((group["lr"], group["weight_decay"], 1.0 - group["betas"][1]))
        # Constant after warm-up, or near zero at the end.
        assert setting.schedule(0.5) > 0.4
        assert setting.schedule(1.0) == pytest.approx(1.0 if "constant" in setting.text else 0.0)
    for values, (low, high) in zip(zip(*found, strict=True), SPACE.values(), strict=True):
        assert all(low <= value <= high for value in values)
        # One in each twelfth of the range, on a logarithmic scale, with cosine and without.
        places = [int(12 * math.log(value / low) / math.log(high / low)) for value in values]
        assert sorted(places[:12]) == sorted(places[12:]) == list(range(12))
    warm_ups = [setting.schedule.keywords["warm_up"] for setting in BASELINE.values()]  # pyright: ignore
    assert all(warm_ups.count(share) == TRIALS / len(WARM_UPS) for share in WARM_UPS)


# Entrants -----------------------------------------------------------------------------------------


def test_names_are_of_one_setting_alone() -> None:
    assert len(SETTINGS) == len(ENTRANTS) + len(CONSTANTS) + TRIALS
    assert list(CONSTANTS) == list(CONSTANT_RATES)
    assert len({setting.text for setting in SETTINGS.values()}) == len(SETTINGS)


@pytest.mark.parametrize("name", [*ENTRANTS, *CONSTANTS, "trial-00"])
def test_an_entrant_gets_the_parameters_that_are_trained(name: str) -> None:
    skip_without_package(name)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    before = [weight.clone() for weight in model.parameters()]
    optimizer = SETTINGS[name].build(model, 100)
    held = [weight for group in optimizer.param_groups for weight in group["params"]]
    assert {id(weight) for weight in held} == {id(weight) for weight in model[1].parameters()}
    inputs = torch.randn(8, 3)
    for step in range(8):
        take_step(optimizer, lambda: model(inputs).square().mean())
        forwards, backwards = passes_of(optimizer)
        assert backwards == 1
        assert forwards >= 1 if isinstance(optimizer, LQA) else forwards == 1, step
    after = list(model.parameters())
    assert all(map(torch.equal, before[:2], after[:2]))
    assert not any(map(torch.equal, before[2:], after[2:]))


@pytest.mark.parametrize("steps", [200, 1000])
def test_a_warm_up_is_a_share_of_the_run(steps: int) -> None:
    skip_without_package("schedulefree-algoperf")
    model = nn.Linear(2, 2)
    warm_ups = {
        name: ENTRANTS[name].build(model, steps).param_groups[0]["warmup_steps"]
        for name in ("schedulefree-algoperf", "schedulefree-adamw")
    }
    assert warm_ups == {"schedulefree-algoperf": steps // 50, "schedulefree-adamw": 0}


Gradient = Callable[[Tensor], Tensor]


def nadamw(weights: Tensor, gradient: Gradient, steps: int, *, ahead: int) -> list[Tensor]:
    """NadamW at a constant rate, as submitted to AlgoPerf; `ahead` is 1 in the NAdam of torch.

    That is by how many steps the bias correction of the momentum is ahead.
    """
    rate, beta1, beta2, decay = 0.0019083, 0.9090935, 0.9988983, 0.0812162
    mean, square = torch.zeros_like(weights), torch.zeros_like(weights)
    found: list[Tensor] = []
    for step in range(1, steps + 1):
        slope = gradient(weights)
        weights = weights * (1.0 - rate * decay)
        mean = beta1 * mean + (1.0 - beta1) * slope
        square = beta2 * square + (1.0 - beta2) * slope.square()
        momentum = beta1 * mean / (1.0 - beta1 ** (step + ahead))
        momentum = momentum + (1.0 - beta1) * slope / (1.0 - beta1**step)
        scale = (square / (1.0 - beta2**step)).sqrt() + 1e-8
        weights = weights - rate * momentum / scale
        found.append(weights)
    return found


def taken(name: str, weights: Tensor, gradient: Gradient, steps: int) -> list[Tensor]:
    """The weights after each step of an entrant at its constant rate."""
    model = nn.ParameterList([weights.clone()])
    optimizer = ENTRANTS[name].build(model, steps)
    found: list[Tensor] = []
    for _ in range(steps):
        model[0].grad = gradient(model[0].detach())
        optimizer.step(None)  # pyright: ignore[reportArgumentType]
        found.append(model[0].detach().clone())
    return found


def test_nadamw_is_that_of_algoperf_but_for_one_bias_correction() -> None:
    torch.manual_seed(0)
    first = torch.randn(20, dtype=torch.float64)
    curvature = torch.rand(20, dtype=torch.float64) + 0.1
    found = taken("nadamw-algoperf", first, curvature.mul, 60)
    for expected, weights in zip(nadamw(first, curvature.mul, 60, ahead=1), found, strict=True):
        # Torch keeps the product of the momenta in float32.
        assert weights.allclose(expected, rtol=0.0, atol=1e-8)
    # The first step is a quarter shorter than theirs, and none after the fiftieth by a thousandth.
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    both = [
        torch.cat([zero, *nadamw(zero, lambda _: one, 60, ahead=ahead)]).diff().abs()
        for ahead in (1, 0)
    ]
    ratios = both[0] / both[1]
    beta1 = 0.9090935
    assert ratios[0].item() == pytest.approx((1 + beta1 / (1 + beta1)) / (1 + beta1))
    assert ratios[0].item() == pytest.approx(0.773, abs=1e-3)
    assert (ratios.diff() > -1e-6).all()
    assert (ratios[50:] - 1.0).abs().max() < 1e-3
