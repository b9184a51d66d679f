"""LQA: the rate it measures, its groups, and what it reports."""

import copy
import math
from collections import Counter
from dataclasses import asdict, replace

import numpy
import pytest
import torch
from configurations import BASES
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Quadratic, classification, identical, values
from reference import algorithm_1, lqa
from seams import Scripted, take_two_probes
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils._pytree import tree_leaves
from training import backward_of, train

from quadstep import LQA, Reason
from quadstep.controllers import TrustRegionConfig, TrustRegionController


class TestTheRate:
    @settings(max_examples=50, deadline=None)
    @given(st.integers(0, 10**6), st.floats(-2, 2))
    def test_paper_is_the_exact_line_minimiser_for_any_delta0(self, seed, exponent):
        problem = Quadratic.random(seed=seed)
        theta = problem.theta.detach().clone()
        direction = problem.hessian @ (theta - problem.optimum)
        exact = problem.line_minimizer(theta, direction)
        opt = LQA.paper([problem.theta], delta0=exact * 10.0**exponent)
        opt.step(problem)
        assert opt.report.rate == pytest.approx(exact, rel=1e-9)
        assert opt.report.slope == pytest.approx(float(direction @ direction), rel=1e-9)

    @settings(max_examples=50, deadline=None)
    @given(st.integers(0, 10**6), st.floats(-3, 0.2), st.sampled_from(["sgd", "momentum", "adam"]))
    def test_along_any_direction(self, seed, exponent, name):
        """The first is a known part of the one that minimizes the loss along the base's step."""
        problem = Quadratic.random(seed=seed)
        theta = problem.theta.detach().clone()
        clone = nn.Parameter(theta.clone())
        reference = BASES[name]([clone])
        problem.at(clone).backward()
        reference.step()
        exact = problem.line_minimizer(theta, theta - clone.detach()) * reference.defaults["lr"]
        base = BASES[name]([problem.theta])
        base.param_groups[0]["lr"] = exact * 10.0**exponent
        opt = LQA(base)
        opt.step(problem)
        assert opt.report.reason is Reason.MINIMUM
        assert opt.report.rate == pytest.approx(exact / TrustRegionConfig().start, rel=1e-6)
        assert base.param_groups[0]["lr"] == opt.report.rate

    def test_paper_on_a_quadratic_is_steepest_descent_with_exact_line_search(self):
        problem = Quadratic.random(floor=0.0)
        theta = problem.theta.detach().clone()
        opt = LQA.paper([problem.theta], delta0=0.1)
        for _ in range(40):
            gradient = problem.hessian @ (theta - problem.optimum)
            rate = problem.line_minimizer(theta, gradient)
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

    @pytest.mark.parametrize("name", ["rms", "gradient"])
    @pytest.mark.parametrize("weight_decay", [0.0, 0.1])
    def test_equals_the_plain_rule_along_the_plain_direction(self, name, weight_decay, monkeypatch):
        """Step by step, with a memory so short that the radius expands and contracts."""
        take_two_probes(monkeypatch)
        config = replace(TrustRegionConfig(), memory=5.0, start=10.0)
        task = classification(nn.Linear(8, 3, bias=False), dtype=torch.float64)
        (theta,) = task.model.parameters()

        def loss(weight, step):
            batch = torch.arange(step * 32, (step + 1) * 32) % 256
            return functional.cross_entropy(task.inputs[batch] @ weight.T, task.labels[batch])

        expected, rates = lqa(
            loss,
            theta.detach().clone(),
            1e-3,
            100,
            asdict(config),
            name == "gradient",
            weight_decay,
        )
        controller = TrustRegionController(config)
        opt = LQA(
            [theta],
            direction=name,
            averaging=None,
            delta0=1e-3,
            weight_decay=weight_decay,
            controller=controller,
        )
        found, counts = [], opt.report.counts
        for step in range(100):
            opt.step(task.closure(step))
            found.append(opt.rate)
        counts = opt.report.counts
        assert found == pytest.approx(rates, rel=1e-3 if name == "gradient" else 1e-7)
        torch.testing.assert_close(theta.data, expected, rtol=1e-4, atol=1e-5)
        assert counts[Reason.RADIUS] > 10

    def test_a_controller_of_the_callers_own_decides_the_rate(self):
        task = classification()
        opt = LQA(task.model.parameters(), averaging=None, controller=Scripted([0.5] * 5))
        rates = [opt.report.rate]
        for step in range(4):
            opt.step(task.closure(step))
            rates.append(opt.report.rate)
        assert rates == [1e-4 * 0.5**step for step in range(5)]
        # Its state is saved as that of the others is.
        resumed = LQA(task.model.parameters(), averaging=None, controller=Scripted([0.5] * 5))
        resumed.load_state_dict(opt.state_dict())
        resumed.step(task.closure(4))
        assert resumed.report.rate == 1e-4 * 0.5**5
        with pytest.raises(ValueError, match="controller"):
            LQA(task.model.parameters(), averaging=None).load_state_dict(opt.state_dict())

    def test_several_groups_keep_the_ratios_of_their_rates(self):
        task = classification()
        first, last = task.model[0], task.model[2]
        opt = LQA(
            [{"params": first.parameters()}, {"params": last.parameters(), "lr": 1e-5}], delta0=1e-4
        )
        train(task, opt, range(30))
        rates = [group["lr"] for group in opt.param_groups]
        assert rates[0] == opt.report.rate != 1e-4
        assert rates[1] == pytest.approx(0.1 * rates[0])

    def test_reports_what_was_measured(self):
        task = classification()
        opt = LQA(task.model.parameters(), every=4)
        assert math.isnan(opt.report.loss)
        assert (opt.report.reason, opt.report.counts) == (Reason.INITIAL, {})
        loss = train(task, opt, range(80))
        report = opt.report
        assert report.loss == loss.item()
        assert report.rate == opt.param_groups[0]["lr"]
        assert sum(report.counts.values()) == 80
        assert report.counts[Reason.REUSED] > 40
        while opt.report.reason is Reason.REUSED:
            assert (opt.report.forwards, opt.report.backwards) == (1, 1)
            opt.step(task.closure())
        assert (opt.report.forwards, opt.report.backwards) == (2, 1)
        with pytest.raises(AttributeError):
            report.rate = 1.0

    @pytest.mark.parametrize("every", [4.0, numpy.int64(4), 10**30])
    def test_any_whole_number_says_how_often_to_measure(self, every):
        task = classification()
        opt = LQA(task.model.parameters(), every=every)
        train(task, opt, range(100))
        assert opt.report.counts[Reason.REUSED] > 40
        # What is kept between two measurements does not grow with the time between them.
        assert len(tree_leaves(opt.state_dict()["param_groups"])) < 250


