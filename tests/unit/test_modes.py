"""eval() shows the averaged weights, train() brings the training weights back."""

import copy

import pytest
import torch
from configurations import CONFIGURATIONS
from problems import classification, identical, noisy_classification, values
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import update_bn
from training import saved_and_loaded, step_in_two_phases, train, train_seeded

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


class TestAveraged:
    def test_holds_what_eval_shows_and_brings_back_every_bit(self, configuration):
        task, twin = classification(), classification()
        opt, other = (configuration(each.model.parameters()) for each in (task, twin))
        for opts in ((task, opt), (twin, other)):
            train(*opts, range(25))
        training = values(task.model)
        other.eval()
        with opt.averaged() as nothing:
            assert nothing is None
            assert identical(values(task.model), values(twin.model))
        other.train()
        assert identical(values(task.model), training)
        train(task, opt, range(25, 50))
        train(twin, other, range(25, 50))
        assert identical(values(task.model), values(twin.model))

    def test_may_be_nested(self):
        task = classification()
        opt = LQA(task.model.parameters())
        train(task, opt, range(25))
        training = values(task.model)
        with opt.averaged():
            shown = values(task.model)
            assert not identical(shown, training)
            with opt.averaged():
                assert identical(values(task.model), shown)
            assert identical(values(task.model), shown)
        assert identical(values(task.model), training)

    @pytest.mark.parametrize("inside", ["eval", "train"])
    def test_restores_the_mode_that_it_found(self, inside):
        task = classification()
        opt = LQA(task.model.parameters())
        train(task, opt, range(25))
        training = values(task.model)
        opt.eval()
        shown = values(task.model)
        with opt.averaged():
            getattr(opt, inside)()
        assert identical(values(task.model), shown)
        opt.train()
        with opt.averaged():
            getattr(opt, inside)()
        assert identical(values(task.model), training)

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_restores_it_after_exceptions(self, error):
        task = classification()
        opt = LQA(task.model.parameters())
        train(task, opt, range(25))
        training = values(task.model)
        with pytest.raises(error), opt.averaged():
            raise error
        assert identical(values(task.model), training)
        train(task, opt, [25])

    def test_takes_no_step(self):
        task = classification()
        opt = LQA(task.model.parameters())
        train(task, opt, range(25))
        with opt.averaged():
            shown = values(task.model)
            with pytest.raises(RuntimeError, match=r"leave `with opt.averaged\(\):`"):
                opt.step(task.closure())
            assert identical(values(task.model), shown)
        opt.step(task.closure())

    def test_may_be_saved_or_loaded_inside(self):
        task, resumed = classification(), classification()
        opt, other = (LQA(each.model.parameters()) for each in (task, resumed))
        train(task, opt, range(25))
        with opt.averaged():
            model, state = saved_and_loaded(task.model, opt)
        with other.averaged():
            resumed.model.load_state_dict(model)
            other.load_state_dict(state)
        train(task, opt, range(25, 50))
        train(resumed, other, range(25, 50))
        assert identical(values(task.model), values(resumed.model))


def averaged_values(model, opt):
    """What a model holds under averaged weights, by name."""
    with opt.averaged():
        return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one, other):
    return [*one] == [*other] and identical([*one.values()], [*other.values()])


