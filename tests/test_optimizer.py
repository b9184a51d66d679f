import copy
import io
import math
import pickle
import warnings
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy
import pytest
import torch
from configurations import CONFIGURATIONS
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import (
    Quadratic,
    RecordingDropout,
    about_to_measure,
    classification,
    identical,
    noisy_classification,
    trains_without_a_trace,
    values,
)
from reference import algorithm_1
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call
from torch.nn import functional

from quadstep import LQA, Reason
from quadstep.averaging import ScheduleFree
from quadstep.optimizer import PATH
from quadstep.parabola import Agreement

BASES = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "nesterov": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True),
    "decayed": lambda params: torch.optim.SGD(params, lr=0.05, weight_decay=0.1),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.05),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.01),
    "adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
}


@pytest.fixture(params=CONFIGURATIONS)
def configuration(request):
    return CONFIGURATIONS[request.param]


def unwatched(reason=Reason.MINIMUM):
    """A search that leaves the rate alone: the wrapped optimizer must then be itself."""

    class Fixed:
        parabola = agreement = None

        def radius(self, rate):
            return rate

        def decide(self, rate, points):
            from quadstep.parabola import Decision

            return self, Decision(rate, rate, reason)

    return Fixed()


class TestTheRate:
    @settings(max_examples=50, deadline=None)
    @given(st.integers(0, 10**6), st.floats(-2, 2))
    def test_paper_is_the_exact_line_minimiser_for_any_delta0(self, seed, exponent):
        problem = Quadratic.random(seed=seed)
        theta = problem.theta.detach().clone()
        direction = problem.hessian @ (theta - problem.optimum)
        exact = problem.line_minimiser(theta, direction)
        opt = LQA.paper([problem.theta], delta0=exact * 10.0**exponent)
        opt.step(problem)
        assert opt.report.rate == pytest.approx(exact, rel=1e-9)
        assert opt.report.slope == pytest.approx(float(direction @ direction), rel=1e-9)

    @settings(max_examples=50, deadline=None)
    @given(st.integers(0, 10**6), st.floats(0.6, 1.0), st.sampled_from(["sgd", "momentum", "adam"]))
    def test_along_any_direction(self, seed, factor, name):
        """Within its clamp the first measured rate minimises the loss along the base's step."""
        problem = Quadratic.random(seed=seed)
        theta = problem.theta.detach().clone()
        clone = nn.Parameter(theta.clone())
        reference = BASES[name]([clone])
        problem.at(clone).backward()
        reference.step()
        exact = problem.line_minimiser(theta, theta - clone.detach()) * reference.defaults["lr"]
        base = BASES[name]([problem.theta])
        base.param_groups[0]["lr"] = exact / factor
        opt = LQA(base)
        opt.step(problem)
        assert opt.report.rate == pytest.approx(exact, rel=1e-9)
        assert opt.report.reason is Reason.MINIMUM
        assert base.param_groups[0]["lr"] == opt.report.rate

    def test_paper_on_a_quadratic_is_steepest_descent_with_exact_line_search(self):
        problem = Quadratic.random(floor=0.0)
        theta = problem.theta.detach().clone()
        opt = LQA.paper([problem.theta], delta0=0.1)
        for _ in range(40):
            gradient = problem.hessian @ (theta - problem.optimum)
            rate = problem.line_minimiser(theta, gradient)
            theta = theta - rate * gradient
            opt.step(problem)
            assert opt.report.rate == pytest.approx(rate, rel=1e-8)
            torch.testing.assert_close(problem.theta.data, theta, rtol=1e-8, atol=1e-8)

    def test_paper_equals_algorithm_1_written_plainly(self):
        task = classification(dtype=torch.float64)
        names = [name for name, _ in task.model.named_parameters()]

        def loss(theta, step):
            batch = torch.arange(step * 32, (step + 1) * 32) % 256
            parameters = dict(zip(names, theta, strict=True))
            logits = functional_call(task.model, parameters, (task.inputs[batch],))
            return functional.cross_entropy(logits, task.labels[batch])

        start = [p.detach().clone() for p in task.model.parameters()]
        expected, rates = algorithm_1(loss, start, 0.1, 50)
        opt = LQA.paper(task.model.parameters(), delta0=0.1)
        measured = []
        for step in range(50):
            opt.step(task.closure(step))
            measured.append(opt.report.rate)
        assert measured == pytest.approx(rates, rel=1e-12)
        torch.testing.assert_close(list(task.model.parameters()), expected, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("start", [1e-12, 1e-3, 1e3, 1e6, 1e12])
    @pytest.mark.parametrize(
        "build",
        [
            lambda params, start: LQA(params, delta0=start),
            lambda params, start: LQA(params, direction="sgd", delta0=start),
            lambda params, start: LQA(torch.optim.AdamW(params, lr=start)),
        ],
        ids=["lqa-auto", "lqa", "lqa(adamw)"],
    )
    def test_recovers_from_any_rate_within_100_steps(self, build, start):
        task = classification()
        opt = build(task.model.parameters(), start)
        first = task.closure(0, 256)().item()
        for step in range(100):
            opt.step(task.closure(step))
        opt.eval()
        last = task.closure(0, 256)().item()
        assert last < 0.8 * first
        assert 1e-4 < opt.rate < 10.0

    def test_a_plateau_does_not_throw_the_weights_away(self):
        """Small weights in a deep network: hardly any slope, a vertex far beyond the probes."""
        torch.manual_seed(0)
        task = classification(
            nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
        )
        with torch.no_grad():
            for param in task.model.parameters():
                param.mul_(0.05)
        opt = LQA(task.model.parameters(), direction="sgd")
        for step in range(1000):
            opt.step(task.closure(step))
        # Gradient descent at a rate of 0.1 is still at 1.08.
        assert task.closure(0, 256)().item() < 0.6

    @pytest.mark.parametrize("name", ["momentum", "adam"])
    def test_noise_along_a_momentum_direction_does_not_run_away(self, name):
        """Every batch promises a decrease along a direction made from it; others see a rise."""
        torch.manual_seed(0)
        model, labels = nn.Linear(64, 4), torch.randint(4, (2048,))
        inputs = torch.randn(2048, 64)
        opt = LQA(BASES[name](model.parameters()))
        for batch in torch.randint(2048, (1000, 16)):
            opt.step(
                lambda batch=batch: functional.cross_entropy(model(inputs[batch]), labels[batch])
            )
        assert functional.cross_entropy(model(inputs), labels).item() < 3.0

    @pytest.mark.parametrize("number", [numpy.float32, numpy.float64, numpy.int64])
    def test_the_first_rate_may_be_any_number(self, number):
        task = classification()
        opt = LQA(task.model.parameters(), delta0=number(1), weight_decay=number(0))
        opt.step(task.closure())
        assert opt.report.rate <= 3.0

    def test_several_groups_keep_the_ratios_of_their_rates(self):
        task = classification()
        first, last = task.model[0], task.model[2]
        opt = LQA(
            [{"params": first.parameters()}, {"params": last.parameters(), "lr": 1e-5}], delta0=1e-4
        )
        for step in range(30):
            opt.step(task.closure(step))
        rates = [group["lr"] for group in opt.param_groups]
        assert rates[0] == opt.report.rate != 1e-4
        assert rates[1] == pytest.approx(0.1 * rates[0])

    @pytest.mark.parametrize("every", [4.0, numpy.int64(4), 10**30])
    def test_any_whole_number_says_how_often_to_measure(self, every):
        task = classification()
        opt = LQA(task.model.parameters(), every=every)
        for step in range(100):
            opt.step(task.closure(step))
        held = opt.report.counts[Reason.HELD]
        assert held > 40
        # What is kept between two measurements does not grow with the time between them.
        assert len(opt.state_dict()["param_groups"][0]["lqa"]["path"]) == min(every, PATH)

    def test_reports_what_was_measured(self):
        task = classification()
        opt = LQA(task.model.parameters(), every=4)
        assert math.isnan(opt.report.loss)
        assert (opt.report.reason, opt.report.counts) == (Reason.INITIAL, {})
        for step in range(80):
            loss = opt.step(task.closure(step))
        report = opt.report
        assert report.loss == loss.item()
        assert report.rate == opt.param_groups[0]["lr"]
        assert sum(report.counts.values()) == 80
        assert report.counts[Reason.HELD] > 40
        while opt.report.reason is Reason.HELD:
            assert (opt.report.forwards, opt.report.backwards) == (1, 1)
            opt.step(task.closure())
        assert (opt.report.forwards, opt.report.backwards) == (2, 1)
        with pytest.raises(AttributeError):
            report.rate = 1.0


def heedless(opt: LQA) -> LQA:
    """Makes each measurement take two probes, whatever gradients tell."""
    opt._search = replace(opt._search, agreement=Agreement(checks=-(10**9)))
    return opt


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
        assert opt.report.counts[Reason.NOISE] == 1, "which is no check"
        assert forwards == [4] + [3] * 10 + [2] * 9 + ([3] + [2] * 9) * 2

    @pytest.mark.parametrize(
        ("name", "forwards"), [("lqa", 2), ("lqa(adamw)", 2), ("lqa-paper", 3)]
    )
    def test_is_taken_along_any_direction_but_not_in_algorithm_1(self, name, forwards):
        task = classification()
        opt = CONFIGURATIONS[name](task.model.parameters())
        for step in range(30):
            opt.step(task.closure(step))
        assert opt.report.forwards == forwards

    @pytest.mark.parametrize(
        "build",
        [
            LQA,
            lambda params: LQA(params, direction="sgd"),
            lambda params: LQA(params, direction="sgd", averaging="schedule-free"),
            lambda params: LQA(BASES["momentum"](params)),
            lambda params: LQA(BASES["adamw"](params), averaging="schedule-free"),
        ],
    )
    def test_finds_on_a_quadratic_what_two_find(self, build):
        ends = []
        for change in (lambda opt: opt, heedless):
            problem = Quadratic.random(floor=0.0)
            opt = change(build([problem.theta]))
            evaluations = 0
            for _ in range(100):
                opt.step(problem)
                evaluations += opt.report.forwards
            ends.append((problem.theta.detach(), evaluations))
        (one, fewer), (two, more) = ends
        assert fewer < more
        torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-9)

    @pytest.mark.parametrize("name", ["lqa-auto", "lqa", "lqa(adamw)"])
    @pytest.mark.parametrize("factor", [-1.0, 0.1, 3.0])
    def test_is_not_taken_where_gradients_are_not_those_of_the_loss(self, name, factor):
        """Then all is as with two probes, to the last bit."""
        tasks = [classification(), classification()]
        opts = [CONFIGURATIONS[name](task.model.parameters()) for task in tasks]
        heedless(opts[1])
        for step in range(60):
            for task, opt in zip(tasks, opts, strict=True):
                opt.step(scaled(task.closure(step), factor))
        assert opts[0]._measured > 5
        assert identical(values(tasks[0].model), values(tasks[1].model))

    @pytest.mark.parametrize("name", ["lqa", "lqa(adamw)"])
    @pytest.mark.parametrize("factor", [0.75, 1.25])
    def test_a_slope_that_is_off_by_a_quarter_does_not_send_the_rate_away(self, name, factor):
        """In small batches, where a share of the vertex is believed, the curvature is off by it."""
        rates = []
        for change in (lambda opt: opt, heedless):
            task = classification()
            opt = change(CONFIGURATIONS[name](task.model.parameters()))
            for step in range(600):
                opt.step(scaled(task.closure(step, size=4), factor))
            rates.append(opt.rate)
        one, two = rates
        assert 0.5 < one / two < 2.0

    @pytest.mark.filterwarnings("ignore:the closure calls backward:UserWarning")
    @pytest.mark.parametrize("name", ["lqa-auto", "lqa", "lqa(adamw)"])
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
                opt.zero_grad()
                loss = closure()
                loss.backward()
                nn.utils.clip_grad_norm_(task.model.parameters(), 0.5)
                opt.step(closure, loss=loss)
            if opt.report.reason is not Reason.HELD:
                assert opt.report.forwards >= 3

    @pytest.mark.parametrize(("foreach", "forwards"), [(False, 2), (True, 3)])
    def test_is_not_taken_where_the_base_writes_into_the_gradients(self, foreach, forwards):
        """As Nesterov's of torch does, whose gradients are gone when it has stepped."""
        task = classification()
        nesterov = partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, foreach=foreach)
        opt = LQA(nesterov(task.model.parameters()))
        for step in range(30):
            opt.step(task.closure(step))
        assert opt.report.forwards == forwards

    def test_trains_where_gradients_tell_another_slope_from_some_step_on(self):
        """As where weights are rounded once they have been learned."""
        rates = []
        for change in (lambda opt: opt, heedless):
            task = classification()
            opt = change(LQA(task.model.parameters(), every=1))
            for step in range(200):
                opt.step(scaled(task.closure(step), 1.0 if step < 100 else 10.0))
            rates.append(opt.rate)
        one, two = rates
        assert one == pytest.approx(two, rel=0.2)