class TestIntervals:
    @pytest.mark.slow
    @pytest.mark.parametrize("period", [2, 3, 5, 10, 11])
    def test_measurements_do_not_alias_with_periodic_batches(self, period):
        task = classification()
        opt = LQA(task.model.parameters())
        met = Counter()
        for step in range(2000):
            opt.step(task.closure(step))
            if step > 200:
                met[step % period] += opt.report.reason is not Reason.REUSED
        assert min(met.values()) > 0.6 * max(met.values())

    @pytest.mark.parametrize("every", [1, 4])
    def test_the_interval_is_the_one_asked_for_or_one_less(self, every):
        task = classification()
        opt = LQA(task.model.parameters(), every=every)
        intervals, since = Counter(), 0
        for step in range(300):
            opt.step(task.closure(step))
            since += 1
            if opt.report.reason is not Reason.REUSED:
                intervals[since] += step > 200
                since = 0
        expected = {1} if every == 1 else {every - 1, every}
        assert {interval for interval, count in intervals.items() if count} == expected


class TestGroups:
    def test_a_group_added_later_joins_at_the_rate_in_force(self, configuration):
        task = classification()
        opt = configuration(task.model[0].parameters())
        train(task, opt, range(12))
        rate = opt.rate
        opt.add_param_group({"params": list(task.model[2].parameters())})
        assert opt.param_groups[1]["lr"] == rate
        loss = train(task, opt, range(12, 40))
        assert math.isfinite(loss.item())
        assert opt.param_groups[1]["lr"] == pytest.approx(opt.param_groups[0]["lr"])

    def test_empty_groups(self, configuration):
        task = classification()
        opt = configuration([{"params": []}, {"params": task.model.parameters()}])
        train(task, opt, range(3))
        assert opt.report.loss > 0.0

    def test_parameters_without_gradient_stay(self, configuration):
        task = classification()
        unused = nn.Parameter(torch.ones(3))
        frozen = task.model[0].bias.requires_grad_(False)
        before = frozen.clone()
        opt = configuration([*task.model.parameters(), unused])
        train(task, opt, range(12))
        opt.eval()
        opt.train()
        assert torch.equal(unused, torch.ones(3))
        assert torch.equal(frozen, before)

    def test_groups_may_go_and_come(self, configuration):
        task = classification()
        first, last = task.model[0], task.model[2]
        opt = configuration([{"params": first.parameters()}, {"params": last.parameters()}])
        train(task, opt, range(5))
        gone = opt.param_groups.pop()
        train(task, opt, range(5))
        own = {key: gone[key] for key in ("params", *opt.defaults)}
        opt.param_groups.append(own | {"lr": opt.rate})
        train(task, opt, range(5))
        assert opt.param_groups[0]["lr"] == pytest.approx(opt.param_groups[1]["lr"])


