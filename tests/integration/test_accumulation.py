"""Two-phase steps: accumulated and clipped gradients."""

import pytest
import torch
from problems import classification, values
from torch import nn
from training import backward_of, full_loss

from quadstep import LQA


@pytest.mark.parametrize("parts", [4, 1])
def test_accumulation(configuration, parts):
    """The closure sees every micro-batch, or a chosen one: the loss given is of the same."""
    task = classification()
    first = full_loss(task)
    opt = configuration(task.model.parameters())
    for step in range(60):
        micro = [task.closure(4 * step + part, size=8) for part in range(4)]
        opt.zero_grad()
        losses = []
        for closure in micro:
            losses.append(closure())
            (losses[-1] / 4).backward()

        def probe(micro=micro):
            return sum(closure() for closure in micro[:parts]) / parts

        opt.step(probe, loss=sum(losses[:parts]).detach() / parts)
    opt.eval()
    assert full_loss(task) < 0.8 * first


def test_accumulation_equals_the_full_batch(configuration):
    joined, parted = classification(dtype=torch.float64), classification(dtype=torch.float64)
    one, other = (configuration(task.model.parameters()) for task in (joined, parted))
    for step in range(12):
        one.step(joined.closure(step, size=32))
        micro = [parted.closure(4 * step + part, size=8) for part in range(4)]
        other.zero_grad()
        losses = [closure() for closure in micro]
        for loss in losses:
            (loss / 4).backward()
        other.step(
            lambda micro=micro: torch.stack([closure() for closure in micro]).mean(),
            loss=torch.stack(losses).mean(),
        )
    torch.testing.assert_close(values(joined.model), values(parted.model), rtol=1e-7, atol=1e-9)


def test_the_direction_probed_is_the_clipped_one():
    task = classification(dtype=torch.float64)
    opt = LQA.paper(task.model.parameters(), delta0=0.1)
    seen = []

    def closure():
        seen.append(values(task.model))
        return task.closure()()

    start = values(task.model)
    loss = backward_of(opt, task.closure())
    nn.utils.clip_grad_norm_(task.model.parameters(), 1e-3)
    grads = [param.grad.clone() for param in task.model.parameters()]
    opt.step(closure, loss=loss)
    clipped = [p - 0.1 * g for p, g in zip(start, grads, strict=True)]
    torch.testing.assert_close(seen[0], clipped, rtol=0, atol=1e-15)
    # The slope along a direction is its product with the gradient, clipped or not.
    assert 0.0 < opt.report.slope < 1e-2
