import pytest
import torch
from reference import schedule_free
from torch import nn

from quadstep.averaging import MOMENTUM_SCALE, UPDATES, ScheduleFree, Update
from quadstep.directions import RMSNormalized
from quadstep.line import Line


def holder(theta, update):
    """An optimizer that holds the state of an update."""
    opt = torch.optim.SGD(theta, lr=1.0)
    opt.param_groups[0].update(update.initial_scalars())
    return opt


def line(opt, rate):
    opt.param_groups[0]["lr"] = rate
    return RMSNormalized().line(opt.param_groups, opt.state, rate, is_kept=False)


def move(update, opt, rate):
    update.apply(line(opt, rate), opt.param_groups, opt.state, rate, None)


def adapt(update, opt, determinism):
    update.apply(Line([]), opt.param_groups, opt.state, 0.0, determinism)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("adapting", [False, True])
@torch.no_grad()
def test_equals_the_plain_iterates_step_by_step(weight_decay, adapting):
    """Also where the losses become deterministic, and noisy again."""
    torch.manual_seed(0)
    hessian = torch.diag(torch.tensor([1.0, 3.0, 10.0], dtype=torch.float64))
    theta = nn.Parameter(torch.randn(3, dtype=torch.float64))
    start = theta.detach().clone()
    rates = [0.1, 0.05, 0.0625, 0.2, 0.01] * 6
    scales: list[float] = []
    determinism = [
        min(step, 20 - step) / 10 if 0 < step < 20 and adapting else 0.0 for step in range(30)
    ]
    update = ScheduleFree(beta=0.5, z_step_scale=3.0, weight_power=2.0, max_momentum_scale=4.0)
    opt = holder([theta], update)
    opt.param_groups[0]["weight_decay"] = weight_decay
    for updates, rate in enumerate(rates):
        adapt(update, opt, determinism[updates])
        # At most as x is old: the weight of its newest z is 3 / (updates + 2).
        limit = min(max(0.5 * (updates + 2) / 3, 1.0), 4.0)
        scales.append(limit ** determinism[updates])
        theta.grad = hessian @ theta
        move(update, opt, rate)
        x, y, z = schedule_free(
            lambda at: hessian @ at,
            start,
            rates[: updates + 1],
            betas=[1.0 - 0.5 / scale for scale in scales],
            z_step_scales=[3.0 * scale for scale in scales],
            power=2.0,
            weight_decay=weight_decay,
        )
        torch.testing.assert_close(theta.data, y, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(opt.state[theta]["z"], z, rtol=1e-11, atol=1e-13)
        update.show_average(opt.param_groups, opt.state)
        torch.testing.assert_close(theta.data, x, rtol=1e-11, atol=1e-13)
        update.resume(opt.param_groups, opt.state)
        torch.testing.assert_close(theta.data, y, rtol=1e-11, atol=1e-13)


@torch.no_grad()
def test_keeps_one_copy_of_the_parameters():
    theta, update = nn.Parameter(torch.ones(5)), ScheduleFree()
    theta.grad = torch.ones(5)
    opt = holder([theta], update)
    move(update, opt, 1.0)
    tensors = {key for key, value in opt.state[theta].items() if isinstance(value, torch.Tensor)}
    assert tensors == {"square_avg", "z"}


@torch.no_grad()
def test_adapting_leaves_the_average_where_it_is():
    theta, still = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    theta.grad = torch.ones(5)
    update = ScheduleFree()
    opt = holder([theta, still], update)

    def iterates():
        y, z = theta.detach().clone(), opt.state[theta]["z"].clone()
        update.show_average(opt.param_groups, opt.state)
        x = theta.detach().clone()
        update.resume(opt.param_groups, opt.state)
        return x, y, z

    for _ in range(2):
        move(update, opt, 1.0)
    x, y, z = iterates()
    opt.param_groups[0][UPDATES] = 10_000
    adapt(update, opt, 1.0)
    assert opt.param_groups[0][MOMENTUM_SCALE] == 3.0
    scaled = iterates()
    adapt(update, opt, 0.0)
    assert opt.param_groups[0][MOMENTUM_SCALE] == 1.0
    back = iterates()
    torch.testing.assert_close(scaled[0], x)
    torch.testing.assert_close(scaled[1], x + (y - x) / 3.0)
    torch.testing.assert_close(scaled[2], z)
    torch.testing.assert_close(back[0], x)
    torch.testing.assert_close(back[1], x + (y - x) / 3.0)
    torch.testing.assert_close(back[2], x + (z - x) / 3.0)
    assert torch.equal(still, torch.ones(5))


@torch.no_grad()
def test_a_plain_update_keeps_no_state():
    theta, update = nn.Parameter(torch.ones(5)), Update()
    theta.grad = torch.full((5,), 0.5)
    opt = holder([theta], update)
    step = line(opt, 0.25)
    expected = theta - 0.25 * step.blocks[0].direction[0]
    update.apply(step, opt.param_groups, opt.state, 0.25, 1.0)
    assert torch.equal(theta, expected)
    update.show_average(opt.param_groups, opt.state)
    assert torch.equal(theta, expected)
    assert "z" not in opt.state[theta]
