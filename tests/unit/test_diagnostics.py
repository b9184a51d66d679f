"""The warnings: each once, at the line of the caller, and none in ordinary use."""

import math
import warnings
from functools import partial

import pytest
import torch
from problems import classification, identical, noisy_classification, values
from seams import audit_every
from torch import nn
from torch.nn import functional
from training import backward_of, full_loss, in_autocast, train

from quadstep import LQA, Reason
from quadstep.diagnostics import SlopeComparison
from quadstep.quadratic import LineSamples


def test_nothing_warns_in_ordinary_use():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task = noisy_classification()
        opt = LQA(task.model.parameters())
        train(task, opt, range(12))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_closure_that_runs_backward_is_warned_of_once_and_works(configuration, set_to_none):
    quiet, loud = classification(dtype=torch.float64), classification(dtype=torch.float64)
    expected, opt = (configuration(t.model.parameters()) for t in (quiet, loud))

    def closure(step):
        def run():
            opt.zero_grad(set_to_none=set_to_none)
            loss = loud.closure(step)()
            loss.backward()
            return loss

        return run

    for step in range(12):
        expected.step(quiet.closure(step))
        if step == 0:
            message = r"closure calls backward\(\) itself"
            with pytest.warns(UserWarning, match=message) as caught:
                opt.step(closure(step))
            assert caught[0].filename == __file__
        else:
            opt.step(closure(step))
    assert identical(values(quiet.model), values(loud.model))
    assert opt.report.backwards == opt.report.forwards


def test_a_librarys_closure_that_runs_backward_is_not_warned_of(tmp_path, monkeypatch):
    """Its user cannot change it."""
    source = (
        "from functools import partial\n"
        "def run(loss):\n    value = loss()\n    value.backward()\n    return value\n"
        "class Closure:\n    def __init__(self, loss):\n        self.loss = loss\n"
        "    def __call__(self):\n        return run(self.loss)\n"
        "    def run(self):\n        return self()\n"
    )
    (tmp_path / "framework.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sysconfig.get_path", lambda kind: str(tmp_path))
    import framework

    task = classification()
    for make in (
        lambda loss: partial(framework.run, loss),
        framework.Closure,
        lambda loss: framework.Closure(loss).run,
        lambda loss: partial(partial(framework.Closure(loss).run)),
    ):
        opt = LQA(task.model.parameters())
        opt.step(make(task.closure()))
        assert opt.report.backwards > 1
    opt = LQA(task.model.parameters())
    with pytest.warns(UserWarning, match="the closure calls backward"):
        opt.step(lambda: framework.run(task.closure()))


class TestClosuresThatMisbehave:
    MESSAGE = r"the closure returned .* and then .* at the same parameters"

    def test_a_batch_drawn_in_the_closure_is_warned_of_once(self, configuration):
        task = classification()
        opt = configuration(task.model.parameters())
        steps = iter(range(10**6))
        with pytest.warns(UserWarning, match=self.MESSAGE) as caught:
            opt.step(lambda: task.closure(next(steps))())
        assert caught[0].filename == __file__
        for _ in range(30):
            opt.step(lambda: task.closure(next(steps))())

    def test_a_generator_of_its_own_is_warned_of(self, configuration):
        task = classification()
        opt = configuration(task.model.parameters())
        generator = torch.Generator().manual_seed(0)

        def closure():
            picked = torch.randint(256, (32,), generator=generator)
            return functional.cross_entropy(task.model(task.inputs[picked]), task.labels[picked])

        with pytest.warns(UserWarning, match=self.MESSAGE):
            opt.step(closure)

    def test_a_closure_that_turns_bad_is_noticed_later(self, monkeypatch):
        audit_every(monkeypatch, steps=5)
        task = classification()
        opt = LQA(task.model.parameters(), direction="gradient", averaging=None)
        steps = iter(range(10**6))
        for step in range(5):
            opt.step(task.closure(step))
            assert opt.report.forwards == (4 if step == 0 else 3)
        with pytest.warns(UserWarning, match=self.MESSAGE):
            opt.step(lambda: task.closure(next(steps))())

    def test_two_phases_warn_of_a_loss_that_is_not_the_closures(self, configuration):
        task = classification()
        opt = configuration(task.model.parameters())
        loss = backward_of(opt, task.closure())
        with pytest.warns(UserWarning, match=r"loss is .*, but at the same parameters") as caught:
            opt.step(task.closure(), loss=1024.0 * loss)
        assert caught[0].filename == __file__

    @pytest.mark.parametrize("two_phases", [False, True])
    def test_a_loss_computed_before_the_closure_is_warned_of_once(self, two_phases):
        task = classification()
        opt = LQA(task.model.parameters())
        message = (
            r"the closure returned \S+ wherever the parameters were, although the gradient tells a "
            r"change of \S+; compute the loss in the closure, from the optimizer's parameters, and "
            r"not before step\(\)"
        )

        def step(number):
            loss = task.closure(number)()
            if two_phases:
                backward_of(opt, lambda: loss)
            opt.step(lambda: loss, loss=loss if two_phases else None)

        with pytest.warns(UserWarning, match=message) as seen:
            any(map(step, range(20)))
        assert len(seen) == 1
        assert opt.rate < 1.0

    def test_deterministic_closures_are_not_warned_of(self, configuration, monkeypatch):
        """Dropout, batch normalization, attention, autocast: at every measurement, both phases."""
        audit_every(monkeypatch, steps=1)
        task = noisy_classification()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        opt = configuration([*task.model.parameters(), *layer.parameters()])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for step in range(12):
                inputs, labels = task.inputs[:32], task.labels[:32]

                def closure(inputs=inputs, labels=labels):
                    logits = task.model(layer(inputs.unsqueeze(1)).squeeze(1))
                    return functional.cross_entropy(logits, labels)

                if step % 3 == 2:
                    closure = in_autocast(closure, torch.bfloat16)
                if step % 2:
                    opt.step(closure)
                else:
                    opt.step(closure, loss=backward_of(opt, closure))


