"""eval() shows the averaged weights, train() brings the training weights back."""

import pytest
import torch
from configurations import CONFIGURATIONS
from problems import classification, identical, values
from training import saved_and_loaded, train

from quadstep import LQA


class TestModes:
    def test_eval_shows_the_average_and_train_brings_back(self):
        task = classification(dtype=torch.float64)
        opt = LQA(task.model.parameters())
        train(task, opt, range(50))
        training = values(task.model)
        opt.eval()
        opt.eval()
        averaged = values(task.model)
        assert not torch.allclose(averaged[0], training[0])
        opt.train()
        opt.train()
        torch.testing.assert_close(values(task.model), training, rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize("name", ["lqa-auto", "lqa(adamw)", "lqa-paper"])
    @pytest.mark.parametrize("every", [1, 7])
    def test_evaluating_changes_no_step(self, name, every):
        plain, evaluated = classification(), classification()
        opts = [CONFIGURATIONS[name](task.model.parameters()) for task in (plain, evaluated)]
        opts[1].eval()
        opts[1].train()
        for step in range(60):
            train(plain, opts[0], [step])
            train(evaluated, opts[1], [step])
            if step % every == 0:
                training = values(evaluated.model)
                opts[1].eval()
                opts[1].train()
                assert identical(values(evaluated.model), training)
        assert identical(values(plain.model), values(evaluated.model))

    def test_evaluating_around_another_optimizer_changes_no_step(self):
        ends = []
        for evaluates in (False, True):
            task = classification()
            base = torch.optim.AdamW(task.model.parameters(), betas=(0.0, 0.999))
            opt = LQA(base, averaging="schedule-free")
            for step in range(40):
                train(task, opt, [step])
                if evaluates:
                    opt.eval()
                    opt.train()
            ends.append(values(task.model))
        assert identical(*ends)

    def test_a_state_saved_in_eval_mode_resumes_bit_for_bit(self):
        task, resumed = classification(), classification()
        opt = LQA(task.model.parameters())
        train(task, opt, range(25))
        opt.eval()
        model, state = saved_and_loaded(task.model, opt)
        opt.train()
        train(task, opt, range(25, 50))
        resumed.model.load_state_dict(model)
        other = LQA(resumed.model.parameters())
        other.load_state_dict(state)
        other.train()
        train(resumed, other, range(25, 50))
        assert identical(values(task.model), values(resumed.model))
        opt.eval()
        other.eval()
        assert identical(values(task.model), values(resumed.model))

    def test_nothing_is_kept_of_evaluating(self):
        task = classification()
        opt = LQA(task.model.parameters())
        train(task, opt, range(25))
        keys = {key for own in opt.state.values() for key in own}
        opt.eval()
        opt.train()
        assert {key for own in opt.state.values() for key in own} == keys
