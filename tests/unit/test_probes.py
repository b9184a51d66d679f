"""How many probes a measurement takes."""

from functools import partial

import pytest
import torch
from configurations import BASES, CONFIGURATIONS, WITH_TRUST_REGION
from problems import Quadratic, classification, identical, values
from seams import take_two_probes
from torch import nn
from training import backward_of, train

from quadstep import LQA, Reason


def scaled(closure, factor):
    """A closure whose gradient is that of its loss times a factor."""

    def evaluate():
        loss = closure()
        return loss + (factor - 1.0) * (loss - loss.detach())

    return evaluate


def clipped(model, closure):
    """A closure that runs backward and clips."""

    def evaluate():
        model.zero_grad()
        loss = closure()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        return loss

    return evaluate


class TestOneProbe:
    """Where the gradient tells the slope that the losses show, one probe makes a parabola."""

    def test_is_taken_after_ten_checks_and_then_but_for_one_measurement_in_ten(self):
        task = classification()
        opt = LQA(task.model.parameters(), every=1)
        forwards = []
        for step in range(40):
            opt.step(task.closure(step))
            forwards.append(opt.report.forwards)
        assert forwards == [4] + [3] * 10 + [2] * 9 + ([3] + [2] * 9) * 2

    @pytest.mark.parametrize(
        ("name", "forwards"), [("lqa", 2), ("lqa(adamw)", 2), ("lqa-paper", 3)]
    )
    def test_is_taken_along_any_direction_but_not_in_algorithm_1(self, name, forwards):
        task = classification()
        opt = CONFIGURATIONS[name](task.model.parameters())
        train(task, opt, range(30))
        assert opt.report.forwards == forwards

    @pytest.mark.parametrize(
        "build",
        [
            LQA,
            lambda params: LQA(params, direction="gradient", averaging=None),
            lambda params: LQA(params, direction="gradient"),
            lambda params: LQA(BASES["momentum"](params)),
            lambda params: LQA(BASES["adamw"](params), averaging="schedule-free"),
        ],
    )
    def test_finds_on_a_quadratic_what_two_find(self, build, monkeypatch):
        ends = []
        for two in (False, True):
            if two:
                take_two_probes(monkeypatch)
            problem = Quadratic.random(floor=0.0)
            opt = build([problem.theta])
            evaluations = 0
            for _ in range(100):
                opt.step(problem)
                evaluations += opt.report.forwards
            ends.append((problem.theta.detach(), evaluations))
        (one, fewer), (two, more) = ends
        assert fewer < more
        torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-9)

    @pytest.mark.parametrize("name", WITH_TRUST_REGION)
    @pytest.mark.parametrize("factor", [-1.0, 0.1, 3.0])
    def test_is_not_taken_where_gradients_are_not_those_of_the_loss(
        self, name, factor, monkeypatch
    ):
        """Then all is as with two probes, to the last bit."""
        ends = []
        for two in (False, True):
            if two:
                take_two_probes(monkeypatch)
            task = classification()
            opt = CONFIGURATIONS[name](task.model.parameters())
            for step in range(60):
                opt.step(scaled(task.closure(step), factor))
            counts = opt.report.counts
            assert sum(counts.values()) - counts.get(Reason.REUSED, 0) > 5
            ends.append(values(task.model))
        assert identical(*ends)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["lqa", "lqa(adamw)"])
    @pytest.mark.parametrize("factor", [0.75, 1.25])
    def test_a_slope_that_is_off_by_a_quarter_does_not_send_the_rate_away(
        self, name, factor, monkeypatch
    ):
        """In small batches, where the minimizer is damped, the curvature is off by it."""
        rates = []
        for two in (False, True):
            if two:
                take_two_probes(monkeypatch)
            task = classification()
            opt = CONFIGURATIONS[name](task.model.parameters())
            for step in range(600):
                opt.step(scaled(task.closure(step, size=4), factor))
            rates.append(opt.rate)
        one, two = rates
        assert 0.5 < one / two < 2.0

    @pytest.mark.filterwarnings("ignore:the closure calls backward:UserWarning")
    @pytest.mark.parametrize("name", WITH_TRUST_REGION)
    @pytest.mark.parametrize("runs_backward", [False, True])
    def test_is_not_taken_where_a_caller_had_the_gradients_in_hand(self, name, runs_backward):
        """Clipping puts a slope off now and then, and no check may see it."""
        task = classification()
        opt = CONFIGURATIONS[name](task.model.parameters())
        for step in range(40):
            closure = task.closure(step)
            if runs_backward:
                opt.step(clipped(task.model, closure))
            else:
                loss = backward_of(opt, closure)
                nn.utils.clip_grad_norm_(task.model.parameters(), 0.5)
                opt.step(closure, loss=loss)
            if opt.report.reason is not Reason.REUSED:
                assert opt.report.forwards >= 3

    @pytest.mark.parametrize(("foreach", "forwards"), [(False, 2), (True, 3)])
    def test_is_not_taken_where_the_base_writes_into_the_gradients(self, foreach, forwards):
        """As Nesterov's of torch does, whose gradients are gone when it has stepped."""
        task = classification()
        nesterov = partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, foreach=foreach)
        opt = LQA(nesterov(task.model.parameters()))
        train(task, opt, range(30))
        assert opt.report.forwards == forwards

    def test_trains_where_gradients_tell_another_slope_from_some_step_on(self, monkeypatch):
        """As where weights are rounded once they have been learned."""
        rates = []
        for two in (False, True):
            if two:
                take_two_probes(monkeypatch)
            task = classification()
            opt = LQA(task.model.parameters(), every=1)
            for step in range(200):
                opt.step(scaled(task.closure(step), 1.0 if step < 100 else 10.0))
            rates.append(opt.rate)
        one, two = rates
        assert one == pytest.approx(two, rel=0.2)
