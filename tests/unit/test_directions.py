"""Where steps lead: the normalized gradients, the step of another optimizer."""

import copy

import numpy
import pytest
import torch
from configurations import BASES
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from problems import classification, identical, noisy_classification, values
from reference import normalised
from seams import Scripted, pin_rate, stepping_rate
from torch import nn
from training import full_loss, raising, same_state, saved_and_loaded, train

from quadstep import LQA, Reason
from quadstep.directions import RMSNormalized, TensorNormalized

NORMALIZED = {"rms": RMSNormalized, "gradient": TensorNormalized}
SHAPES = [(), (6,), (5, 6), (4, 3, 2, 2), (5, 1), (7, 1, 1), (1, 6), (0, 6), (6, 0)]

by_direction = pytest.mark.parametrize("name", NORMALIZED)


@st.composite
def histories(draw):
    """The gradients of a few steps, of a parameter of any shape; many entries are zero."""
    shape = draw(st.sampled_from([*SHAPES, (3, 2, 2)]))
    numbers = st.floats(-1e6, 1e6) | st.sampled_from([0.0, 1e-9, 1.0])
    found = arrays(numpy.float64, (draw(st.integers(1, 4)), *shape), elements=numbers)
    return list(torch.from_numpy(draw(found)))


def direction_along(name, params, histories, weight_decay=0.0):
    """The last direction at these gradients, one history for each parameter."""
    state, direction = {param: {} for param in params}, NORMALIZED[name]()
    group = {"params": params, "lr": 1.0, "weight_decay": weight_decay}
    for grads in zip(*histories, strict=True):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        with torch.no_grad():
            line = direction.line([group], state, 1.0, True)
    return line.blocks[0].direction


@by_direction
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_the_plain_direction(name, shape, weight_decay):
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    grads = [torch.randn(shape, dtype=torch.float64) + 0.5 for _ in range(5)]
    rounding = 1e-12 if name == "rms" else 1e-6  # its mean square is in single precision
    for step in range(1, 6):
        (found,) = direction_along(name, [param], [grads[:step]], weight_decay)
        decayed = weight_decay * param.detach()
        plain = normalised(grads[:step], decayed=decayed, by_tensor=name == "gradient")
        torch.testing.assert_close(found, plain, rtol=rounding, atol=rounding)


@by_direction
@settings(max_examples=200)
@given(histories())
def test_descends_whatever_the_gradients_were(name, grads):
    (found,) = direction_along(name, [nn.Parameter(torch.zeros_like(grads[0]))], [grads])
    assert (grads[-1] * found).sum() >= 0.0
    assert found.square().sum() <= (1.0 + 1e-9) * found.numel()


@by_direction
@settings(max_examples=50)
@given(histories().filter(lambda grads: grads[0].shape[-1:] == (2,)))
def test_descends_along_complex_gradients(name, grads):
    grads = [torch.view_as_complex(grad) for grad in grads]
    (found,) = direction_along(name, [nn.Parameter(torch.zeros_like(grads[0]))], [grads])
    assert (torch.view_as_real(grads[-1]) * found).sum() >= 0.0


@by_direction
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e25), (torch.float16, 3e4)])
def test_a_gradient_whose_square_overflows_leaves_the_direction_finite(name, dtype, size):
    torch.manual_seed(0)
    grads = list(torch.randn(3, 4, 6).to(dtype))
    grads[1] = grads[1].sign() * size
    grads[1][0, 0] = 0.0
    for count in (2, 3):
        param = nn.Parameter(torch.ones(4, 6, dtype=dtype))
        (found,) = direction_along(name, [param], [grads[:count]], weight_decay=0.1)
        assert found.isfinite().all()


@by_direction
@given(histories(), st.randoms(use_true_random=False))
def test_entries_whose_gradient_has_always_been_zero_stay(name, grads, random):
    unused = torch.tensor(
        [random.random() < 0.5 for _ in range(grads[0].numel())], dtype=torch.bool
    )
    unused = unused.view(grads[0].shape)
    grads = [grad.masked_fill(unused, 0.0) for grad in grads]
    (found,) = direction_along(name, [nn.Parameter(torch.ones_like(grads[0]))], [grads])
    assert not found[unused].any()


