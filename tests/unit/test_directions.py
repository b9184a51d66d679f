"""Where steps lead: the gradient, the normalized gradient, the step of another optimizer."""

import copy

import pytest
import torch
from configurations import BASES
from problems import classification, noisy_classification, values
from reference import normalised
from seams import pin_rate
from torch import nn
from training import full_loss, same_state, train

from quadstep import LQA, Reason
from quadstep.directions import RMSNormalized


def direction_along(params, grads, state=None):
    """The direction at these gradients, of parameters whose state is carried on."""
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    state = {param: {} for param in params} if state is None else state
    with torch.no_grad():
        line = RMSNormalized().line([{"params": params, "lr": 1.0}], state, 1.0, True)
    return line.blocks[0].direction


@pytest.mark.parametrize(
    "shape", [(), (6,), (5, 6), (4, 3, 2, 2), (5, 1), (7, 1, 1), (1, 6), (0, 6), (6, 0)]
)
def test_equals_the_plain_direction(shape):
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    state = {param: {}}
    grads = [torch.randn(shape, dtype=torch.float64) + 0.5 for _ in range(5)]
    for step in range(1, 6):
        (found,) = direction_along([param], [grads[step - 1]], state)
        torch.testing.assert_close(found, normalised(grads[:step]), rtol=1e-12, atol=1e-14)


def test_a_gradient_of_one_sign_moves_an_output_as_far_as_its_bias():
    layer = nn.Linear(64, 3)
    weight, bias = direction_along(
        [layer.weight, layer.bias], [torch.rand(3, 64) + 0.1, torch.ones(3)]
    )
    inputs = torch.ones(64)
    torch.testing.assert_close(weight @ inputs, bias)


def test_real_and_imaginary_parts_are_centralized_apart():
    torch.manual_seed(0)
    grad = torch.randn(4, 6, dtype=torch.complex128) + (1.0 + 2.0j)
    (joint,) = direction_along([nn.Parameter(torch.zeros(4, 6, dtype=torch.complex128))], [grad])
    apart = [normalised([part]) for part in (grad.real, grad.imag)]
    torch.testing.assert_close(joint, torch.stack(apart, dim=-1), rtol=1e-12, atol=1e-14)


def test_a_complex_vector_is_not_centralized():
    grad = torch.full((3,), 1.0 + 1.0j, dtype=torch.complex128)
    (kept,) = direction_along([nn.Parameter(torch.zeros_like(grad))], [grad])
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


@pytest.mark.parametrize(
    ("own", "decay"), [({}, 0.01), ({"averaging": None}, 0.01), ({"direction": "sgd"}, 0.0)]
)
def test_weights_decay_by_default_along_the_normalised_gradient(own, decay):
    opt = LQA(nn.Linear(2, 1).parameters(), **own)
    assert opt.param_groups[0]["weight_decay"] == decay


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
