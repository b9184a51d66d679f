"""metrics() is the report as a flat dict of floats."""

import copy
import math

import pytest
import torch
from problems import classification
from training import REPORTED, reported, saved_and_loaded, train

from quadstep import LQA, Reason

REASONS = [f"lqa/reason/{reason.value}" for reason in Reason if reason is not Reason.INITIAL]
KEYS = [*(f"lqa/{name}" for name in REPORTED), *REASONS]


def equal(metrics, expected):
    return metrics.keys() == expected.keys() and all(
        metrics[key] == value or (math.isnan(metrics[key]) and not math.isfinite(value))
        for key, value in expected.items()
    )


def test_are_the_report_at_every_step(configuration):
    task = classification()
    opt = configuration(task.model.parameters())
    for step in range(25):
        metrics = opt.metrics()
        assert [*metrics] == KEYS
        assert {type(value) for value in metrics.values()} == {float}
        assert equal(metrics, reported(opt))
        train(task, opt, [step])
    assert sum(opt.metrics()[key] for key in REASONS) == 25.0


def test_before_the_first_step():
    opt = LQA(classification().model.parameters())
    metrics = opt.metrics()
    assert math.isnan(metrics["lqa/loss"])
    assert metrics["lqa/rate"] == opt.rate
    assert sum(metrics[key] for key in REASONS) == 0.0


def test_in_eval_mode_and_after_loading():
    task = classification()
    opt = LQA(task.model.parameters())
    train(task, opt, range(25))
    metrics = opt.metrics()
    with opt.averaged():
        assert opt.metrics() == metrics
        _, state = saved_and_loaded(task.model, opt)
    other = LQA(copy.deepcopy(task.model).parameters())
    other.load_state_dict(state)
    loaded = other.metrics()
    # What only the last step had is not part of the state.
    gone = {"lqa/loss", "lqa/forwards", "lqa/backwards"}
    assert {key for key in KEYS if loaded[key] != metrics[key]} == gone


def test_of_several_groups_have_the_rate_of_each():
    task = classification()
    first, _, last = task.model
    groups = [
        {"params": first.parameters(), "lr": 1e-5},
        {"params": last.parameters(), "lr": 1e-4},
    ]
    opt = LQA(groups)
    assert opt.metrics()["lqa/rate_0"] == 1e-5
    train(task, opt, range(25))
    metrics = opt.metrics()
    assert metrics["lqa/rate_0"] == metrics["lqa/rate"] == opt.rate
    assert metrics["lqa/rate_1"] == opt.param_groups[1]["lr"]
    assert metrics["lqa/rate_1"] == pytest.approx(10.0 * metrics["lqa/rate_0"])
    added = torch.nn.Parameter(torch.zeros(3))
    opt.add_param_group({"params": [added]})
    assert opt.metrics()["lqa/rate_2"] == opt.rate


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_that_are_not_finite_are_nan(value):
    theta = torch.nn.Parameter(torch.ones(2))
    opt = LQA([theta])
    opt.step(lambda: theta.sum() * value)
    assert math.isnan(opt.metrics()["lqa/loss"])
    assert opt.metrics()["lqa/reason/non_finite"] == 1.0


def test_wait_for_the_device_once(monkeypatch):
    theta = torch.nn.Parameter(torch.ones(2))
    other = torch.nn.Parameter(torch.ones(1))
    opt = LQA([{"params": [theta]}, {"params": [other], "lr": torch.tensor(1e-4)}])
    opt.step(lambda: theta.square().sum())
    waits = []
    read = torch.Tensor.__float__
    for name in ("__float__", "item", "tolist"):
        wrapped = getattr(torch.Tensor, name)

        def count(tensor, wrapped=wrapped):
            waits.append(wrapped)
            return wrapped(tensor)

        monkeypatch.setattr(torch.Tensor, name, count)
    opt.metrics()
    assert waits == [read]