@pytest.mark.parametrize(("name", "size"), [("rms", 0.1), ("rms", 0.0), ("gradient", 0.1)])
@pytest.mark.parametrize("shape", [(3, 16), (1, 16), (2, 4, 2, 2)])
def test_the_mean_of_a_row_keeps_the_same_part_of_the_gradient_and_of_the_decay(name, size, shape):
    """One over the root of 16, also where the gradient is zero now."""
    torch.manual_seed(0)
    param = nn.Parameter(0.1 * torch.randn(shape, dtype=torch.float64) + 0.5)
    first, last = torch.rand(2, *shape, dtype=torch.float64) + 1.0
    (found,) = direction_along(name, [param], [[first, size * last]], weight_decay=0.2)
    squares = 0.999 * first.square() + (size * last).square()
    roots = ((squares if name == "rms" else squares.mean().expand(shape)) / 1.999).sqrt()
    quotient = size * last / (roots + 1e-8) + 0.2 * param.detach()
    means = [(roots * part).flatten(1).sum(1) for part in (found, quotient)]
    torch.testing.assert_close(means[0], means[1] / 4.0, rtol=1e-6, atol=0.0)


@by_direction
def test_a_gradient_of_one_sign_moves_an_output_by_the_root_of_its_inputs(name):
    """Of 64 inputs of one: eight times as far as its bias, and not 64 times."""
    layer = nn.Linear(64, 3)
    grads = [torch.full((3, 64), 0.1)], [torch.ones(3)]
    weight, bias = direction_along(name, [layer.weight, layer.bias], grads)
    torch.testing.assert_close(weight @ torch.ones(64), 8.0 * bias)


def test_real_and_imaginary_parts_are_centralized_apart():
    torch.manual_seed(0)
    grad = torch.randn(4, 6, dtype=torch.complex128) + (1.0 + 2.0j)
    (joint,) = direction_along("rms", [nn.Parameter(torch.zeros_like(grad))], [[grad]])
    apart = [normalised([part]) for part in (grad.real, grad.imag)]
    torch.testing.assert_close(joint, torch.stack(apart, dim=-1), rtol=1e-12, atol=1e-14)


@by_direction
def test_a_complex_vector_is_not_centralized(name):
    grad = torch.full((3,), 1.0 + 1.0j, dtype=torch.complex128)
    (kept,) = direction_along(name, [nn.Parameter(torch.zeros_like(grad))], [[grad]])
    torch.testing.assert_close(kept, torch.ones(3, 2, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parameters_without_a_slope_stay_in_half_precision(dtype):
    """The mean square of a small gradient is zero in float16, and so is 1e-8."""
    torch.manual_seed(0)
    table = nn.Embedding(6, 4, dtype=dtype)
    opt = LQA(table.parameters(), weight_decay=0)
    unused = table.weight[5].clone()
    for _ in range(30):
        opt.step(lambda: 1.0 + table(torch.arange(5)).float().square().mean() / 100)
        assert table.weight.isfinite().all()
    assert torch.equal(unused, table.weight[5])


@by_direction
@pytest.mark.parametrize("averaging", ["auto", None])
def test_weights_decay_by_default(name, averaging):
    opt = LQA(nn.Linear(2, 1).parameters(), direction=name, averaging=averaging)
    assert opt.param_groups[0]["weight_decay"] == 0.01


def test_weight_decay_shrinks_the_groups_that_ask_for_it():
    def sizes(**options):
        task = classification()
        bodies = [task.model[0].parameters(), task.model[2].parameters()]
        opt = LQA([{"params": bodies[0]} | options, {"params": bodies[1]}])
        train(task, opt, range(60))
        opt.eval()
        assert full_loss(task) < 1.0
        return [task.model[layer].weight.norm().item() for layer in (0, 2)]

    plain, decayed = sizes(), sizes(weight_decay=1.0)
    assert decayed[0] < 0.9 * plain[0]
    assert decayed[1] > 0.9 * plain[1]


def test_group_ratios_and_weight_decay_of_a_wrapped_optimizer():
    task = classification()
    groups = [
        {"params": task.model[0].parameters(), "lr": 1e-3, "weight_decay": 0.1},
        {"params": task.model[2].parameters(), "lr": 4e-3, "weight_decay": 0.0},
    ]
    opt = LQA(torch.optim.AdamW(groups))
    start = full_loss(task)
    train(task, opt, range(60))
    rates = [group["lr"] for group in opt.param_groups]
    assert rates[1] == pytest.approx(4.0 * rates[0], rel=1e-9)
    assert rates[0] != 1e-3
    assert [group["weight_decay"] for group in opt.param_groups] == [0.1, 0.0]
    assert full_loss(task) < start


def test_a_shape_that_changed_is_named_before_anything_moves():
    theta, other = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2))
    opt = LQA([other, theta])

    def closure():
        return theta.square().sum() + other.square().sum()

    opt.step(closure)
    theta.data, theta.grad = torch.ones(6), None
    before = copy.deepcopy(opt.state[other])
    kept = other.clone()
    message = (
        r"a parameter has shape \(6,\), but had \(4,\) when its state was made; "
        r"forget that state with del opt.state\[param\], or construct LQA anew"
    )
    with pytest.raises(ValueError, match=message):
        opt.step(closure)
    assert torch.equal(kept, other)
    assert same_state(opt.state[other], before)
    del opt.state[theta]
    opt.step(closure)
    assert opt.report.reason is not Reason.NON_FINITE