class TestRhythm:
    @pytest.mark.parametrize("beats", [2, 3, 5, 10, 11])
    def test_measurements_meet_every_beat_alike(self, beats):
        task = classification()
        opt = LQA(task.model.parameters())
        met = Counter()
        for step in range(2000):
            opt.step(task.closure(step))
            if step > 200:
                met[step % beats] += opt.report.reason is not Reason.HELD
        assert min(met.values()) > 0.6 * max(met.values())

    @pytest.mark.parametrize("every", [1, 4])
    def test_the_interval_is_the_one_asked_for_or_one_less(self, every):
        task = classification()
        opt = LQA(task.model.parameters(), every=every)
        intervals, since = Counter(), 0
        for step in range(300):
            opt.step(task.closure(step))
            since += 1
            if opt.report.reason is not Reason.HELD:
                intervals[since] += step > 200
                since = 0
        expected = {1} if every == 1 else {every - 1, every}
        assert {interval for interval, count in intervals.items() if count} == expected


class TestNoise:
    """Where every step sees the same losses, the fast iterate of the default steps further."""

    def test_losses_of_all_the_data_are_quiet(self):
        task = classification()
        opt = LQA(task.model.parameters())
        stretches = [1.0]
        for _ in range(400):
            opt.step(task.closure(size=len(task.inputs)))
            stretches.append(opt._averaging.stretch)
        assert max(stretches) == 3.0

    def test_batches_are_not_and_change_nothing(self):
        tasks = classification(), classification()
        opts = [LQA(task.model.parameters()) for task in tasks]
        opts[1]._averaging = ScheduleFree(furthest=1.0)
        for step in range(400):
            for opt, task in zip(opts, tasks, strict=True):
                opt.step(task.closure(step, size=16))
            assert opts[0]._averaging.stretch == 1.0
        assert identical(*(values(task.model) for task in tasks))

    def test_a_probe_that_is_not_finite_says_nothing_of_noise(self):
        task = classification()
        opt = LQA(task.model.parameters())
        size = len(task.inputs)
        while opt._averaging.stretch < 2.0 or opt._wait:
            opt.step(task.closure(size=size))
        known, stretch = opt._search.noise, opt._averaging.stretch
        calls = []

        def closure():
            calls.append(None)
            return task.closure(size=size)() * (1.0 if len(calls) == 1 else math.inf)

        opt.step(closure)
        assert opt.report.reason is Reason.NON_FINITE
        assert (opt._search.noise, opt._averaging.stretch) == (known, stretch)

    def test_a_narrow_valley_is_followed_faster(self):
        left = []
        turn = torch.linalg.qr(torch.arange(400, dtype=torch.float64).reshape(20, 20).sin()).Q
        hessian = turn @ torch.logspace(-4, 0, 20, dtype=torch.float64).diag() @ turn.T
        for furthest in (1.0, 3.0):
            theta = nn.Parameter(torch.ones(20, dtype=torch.float64))
            valley = Quadratic(hessian, torch.zeros_like(theta), 0.0, theta)
            opt = LQA([theta])
            opt._averaging = ScheduleFree(furthest=furthest)
            for _ in range(600):
                opt.step(valley)
            opt.eval()
            left.append(valley().item())
        assert left[1] < 0.6 * left[0]

    @pytest.mark.parametrize("stop", [245, 253, 260])
    def test_resumes_bit_for_bit(self, stop):
        whole, part, resumed = classification(), classification(), classification()
        opt, first = LQA(whole.model.parameters()), LQA(part.model.parameters())
        for _ in range(stop):
            opt.step(whole.closure(size=len(whole.inputs)))
            first.step(part.closure(size=len(part.inputs)))
        assert first._averaging.stretch > 1.0
        resumed.model.load_state_dict(part.model.state_dict())
        second = LQA(resumed.model.parameters())
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        for _ in range(60):
            opt.step(whole.closure(size=len(whole.inputs)))
            second.step(resumed.closure(size=len(resumed.inputs)))
        opt.eval()
        second.eval()
        assert identical(values(whole.model), values(resumed.model))


