"""Autocast, scalers of gradients, and parameters in half precision."""

import copy
import math

import pytest
import torch
from problems import classification, identical, noisy_classification, values
from torch import nn
from torch.nn import functional
from training import full_loss, in_autocast, same_state, step_in_two_phases

from quadstep import LQA, Reason


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains(configuration, dtype):
    task = classification()
    first = full_loss(task)
    opt = configuration(task.model.parameters())
    for step in range(150):
        loss = opt.step(in_autocast(task.closure(step), dtype))
    opt.eval()
    assert loss.dtype is torch.float32
    assert full_loss(task) < 0.6 * first


def test_a_scaler_skips_the_step_at_an_overflow_and_training_goes_on(configuration):
    task = noisy_classification()
    opt = configuration(task.model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    first = full_loss(task)
    for step in range(150):
        closure = in_autocast(task.closure(step), torch.float16)
        opt.zero_grad()
        loss = closure()
        scaler.scale(loss).backward()
        if step == 20:
            next(task.model.parameters()).grad[0, 0] = math.inf
            scale, before = scaler.get_scale(), copy.deepcopy(opt.state_dict())
            weights = [param.clone() for param in task.model.parameters()]
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(task.model.parameters(), 1.0)
        taken = scaler.step(opt, closure, loss=loss)
        scaler.update()
        if step == 20:
            assert taken is None
            assert scaler.get_scale() < scale
            assert identical(weights, list(task.model.parameters()))
            assert same_state(opt.state_dict(), before)
    opt.eval()
    assert opt.report.backwards == 0
    assert sum(opt.report.counts.values()) == 149
    task.model.eval()
    assert full_loss(task) < 0.7 * first


def test_an_overflow_of_the_scale_itself():
    """Gradients of a loss scaled beyond float16: nothing moves until the scale is fit."""
    task = classification()
    opt = LQA(task.model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    start, skipped = values(task.model), 0
    for step in range(60):
        closure = in_autocast(task.closure(step), torch.float16)
        opt.zero_grad()
        loss = closure()
        scaler.scale(loss).backward()
        if scaler.step(opt, closure, loss=loss) is None:
            skipped += 1
            assert identical(start, values(task.model))
        scaler.update()
        if opt.report.counts:
            break
    assert 5 < skipped < 40


@pytest.mark.parametrize("inside", [True, False])
def test_the_resolution_is_that_of_the_arithmetic_not_of_the_last_cast(inside):
    """Autocast gives a float32 loss whose differences are those of bfloat16."""
    task = classification()
    opt = LQA(task.model.parameters(), direction="gradient", averaging=None, delta0=1e-4)
    closure = task.closure()
    if inside:
        opt.step(in_autocast(closure, torch.bfloat16))
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            opt.step(closure)
    assert opt.report.reason is Reason.UNRESOLVED
    exact = classification()
    other = LQA(exact.model.parameters(), direction="gradient", averaging=None, delta0=1e-2)
    other.step(exact.closure())
    assert other.report.reason is not Reason.UNRESOLVED


def test_two_phases_know_the_resolution():
    task = classification()
    opt = LQA(task.model.parameters(), direction="gradient", averaging=None, delta0=1e-4)
    closure = in_autocast(task.closure(), torch.bfloat16)
    step_in_two_phases(opt, closure)
    assert opt.report.reason is Reason.UNRESOLVED


@pytest.mark.parametrize("upcast", [True, False])
def test_probes_too_near_to_move_bfloat16_parameters_are_noise(upcast):
    task = classification(dtype=torch.bfloat16)
    # Parameters between two powers of two: a step of 1e-6 is far below their spacing.
    with torch.no_grad():
        for param in task.model.parameters():
            param.copy_(torch.where(param < 0, -0.75, 0.75))
    opt = LQA(task.model.parameters(), delta0=1e-6)
    seen = []

    def closure():
        seen.append(nn.utils.parameters_to_vector(task.model.parameters()).detach())
        logits = task.model(task.inputs)
        return functional.cross_entropy(logits.float() if upcast else logits, task.labels)

    opt.step(closure)
    assert opt.report.reason is Reason.UNRESOLVED
    assert opt.rate == 1e-6
    # Probes go further out until what they see is no noise, and no further.
    while opt.report.reason is Reason.UNRESOLVED:
        seen.clear()
        opt.step(closure)
    theta, *probes = seen
    assert all(0.0 < (probe - theta).abs().max() < 10.0 for probe in probes)


def test_pure_bfloat16_makes_progress(configuration):
    task = classification(dtype=torch.bfloat16)
    first = full_loss(task)
    opt = configuration(task.model.parameters())
    for step in range(200):
        picked = torch.arange(step * 32, (step + 1) * 32) % 256
        opt.step(
            lambda picked=picked: functional.cross_entropy(
                task.model(task.inputs[picked]).float(), task.labels[picked]
            )
        )
    opt.eval()
    assert full_loss(task) < 0.6 * first