class TestStepsOfAnotherOptimizer:
    @pytest.mark.parametrize("name", BASES)
    def test_with_the_rate_forced_the_base_is_itself(self, name, monkeypatch):
        """Dropout, batch normalization, state and all: probing changes nothing."""
        pin_rate(monkeypatch)
        plain, wrapped = noisy_classification(torch.float64), noisy_classification(torch.float64)
        base = BASES[name](plain.model.parameters())
        opt = LQA(BASES[name](wrapped.model.parameters()))
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
    def test_muon(self, monkeypatch):
        pin_rate(monkeypatch)
        plain, wrapped = (nn.Linear(6, 4, bias=False).double() for _ in range(2))
        wrapped.load_state_dict(plain.state_dict())
        inputs = torch.randn(32, 6, dtype=torch.float64)
        base = torch.optim.Muon(plain.parameters(), lr=0.01)
        opt = LQA(torch.optim.Muon(wrapped.parameters(), lr=0.01))
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
        train(task, opt, range(12))
        assert {int(state["step"]) for state in base.state.values()} == {12}
        assert opt.state is base.state
        assert opt.param_groups is base.param_groups

    def test_averages_along_another_optimizer(self):
        task = classification()
        opt = LQA(torch.optim.SGD(task.model.parameters(), lr=0.01), averaging="schedule-free")
        train(task, opt, range(100))
        opt.eval()
        assert task.closure(0, 256)().item() < 0.7