class TestAveragedStateDict:
    @pytest.mark.parametrize("mode", ["train", "eval"])
    def test_has_the_averaged_weights_and_changes_nothing(self, configuration, mode):
        task, twin = noisy_classification(), noisy_classification()
        opt, other = (configuration(each.model.parameters()) for each in (task, twin))
        for each in ((task, opt), (twin, other)):
            train_seeded(*each, range(25))
        expected = averaged_values(twin.model, other)
        getattr(opt, mode)()
        held = values(task.model)
        gradients = [param.grad.clone() for param in task.model.parameters()]
        exported = opt.averaged_state_dict(task.model)
        assert equal(exported, expected)
        assert identical(values(task.model), held)
        assert identical([param.grad for param in task.model.parameters()], gradients)
        opt.train()
        for each in ((task, opt), (twin, other)):
            train_seeded(*each, range(25, 50))
        assert identical(values(task.model), values(twin.model))
        assert equal(exported, expected), "training changes the copies"

    def test_loads_into_a_fresh_model(self):
        task, other = classification(), classification(seed=1)
        opt = LQA(task.model.parameters())
        train(task, opt, range(50))
        other.model.load_state_dict(opt.averaged_state_dict(task.model))
        with opt.averaged():
            assert identical(values(task.model), values(other.model))

    def test_keeps_ties_and_what_is_not_optimized(self):
        task = classification(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3))
        model = task.model
        model[2].weight = model[0].weight
        opt = LQA([*model[0].parameters()])
        train(task, opt, range(25))
        exported = opt.averaged_state_dict(model)
        assert equal(exported, averaged_values(model, opt))
        assert exported["0.weight"].data_ptr() == exported["2.weight"].data_ptr()
        assert exported["0.weight"].data_ptr() != model[0].weight.data_ptr()
        assert torch.equal(exported["3.weight"], model[3].weight)
        assert not torch.equal(exported["0.weight"], model[0].weight)

    @pytest.mark.parametrize("dtype", [torch.complex64, torch.bfloat16, torch.float64])
    def test_of_other_types(self, dtype):
        model = nn.Linear(4, 1, dtype=dtype)
        opt = LQA(model.parameters())
        for _ in range(25):
            opt.step(lambda: (model(torch.ones(4, dtype=dtype)) - 2.0).abs().square().sum())
        exported = opt.averaged_state_dict(model)
        assert equal(exported, averaged_values(model, opt))
        assert exported["weight"].dtype is dtype

    def test_of_a_parameter_that_the_caller_has_changed_is_what_was_left(self):
        task = classification()
        opt = LQA(task.model.parameters())
        train(task, opt, range(25))
        with torch.no_grad():
            task.model[0].weight.zero_()
        exported = opt.averaged_state_dict(task.model)
        assert not exported["0.weight"].any()
        assert equal(exported, averaged_values(task.model, opt))

    def test_has_the_keys_of_the_module_that_is_given(self):
        task = classification()
        opt = LQA(task.model.parameters())
        train(task, opt, range(25))
        compiled = torch.compile(task.model, backend="eager")
        assert [*opt.averaged_state_dict(compiled)] == [*compiled.state_dict()]
        assert [*opt.averaged_state_dict(task.model)] == [*task.model.state_dict()]
        assert [*opt.averaged_state_dict(task.model[0])] == ["weight", "bias"]

    def test_copies_what_modules_add(self):
        class Counting(nn.Linear):
            def __init__(self):
                super().__init__(2, 1)
                self.counts = {"calls": 0}

            def get_extra_state(self):
                return self.counts

            def set_extra_state(self, state):
                self.counts = state

        model = Counting()
        exported = LQA(model.parameters()).averaged_state_dict(model)
        model.counts["calls"] = 1
        assert exported["_extra_state"] == {"calls": 0}

    def test_of_a_model_without_a_parameter_of_the_optimizer(self):
        task = classification()
        opt = LQA(task.model.parameters())
        train(task, opt, range(5))
        training = values(task.model)
        for other in (copy.deepcopy(task.model), nn.Tanh()):
            with pytest.raises(ValueError, match=r"model, a .* has no parameter of this optimizer"):
                opt.averaged_state_dict(other)
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
            opt.averaged_state_dict([task.model])
        assert identical(values(task.model), training)
        train(task, opt, range(5, 10))


class TestBatchNorm:
    def test_update_bn_gives_the_statistics_of_the_averaged_weights(self):
        """And training goes on as without it."""
        task, twin = noisy_classification(), noisy_classification()
        opt, other = (LQA(each.model.parameters()) for each in (task, twin))
        for each in ((task, opt), (twin, other)):
            train_seeded(*each, range(50))
        batches = task.inputs.split(64)
        with opt.averaged():
            update_bn(batches, task.model)
            exported = opt.averaged_state_dict(task.model)
            shown = values(task.model)
        with torch.no_grad():
            hidden = torch.stack(
                [functional.linear(batch, exported["0.weight"]) for batch in batches]
            )
        found = exported["1.running_mean"], exported["1.running_var"]
        torch.testing.assert_close(found[0], hidden.mean((0, 1)))
        torch.testing.assert_close(found[1], hidden.var(1).mean(0))
        # The buffers stay, and validation of the average uses them.
        with opt.averaged():
            assert identical(values(task.model), shown)
        assert torch.equal(task.model[1].running_mean, found[0])
        assert not torch.equal(task.model[0].weight, exported["0.weight"])
        assert not torch.equal(twin.model[1].running_mean, found[0])
        for each in ((task, opt), (twin, other)):
            train_seeded(*each, range(50, 100))
        assert identical([*task.model.parameters()], [*twin.model.parameters()])


class TestEvaluatingInTrainMode:
    @pytest.mark.parametrize("two_phases", [False, True])
    def test_for_long_changes_no_step_and_is_not_warned_of(self, configuration, two_phases):
        """Warnings are errors in tests. The model is in eval mode, the optimizer is not."""
        task, evaluated = noisy_classification(), noisy_classification()
        opts = [configuration(each.model.parameters()) for each in (task, evaluated)]

        def loss():
            return functional.cross_entropy(evaluated.model(evaluated.inputs), evaluated.labels)

        for step in range(0, 100, 10):
            for each, opt in zip((task, evaluated), opts, strict=True):
                for inner in range(step, step + 10):
                    torch.manual_seed(inner)
                    take = step_in_two_phases if two_phases else LQA.step
                    take(opt, each.closure(inner))
            evaluated.model.eval()
            for _ in range(120):
                with torch.no_grad():
                    loss()
                with torch.inference_mode():
                    loss()
                loss()
            evaluated.model.train()
        assert identical(values(task.model), values(evaluated.model))
        assert opts[0].report == opts[1].report

    def test_and_asking_for_gradients_there_is_not_warned_of(self):
        """As attributions, and norms of gradients, are computed of validation data."""
        task, evaluated = classification(), classification()
        opts = [LQA(each.model.parameters()) for each in (task, evaluated)]
        for step in range(60):
            for each, opt in zip((task, evaluated), opts, strict=True):
                train(each, opt, [step])
            inputs = evaluated.inputs.clone().requires_grad_()
            loss = functional.cross_entropy(evaluated.model(inputs), evaluated.labels)
            torch.autograd.grad(loss, [inputs, *evaluated.model.parameters()])
        assert identical(values(task.model), values(evaluated.model))