class TestWrapping:
    @pytest.mark.parametrize("name", BASES)
    def test_with_the_rate_forced_the_base_is_itself(self, name):
        """Dropout, batch normalisation, state and all: probing changes nothing."""
        plain, wrapped = noisy_classification(torch.float64), noisy_classification(torch.float64)
        base = BASES[name](plain.model.parameters())
        opt = LQA(BASES[name](wrapped.model.parameters()))
        opt._search = unwatched()
        for step in range(20):
            torch.manual_seed(step)
            base.zero_grad()
            plain.closure(step)().backward()
            base.step()
            drawn = torch.rand(())
            torch.manual_seed(step)
            opt.step(wrapped.closure(step))
            assert torch.equal(torch.rand(()), drawn)
        torch.testing.assert_close(values(wrapped.model), values(plain.model), rtol=0, atol=1e-12)
        for own, other in zip(base.state.values(), opt.state.values(), strict=True):
            for key, value in own.items():
                torch.testing.assert_close(other[key], value, rtol=0, atol=1e-12)

    @pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch without Muon")
    def test_muon(self):
        plain, wrapped = (nn.Linear(6, 4, bias=False).double() for _ in range(2))
        wrapped.load_state_dict(plain.state_dict())
        inputs = torch.randn(32, 6, dtype=torch.float64)
        base = torch.optim.Muon(plain.parameters(), lr=0.01)
        opt = LQA(torch.optim.Muon(wrapped.parameters(), lr=0.01))
        opt._search = unwatched()
        for _ in range(10):
            base.zero_grad()
            plain(inputs).square().mean().backward()
            base.step()
            opt.step(lambda: wrapped(inputs).square().mean())
        torch.testing.assert_close(wrapped.weight, plain.weight, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("every", [1, 5])
    def test_the_state_of_the_base_advances_once_a_step(self, every):
        task = classification()
        base = torch.optim.Adam(task.model.parameters())
        opt = LQA(base, every=every)
        for step in range(12):
            opt.step(task.closure(step))
        assert {int(state["step"]) for state in base.state.values()} == {12}
        assert opt.state is base.state
        assert opt.param_groups is base.param_groups

    def test_averages_along_another_optimizer(self):
        task = classification()
        opt = LQA(torch.optim.SGD(task.model.parameters(), lr=0.01), averaging="schedule-free")
        for step in range(100):
            opt.step(task.closure(step))
        opt.eval()
        assert task.closure(0, 256)().item() < 0.7


class TestNumbersOfNumpy:
    @pytest.mark.parametrize(
        "build",
        [
            lambda p: LQA(
                p, delta0=numpy.float32(1e-4), every=numpy.int64(5), weight_decay=numpy.float64(0)
            ),
            lambda p: LQA(
                [{"params": p, "lr": numpy.float64(1e-4), "weight_decay": numpy.int8(0)}]
            ),
            lambda p: LQA(
                torch.optim.AdamW(
                    p,
                    lr=numpy.float64(1e-3),
                    betas=(numpy.float64(0.9), numpy.float64(0.99)),
                    weight_decay=numpy.float64(0.1),
                )
            ),
            lambda p: LQA.paper(p, delta0=numpy.float64(0.1)),
        ],
    )
    @pytest.mark.parametrize("steps", [0, 3])
    def test_are_pythons_in_checkpoints(self, build, steps):
        task = classification()
        first, *others = task.model.parameters()
        opt = build([first])
        opt.add_param_group({"params": others, "lr": numpy.float64(1e-4)})
        for step in range(steps):
            opt.step(task.closure(step))
        file = io.BytesIO()
        torch.save(opt.state_dict(), file)
        file.seek(0)
        build([first]).state_dict()
        assert torch.load(file, weights_only=True)["param_groups"][1]["lr"] > 0.0


@pytest.mark.parametrize("make", [LQA, LQA.paper])
def test_no_lr_may_be_passed(make):
    task = classification()
    opt = make(task.model.parameters(), lr=None)
    opt.add_param_group({"params": nn.Linear(2, 2).parameters(), "lr": None})
    opt.step(task.closure())


class TestWrappingKnowsWhatItWraps:
    def test_trying_a_step_leaves_no_trace(self):
        task = classification()
        calls = []

        class Noisy(torch.optim.SGD):
            def step(self, closure=None):
                calls.append(torch.rand(()))
                for group in self.param_groups:
                    group["steps"] = group.get("steps", 0) + 1
                return super().step(closure)

        base = Noisy(task.model.parameters(), lr=0.1)
        base.register_step_pre_hook(lambda *_: calls.append("hook"))
        torch.optim.lr_scheduler.StepLR(base, 1)
        before, random = values(task.model), torch.get_rng_state()
        LQA(base)
        assert len(calls) == 1
        assert "steps" not in base.param_groups[0]
        assert not base.state
        assert torch.equal(random, torch.get_rng_state())
        assert identical(before, values(task.model))


SCHEDULERS = {
    "exponential": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
    "warm-up": lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.01, total_iters=20),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(
        o, 1.0, total_steps=100, cycle_momentum=False
    ),
    "swa": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.5),
    "restarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.ConstantLR(o, 0.1, total_iters=5),
            torch.optim.lr_scheduler.ExponentialLR(o, 0.5),
        ],
        milestones=[5],
    ),
}