class Heavy(torch.optim.Optimizer):
    """Momentum that holds the rate, as Keras has it: a step is not in proportion to its lr."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})
        self.rates, self.fault = [], None

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            self.rates.append(float(group["lr"]))
            for param in group["params"]:
                held = self.state[param].setdefault("held", torch.zeros_like(param))
                param.add_(held.mul_(0.9).sub_(param.grad, alpha=self.rates[-1]))
                if self.fault is not None:
                    self.fault(param)


class TestMomentumThatHoldsTheRate:
    FACTORS = (1.0, 0.5, 1e-3, 0.1, 1e3, 2.0, 1.0, 1e-6, 0.3, 1e4)

    def build(self, task, factors, every=1, lr=0.01):
        opt = LQA(Heavy(task.model.parameters(), lr), every=every, controller=Scripted(factors))
        return task, opt

    def heavy_ball(self, task, rates):
        """Heavy-ball momentum of the gradients, in units of the largest rate so far."""
        params = list(task.model.parameters())
        moments, largest = [torch.zeros_like(param) for param in params], 0.0
        for step, (before, rate) in enumerate(rates):
            largest, old = max(largest, before), largest
            gradients = torch.autograd.grad(task.closure(step)(), params)
            for param, moment, gradient in zip(params, moments, gradients, strict=True):
                moment.mul_(0.9 * old / largest).add_(gradient)
                param.data.sub_(rate * moment)

    @pytest.mark.parametrize("factors", [FACTORS, (*FACTORS, 50.0, 0.1, 30.0)], ids=["", "larger"])
    def test_steps_in_one_unit_whatever_the_rate_does(self, factors):
        task, opt = self.build(classification(dtype=torch.float64), factors)
        plain, rates = classification(dtype=torch.float64), []
        for step in range(len(factors)):
            before = opt.rate
            opt.step(task.closure(step))
            rates.append((before, opt.rate))
            assert opt.param_groups[0]["lr"] == opt.rate
        self.heavy_ball(plain, rates)
        torch.testing.assert_close(values(task.model), values(plain.model), rtol=1e-11, atol=1e-13)
        assert stepping_rate(opt) == max(before for before, _ in rates)

    def test_steps_between_measurements_are_in_that_unit(self):
        task, opt = self.build(classification(dtype=torch.float64), (0.5, 0.1), every=3)
        plain, rates = classification(dtype=torch.float64), []
        for step in range(6):
            before = opt.rate
            opt.step(task.closure(step))
            rates.append((before, opt.rate))
        assert opt.report.counts[Reason.REUSED] == 4
        self.heavy_ball(plain, rates)
        torch.testing.assert_close(values(task.model), values(plain.model), rtol=1e-11, atol=1e-13)

    @pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5)], ids=["float", "tensor"])
    def test_lr_is_restored_after_the_step_also_when_the_base_raises(self, lr):
        task = classification()
        base = Heavy(task.model.parameters(), lr)
        opt = LQA(base, controller=Scripted((0.25, 1.0)))
        opt.step(task.closure())
        before = values(task.model)
        base.fault = raising(ZeroDivisionError)
        with pytest.raises(ZeroDivisionError):
            opt.step(task.closure())
        assert identical(values(task.model), before)
        assert opt.param_groups[0]["lr"] == opt.rate == 0.125
        base.fault = None
        opt.step(task.closure())
        assert base.rates == [0.5] * 3
        assert (opt.param_groups[0]["lr"] is lr) == isinstance(lr, torch.Tensor)

    @pytest.mark.parametrize("lr", [0.01, 1.0, 100.0])
    def test_learns_from_any_first_rate(self, lr):
        task = classification()
        opt = LQA(Heavy(task.model.parameters(), lr))
        train(task, opt, range(300))
        assert full_loss(task) < 0.5
        assert 1e-3 < opt.rate < 10.0

    def test_resumes_bit_for_bit(self):
        """Also at a rate other than the largest."""
        task, opt = self.build(classification(), self.FACTORS)
        train(task, opt, range(4))
        assert stepping_rate(opt) > opt.rate
        resumed, other = self.build(classification(), self.FACTORS)
        model, state = saved_and_loaded(task.model, opt)
        resumed.model.load_state_dict(model)
        other.load_state_dict(state)
        for each, optimizer in ((task, opt), (resumed, other)):
            train(each, optimizer, range(4, 10))
        assert identical(values(task.model), values(resumed.model))
        assert other.rate == opt.rate


def test_sparse_gradients_through_an_optimizer_that_takes_them():
    torch.manual_seed(0)
    table = nn.Embedding(10, 3, sparse=True)
    opt = LQA(torch.optim.SparseAdam(table.parameters(), lr=0.01))
    index = torch.tensor([1, 3, 3])
    untouched = table.weight[5].clone()
    for _ in range(200):
        opt.step(lambda: table(index).square().sum())
    assert table(index).square().sum() < 1e-2
    assert torch.equal(table.weight[5], untouched)
