"""Steps of training loops, and what they must leave unchanged."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterable

import torch
from problems import Task, identical, noisy_classification
from seams import is_due
from torch import Tensor, nn
from torch.nn import functional

from quadstep import LQA, Reason

Closure = Callable[[], Tensor]
REPORTED = ("loss", "rate", "slope", "curvature", "forwards", "backwards")


def train(task: Task, opt: LQA, steps: Iterable[int], enforce=lambda task: None) -> Tensor | None:
    """Steps on the batches of these numbers; returns the last loss."""
    loss = None
    for step in steps:
        loss = opt.step(task.closure(step))
        enforce(task)
    return loss


def train_seeded(task: Task, opt: LQA, steps: Iterable[int]) -> None:
    """Draws the random numbers of each step anew from its number."""
    for step in steps:
        torch.manual_seed(step)
        opt.step(task.closure(step))


def reported(opt: LQA) -> dict[str, float]:
    """What the report of the last step has, by the names of the metrics."""
    report = opt.report
    values = {f"lqa/{name}": getattr(report, name) for name in REPORTED}
    reasons = set(Reason) - {Reason.INITIAL}
    counts = {f"lqa/reason/{reason.value}": report.counts.get(reason, 0) for reason in reasons}
    return values | counts


def full_loss(task: Task) -> float:
    """The loss of all examples."""
    with torch.no_grad():
        logits = task.model(task.inputs)
    return functional.cross_entropy(logits.float(), task.labels).item()


def backward_of(opt: LQA, closure: Closure) -> Tensor:
    """The caller's part of a two-phase step; returns the loss."""
    opt.zero_grad()
    loss = closure()
    loss.backward()
    return loss


def step_in_two_phases(opt: LQA, closure: Closure) -> Tensor:
    """The caller runs backward, and the step probes alone."""
    return opt.step(closure, loss=backward_of(opt, closure))


def in_autocast(closure: Closure, dtype: torch.dtype) -> Closure:
    """The closure within autocast."""

    def run():
        with torch.autocast("cpu", dtype=dtype):
            return closure()

    return run


def saved_and_loaded(model: nn.Module, opt: LQA, **options) -> tuple[dict, dict]:
    """The state dicts of both, as they come back from a file."""
    file = io.BytesIO()
    torch.save((model.state_dict(), opt.state_dict()), file)
    file.seek(0)
    return torch.load(file, **options)


def with_fault(closure: Closure, call: int, fault: Callable[[Tensor], Tensor]) -> Closure:
    """The closure, but for what a fault makes of the loss of one call, counted from 1."""
    calls = itertools.count(1)

    def run():
        loss = closure()
        return fault(loss) if next(calls) == call else loss

    return run


def raising(error: type[BaseException]) -> Callable[[Tensor], Tensor]:
    """A fault that raises."""

    def fault(_: Tensor) -> Tensor:
        raise error("injected")

    return fault


def same_state(one: object, other: object) -> bool:
    """Whether two states are equal, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_state(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same_state, one, other))
    return one == other


def about_to_measure(configuration, device: str = "cpu") -> tuple[Task, LQA]:
    """A task and its optimizer, with some state, before a step that measures."""
    task = noisy_classification().to(device)
    opt = configuration(task.model.parameters())
    while not (opt.report.counts and is_due(opt)):
        opt.step(task.closure())
    return task, opt


def about_to_reuse(task: Task) -> LQA:
    """The default optimizer before a step that does not measure."""
    opt = LQA(task.model.parameters())
    while is_due(opt):
        opt.step(task.closure())
    return opt


def assert_free_of_side_effects(
    configuration, take: Callable[[LQA, Closure], object], device: str = "cpu"
) -> Task:
    """Asserts that steps leave the buffers and random numbers of one pass; returns what trained."""
    probed, plain = noisy_classification().to(device), noisy_classification().to(device)
    opt = configuration(probed.model.parameters())
    for step in range(5):
        plain.model.load_state_dict(probed.model.state_dict())
        torch.manual_seed(step)
        plain.closure(step)().backward()
        drawn = torch.rand((), device=device)
        torch.manual_seed(step)
        take(opt, probed.closure(step))
        assert torch.equal(torch.rand((), device=device), drawn)
        assert identical(list(plain.model.buffers()), list(probed.model.buffers()))
    return probed