def test_optimizers_that_pass_modes_on_are_judged_by_what_they_wrap():
    class Passing(Rated):
        def __init__(self, optimizer):
            self.optimizer = optimizer
            super().__init__(optimizer.param_groups)

        def train(self):
            pass

        def eval(self):
            pass

    params = [nn.Parameter(torch.ones(3))]
    assert LQA(Passing(torch.optim.SGD(params, lr=0.1))).rate == 0.1
    with pytest.raises(TypeError, match="modes of its own"):
        LQA(Passing(Averaging(params)))


def test_groups_may_go_and_come(configuration):
    task = classification()
    first, last = task.model[0], task.model[2]
    opt = configuration([{"params": first.parameters()}, {"params": last.parameters()}])
    for step in range(5):
        opt.step(task.closure(step))
    gone = opt.param_groups.pop()
    for step in range(5):
        opt.step(task.closure(step))
    opt.param_groups.append(gone | {"lr": opt.rate, "measured_lr": opt.rate})
    for step in range(5):
        opt.step(task.closure(step))
    assert opt.param_groups[0]["lr"] == pytest.approx(opt.param_groups[1]["lr"])


def test_numbers_of_numpy_that_are_written_later_are_pythons_in_checkpoints():
    opt = LQA(classification().model.parameters())
    opt.param_groups[0]["weight_decay"] = numpy.float64(0.1)
    decays = numpy.linspace(0.0, 1.0, 3)
    opt.param_groups[0]["schedule"] = {"decays": decays, "at": [numpy.int64(3)]}
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    group = torch.load(file, weights_only=True)["param_groups"][0]
    assert group["schedule"] == {"decays": [0.0, 0.5, 1.0], "at": [3]}


def test_a_step_without_a_closure_is_named_at_a_rate_of_zero():
    task = classification()
    opt = LQA(task.model.parameters())
    opt.param_groups[0]["lr"] = 0.0
    task.closure()().backward()
    with pytest.raises(TypeError, match=r"step\(\) needs a closure"):
        opt.step()


LR_MESSAGE = (
    r"^lr was set to \S+ from outside, as a learning-rate scheduler does, and is ignored: LQA "
    r"measures the rate, which stays at \S+; leave the scheduler out$"
)


class TestRatesFromOutside:
    """The rate is the optimizer's own: what others write into lr is ignored, with one warning."""

    @pytest.mark.parametrize("scheduler", SCHEDULERS)
    @pytest.mark.parametrize("cadence", [1, 8])
    def test_of_a_scheduler_are_ignored(self, configuration, scheduler, cadence):
        plain, scheduled = classification(), classification()
        opts = [configuration(task.model.parameters()) for task in (plain, scheduled)]

        def train():
            schedule = SCHEDULERS[scheduler](opts[1])
            for step in range(40):
                opts[0].step(plain.closure(step))
                opts[1].step(scheduled.closure(step))
                assert opts[1].param_groups[0]["lr"] == opts[0].rate
                if step % cadence == cadence - 1:
                    schedule.step()
                    assert opts[1].rate == opts[0].rate

        with pytest.warns(UserWarning, match=LR_MESSAGE) as caught:
            train()
        (warning,) = caught
        assert warning.filename == __file__
        assert identical(values(plain.model), values(scheduled.model))

    @pytest.mark.parametrize("loss_given", [False, True])
    def test_written_by_hand_are_ignored_at_any_time(self, configuration, loss_given):
        plain, meddled = classification(), classification()
        opts = [configuration(task.model.parameters()) for task in (plain, meddled)]

        def train():
            for step in range(30):
                for opt, task in zip(opts, (plain, meddled), strict=True):
                    loss = None
                    if loss_given:
                        opt.zero_grad()
                        loss = task.closure(step)()
                        loss.backward()
                    opt.step(task.closure(step), loss=loss)
                if step in (0, 17):
                    opts[1].param_groups[0]["lr"] = 10.0

        with pytest.warns(UserWarning, match=LR_MESSAGE) as caught:
            train()
        assert len(caught) == 1
        assert identical(values(plain.model), values(meddled.model))

    def test_are_no_part_of_a_checkpoint(self, configuration):
        task = classification()
        opt = configuration(task.model.parameters())
        for step in range(12):
            opt.step(task.closure(step))
        opt.param_groups[0]["lr"] = 10.0
        with pytest.warns(UserWarning, match=LR_MESSAGE):
            state = copy.deepcopy(opt.state_dict())
        other = configuration(copy.deepcopy(task).model.parameters())
        other.load_state_dict(state)
        assert other.rate == opt.rate != 10.0

    def test_of_tensors_are_ignored_and_the_tensors_kept(self):
        task = classification()
        rate = torch.tensor(0.01)
        opt = LQA(torch.optim.AdamW(task.model.parameters(), lr=rate, foreach=False))
        for step in range(20):
            opt.step(task.closure(step))
        assert opt.param_groups[0]["lr"] is rate
        assert opt.rate == rate.item() != 0.01
        measured = opt.rate
        rate.fill_(3.0)
        with pytest.warns(UserWarning, match=LR_MESSAGE):
            opt.step(task.closure())
        assert opt.rate < 2.0 * measured

    def test_a_schedule_that_changes_nothing_is_no_news(self, configuration):
        task = classification()
        opt = configuration(task.model.parameters())
        kept = torch.optim.lr_scheduler.MultiplicativeLR(opt, lambda step: 1.0)
        for step in range(30):
            opt.step(task.closure(step))
            kept.step()

    def test_exceptions_that_are_caught_are_no_scheduler(self, configuration):
        task = classification()
        opt = configuration(task.model.parameters())

        def failing():
            raise ZeroDivisionError

        for _ in range(30):
            with pytest.raises(ZeroDivisionError):
                opt.step(failing)
        for step in range(5):
            opt.step(task.closure(step))