def test_hooks_and_zero_grad_are_torchs_own():
    task = classification()
    opt = LQA(task.model.parameters())
    calls = []
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.register_step_post_hook(lambda *_: calls.append("post"))
    opt.step(task.closure())
    assert calls == ["pre", "post"]
    opt.zero_grad()
    assert all(param.grad is None for param in task.model.parameters())


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

        def run():
            schedule = SCHEDULERS[scheduler](opts[1])
            for step in range(40):
                opts[0].step(plain.closure(step))
                opts[1].step(scheduled.closure(step))
                assert opts[1].param_groups[0]["lr"] == opts[0].rate
                if step % cadence == cadence - 1:
                    schedule.step()
                    assert opts[1].rate == opts[0].rate

        with pytest.warns(UserWarning, match=LR_MESSAGE) as caught:
            run()
        (warning,) = caught
        assert warning.filename == __file__
        assert identical(values(plain.model), values(scheduled.model))

    @pytest.mark.parametrize("loss_given", [False, True])
    def test_written_by_hand_are_ignored_at_any_time(self, configuration, loss_given):
        plain, changed = classification(), classification()
        opts = [configuration(task.model.parameters()) for task in (plain, changed)]

        def run():
            for step in range(30):
                for opt, task in zip(opts, (plain, changed), strict=True):
                    loss = backward_of(opt, task.closure(step)) if loss_given else None
                    opt.step(task.closure(step), loss=loss)
                if step in (0, 17):
                    opts[1].param_groups[0]["lr"] = 10.0

        with pytest.warns(UserWarning, match=LR_MESSAGE) as caught:
            run()
        assert len(caught) == 1
        assert identical(values(plain.model), values(changed.model))

    def test_are_no_part_of_a_checkpoint(self, configuration):
        task = classification()
        opt = configuration(task.model.parameters())
        train(task, opt, range(12))
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
        train(task, opt, range(20))
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
        train(task, opt, range(5))


class TestGroupsOfAnotherLQA:
    """Their scalars are those of an optimizer that is gone."""

    def test_a_list_of_groups_that_served_another(self, configuration):
        task, fresh = classification(), classification()
        groups = [{"params": list(task.model.parameters())}]
        train(task, configuration(groups), range(12))
        fresh.model.load_state_dict(task.model.state_dict())
        own = {key: value for key, value in groups[0].items() if not key.startswith("lqa.")}
        opts = [configuration(groups)]
        opts.append(configuration([own | {"params": list(fresh.model.parameters())}]))
        assert opts[0].report.counts == {}
        for each, opt in zip((task, fresh), opts, strict=True):
            train(each, opt, range(12, 24))
        assert identical(values(task.model), values(fresh.model))

    @pytest.mark.parametrize("averaging", [None, "schedule-free"])
    def test_an_optimizer_that_is_wrapped_again(self, averaging):
        task = classification()
        base = torch.optim.SGD(task.model.parameters(), lr=0.1)
        train(task, LQA(base), range(12))
        opt = LQA(base, averaging=averaging)
        assert opt.report.counts == {}
        train(task, opt, range(12, 24))
        assert sum(opt.report.counts.values()) == 12

    def test_a_wrapped_optimizer_that_loads_the_state_of_its_wrapper(self):
        task = classification()
        base = torch.optim.SGD(task.model.parameters(), lr=0.1)
        opt = LQA(base, averaging="schedule-free")
        train(task, opt, range(14))
        base.load_state_dict(opt.state_dict())
        train(task, opt, range(14, 30))
        assert sum(opt.report.counts.values()) == 30


def test_the_rate_of_groups_that_a_wrapped_optimizer_has_loaded_is_their_lr():
    task = classification()
    base = torch.optim.SGD(task.model.parameters(), lr=0.1)
    fresh = copy.deepcopy(base.state_dict())
    opt = LQA(base, averaging="schedule-free")
    train(task, opt, range(5))
    base.load_state_dict(fresh)
    opt.eval()
    opt.train()
    assert opt.rate == 0.1


class TestGroupsThatChangePlaces:
    """The scalars of the state are in whichever group is the first."""

    @pytest.fixture
    def started(self, configuration):
        task = classification()
        first, last = task.model[0], task.model[2]
        opt = configuration([{"params": first.parameters()}, {"params": last.parameters()}])
        train(task, opt, range(5))
        return task, opt

    @pytest.mark.parametrize("returns", [lambda group: group, dict], ids=["itself", "a copy"])
    def test_the_first_leaves_and_comes_back(self, started, returns):
        task, opt = started
        gone = opt.param_groups.pop(0)
        copied = returns(gone)
        train(task, opt, range(5, 10))
        opt.param_groups.insert(0, copied)
        train(task, opt, range(10, 15))
        assert sum(opt.report.counts.values()) == 15

    def test_reversed_twice(self, started):
        task, opt = started
        for step in range(5, 15):
            if step in (6, 9):
                opt.param_groups.reverse()
            opt.step(task.closure(step))
        assert sum(opt.report.counts.values()) == 15

    def test_in_eval_mode(self, started):
        task, opt = started
        gone = opt.param_groups.pop(0)
        opt.eval()
        opt.param_groups.insert(0, gone)
        with pytest.raises(RuntimeError, match=r"or call opt.train"):
            opt.step(task.closure())
        opt.train()
        opt.step(task.closure())
