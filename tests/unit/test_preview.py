"""A preview measures the line of the next step, and moves nothing."""

import copy
import random

import numpy as np
import pytest
import torch
from problems import classification, identical, noisy_classification, values
from torch import nn
from training import same_state, train

from quadstep import LQA
from quadstep.directions import Gradient


def draws():
    """What the random generators give next."""
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)  # noqa: NPY002
    drawn = torch.rand(2).tolist(), random.random(), np.random.random()  # noqa: NPY002
    torch.set_rng_state(generators[0])
    random.setstate(generators[1])
    np.random.set_state(generators[2])  # noqa: NPY002
    return drawn


@pytest.mark.parametrize("steps", [0, 1, 7, 20, 25])
def test_training_continues_as_if_there_had_been_none(configuration, steps):
    """Also where the closure has dropout and batch normalization, and at a step that measures."""
    plain, previewed = noisy_classification(), noisy_classification()
    opts = [configuration(each.model.parameters()) for each in (plain, previewed)]
    for each, opt in zip((plain, previewed), opts, strict=True):
        torch.manual_seed(0)
        train(each, opt, range(steps))
    before, state = values(previewed.model), copy.deepcopy(opts[1].state_dict())
    drawn, report = draws(), opts[1].report
    line = opts[1].preview(previewed.closure(steps))
    line.losses([0.0, line.rate, -0.5])
    assert identical(before, values(previewed.model))
    assert same_state(opts[1].state_dict(), state)
    assert draws() == drawn
    assert repr(opts[1].report) == repr(report)
    for each, opt in zip((plain, previewed), opts, strict=True):
        torch.manual_seed(1)
        train(each, opt, range(steps, steps + 15))
    assert identical(values(plain.model), values(previewed.model))


@pytest.mark.parametrize("steps", [0, 3, 20, 24])
def test_it_has_the_rate_of_the_step_that_follows(configuration, steps):
    task = classification()
    opt = configuration(task.model.parameters())
    train(task, opt, range(steps))
    start = copy.deepcopy(task.model)
    line = opt.preview(task.closure(steps))
    ahead = line.losses([line.rate])[0]
    opt.step(task.closure(steps))
    is_averaged = any("z" in own for own in opt.state.values())
    if is_averaged or (steps == 0 and opt.rate > 0.0):
        # The first step stays near the first probe.
        assert 0.0 < line.rate <= opt.rate
    else:
        assert line.rate == pytest.approx(opt.rate)
    if not is_averaged:
        moved = task.closure(steps)()
        assert ahead == pytest.approx(moved.item(), rel=1e-5)
    assert not identical(values(start), values(task.model))


def test_its_losses_are_those_of_the_closure_at_each_rate():
    torch.manual_seed(0)
    theta = nn.Parameter(torch.randn(5, dtype=torch.float64))
    opt = LQA([theta], direction=Gradient(), averaging=None)

    def loss(at):
        return (at * torch.arange(1.0, 6.0)).sin().square().sum()

    line = opt.preview(lambda: loss(theta))
    (gradient,) = torch.autograd.grad(loss(theta), theta)
    rates = [0.0, 0.1, -0.2, 3.0]
    expected = [loss(theta - rate * gradient).item() for rate in rates]
    assert line.losses(rates) == pytest.approx(expected, rel=1e-12)
    assert theta.grad is None


def test_gradients_in_place_stay():
    task = classification()
    opt = LQA(task.model.parameters())
    task.closure(0)().backward()
    gradients = [param.grad for param in task.model.parameters()]
    copies = [gradient.clone() for gradient in gradients]
    opt.preview(task.closure(1)).losses([0.1])
    assert all(
        param.grad is gradient
        for param, gradient in zip(task.model.parameters(), gradients, strict=True)
    )
    assert identical(copies, gradients)


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_an_exception_in_the_closure_changes_nothing(configuration, failing):
    task = classification()
    opt = configuration(task.model.parameters())
    before, state = values(task.model), copy.deepcopy(opt.state_dict())
    calls = []

    def closure():
        calls.append(1)
        if len(calls) == failing:
            raise KeyboardInterrupt
        return task.closure(3)()

    with pytest.raises(KeyboardInterrupt):
        opt.preview(closure)
    assert identical(before, values(task.model))
    assert same_state(opt.state_dict(), state)


def test_it_is_refused_in_eval_mode():
    task = classification()
    opt = LQA(task.model.parameters())
    opt.eval()
    with pytest.raises(RuntimeError, match=r"or call opt.train"):
        opt.preview(task.closure())


def test_a_learning_rate_from_outside_stays_and_the_step_warns_of_it():
    task = classification()
    for lr in (0.5, torch.tensor(0.5)):
        opt = LQA([{"params": list(task.model.parameters()), "lr": lr}])
        opt.step(task.closure())
        if isinstance(lr, torch.Tensor):
            lr.fill_(3.0)
        else:
            opt.param_groups[0]["lr"] = 3.0
        opt.preview(task.closure())
        assert opt.param_groups[0]["lr"] == 3.0
        with pytest.warns(UserWarning, match="lr was set to"):
            opt.step(task.closure())


def test_what_its_closure_does_is_not_expected_of_others():
    task = classification()
    opt = LQA(task.model.parameters(), direction="gradient", averaging=None)

    def running_backward():
        loss = task.closure()()
        if torch.is_grad_enabled():
            loss.backward()
        return loss

    with pytest.warns(UserWarning, match="calls backward"):
        opt.preview(running_backward)
    opt.step(task.closure())
    assert opt.report.backwards == 1


def test_gradients_of_other_parameters_stay():
    torch.manual_seed(0)
    encoder, head = nn.Linear(4, 4), nn.Linear(4, 1)
    head(torch.ones(1, 4)).sum().backward()
    before = head.weight.grad.clone()
    opt = LQA(encoder.parameters())
    opt.preview(lambda: head(encoder(torch.ones(2, 4))).square().mean())
    assert torch.equal(head.weight.grad, before)


def test_the_state_of_a_wrapped_optimizer_stays_the_same_tensors():
    task = classification()
    base = torch.optim.Adam(task.model.parameters())
    base.steps = 0
    base.register_step_post_hook(lambda opt, *_: setattr(opt, "steps", opt.steps + 1))
    opt = LQA(base)
    train(task, opt, range(3))
    before = [entry["exp_avg"] for entry in opt.state.values()]
    opt.preview(task.closure())
    assert all(
        entry["exp_avg"] is tensor for entry, tensor in zip(opt.state.values(), before, strict=True)
    )
    assert base.steps == 3


def test_after_the_storage_of_a_complex_parameter_was_replaced():
    theta = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    opt = LQA([theta])
    line = opt.preview(lambda: theta.abs().square().sum())
    theta.data = theta.data.clone()
    center, ahead = line.losses([0.0, 0.5])
    assert center != ahead