class TestNoTrace:
    def test_the_three_evaluations_see_one_dropout_mask(self, configuration):
        dropout = RecordingDropout()
        masks = dropout.masks
        task = classification(nn.Linear(8, 16), nn.Softplus(), dropout, nn.Linear(16, 3))
        opt = configuration(task.model.parameters())
        for step in range(3):
            masks.clear()
            opt.step(task.closure(step))
            # The first measurement looks twice whether the closure repeats itself.
            assert len(masks) == (4 if step == 0 else 3)
            assert all(torch.equal(masks[0], mask) for mask in masks)
        previous = masks[0]
        opt.step(task.closure())
        assert not torch.equal(masks[-1], previous)

    def test_buffers_and_random_numbers_are_those_of_a_plain_step(self, configuration):
        probed = trains_without_a_trace(configuration, lambda opt, closure: opt.step(closure))
        assert probed.model[1].num_batches_tracked == 5

    def test_gradients_stay_those_of_the_gradient_pass(self):
        probed, plain = classification(), classification()
        opt = LQA(probed.model.parameters())
        plain.closure()().backward()
        opt.step(probed.closure())
        assert identical(
            [p.grad for p in plain.model.parameters()], [p.grad for p in probed.model.parameters()]
        )

    @pytest.mark.parametrize("failing", [1, 2, 3])
    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_an_exception_undoes_the_step(self, configuration, failing, error):
        task, opt = about_to_measure(configuration)
        before, random = values(task.model), torch.get_rng_state()
        calls = 0

        def closure():
            nonlocal calls
            calls += 1
            loss = task.closure()()
            if calls == failing:
                raise error("injected")
            return loss

        with pytest.raises(error, match="injected"):
            opt.step(closure)
        assert identical(before, values(task.model))
        assert torch.equal(random, torch.get_rng_state())
        opt.step(task.closure())
        assert not identical(before, values(task.model))

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    @pytest.mark.parametrize("failing", [1, 2, 3])
    def test_a_non_finite_loss_undoes_the_step(self, configuration, failing, bad):
        task, opt = about_to_measure(configuration)
        before, random = values(task.model), torch.get_rng_state()
        calls = 0

        def closure():
            nonlocal calls
            calls += 1
            loss = task.closure()()
            return loss * bad if calls == failing else loss

        opt.step(closure)
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
        ("size", "reason"), [(1e-30, Reason.NOISE), (1e20, Reason.NOISE), (0.0, Reason.HELD)]
    )
    def test_gradients_count_whose_squares_are_beyond_their_type(self, size, reason):
        param = nn.Parameter(torch.ones(3))
        opt = LQA([param], direction="sgd", delta0=1e-10)
        opt.step(lambda: size * param.sum() + 1.0)
        assert opt.report.reason is reason

    @pytest.mark.parametrize("name", ["lqa", "lqa-auto"])
    def test_steps_without_a_gradient_might_as_well_not_be_taken(self, name):
        """At the start flat lines would send the first rate out, and later shift the averages."""
        plain, broken = classification(), classification()
        opts = [CONFIGURATIONS[name](task.model.parameters()) for task in (plain, broken)]
        for step in range(120):
            for _ in range(30 if step == 0 else step % 3):
                opts[1].step(lambda: 0.0 * broken.closure()())
                assert opts[1].report.reason is Reason.HELD
                assert opts[1].report.forwards == 1
            for opt, task in zip(opts, (plain, broken), strict=True):
                opt.step(task.closure(step))
        assert identical(values(plain.model), values(broken.model))
        assert opts[0].rate == opts[1].rate
        if name == "lqa-auto":
            assert opts[0].report.counts[Reason.HELD] > 30

    def test_a_wrapped_optimizer_steps_without_a_gradient_as_it_would_by_itself(self):
        """Momentum coasts and weights decay, at the rate in force, which nothing measures."""
        task = classification()
        settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
        opt = LQA(torch.optim.SGD(task.model.parameters(), **settings))
        for step in range(5):
            opt.step(task.closure(step))
        alone = copy.deepcopy(task.model)
        base = torch.optim.SGD(alone.parameters(), **settings)
        base.load_state_dict(copy.deepcopy(opt._direction.base.state_dict()))
        for _ in range(5):
            opt.step(lambda: 0.0 * task.closure()())
            assert opt.report.reason is Reason.HELD
            base.zero_grad()
            (0.0 * functional.cross_entropy(alone(task.inputs), task.labels)).backward()
            base.step()
        assert identical(values(task.model), values(alone))

    def test_held_steps_survive_a_non_finite_loss(self):
        task = noisy_classification()
        opt = LQA(task.model.parameters())
        while not opt._wait:
            opt.step(task.closure())
        before = values(task.model)
        opt.step(lambda: task.model(task.inputs * math.nan).mean())
        assert opt.report.reason is Reason.NON_FINITE
        assert identical(before, values(task.model))


