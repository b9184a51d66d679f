import pytest
import torch
from reference import schedule_free
from torch import nn

from quadstep.averaging import ScheduleFree
from quadstep.direction import NormalisedGradient


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_the_plain_iterates_step_by_step(weight_decay):
    torch.manual_seed(0)
    hessian = torch.diag(torch.tensor([1.0, 3.0, 10.0], dtype=torch.float64))
    theta = nn.Parameter(torch.randn(3, dtype=torch.float64))
    start = theta.detach().clone()
    rates = [0.1, 0.05, 0.0625, 0.2, 0.01] * 6
    averaging, direction, state = (
        ScheduleFree(beta=0.9, kappa=3.0, power=2.0),
        NormalisedGradient(),
        {theta: {}},
    )
    with torch.no_grad():
        for moves, rate in enumerate(rates, start=1):
            theta.grad = hessian @ theta
            group = {"params": [theta], "lr": rate, "weight_decay": weight_decay}
            line = direction.line([group], state, rate, measured=False)
            averaging.move(line.blocks, state, rate, averaging.weight(moves))
            x, y, z = schedule_free(
                lambda at: hessian @ at,
                start,
                rates[:moves],
                beta=0.9,
                kappa=3.0,
                power=2.0,
                weight_decay=weight_decay,
            )
            torch.testing.assert_close(theta.data, y, rtol=1e-11, atol=1e-13)
            torch.testing.assert_close(state[theta]["z"], z, rtol=1e-11, atol=1e-13)
            averaging.average([theta], state)
            torch.testing.assert_close(theta.data, x, rtol=1e-11, atol=1e-13)
            averaging.resume([theta], state)
            torch.testing.assert_close(theta.data, y, rtol=1e-11, atol=1e-13)


def test_keeps_one_copy_of_the_parameters():
    theta = nn.Parameter(torch.ones(5))
    theta.grad = torch.ones(5)
    state = {theta: {}}
    with torch.no_grad():
        line = NormalisedGradient().line([{"params": [theta], "lr": 1.0}], state, 1.0, False)
        ScheduleFree().move(line.blocks, state, 1.0, 1.0)
    assert set(state[theta]) == {"step", "square", "z"}
