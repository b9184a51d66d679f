import pytest
import torch
from reference import schedule_free
from torch import nn

from quadstep.averaging import ScheduleFree
from quadstep.directions import RMSNormalized


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("adapting", [False, True])
def test_equals_the_plain_iterates_step_by_step(weight_decay, adapting):
    """Also where the losses become quiet, and noisy again."""
    torch.manual_seed(0)
    hessian = torch.diag(torch.tensor([1.0, 3.0, 10.0], dtype=torch.float64))
    theta = nn.Parameter(torch.randn(3, dtype=torch.float64))
    start = theta.detach().clone()
    rates = [0.1, 0.05, 0.0625, 0.2, 0.01] * 6
    stretches: list[float] = []
    quiet = [min(step, 20 - step) / 10 if 0 < step < 20 and adapting else 0.0 for step in range(30)]
    averaging, direction, state = (
        ScheduleFree(beta=0.5, kappa=3.0, power=2.0, furthest=4.0),
        RMSNormalized(),
        {theta: {}},
    )
    with torch.no_grad():
        for moves, rate in enumerate(rates, start=1):
            averaging.adapt(quiet[moves - 1], moves, [theta], state)
            # No further than the average is old: its newest iterate has a share of 3 / (n + 2).
            most = min(max(0.5 * (moves + 2) / 3, 1.0), 4.0)
            stretches.append(most ** quiet[moves - 1])
            theta.grad = hessian @ theta
            group = {"params": [theta], "lr": rate, "weight_decay": weight_decay}
            line = direction.line([group], state, rate, kept=False)
            averaging.move(line.blocks, state, rate, averaging.weight(moves))
            x, y, z = schedule_free(
                lambda at: hessian @ at,
                start,
                rates[:moves],
                betas=[1.0 - 0.5 / stretch for stretch in stretches],
                kappas=[3.0 * stretch for stretch in stretches],
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
        line = RMSNormalized().line([{"params": [theta], "lr": 1.0}], state, 1.0, False)
        ScheduleFree().move(line.blocks, state, 1.0, 1.0)
    assert set(state[theta]) == {"step", "square", "z"}


def test_adapting_leaves_the_average_where_it_is():
    theta, still = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    theta.grad = torch.ones(5)
    averaging, state = ScheduleFree(), {theta: {}, still: {}}

    def iterates():
        y, z = theta.detach().clone(), state[theta]["z"].clone()
        averaging.average([theta], state)
        x = theta.detach().clone()
        averaging.resume([theta], state)
        return x, y, z

    with torch.no_grad():
        line = RMSNormalized().line([{"params": [theta], "lr": 1.0}], state, 1.0, False)
        averaging.move(line.blocks, state, 1.0, 0.5)
        x, y, z = iterates()
        averaging.adapt(1.0, 10_000, [theta, still], state)
        assert averaging.stretch == 3.0
        stretched = iterates()
        averaging.adapt(0.0, 10_000, [theta, still], state)
        assert averaging.stretch == 1.0
        back = iterates()
    torch.testing.assert_close(stretched[0], x)
    torch.testing.assert_close(stretched[1], x + (y - x) / 3.0)
    torch.testing.assert_close(stretched[2], z)
    torch.testing.assert_close(back[0], x)
    torch.testing.assert_close(back[1], x + (y - x) / 3.0)
    torch.testing.assert_close(back[2], x + (z - x) / 3.0)
    assert torch.equal(still, torch.ones(5))
