"""What LQA is constructed with: errors name the argument and say how to fix it."""

import math

import numpy
import pytest
import torch
from problems import classification, identical, values
from torch import nn

from quadstep import LQA
from quadstep.controllers import VertexController


class Rated(torch.optim.SGD):
    """An optimizer with any lr, as Adafactor of Transformers has None."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr=0.1)
        for group in self.param_groups:
            group["lr"] = lr


class SharpnessAware(Rated):
    """Takes a second gradient elsewhere, and says that it needs a closure."""

    def step(self, closure=None):
        assert closure is not None, "sharpness-aware steps need a closure"
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
    """An optimizer with train and eval modes, as schedule-free ones have."""

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
                'direction must be "rms" or "gradient", got \'adam\'; to follow another '
                "optimizer's steps pass the optimizer itself: LQA(torch.optim.AdamW(params))",
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
                    f"lr={lr!r}; leave lr out or pass None (delta0 is only the first probe "
                    "distance, and its default needs no tuning)",
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
                    f"LQA cannot wrap {kind.__name__}, whose step() needs a closure; "
                    "wrap one that steps from the gradients alone, such as "
                    "torch.optim.AdamW(params)",
                )
                for kind in (SharpnessAware, SharpnessUnaware, SteppedTwice, NeedsLoss)
            ),
            (
                lambda p: LQA(Averaging(p)),
                TypeError,
                "LQA cannot wrap Averaging, which has separate train() and eval() modes and "
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
            *(
                (
                    lambda p, dtype=dtype: LQA(p, state_dtype=dtype),
                    ValueError,
                    f"state_dtype must be torch.float32 or torch.bfloat16, got {dtype!r}; leave it "
                    "out to keep the state in the type of each parameter",
                )
                for dtype in (torch.float16, torch.int8, "bfloat16")
            ),
            *(
                (
                    lambda p, make=make: make(p, state_dtype=torch.bfloat16),
                    ValueError,
                    "state_dtype is the type of LQA's own state, of which there is none without "
                    'averaging around an optimizer or along "gradient", got '
                    "state_dtype=torch.bfloat16; leave it out, or pass "
                    'averaging="schedule-free"',
                )
                for make in (
                    lambda p, **own: LQA(p, direction="gradient", averaging=None, **own),
                    lambda p, **own: LQA(torch.optim.AdamW(p), **own),
                )
            ),
            (
                lambda p: LQA(torch.optim.AdamW(p), restore="subtract"),
                ValueError,
                'restore="subtract" saves nothing around an optimizer, whose own step is found '
                "from a copy of the parameters; leave it out",
            ),
            *(
                (
                    lambda p, controller=controller: LQA(p, controller=controller),
                    TypeError,
                    "controller must be an instance of a class that has what "
                    "quadstep.controllers.StepController has, got "
                    f"{controller!r}; leave it out for the default",
                )
                for controller in (0.1, VertexController)
            ),
            (
                lambda p: LQA(p, restore="snapshot"),
                ValueError,
                'restore must be "copy" or "subtract", got \'snapshot\'',
            ),
            (
                lambda p: LQA(p, delta0=-1.0),
                ValueError,
                "delta0 must be a positive finite number, got -1.0; it is only the first probe "
                "distance, a small one such as 1e-4 is safe",
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
                "delta0 must be a positive finite number, got nan; it is only the first probe "
                "distance, a small one such as 1e-4 is safe",
            ),
            (
                lambda p: LQA(p, weight_decay=-0.1),
                ValueError,
                "weight_decay must be a finite number, not negative, got -0.1; 0.01 is common, 0 "
                "turns it off",
            ),
            (
                lambda p: LQA.paper([{"params": p, "weight_decay": 0.1}]),
                ValueError,
                "weight_decay must be 0 along the plain gradient, as in LQA.paper(params), got "
                "0.1; add the penalty to the loss, or train with LQA(params)",
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
                lambda p: LQA(torch.optim.SGD(p), direction="gradient"),
                ValueError,
                "direction is the wrapped optimizer's own step, got direction='gradient'; leave it "
                "out, or pass parameters instead of an optimizer",
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


def test_trying_a_step_has_no_side_effects():
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
    with pytest.raises(TypeError, match="separate train"):
        LQA(Passing(Averaging(params)))


@pytest.mark.parametrize("make", [LQA, LQA.paper])
def test_no_lr_may_be_passed(make):
    task = classification()
    opt = make(task.model.parameters(), lr=None)
    opt.add_param_group({"params": nn.Linear(2, 2).parameters(), "lr": None})
    opt.step(task.closure())


@pytest.mark.parametrize("number", [numpy.float32, numpy.float64, numpy.int64])
def test_the_first_rate_may_be_any_number(number):
    task = classification()
    opt = LQA(task.model.parameters(), delta0=number(1), weight_decay=number(0))
    opt.step(task.closure())
    assert opt.report.rate <= 3.0