class TestClosures:
    def test_two_phases_equal_one(self, configuration):
        one, two = classification(dtype=torch.float64), classification(dtype=torch.float64)
        single, double = (configuration(task.model.parameters()) for task in (one, two))
        for step in range(15):
            single.step(one.closure(step))
            double.zero_grad()
            loss = two.closure(step)()
            loss.backward()
            double.step(two.closure(step), loss=loss)
        assert identical(values(one.model), values(two.model))
        assert double.report.backwards == 0

    def test_two_phases_probe_under_one_dropout_mask(self):
        task = noisy_classification()
        opt = LQA(task.model.parameters(), direction="sgd")
        opt.step(task.closure())
        loss = task.closure()()
        opt.zero_grad()
        loss.backward()
        buffers, random = [b.clone() for b in task.model.buffers()], torch.get_rng_state()
        opt.step(task.closure(), loss=loss)
        assert opt.report.forwards == 3
        assert identical(buffers, list(task.model.buffers()))
        assert torch.equal(random, torch.get_rng_state())

    def test_two_phases_leave_the_buffers_alone_from_the_first_step_on(self):
        probed, plain = noisy_classification(), noisy_classification()
        opt = LQA(probed.model.parameters())
        for step in range(3):
            plain.model.load_state_dict(probed.model.state_dict())
            torch.manual_seed(step)
            plain.closure(step)()
            torch.manual_seed(step)
            opt.zero_grad()
            loss = probed.closure(step)()
            loss.backward()
            opt.step(probed.closure(step), loss=loss)
            assert identical(list(plain.model.buffers()), list(probed.model.buffers()))

    @pytest.mark.filterwarnings("ignore:the closure calls backward:UserWarning")
    def test_a_closure_that_runs_backward_adds_to_what_was_accumulated(self, configuration):
        whole, parts = classification(dtype=torch.float64), classification(dtype=torch.float64)
        expected, opt = (configuration(task.model.parameters()) for task in (whole, parts))
        for step in range(12):
            expected.zero_grad()
            whole.closure(step + 100)().backward()
            loss = whole.closure(step)()
            loss.backward()
            expected.step(whole.closure(step), loss=loss)

            def closure(step=step):
                loss = parts.closure(step)()
                loss.backward()
                return loss

            opt.zero_grad()
            parts.closure(step + 100)().backward()
            opt.step(closure)
        assert identical(values(whole.model), values(parts.model))

    @pytest.mark.filterwarnings("ignore:gradients were in place:UserWarning")
    def test_what_was_accumulated_is_cleared_for_a_closure_that_only_runs_forward(
        self, configuration
    ):
        cleared, left = classification(dtype=torch.float64), classification(dtype=torch.float64)
        expected, opt = (configuration(task.model.parameters()) for task in (cleared, left))
        for step in range(12):
            expected.step(cleared.closure(step))
            left.closure(step + 100)().backward()
            opt.step(left.closure(step))
        assert identical(values(cleared.model), values(left.model))

    @pytest.mark.filterwarnings("ignore:the closure calls backward:UserWarning")
    @pytest.mark.parametrize("runs_backward", [True, False])
    def test_what_the_last_step_left_is_cleared(self, configuration, runs_backward):
        cleared, left = classification(dtype=torch.float64), classification(dtype=torch.float64)
        expected, opt = (configuration(task.model.parameters()) for task in (cleared, left))
        for step in range(12):
            expected.step(cleared.closure(step))

            def closure(step=step):
                loss = left.closure(step)()
                if runs_backward:
                    loss.backward()
                return loss

            if step == 5:
                with pytest.raises(ZeroDivisionError):
                    opt.step(lambda closure=closure: closure() / (1 // 0))
            opt.step(closure)
        assert identical(values(cleared.model), values(left.model))

    @pytest.mark.parametrize("set_to_none", [True, False])
    def test_a_closure_that_runs_backward_is_warned_of_once_and_works(
        self, configuration, set_to_none
    ):
        quiet, loud = classification(dtype=torch.float64), classification(dtype=torch.float64)
        expected, opt = (configuration(t.model.parameters()) for t in (quiet, loud))

        def closure(step):
            def run():
                opt.zero_grad(set_to_none=set_to_none)
                loss = loud.closure(step)()
                loss.backward()
                return loss

            return run

        for step in range(12):
            expected.step(quiet.closure(step))
            if step == 0:
                message = r"closure calls backward\(\) itself"
                with pytest.warns(UserWarning, match=message) as caught:
                    opt.step(closure(step))
                assert caught[0].filename == __file__
            else:
                opt.step(closure(step))
        assert identical(values(quiet.model), values(loud.model))
        assert opt.report.backwards == opt.report.forwards

    def test_parameters_without_gradient_stay(self, configuration):
        task = classification()
        unused = nn.Parameter(torch.ones(3))
        frozen = task.model[0].bias.requires_grad_(False)
        before = frozen.clone()
        opt = configuration([*task.model.parameters(), unused])
        for step in range(12):
            opt.step(task.closure(step))
        opt.eval()
        opt.train()
        assert torch.equal(unused, torch.ones(3))
        assert torch.equal(frozen, before)

    def test_complex_parameters(self, configuration):
        torch.manual_seed(0)
        target = torch.randn(5, dtype=torch.complex128)
        theta = nn.Parameter(torch.randn(5, dtype=torch.complex128))
        opt = configuration([theta])
        start = (theta - target).abs().square().sum().item()
        for _ in range(300):
            opt.step(lambda: (theta - target).abs().square().sum() + 1.0)
        opt.eval()
        assert (theta - target).abs().square().sum().item() < 1e-2 * start

    def test_empty_groups(self, configuration):
        task = classification()
        opt = configuration([{"params": []}, {"params": task.model.parameters()}])
        for step in range(3):
            opt.step(task.closure(step))
        assert opt.report.loss > 0.0

    def test_sparse_gradients_through_an_optimizer_that_takes_them(self):
        torch.manual_seed(0)
        table = nn.Embedding(10, 3, sparse=True)
        opt = LQA(torch.optim.SparseAdam(table.parameters(), lr=0.01))
        index = torch.tensor([1, 3, 3])
        untouched = table.weight[5].clone()
        for _ in range(200):
            opt.step(lambda: table(index).square().sum())
        assert table(index).square().sum() < 1e-2
        assert torch.equal(table.weight[5], untouched)

    def test_derivatives_may_be_taken_in_the_closure(self, configuration):
        """As of a differential equation: forward passes without gradients cannot."""
        task = classification(dtype=torch.float64)
        inputs = task.inputs[:32].requires_grad_()
        eager = copy.deepcopy(task)
        opts = [configuration(each.model.parameters()) for each in (task, eager)]

        def residual(model):
            (slopes,) = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
            return (slopes.sum(1) - inputs.detach().sum(1)).square().mean()

        for _ in range(15):
            opts[0].step(lambda: residual(task.model))
            opts[1].step(torch.enable_grad()(lambda: residual(eager.model)))
        assert identical(values(task.model), values(eager.model))

    def test_activations_may_be_hooked(self, configuration):
        seen = []
        task = classification()
        task.model[1].register_forward_hook(lambda *_: _[-1].register_hook(seen.append) and None)
        opt = configuration(task.model.parameters())
        for _ in range(5):
            opt.step(task.closure())
        assert len(seen) == 5

    def test_any_other_error_in_a_probe_is_the_callers(self):
        task, calls = classification(), []

        def closure():
            calls.append(None)
            if len(calls) == 2:
                raise RuntimeError("out of luck")
            return task.closure()()

        with pytest.raises(RuntimeError, match="out of luck"):
            LQA(task.model.parameters()).step(closure)
        assert len(calls) == 2

    def test_the_loss_may_have_one_element_in_any_shape(self):
        task = classification()
        opt = LQA(task.model.parameters())
        assert opt.step(lambda: task.closure()().reshape(1)).shape == (1,)

    @pytest.mark.filterwarnings("ignore:the closure calls backward:UserWarning")
    def test_a_closure_may_return_the_same_tensor_each_time(self, configuration):
        plain, replayed = classification(dtype=torch.float64), classification(dtype=torch.float64)
        opts = [configuration(task.model.parameters()) for task in (plain, replayed)]
        static = torch.zeros((), dtype=torch.float64)
        for step in range(15):

            def closure(step=step):
                for param in replayed.model.parameters():
                    param.grad = None
                loss = replayed.closure(step)()
                loss.backward()
                return static.copy_(loss.detach())

            losses = opts[0].step(plain.closure(step)), opts[1].step(closure)
            assert identical(*([loss.clone()] for loss in losses))
            assert opts[0].report.rate == opts[1].report.rate
        assert identical(values(plain.model), values(replayed.model))

    def test_compiled_models(self):
        task = classification()
        eager = copy.deepcopy(task)
        compiled = torch.compile(task.model, backend="aot_eager")
        opt, reference = LQA(task.model.parameters()), LQA(eager.model.parameters())
        inputs, labels = task.inputs, task.labels
        for _ in range(6):
            opt.step(lambda: functional.cross_entropy(compiled(inputs), labels))
            reference.step(lambda: functional.cross_entropy(eager.model(inputs), labels))
        torch.testing.assert_close(values(task.model), values(eager.model))

    # Torch's compiler asks a loss that is handed on from one graph to the next.
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
    @pytest.mark.parametrize("build", [LQA, lambda params: LQA(torch.optim.AdamW(params, lr=0.1))])
    @pytest.mark.parametrize("kind", ["step", "train step", "partial", "two phases"])
    def test_a_compiled_step_takes_the_same_steps(self, build, kind):
        """Eagerly, without compiling it anew for each rate or batch."""
        tasks = classification(), classification()
        opts = [build(task.model.parameters()) for task in tasks]
        frames = CompileCounter()
        compiled = partial(torch.compile, backend=frames)

        def loss(task, rows):
            return functional.cross_entropy(task.model(task.inputs[rows]), task.labels[rows])

        def plain(rows):
            return opts[0].step(lambda: loss(tasks[0], rows))

        step = compiled(opts[1].step)

        def partial_step(rows):
            return step(partial(loss, tasks[1], rows))

        @compiled
        def train_step(rows):
            return opts[1].step(lambda: loss(tasks[1], rows))

        @compiled
        def two_phases(rows):
            opts[1].zero_grad()
            first = loss(tasks[1], rows)
            first.backward()
            opts[1].step(lambda: loss(tasks[1], rows), loss=first)
            return first.detach()

        def two_plain_phases(rows):
            opts[0].zero_grad()
            first = loss(tasks[0], rows)
            first.backward()
            return opts[0].step(lambda: loss(tasks[0], rows), loss=first)

        steps = {
            "step": (plain, lambda rows: step(lambda: loss(tasks[1], rows))),
            "train step": (plain, train_step),
            "partial": (plain, partial_step),
            "two phases": (two_plain_phases, two_phases),
        }
        for batch in torch.randint(256, (60, 32)):
            one, other = (take(batch) for take in steps[kind])
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        assert opts[0].rate == pytest.approx(opts[1].rate, rel=1e-3)
        assert frames.frame_count <= 3

    def test_what_is_compiled_within_a_step_stays_so(self):
        task = classification()
        frames = CompileCounter()
        compiled = torch.compile(task.model, backend=frames)
        opt = LQA(task.model.parameters())
        for _ in range(40):
            opt.step(lambda: functional.cross_entropy(compiled(task.inputs), task.labels))
        # With gradients and without.
        assert frames.frame_count == 2

    def test_probes_see_their_own_weights_under_autocast(self):
        """Autocast caches the cast weights: a probe must not be given the cached ones."""
        task = classification()
        opt = LQA(task.model.parameters(), direction="sgd", delta0=0.5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            opt.step(task.closure())
        assert opt.report.slope > 0.0


SPARSE = nn.Embedding(4, 2, sparse=True)


class Rated(torch.optim.SGD):
    """An optimizer with any lr, as Adafactor of Transformers has None."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr=0.1)
        for group in self.param_groups:
            group["lr"] = lr


class SharpnessAware(Rated):
    """Takes a second gradient elsewhere, and says that it needs a closure."""

    def step(self, closure=None):
        assert closure is not None, "sharpness-aware minimisation needs a closure"
        torch.enable_grad()(closure)()
        return super().step()


class SharpnessUnaware(Rated):
    """The same, and finds out."""

    def step(self, closure=None):
        loss = closure()
        super().step()
        return loss


class SteppedTwice(torch.optim.Optimizer):
    """The same around another optimizer, which copies that are pickled do not have."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=0.1, momentum=0.9)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is not None
        norm = torch.stack([p.grad.norm() for p in self.param_groups[0]["params"]]).norm()
        torch.enable_grad()(closure)()
        self.base_optimizer.step()
        return norm


class NeedsLoss(Rated):
    """The same, by its signature."""

    def step(self, closure):
        super().step()
        return closure()


class Averaging(Rated):
    """An optimizer with modes of its own, as schedule-free ones have."""

    def train(self):
        pass

    def eval(self):
        pass


class TestErrors:
    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (
                lambda p: LQA(p, direction="adam"),
                ValueError,
                'direction must be "rms" or "sgd", got \'adam\'; to follow another optimizer\'s '
                "steps pass the optimizer itself: LQA(torch.optim.AdamW(params))",
            ),
            (
                lambda p: LQA(nn.Linear(2, 1)),
                TypeError,
                "params must be parameters, param groups or an optimizer, got a module, Linear; "
                "use LQA(model.parameters())",
            ),
            (
                lambda p: LQA(torch.optim.AdamW(p, maximize=True)),
                ValueError,
                "LQA goes where the loss falls, got a wrapped optimizer with maximize=True; leave "
                "it out and return the negative objective from the closure",
            ),
            (
                lambda p: LQA(torch.optim.Optimizer(p, {})),
                ValueError,
                "Optimizer has no lr in its param groups, so there is no rate to measure; use an "
                "optimizer whose steps are in proportion to lr",
            ),
            *(
                (
                    lambda p, make=make, lr=lr: make(p, lr=lr),
                    ValueError,
                    "LQA measures the learning rate, so there is none to choose, got "
                    f"lr={lr!r}; leave lr out or pass None (delta0 is only the first rate, and its "
                    "default needs no tuning)",
                )
                for make in (LQA, LQA.paper, lambda p, lr: LQA(torch.optim.SGD(p), lr=lr))
                for lr in (1e-3, 0, numpy.float32(0.5), "auto")
            ),
            *(
                (
                    lambda p, lr=lr: LQA(Rated(p, lr)),
                    ValueError,
                    f"Rated has lr={lr!r} in its param groups, which is no rate to measure from; "
                    "construct it with a number for lr, and so that its steps are in proportion to "
                    "it (Adafactor of Transformers with relative_step=False)",
                )
                for lr in (None, "auto", math.nan, -1.0, [0.1])
            ),
            *(
                (
                    lambda p, lr=lr: LQA([{"params": p, "lr": lr}]),
                    ValueError,
                    f"lr must be finite and not negative, got {lr!r}",
                )
                for lr in ("auto", math.inf)
            ),
            *(
                (
                    lambda p, kind=kind: LQA(kind(p)),
                    TypeError,
                    f"LQA cannot wrap {kind.__name__}, whose step() needs a closure of its own; "
                    "wrap one that steps from the gradients alone, such as "
                    "torch.optim.AdamW(params)",
                )
                for kind in (SharpnessAware, SharpnessUnaware, SteppedTwice, NeedsLoss)
            ),
            (
                lambda p: LQA(Averaging(p)),
                TypeError,
                "LQA cannot wrap Averaging, which has train() and eval() modes of its own and "
                "averages its iterates; LQA(params) does so, too, and "
                'LQA(torch.optim.AdamW(params), averaging="schedule-free") around another '
                "optimizer",
            ),
            (
                lambda p: LQA(p, averaging="ema"),
                ValueError,
                "averaging must be \"schedule-free\" or None, got 'ema'",
            ),
            *(
                (
                    lambda p, every=every: LQA(p, every=every),
                    ValueError,
                    f"every must be a whole number of steps, at least 1, got {every!r}",
                )
                for every in (0, 1.5, math.inf, math.nan, "3")
            ),
            (
                lambda p: LQA(p, delta0=-1.0),
                ValueError,
                "delta0 must be a positive finite number, got -1.0; it is only the first rate, a "
                "small one such as 1e-4 is safe",
            ),
            (
                lambda p: LQA(p, weight_decay=False),
                ValueError,
                "weight_decay must be a finite number, not negative, got False; 0.01 is common, 0 "
                "turns it off",
            ),
            (
                lambda p: LQA.paper(p, delta0=math.nan),
                ValueError,
                "delta0 must be a positive finite number, got nan; it is only the first rate, a "
                "small one such as 1e-4 is safe",
            ),
            (
                lambda p: LQA(p, weight_decay=-0.1),
                ValueError,
                "weight_decay must be a finite number, not negative, got -0.1; 0.01 is common, 0 "
                "turns it off",
            ),
            (
                lambda p: LQA([{"params": p, "weight_decay": 0.1}], direction="sgd"),
                ValueError,
                'weight_decay goes with direction="rms", got weight_decay=0.1 along "sgd"; wrap an '
                "optimizer that has it: LQA(torch.optim.SGD(params, weight_decay=0.1))",
            ),
            (
                lambda p: LQA(torch.optim.AdamW(p), weight_decay=0.1),
                ValueError,
                "weight_decay is the wrapped optimizer's own, got weight_decay=0.1; set it there: "
                "AdamW(params, weight_decay=0.1)",
            ),
            (
                lambda p: LQA([{"params": p, "lr": -1.0}]),
                ValueError,
                "lr must be finite and not negative, got -1.0",
            ),
            (
                lambda p: LQA(LQA(p)),
                TypeError,
                "LQA cannot wrap LQA, which searches its own line; pass the parameters, or an "
                "optimizer that takes plain steps",
            ),
            (
                lambda p: LQA(torch.optim.LBFGS(p)),
                TypeError,
                "LQA cannot wrap LBFGS, which searches its own line; pass the parameters, or an "
                "optimizer that takes plain steps",
            ),
            (
                lambda p: LQA(torch.optim.SGD(p), direction="sgd"),
                ValueError,
                "direction is the wrapped optimizer's own step, got direction='sgd'; leave it out, "
                "or pass parameters instead of an optimizer",
            ),
            (
                lambda p: LQA(torch.optim.SGD(p), delta0=0.1),
                ValueError,
                "delta0 is the wrapped optimizer's own lr, got delta0=0.1; set it there: "
                "SGD(params, lr=0.1)",
            ),
            (
                lambda p: LQA.paper(torch.optim.SGD(p)),
                TypeError,
                "LQA.paper follows the gradient and takes parameters, not an optimizer; use "
                "LQA(optimizer) to measure along another optimizer's steps",
            ),
            (lambda p: LQA([]), ValueError, "optimizer got an empty parameter list"),
        ],
    )
    def test_construction(self, make, error, message):
        with pytest.raises(error) as caught:
            make(list(classification().model.parameters()))
        assert str(caught.value) == message

    def test_step_without_a_closure(self, configuration):
        opt = configuration(classification().model.parameters())
        with pytest.raises(TypeError, match=r"^step\(\) needs a closure .*, got NoneType; call it"):
            opt.step()

    @pytest.mark.parametrize(
        ("closure", "error", "message"),
        [
            (
                lambda task: None,
                TypeError,
                "step() needs a closure that returns the loss, got NoneType; call it as "
                "opt.step(lambda: loss_fn(model(x), y)), which runs backward itself, or after "
                "loss.backward() as opt.step(closure, loss=loss)",
            ),
            (
                lambda task: lambda: task.closure()().item(),
                TypeError,
                "closure must return the loss as a scalar tensor, got float; use the loss itself, "
                "not loss.item(), a tuple or None",
            ),
            (
                lambda task: lambda: (task.closure()(), 1),
                TypeError,
                "closure must return the loss as a scalar tensor, got tuple; use the loss itself, "
                "not loss.item(), a tuple or None",
            ),
            (
                lambda task: lambda: task.model(task.inputs),
                ValueError,
                "closure must return the loss as a scalar tensor, got shape (256, 3); reduce it, "
                "for example with .mean()",
            ),
            (
                lambda task: lambda: task.labels.sum(),
                TypeError,
                "closure must return the loss as a real floating-point tensor, got torch.int64",
            ),
            (
                lambda task: lambda: task.closure()().detach(),
                RuntimeError,
                "the loss that closure returned does not require grad; compute it from the "
                "optimizer's parameters, without torch.no_grad(), .detach() or .item()",
            ),
            (
                lambda task: lambda: nn.Parameter(torch.ones(())) * 2.0,
                RuntimeError,
                "no parameter of the optimizer has a gradient; compute the loss from the "
                "parameters given to LQA, and in the two-phase use call loss.backward() before "
                "step()",
            ),
            (
                lambda task: lambda: SPARSE(torch.tensor([1])).sum() + task.closure()(),
                RuntimeError,
                "LQA got a sparse gradient, which has no dense direction to measure along; use a "
                "dense layer (sparse=False) or wrap an optimizer for sparse gradients: "
                "LQA(torch.optim.SparseAdam(params))",
            ),
        ],
    )
    def test_step(self, closure, error, message):
        task = classification()
        opt = LQA([*task.model.parameters(), *SPARSE.parameters()])
        before = values(task.model)
        with pytest.raises(error) as caught:
            opt.step(closure(task))
        assert str(caught.value) == message
        assert identical(before, values(task.model))

    def test_a_step_in_eval_mode(self):
        task = classification()
        opt = LQA(task.model.parameters())
        opt.eval()
        with pytest.raises(RuntimeError, match=r"call opt.train\(\) first"):
            opt.step(task.closure())

    def test_two_phases_with_a_number(self):
        task = classification()
        with pytest.raises(TypeError, match="loss must be given as a scalar tensor, got float"):
            LQA(task.model.parameters()).step(task.closure(), loss=0.5)

    @pytest.mark.parametrize(
        ("saved", "message"),
        [
            (
                lambda params: torch.optim.SGD(params).state_dict(),
                "state_dict was not saved by LQA: its first param group has no entry 'lqa'; "
                "load it into the optimizer that saved it",
            ),
            (
                lambda params: LQA.paper(params).state_dict(),
                "state_dict was saved with direction = 'Gradient', this optimizer has direction = "
                "'NormalisedGradient'; construct LQA as it was when it was saved",
            ),
        ],
    )
    def test_loading_what_another_optimizer_saved(self, saved, message):
        params = list(classification().model.parameters())
        opt = LQA(params)
        with pytest.raises(ValueError, match="state_dict") as caught:
            opt.load_state_dict(saved(params))
        assert str(caught.value) == message

    def test_loading_another_version(self):
        opt = LQA(classification().model.parameters())
        state = opt.state_dict()
        state["param_groups"][0]["lqa"]["version"] = 99
        message = (
            r"^state_dict has version 99, and this quadstep reads version 4; load it with the "
            r"quadstep that saved it$"
        )
        with pytest.raises(ValueError, match=message):
            opt.load_state_dict(state)


class TestState:
    @pytest.mark.parametrize("stop", range(1, 25, 4))
    def test_resumes_bit_for_bit(self, configuration, stop):
        """Also between measurements and with averaging."""
        whole, part = noisy_classification(), noisy_classification()
        opt = configuration(whole.model.parameters())
        for step in range(30):
            torch.manual_seed(step)
            opt.step(whole.closure(step))
        first = configuration(part.model.parameters())
        for step in range(stop):
            torch.manual_seed(step)
            first.step(part.closure(step))
        file = io.BytesIO()
        torch.save((part.model.state_dict(), first.state_dict()), file)
        file.seek(0)
        model, state = torch.load(file)
        resumed = noisy_classification()
        resumed.model.load_state_dict(model)
        second = configuration(resumed.model.parameters())
        second.load_state_dict(state)
        for step in range(stop, 30):
            torch.manual_seed(step)
            second.step(resumed.closure(step))
        assert identical(values(whole.model), values(resumed.model))
        assert second.report == opt.report

    def test_eval_shows_the_average_and_train_brings_back(self):
        task = classification(dtype=torch.float64)
        opt = LQA(task.model.parameters())
        for step in range(50):
            opt.step(task.closure(step))
        training = values(task.model)
        opt.eval()
        opt.eval()
        averaged = values(task.model)
        assert not torch.allclose(averaged[0], training[0])
        opt.train()
        opt.train()
        torch.testing.assert_close(values(task.model), training, rtol=1e-12, atol=1e-14)

    def test_a_state_saved_in_eval_mode_resumes_in_it(self):
        task = classification()
        opt = LQA(task.model.parameters())
        for step in range(20):
            opt.step(task.closure(step))
        opt.eval()
        other = copy.deepcopy(task)
        loaded = LQA(other.model.parameters())
        loaded.load_state_dict(copy.deepcopy(opt.state_dict()))
        for optimizer, owner in ((opt, task), (loaded, other)):
            optimizer.train()
            optimizer.step(owner.closure())
        assert identical(values(task.model), values(other.model))

    @pytest.mark.parametrize(
        "clone",
        [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))],
        ids=["copy", "pickle"],
    )
    def test_copies_go_their_own_way(self, configuration, clone):
        task = classification()
        opt = configuration(task.model.parameters())
        for step in range(12):
            opt.step(task.closure(step))
        other, copied = clone((task.model, opt))
        before = values(task.model)
        for step in range(12, 20):
            batch = torch.arange(step * 32, (step + 1) * 32) % 256
            copied.step(
                lambda batch=batch: functional.cross_entropy(
                    other(task.inputs[batch]), task.labels[batch]
                )
            )
        assert identical(before, values(task.model))
        for step in range(12, 20):
            opt.step(task.closure(step))
        assert identical(values(other), values(task.model))

    def test_a_group_added_later_joins_at_the_rate_in_force(self, configuration):
        task = classification()
        opt = configuration(task.model[0].parameters())
        for step in range(12):
            opt.step(task.closure(step))
        rate = opt.rate
        opt.add_param_group({"params": list(task.model[2].parameters())})
        assert opt.param_groups[1]["lr"] == rate
        for step in range(12, 40):
            loss = opt.step(task.closure(step))
        assert math.isfinite(loss.item())
        assert opt.param_groups[1]["lr"] == pytest.approx(opt.param_groups[0]["lr"])

    def test_hooks_and_zero_grad_are_torchs_own(self):
        task = classification()
        opt = LQA(task.model.parameters())
        calls = []
        opt.register_step_pre_hook(lambda *_: calls.append("pre"))
        opt.register_step_post_hook(lambda *_: calls.append("post"))
        opt.step(task.closure())
        assert calls == ["pre", "post"]
        opt.zero_grad()
        assert all(param.grad is None for param in task.model.parameters())


def test_nothing_warns_in_ordinary_use():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task = noisy_classification()
        opt = LQA(task.model.parameters())
        for step in range(12):
            opt.step(task.closure(step))
