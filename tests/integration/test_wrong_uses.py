"""The most frequent wrong uses of a loop: each gets an error or one warning that tells the fix."""

import copy
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from quadstep import LQA


class Classifier(nn.Module):
    """Returns loss and logits, or the logits alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 3))

    def forward(self, x, y=None):
        logits = self.net(x)
        return logits if y is None else (cross_entropy(logits, y), logits)


def batches(steps):
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = torch.randn(32, 8, generator=generator)
        yield x, x[:, :3].argmax(1)


def step(model, opt, x, y):
    opt.zero_grad()
    model(x, y)[0].backward()
    opt.step()


def no_closure_and_no_model():
    model = Classifier()
    opt = LQA(model.parameters())
    for x, y in batches(5):
        step(model, opt, x, y)


def loss_that_is_not_the_models():
    model = Classifier()
    opt = LQA(model.parameters(), model=model)
    for x, y in batches(5):
        cross_entropy(model(x, y)[1], y, label_smoothing=0.1).backward()
        opt.step()


def penalty_that_the_model_does_not_return():
    model = Classifier()
    opt = LQA(model.parameters(), model=model)
    for x, y in batches(100):
        opt.zero_grad()
        loss, logits = model(x, y)
        (loss + 2.0 * (logits - 1.0).square().mean()).backward()
        opt.step()


def training_in_eval_mode():
    model = Classifier()
    opt = LQA(model.parameters(), model=model)
    opt.eval()
    for x, y in batches(5):
        step(model, opt, x, y)


def scheduler():
    model = Classifier()
    opt = LQA(model.parameters(), model=model)
    schedule = torch.optim.lr_scheduler.LinearLR(opt)
    for x, y in batches(20):
        step(model, opt, x, y)
        schedule.step()


def two_optimizers():
    model = Classifier()
    other = torch.optim.AdamW(model.parameters())
    opt = LQA(model.parameters(), model=model)
    for x, y in batches(20):
        other.zero_grad()
        model(x, y)[0].backward()
        other.step()
        opt.step()


def two_optimizers_for_parts():
    model = Classifier()
    first = LQA(model.net[0].parameters(), model=model)
    second = LQA(model.net[3].parameters(), model=model)
    for x, y in batches(20):
        first.zero_grad()
        second.zero_grad()
        model(x, y)[0].backward()
        first.step()
        second.step()


def frozen_model():
    model = Classifier().requires_grad_(False)
    opt = LQA(model.parameters())
    for x, y in batches(5):
        opt.step(lambda x=x, y=y: model(x, y)[0])


def frozen_parameters():
    model = Classifier()
    opt = LQA(model.net[0].parameters(), model=model)
    model.net[0].requires_grad_(False)
    for x, y in batches(5):
        step(model, opt, x, y)


def moved_model():
    model = Classifier()
    opt = LQA(model.parameters(), model=model)
    for x, y in batches(3):
        step(model, opt, x, y)
    model.double()
    for x, y in batches(3):
        step(model, opt, x.double(), y)


def copied_model():
    model = Classifier()
    opt = LQA(model.parameters(), model=model)
    model = copy.deepcopy(model)
    for x, y in batches(3):
        step(model, opt, x, y)


def parameters_of_another_model():
    model = Classifier()
    LQA(copy.deepcopy(model).parameters(), model=model)


def output_without_a_loss():
    model = Classifier()
    opt = LQA(model.parameters(), model=model)
    for x, y in batches(5):
        opt.zero_grad()
        cross_entropy(model(x), y).backward()
        opt.step()


def criterion_that_is_not_called():
    model = Classifier()
    opt = LQA(model.parameters(), model=model, criterion=nn.CrossEntropyLoss())
    for x, y in batches(5):
        opt.zero_grad()
        cross_entropy(model(x), y).backward()
        opt.step()


def criterion_of_changed_outputs():
    model, criterion = Classifier(), nn.CrossEntropyLoss()
    opt = LQA(model.parameters(), model=model, criterion=criterion)
    for x, y in batches(5):
        opt.zero_grad()
        criterion(2.0 * model(x), y).backward()
        opt.step()


def criterion_without_a_reduction():
    model, criterion = Classifier(), nn.CrossEntropyLoss(reduction="none")
    opt = LQA(model.parameters(), model=model, criterion=criterion)
    for x, y in batches(5):
        opt.zero_grad()
        criterion(model(x), y).mean().backward()
        opt.step()


def forgotten_backward():
    model = Classifier()
    opt = LQA(model.parameters(), model=model)
    for x, y in batches(5):
        opt.zero_grad()
        model(x, y)
        opt.step()


def function_of_outputs_without_the_model():
    model = Classifier()
    opt = LQA(model.parameters())
    loss_fn = opt.recorded(cross_entropy)
    for x, y in batches(5):
        opt.zero_grad()
        loss_fn(model(x), y).backward()
        opt.step()


def function_that_is_called_unwrapped():
    model = Classifier()
    opt = LQA(model.parameters())
    opt.recorded(cross_entropy)
    for x, y in batches(5):
        opt.zero_grad()
        cross_entropy(model(x), y).backward()
        opt.step()


def function_that_returns_the_loss_last():
    model = Classifier()
    opt = LQA(model.parameters())
    loss_fn = opt.recorded(lambda x, y: model(x, y)[::-1])
    for x, y in batches(5):
        opt.zero_grad()
        loss_fn(x, y)[1].backward()
        opt.step()


def criterion_that_is_a_function():
    model = Classifier()
    LQA(model.parameters(), model=model, criterion=cross_entropy)


def model_that_is_a_function():
    model = Classifier()
    LQA(model.parameters(), model=model.forward)


def criterion_without_a_model():
    LQA(Classifier().parameters(), criterion=nn.CrossEntropyLoss())


def method_that_is_called_in_place_of_the_model():
    model = Classifier()
    opt = LQA(model.parameters(), model=model)
    for x, y in batches(5):
        model.forward(x, y)[0].backward()
        opt.step()


def inputs_changed_before_the_step():
    model = Classifier()
    opt = LQA(model.parameters(), model=model)
    for x, y in batches(20):
        opt.zero_grad()
        model(x, y)[0].backward()
        x.normal_()
        opt.step()


def forgotten_zero_grad():
    model = Classifier()
    opt = LQA(model.parameters(), model=model)
    for x, y in batches(100):
        model(x, y)[0].backward()
        opt.step()


ERRORS = [
    (no_closure_and_no_model, TypeError, "construct LQA(params, model=model)"),
    (loss_that_is_not_the_models, RuntimeError, "call it on that loss, or wrap the function"),
    (training_in_eval_mode, RuntimeError, "or call opt.train(), first"),
    (frozen_model, RuntimeError, "does not require grad"),
    (frozen_parameters, RuntimeError, "requires_grad_(True)"),
    (moved_model, ValueError, "opt.load_state_dict(opt.state_dict())"),
    (copied_model, RuntimeError, "call the object that was given as model="),
    (parameters_of_another_model, ValueError, "do not belong to model; pass all modules"),
    (output_without_a_loss, RuntimeError, "LQA(..., criterion=criterion)"),
    (criterion_that_is_not_called, RuntimeError, "call the object that was given as criterion="),
    (criterion_of_changed_outputs, RuntimeError, "move it into the model or the criterion"),
    (criterion_without_a_reduction, RuntimeError, 'leave its reduction at "mean"'),
    (forgotten_backward, RuntimeError, "call loss.backward() before step()"),
    (function_of_outputs_without_the_model, RuntimeError, "LQA(params, model=model)"),
    (function_that_is_called_unwrapped, RuntimeError, "call what opt.recorded returned"),
    (function_that_returns_the_loss_last, RuntimeError, "return the loss first"),
    (criterion_that_is_a_function, TypeError, "criterion = nn.CrossEntropyLoss()"),
    (model_that_is_a_function, TypeError, "model must be a module"),
    (criterion_without_a_model, ValueError, "add model=model"),
    (method_that_is_called_in_place_of_the_model, RuntimeError, "not its forward()"),
]

WARNINGS = [
    (penalty_that_the_model_does_not_return, "compute all of the loss in the model"),
    (scheduler, "leave the scheduler out"),
    (two_optimizers, "put all parameters into one LQA"),
    (two_optimizers_for_parts, "put all parameters into one LQA"),
    (inputs_changed_before_the_step, "change it after step()"),
    (forgotten_zero_grad, "zero_grad() is missing"),
]


@pytest.mark.parametrize(
    ("use", "error", "fix"), ERRORS, ids=lambda value: getattr(value, "__name__", None)
)
def test_error(use, error, fix):
    with pytest.raises(error, match=re.escape(fix)):
        use()


@pytest.mark.parametrize(
    ("use", "fix"), WARNINGS, ids=lambda value: getattr(value, "__name__", None)
)
def test_one_warning(use, fix):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        use()
    (warning,) = caught
    assert warning.category is UserWarning
    assert fix in str(warning.message)
    assert warning.filename == __file__
