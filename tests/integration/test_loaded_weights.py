"""Weights that callers load or swap in between steps."""

import copy

import pytest
import torch
from problems import Task, classification, identical, values
from seams import watched
from torch import nn
from training import full_loss, train

from quadstep import LQA


class TestWeightsThatAreLoaded:
    @pytest.mark.parametrize("by", ["load_state_dict", "data", "vector"])
    def test_are_where_training_goes_on_from_and_what_eval_shows(self, by):
        task, other = classification(), classification(seed=3)
        other = Task(other.model, task.inputs, task.labels)
        opt, own = LQA(task.model.parameters()), LQA(other.model.parameters())
        train(task, opt, range(100))
        train(other, own, range(400))
        own.eval()
        if by == "load_state_dict":
            task.model.load_state_dict(other.model.state_dict())
        elif by == "data":
            for param, loaded in zip(task.model.parameters(), values(other.model), strict=True):
                param.data.copy_(loaded)
        else:
            vector = nn.utils.parameters_to_vector(other.model.parameters()).detach()
            nn.utils.vector_to_parameters(vector, task.model.parameters())
        loaded, start = values(other.model), full_loss(other)
        opt.eval()
        assert identical(values(task.model), loaded)
        opt.train()
        assert identical(values(task.model), loaded)
        train(task, opt, range(10))
        assert full_loss(task) < 1.05 * start
        opt.eval()
        assert full_loss(task) < 1.05 * start
        opt.train()
        train(task, opt, range(300))
        opt.eval()
        assert full_loss(task) < start

    def test_in_eval_mode(self):
        task, other = classification(), classification(seed=3)
        opt = LQA(task.model.parameters())
        train(task, opt, range(100))
        opt.eval()
        task.model.load_state_dict(other.model.state_dict())
        opt.train()
        assert identical(values(task.model), values(other.model))
        train(task, opt, range(1))
        for param, loaded in zip(task.model.parameters(), values(other.model), strict=True):
            torch.testing.assert_close(param.detach(), loaded, rtol=0, atol=0.1)

    @pytest.mark.parametrize("data", [False, True])
    @pytest.mark.parametrize("averaged", [False, True])
    def test_for_a_while_have_no_effect(self, data, averaged):
        """As an average that the caller keeps, for validation."""
        plain, swapped = classification(), classification()
        opts = [LQA(task.model.parameters()) for task in (plain, swapped)]
        torch.manual_seed(0)
        others = [torch.randn_like(param) for param in plain.model.parameters()]

        def swap(weights):
            held = [param.detach().clone() for param in swapped.model.parameters()]
            for param, weight in zip(swapped.model.parameters(), weights, strict=True):
                if data:
                    param.data.copy_(weight)
                else:
                    with torch.no_grad():
                        param.copy_(weight)
            return held

        for epoch in range(6):
            for task, opt in zip((plain, swapped), opts, strict=True):
                train(task, opt, range(12 * epoch, 12 * (epoch + 1)))
            if averaged:
                opts[1].eval()
            held = swap(others)
            if not averaged:
                opts[1].eval()
            assert identical(list(swapped.model.parameters()), others)
            if not averaged:
                opts[1].train()
                assert identical(list(swapped.model.parameters()), others)
            swap(held)
            if averaged:
                opts[1].train()
            assert identical(values(plain.model), values(swapped.model))
            for opt in opts:
                opt.eval()
            assert identical(values(plain.model), values(swapped.model))
            for opt in opts:
                opt.train()
            assert not watched(opts[1])

    def test_are_saved_as_they_are(self):
        """The state that is saved while other weights are in place goes with either."""
        task = classification()
        opt = LQA(task.model.parameters())
        train(task, opt, range(50))
        training = copy.deepcopy(task.model.state_dict())
        for param in task.model.parameters():
            param.data.zero_()
        state = copy.deepcopy(opt.state_dict())
        task.model.load_state_dict(training)
        train(task, opt, range(50, 70))
        resumed = classification()
        resumed.model.load_state_dict(training)
        other = LQA(resumed.model.parameters())
        other.load_state_dict(state)
        train(resumed, other, range(50, 70))
        assert identical(values(task.model), values(resumed.model))
