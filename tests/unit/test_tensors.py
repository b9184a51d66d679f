"""Operations on lists of tensors, of any type, and on an accelerator in few launches."""

import copy
import math

import pytest
import torch
from problems import classification, identical, noisy_classification, values
from seams import run_as_on_an_accelerator
from torch import nn
from training import (
    about_to_measure,
    about_to_reuse,
    assert_free_of_side_effects,
    backward_of,
    full_loss,
    same_state,
    train,
)

from quadstep import LQA, Reason
from quadstep.tensors import assign, copies, group_by, inner, rank_mean


def test_groups_keep_the_order_of_their_items():
    assert list(group_by([3, 1, 4, 1, 5, 2], lambda number: number % 2)) == [[3, 1, 1, 5], [4, 2]]


def test_copies_are_assigned_back_bit_for_bit_in_any_types():
    tensors = [torch.randn(3), torch.randn(2, 2).bfloat16(), torch.randn(0), torch.arange(4)]
    before = copies(tensors)
    for tensor in tensors:
        tensor.add_(1)
    assert not torch.equal(tensors[0], before[0])
    assign(tensors, before)
    assert identical(tensors, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_inner_products_do_not_overflow_in_half_precision(dtype):
    one = torch.full((4,), 300.0, dtype=dtype)
    assert inner(one, one).item() == pytest.approx(4 * 300.0**2, rel=1e-2)


def test_the_mean_over_one_process_is_the_number_itself():
    like = torch.zeros((), dtype=torch.float64)
    assert rank_mean([0.1, 2.0], like, None) == [0.1, 2.0]
    assert rank_mean([0.1, torch.tensor(2.0)], like, None) == [0.1, 2.0]


class TestAccelerators:
    def test_what_is_launched_together_gives_what_is_done_one_by_one(
        self, configuration, monkeypatch
    ):
        def trained():
            task = noisy_classification(dtype=torch.float64)
            opt = configuration(task.model.parameters())
            train(task, opt, range(25))
            return values(task.model)

        plain = trained()
        run_as_on_an_accelerator(monkeypatch)
        torch.testing.assert_close(trained(), plain, rtol=1e-9, atol=1e-12)
        assert_free_of_side_effects(configuration, lambda opt, closure: opt.step(closure))

    def test_probes_may_write_over_the_gradients(self, configuration, monkeypatch):
        """As those of replayed graphs do."""
        run_as_on_an_accelerator(monkeypatch)
        plain, replayed = classification(dtype=torch.float64), classification(dtype=torch.float64)
        for task in (plain, replayed):
            opt = configuration(task.model.parameters())
            for step in range(15):
                loss = backward_of(opt, task.closure(step))
                static = [param.grad for param in task.model.parameters()]

                def closure(task=task, static=static, step=step):
                    if task is replayed:
                        torch._foreach_zero_(static)
                    return task.closure(step)()

                opt.step(closure, loss=loss)
        assert identical(values(plain.model), values(replayed.model))

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_measuring_step_looks_before_any_state_advances(
        self, configuration, bad, monkeypatch
    ):
        """Where looking means waiting, a step that does not measure does not look."""
        run_as_on_an_accelerator(monkeypatch)
        task, opt = about_to_measure(configuration)
        before, state = values(task.model), copy.deepcopy(opt.state_dict()["state"])
        hook = task.model[0].weight.register_hook(lambda grad: grad * bad)
        opt.step(task.closure())
        hook.remove()
        assert opt.report.reason is Reason.NON_FINITE
        assert identical(before, values(task.model))
        assert same_state(opt.state_dict()["state"], state)
        train(task, opt, range(20))
        assert opt.report.reason is not Reason.NON_FINITE
        assert math.isfinite(full_loss(task))

    def test_a_measuring_step_without_a_gradient_is_not_taken(self, monkeypatch):
        run_as_on_an_accelerator(monkeypatch)
        task, opt = about_to_measure(LQA)
        before = [param.detach().clone() for param in task.model.parameters()]
        state = copy.deepcopy(opt.state_dict()["state"])
        opt.step(lambda: 0.0 * task.closure()())
        assert opt.report.reason is Reason.REUSED
        assert identical(before, list(task.model.parameters()))
        assert same_state(opt.state_dict()["state"], state)
        opt.step(task.closure())
        assert opt.report.reason is not Reason.REUSED

    def test_a_step_that_reuses_the_rate_does_not_look(self, monkeypatch):
        run_as_on_an_accelerator(monkeypatch)
        task = classification()
        opt = about_to_reuse(task)
        task.model[0].weight.register_hook(lambda grad: grad * math.nan)
        opt.step(task.closure())
        assert opt.report.reason is Reason.REUSED


def test_complex_parameters(configuration):
    torch.manual_seed(0)
    target = torch.randn(5, dtype=torch.complex128)
    theta = nn.Parameter(torch.randn(5, dtype=torch.complex128))
    opt = configuration([theta])
    start = (theta - target).abs().square().sum().item()
    for _ in range(300):
        opt.step(lambda: (theta - target).abs().square().sum() + 1.0)
    opt.eval()
    assert (theta - target).abs().square().sum().item() < 1e-2 * start
