"""torch.compile around models, losses and steps; threads."""

import copy
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from problems import classification, identical, noisy_classification, values
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional
from training import backward_of, step_in_two_phases, train

from quadstep import LQA, Reason

EAGER = partial(torch.compile, backend="eager")


def test_compiled_models():
    task = classification()
    eager = copy.deepcopy(task)
    compiled = torch.compile(task.model, backend="aot_eager")
    opt, reference = LQA(task.model.parameters()), LQA(eager.model.parameters())
    inputs, labels = task.inputs, task.labels
    for _ in range(6):
        opt.step(lambda: functional.cross_entropy(compiled(inputs), labels))
        reference.step(lambda: functional.cross_entropy(eager.model(inputs), labels))
    torch.testing.assert_close(values(task.model), values(eager.model))


# Torch's compiler asks a loss that is handed on from one graph to the next.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("build", [LQA, lambda params: LQA(torch.optim.AdamW(params, lr=0.1))])
@pytest.mark.parametrize("kind", ["step", "train step", "partial", "two phases"])
def test_a_compiled_step_takes_the_same_steps(build, kind):
    """Eagerly, without compiling it anew for each rate or batch."""
    tasks = classification(), classification()
    opts = [build(task.model.parameters()) for task in tasks]
    frames = CompileCounter()
    compiled = partial(torch.compile, backend=frames)

    def loss(task, rows):
        return functional.cross_entropy(task.model(task.inputs[rows]), task.labels[rows])

    def plain(rows):
        return opts[0].step(lambda: loss(tasks[0], rows))

    step = compiled(opts[1].step)

    def partial_step(rows):
        return step(partial(loss, tasks[1], rows))

    @compiled
    def train_step(rows):
        return opts[1].step(lambda: loss(tasks[1], rows))

    @compiled
    def two_phases(rows):
        first = backward_of(opts[1], lambda: loss(tasks[1], rows))
        opts[1].step(lambda: loss(tasks[1], rows), loss=first)
        return first.detach()

    def two_plain_phases(rows):
        return step_in_two_phases(opts[0], lambda: loss(tasks[0], rows))

    steps = {
        "step": (plain, lambda rows: step(lambda: loss(tasks[1], rows))),
        "train step": (plain, train_step),
        "partial": (plain, partial_step),
        "two phases": (two_plain_phases, two_phases),
    }
    for batch in torch.randint(256, (60, 32)):
        one, other = (take(batch) for take in steps[kind])
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert opts[0].rate == pytest.approx(opts[1].rate, rel=1e-3)
    assert frames.frame_count <= 3


@pytest.mark.parametrize("around", [lambda step: step, EAGER], ids=["", "train step"])
def test_what_is_compiled_within_a_step_stays_so(around):
    task = classification()
    frames = CompileCounter()
    compiled = torch.compile(task.model, backend=frames)
    opt = LQA(task.model.parameters())

    @around
    def train_step():
        opt.step(lambda: functional.cross_entropy(compiled(task.inputs), task.labels))

    for _ in range(40):
        train_step()
    # With gradients and without.
    assert frames.frame_count == 2


def test_threads_train_side_by_side():
    """Each with separate buffers, and models that are compiled later are."""
    alone, *tasks = [
        classification(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))
        for _ in range(4)
    ]

    def run(task):
        train(task, LQA(task.model.parameters()), range(150))

    run(alone)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(run, tasks))
    for task in tasks:
        assert identical(values(task.model), values(alone.model))
    frames = CompileCounter()
    torch.compile(alone.model, backend=frames)(alone.inputs)
    assert frames.frame_count == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("kind", ["closure", "given", "within", "in place", "part", "train step"])
def test_recorded_calls_of_compiled_models(kind):
    """Compiled dropout draws other masks than eager one: probes must not mix the two."""
    torch.compiler.reset()
    task = noisy_classification()
    model, criterion = task.model, nn.CrossEntropyLoss()
    called = torch.compile(model) if kind in ("closure", "given", "within") else model
    if kind == "in place":
        model.compile()
    if kind == "part":
        model[3].compile()
    recorded = {"model": called if kind == "given" else model, "criterion": criterion}
    opt = LQA(model.parameters(), **({} if kind == "closure" else recorded))
    samples = []

    def step(x, y):
        opt.zero_grad()
        criterion(called(x), y).backward()
        opt.step()

    train_step = torch.compile(step) if kind == "train step" else step
    torch.manual_seed(0)
    for number in range(40):
        rows = torch.arange(number * 32, number * 32 + 32) % 256
        if kind == "closure":
            opt.step(lambda rows=rows: criterion(called(task.inputs[rows]), task.labels[rows]))
        else:
            train_step(task.inputs[rows], task.labels[rows])
        samples.append(opt.report)
    # Under other masks the slope that the gradient gives is not that of the losses.
    usual = {Reason.MINIMUM, Reason.RADIUS, Reason.REUSED, Reason.UNRESOLVED}
    assert {report.reason for report in samples} <= usual
    assert samples[-1].forwards <= 2
