"""Parameters that are frozen, tied, adapted, quantized, or used now and then."""

import pytest
import torch
from problems import classification, identical, values
from torch import nn
from torch.nn import functional
from training import full_loss, train

from quadstep import LQA, Reason


def test_frozen_and_unfrozen_in_mid_run(configuration):
    task = classification()
    first, head = task.model[0], task.model[2]
    first.requires_grad_(False)
    opt = configuration(task.model.parameters())
    frozen, start = first.weight.clone(), full_loss(task)
    train(task, opt, range(25))
    assert torch.equal(frozen, first.weight)
    first.requires_grad_(True)
    train(task, opt, range(25, 50))
    assert not torch.equal(frozen, first.weight)
    head.requires_grad_(False)
    opt.zero_grad()
    kept = head.weight.clone()
    train(task, opt, range(50, 75))
    assert torch.equal(kept, head.weight)
    opt.eval()
    assert torch.equal(kept, head.weight)
    assert full_loss(task) < 0.8 * start


def test_tied_weights_move_as_one(configuration):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(12, 6), nn.Linear(6, 12, bias=False))
    model[1].weight = model[0].weight
    tokens = torch.arange(12)
    opt = configuration(model.parameters())
    first = functional.cross_entropy(model(tokens), tokens.roll(1)).item()
    for _ in range(120):
        opt.step(lambda: functional.cross_entropy(model(tokens), tokens.roll(1)))
    opt.eval()
    assert model[0].weight is model[1].weight
    assert len(list(model.parameters())) == 1
    assert functional.cross_entropy(model(tokens), tokens.roll(1)).item() < first


def test_low_rank_adapters_train_beside_a_frozen_body(configuration):
    task = classification()
    task.model.requires_grad_(False)
    body = values(task.model)
    torch.manual_seed(1)
    down, up = nn.Parameter(0.3 * torch.randn(2, 8)), nn.Parameter(torch.zeros(16, 2))
    opt = configuration([{"params": [down]}, {"params": [up]}])

    def loss(step, size=32):
        picked = torch.arange(step * size, (step + 1) * size) % 256
        inputs = task.inputs[picked]
        hidden = task.model[0](inputs) + inputs @ down.T @ up.T
        return functional.cross_entropy(task.model[2](hidden.tanh()), task.labels[picked])

    start = loss(0, 256).item()
    for step in range(80):
        opt.step(lambda step=step: loss(step))
    opt.eval()
    assert identical(body, values(task.model))
    # The raw gradient of a product that starts at zero is slow, with any rate.
    assert loss(0, 256).item() < start


def test_frozen_parameters_may_be_quantised(configuration):
    task = classification()
    codes = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    opt = configuration([codes, *task.model.parameters()])
    train(task, opt, range(12))
    assert torch.equal(codes, torch.ones(3, dtype=torch.int8))
    assert opt.report.reason is not Reason.NON_FINITE


def test_parameters_that_get_a_gradient_only_sometimes(configuration):
    torch.manual_seed(0)
    task = classification()
    task.model.append(nn.Identity())
    expert = nn.Linear(8, 3)
    opt = configuration([*task.model.parameters(), *expert.parameters()])
    start = full_loss(task)
    for step in range(60):
        picked = torch.arange(step * 32, (step + 1) * 32) % 256
        inputs, labels, idle = task.inputs[picked], task.labels[picked], step % 3 != 0

        def closure(inputs=inputs, labels=labels, idle=idle):
            logits = task.model(inputs)
            return functional.cross_entropy(logits if idle else logits + expert(inputs), labels)

        before = expert.weight.clone()
        opt.step(closure)
        assert not idle or torch.equal(before, expert.weight)
    opt.eval()
    assert full_loss(task) < start


def test_data_of_the_same_shape_may_be_replaced(configuration):
    task = classification()
    opt = configuration(task.model.parameters())
    train(task, opt, range(15))
    weight = task.model[0].weight
    weight.data = weight.data.clone()
    start = full_loss(task)
    train(task, opt, range(15, 60))
    opt.eval()
    assert full_loss(task) < start


class TestFrozenParameters:
    @pytest.mark.parametrize("size", [16, 256])
    @pytest.mark.parametrize("after", [10, 100])
    def test_stay_where_they_are(self, size, after):
        task = classification()
        opt = LQA(task.model.parameters())
        for step in range(after):
            opt.step(task.closure(step, size))
        first = task.model[0].requires_grad_(False)
        kept = first.weight.clone()
        for step in range(after, after + 150):
            opt.step(task.closure(step, size))
            assert torch.equal(first.weight, kept)
            opt.eval()
            assert torch.equal(first.weight, kept)
            opt.train()
        first.requires_grad_(True)
        for step in range(30):
            opt.step(task.closure(step, size))
        assert not torch.equal(first.weight, kept)

    def test_for_the_step_of_another_optimizer_alone_keep_their_average(self):
        """As a discriminator is while its generator steps."""
        ends = []
        for freezes in (False, True):
            task = classification()
            opt = LQA(task.model.parameters())
            for step in range(60):
                opt.step(task.closure(step))
                if freezes:
                    task.model.requires_grad_(False)
                    task.model.requires_grad_(True)
            task.model.requires_grad_(not freezes)
            opt.eval()
            ends.append(values(task.model))
        assert identical(*ends)

    @pytest.mark.parametrize("changes", [False, True])
    @pytest.mark.parametrize("unfreezes", [False, True])
    def test_whose_state_was_forgotten(self, configuration, changes, unfreezes):
        task = classification()
        opt = configuration(task.model.parameters())
        weight = task.model[0].weight
        for step in range(12):
            opt.step(task.closure(step))
        if changes:
            # It is watched from the next step on.
            with torch.no_grad():
                weight[0] = 0.0
            opt.step(task.closure())
        opt.state.pop(weight, None)
        weight.requires_grad_(False)
        kept = weight.clone()
        for step in range(12):
            opt.step(task.closure(step))
        assert torch.equal(weight, kept)
        weight.requires_grad_(unfreezes)
        for step in range(12):
            opt.step(task.closure(step))
        assert torch.equal(weight, kept) != unfreezes
