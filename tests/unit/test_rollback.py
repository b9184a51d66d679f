"""A step that fails is undone: exceptions, interrupts, losses and gradients that are not finite."""

import copy
import math

import pytest
import torch
from configurations import CONFIGURATIONS
from problems import classification, identical, noisy_classification, values
from torch import nn
from torch.nn import functional
from training import about_to_measure, about_to_reuse, backward_of, raising, train, with_fault

from quadstep import LQA, Reason
from quadstep.directions import Gradient


class TestFreeOfSideEffects:
    @pytest.mark.parametrize("failing", [1, 2, 3])
    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_an_exception_undoes_the_step(self, configuration, failing, error):
        task, opt = about_to_measure(configuration)
        before, random = values(task.model), torch.get_rng_state()
        with pytest.raises(error, match="injected"):
            opt.step(with_fault(task.closure(), failing, raising(error)))
        assert identical(before, values(task.model))
        assert torch.equal(random, torch.get_rng_state())
        opt.step(task.closure())
        assert not identical(before, values(task.model))

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    @pytest.mark.parametrize("failing", [1, 2, 3])
    def test_a_non_finite_loss_undoes_the_step(self, configuration, failing, bad):
        task, opt = about_to_measure(configuration)
        before, random = values(task.model), torch.get_rng_state()
        opt.step(with_fault(task.closure(), failing, lambda loss: loss * bad))
        assert opt.report.reason is Reason.NON_FINITE
        assert identical(before, values(task.model))
        # A loss that fails by itself must not be drawn again for ever.
        assert torch.equal(random, torch.get_rng_state()) == (failing > 1)
        for _ in range(5):
            opt.step(task.closure())
        assert math.isfinite(task.closure(0, 256)().item())

    def test_non_finite_gradients_are_not_stepped_with(self, configuration):
        task = classification()
        opt = configuration(task.model.parameters())
        opt.step(task.closure())
        before = values(task.model)
        hook = task.model[0].weight.register_hook(lambda grad: grad * math.nan)
        opt.step(task.closure())
        hook.remove()
        assert opt.report.reason is Reason.NON_FINITE
        assert identical(before, values(task.model))
        for _ in range(30):
            loss = opt.step(task.closure())
        assert loss.item() < task.closure(0, 256)().item() * 2.0

    @pytest.mark.parametrize(
        ("size", "reason"),
        [(1e-30, Reason.UNRESOLVED), (1e20, Reason.UNRESOLVED), (0.0, Reason.REUSED)],
    )
    def test_gradients_count_whose_squares_are_beyond_their_type(self, size, reason):
        param = nn.Parameter(torch.ones(3))
        opt = LQA([param], direction=Gradient(), averaging=None, delta0=1e-10)
        opt.step(lambda: size * param.sum() + 1.0)
        assert opt.report.reason is reason

    @pytest.mark.parametrize("name", ["lqa", "lqa-auto"])
    def test_steps_without_a_gradient_might_as_well_not_be_taken(self, name):
        """At the start flat lines would send the first rate out, and later shift the averages."""
        plain, flat = classification(), classification()
        opts = [CONFIGURATIONS[name](task.model.parameters()) for task in (plain, flat)]
        for step in range(120):
            for _ in range(30 if step == 0 else step % 3):
                opts[1].step(lambda: 0.0 * flat.closure()())
                assert opts[1].report.reason is Reason.REUSED
                assert opts[1].report.forwards == 1
            for opt, task in zip(opts, (plain, flat), strict=True):
                opt.step(task.closure(step))
        assert identical(values(plain.model), values(flat.model))
        assert opts[0].rate == opts[1].rate
        if name == "lqa-auto":
            assert opts[0].report.counts[Reason.REUSED] > 30

    def test_a_wrapped_optimizer_steps_without_a_gradient_as_it_would_by_itself(self):
        """Momentum coasts and weights decay, at the rate in force, which nothing measures."""
        task = classification()
        settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
        wrapped = torch.optim.SGD(task.model.parameters(), **settings)
        opt = LQA(wrapped)
        train(task, opt, range(5))
        alone = copy.deepcopy(task.model)
        base = torch.optim.SGD(alone.parameters(), **settings)
        base.load_state_dict(copy.deepcopy(wrapped.state_dict()))
        for _ in range(5):
            opt.step(lambda: 0.0 * task.closure()())
            assert opt.report.reason is Reason.REUSED
            base.zero_grad()
            (0.0 * functional.cross_entropy(alone(task.inputs), task.labels)).backward()
            base.step()
        # LQA scales the displacement, which rounds.
        torch.testing.assert_close(values(task.model), values(alone), rtol=1e-5, atol=1e-7)

    def test_steps_that_reuse_the_rate_survive_a_non_finite_loss(self):
        task = noisy_classification()
        opt = about_to_reuse(task)
        before = values(task.model)
        opt.step(lambda: task.model(task.inputs * math.nan).mean())
        assert opt.report.reason is Reason.NON_FINITE
        assert identical(before, values(task.model))


class TestTwoPhases:
    @pytest.mark.parametrize("failing", [1, 2, 3])
    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_an_exception_undoes_the_step(self, configuration, failing, error):
        task = noisy_classification()
        opt = configuration(task.model.parameters())
        loss = backward_of(opt, task.closure())
        before, random = values(task.model), torch.get_rng_state()
        with pytest.raises(error, match="injected"):
            opt.step(with_fault(task.closure(), failing, raising(error)), loss=loss)
        assert identical(before, values(task.model))
        assert torch.equal(random, torch.get_rng_state())
        assert all(param.grad is not None for param in task.model.parameters())

    @pytest.mark.parametrize("failing", [1, 2, 3])
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_non_finite_probe_undoes_the_step(self, configuration, failing, bad):
        task = noisy_classification()
        opt = configuration(task.model.parameters())
        loss = backward_of(opt, task.closure())
        before = values(task.model)
        opt.step(with_fault(task.closure(), failing, lambda loss: loss * bad), loss=loss)
        assert opt.report.reason is Reason.NON_FINITE
        assert identical(before, values(task.model))


def test_an_interrupted_closure_that_moved_the_parameters_is_undone():
    task = classification()
    opt = LQA(task.model.parameters(), direction="gradient", averaging=None)
    loss, before = backward_of(opt, task.closure()), values(task.model)
    calls = []

    def closure():
        calls.append(task.closure()())
        with torch.no_grad():
            task.model[0].weight.add_(1.0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return calls[-1]

    with pytest.raises(KeyboardInterrupt):
        opt.step(closure, loss=loss)
    assert identical(before, values(task.model))