class TestOutOfMemory:
    MESSAGE = (
        r"^the last 3 measurements ran out of memory, so training goes on at the rate in force, "
        r"\S+: a probe holds one more copy of the parameters and runs the model forward; make the "
        r"batches smaller, or free memory before step\(\)$"
    )

    ERRORS = (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't "
            "allocate memory: you tried to allocate 8 bytes"
        ),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        MemoryError(),
    )

    @staticmethod
    def probing(task, step, error):
        """A closure whose probes run out of memory, and no gradient pass."""

        def closure():
            if not torch.is_grad_enabled():
                raise error
            return task.closure(step)()

        return closure

    @pytest.mark.parametrize("error", ERRORS)
    def test_in_probes_is_told_and_training_goes_on_at_the_rate_in_force(
        self, configuration, error
    ):
        task = classification()
        opt = configuration(task.model.parameters())
        start, first = values(task.model), full_loss(task)
        for step in range(2):
            with pytest.raises(type(error)):
                opt.step(self.probing(task, step, error))
        assert identical(start, values(task.model))
        with pytest.warns(UserWarning, match=self.MESSAGE) as caught:
            opt.step(self.probing(task, 2, error))
        assert caught[0].filename == __file__
        assert opt.report.reason is Reason.REUSED
        rate = opt.rate
        for step in range(3, 100):
            opt.step(self.probing(task, step, error))
        assert opt.rate == rate
        assert full_loss(task) < first
        # There is memory again.
        train(task, opt, range(100, 150))
        assert opt.report.counts[Reason.REUSED] < 149
        assert opt.rate != rate

    def test_in_the_slope_is_told_as_in_probes(self, monkeypatch):
        task = classification()
        opt = LQA(task.model.parameters())

        def slope(line):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr("quadstep.line.Line.slope", slope)
        for step in range(2):
            with pytest.raises(torch.OutOfMemoryError):
                opt.step(task.closure(step))
        with pytest.warns(UserWarning, match=self.MESSAGE):
            opt.step(task.closure(2))
        assert opt.report.reason is Reason.REUSED

    def test_now_and_then_is_the_callers(self):
        task = classification()
        opt = LQA(task.model.parameters(), direction="gradient", averaging=None)
        for step in range(30):
            if step % 3:
                with pytest.raises(MemoryError):
                    opt.step(self.probing(task, step, MemoryError()))
            else:
                opt.step(task.closure(step))

    def test_in_the_gradient_pass_is_the_callers(self):
        task = classification()
        opt = LQA(task.model.parameters())

        def closure():
            raise torch.OutOfMemoryError("CUDA out of memory")

        for _ in range(30):
            with pytest.raises(torch.OutOfMemoryError):
                opt.step(closure)


class TestSlopeComparison:
    def samples(self, ratio, resolution=1e-7, curvature=0.0, **changed):
        """Losses whose slope is `ratio` times the one that the gradient gives, which is 2."""
        loss = {"loss_ahead": 1.0 - 0.2 * ratio + curvature, "loss_behind": 1.0 + 0.2 * ratio}
        options = {"loss_center": 1.0, "resolution": resolution, "slope": 2.0}
        return LineSamples(0.1, **loss | options | changed)

    def compare(self, count, *args, **options):
        comparison = SlopeComparison()
        return [comparison.differ(self.samples(*args, **options)) for _ in range(count)]

    @pytest.mark.parametrize("ratio", [0.1, -1.0, 2.0])
    def test_other_gradients_are_noticed_in_time(self, ratio):
        assert self.compare(25, ratio) == [False] * 19 + [True] * 6

    @pytest.mark.parametrize("ratio", [0.5, 1.0, 1.4])
    def test_the_same_are_not(self, ratio):
        assert not any(self.compare(100, ratio))

    @pytest.mark.parametrize(
        "unknown",
        [
            {"resolution": 1e-3},
            {"gradient_unmodified": False},
            {"loss_behind": None},
            {"slope": math.nan},
            {"curvature": 1.0},
            {"loss_ahead": math.inf},
        ],
    )
    def test_what_tells_nothing_is_left_out(self, unknown):
        assert not any(self.compare(100, -1.0, **unknown))
