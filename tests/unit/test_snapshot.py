"""Probes are free of side effects: random generators, dropout masks and buffers."""

import copy
import pickle
import random

import numpy as np
import pytest
import torch
from configurations import CONFIGURATIONS
from hypothesis import given
from hypothesis import strategies as st
from problems import RecordingDropout, classification, identical, noisy_classification
from seams import pin_rate
from torch import nn
from torch.nn import functional
from training import assert_free_of_side_effects, backward_of, step_in_two_phases, train

from quadstep import LQA, Reason
from quadstep.snapshot import ModuleTracker, NumpyGenerator


@pytest.fixture(params=[np.random.MT19937, np.random.PCG64])
def bit_generator(request):
    """What NumPy's global functions draw from."""
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(request.param(0))
    yield
    np.random.set_bit_generator(before)


@pytest.mark.usefixtures("bit_generator")
def test_a_snapshot_restores_all_random_generators():
    tracker = ModuleTracker()
    snapshot = tracker.capture([torch.zeros(())])

    def draw():
        return torch.rand(()).item(), random.random(), np.random.random()  # noqa: NPY002

    drawn = draw()
    snapshot.restore()
    assert draw() == drawn


DRAWS = {
    "torch": lambda: torch.rand(()),
    "python": random.random,
    "numpy": lambda: np.random.random(),  # noqa: NPY002
    "numpy's second of two normals": lambda: np.random.randn(),  # noqa: NPY002
}


@pytest.mark.usefixtures("bit_generator")
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_only_generators_that_advanced_are_kept(draw):
    np.random.randn()  # noqa: NPY002
    tracker = ModuleTracker()
    before = tracker.capture([torch.zeros(())])
    draw()
    then, now = tracker.capture([torch.zeros(())]).pair_advanced(before)
    assert len(then.generators) == len(now.generators) == 1


ACTIONS = {
    "nothing": lambda: None,
    "uniform": lambda: np.random.random(),  # noqa: NPY002
    "normal": lambda: np.random.randn(),  # noqa: NPY002
    "many": lambda: np.random.random(700),  # noqa: NPY002
    "seed": lambda: np.random.seed(0),  # noqa: NPY002
    "twister": lambda: np.random.set_bit_generator(np.random.MT19937(1)),
    "congruential": lambda: np.random.set_bit_generator(np.random.PCG64(1)),
}


@given(actions=st.lists(st.sampled_from(sorted(ACTIONS)), max_size=20))
def test_the_state_of_the_generator_of_numpy_is_the_one_numpy_returns(actions):
    generator = NumpyGenerator(np.random)
    own = np.random.get_bit_generator()
    try:
        for action in actions:
            ACTIONS[action]()
            plain = np.random.get_state(legacy=False)  # noqa: NPY002
            assert pickle.dumps(generator.get()) == pickle.dumps(plain)
            np.random.randn()  # noqa: NPY002
            generator.get()
            generator.set(plain)
            assert pickle.dumps(generator.get()) == pickle.dumps(plain)
    finally:
        np.random.set_bit_generator(own)


def test_buffers_are_found_in_whatever_runs_first_and_restored_in_place():
    class Replacing(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls = self.calls + 1
            return x

    model = nn.Sequential(nn.BatchNorm1d(2), Replacing())
    tracker = ModuleTracker()
    tracker.start_step()
    first = tracker.capture(None)
    with tracker.tracking(first, ()):
        model(torch.randn(4, 2))
    assert model[0].num_batches_tracked == 1
    first.restore()
    assert model[0].num_batches_tracked == 0
    assert torch.equal(model[0].running_mean, torch.zeros(2))

    buffer = model[1].calls
    snapshot = tracker.capture(None)
    model(torch.randn(4, 2))
    snapshot.restore()
    assert model[1].calls is buffer
    assert model[1].calls == 0


class TestSideEffects:
    def test_the_three_evaluations_see_one_dropout_mask(self, configuration):
        dropout = RecordingDropout()
        masks = dropout.masks
        task = classification(nn.Linear(8, 16), nn.Softplus(), dropout, nn.Linear(16, 3))
        opt = configuration(task.model.parameters())
        for step in range(3):
            masks.clear()
            opt.step(task.closure(step))
            # The first measurement looks twice whether the closure repeats itself.
            assert len(masks) == (4 if step == 0 else 3)
            assert all(torch.equal(masks[0], mask) for mask in masks)
        previous = masks[0]
        opt.step(task.closure())
        assert not torch.equal(masks[-1], previous)

    def test_buffers_and_random_numbers_are_those_of_a_plain_step(self, configuration):
        probed = assert_free_of_side_effects(configuration, lambda opt, closure: opt.step(closure))
        assert probed.model[1].num_batches_tracked == 5

    def test_gradients_stay_those_of_the_gradient_pass(self):
        probed, plain = classification(), classification()
        opt = LQA(probed.model.parameters())
        plain.closure()().backward()
        opt.step(probed.closure())
        assert identical(
            [p.grad for p in plain.model.parameters()], [p.grad for p in probed.model.parameters()]
        )

    def test_two_phases_probe_under_one_dropout_mask(self):
        task = noisy_classification()
        opt = LQA(task.model.parameters(), direction="gradient", averaging=None)
        opt.step(task.closure())
        loss = backward_of(opt, task.closure())
        buffers, random = [b.clone() for b in task.model.buffers()], torch.get_rng_state()
        opt.step(task.closure(), loss=loss)
        assert opt.report.forwards == 3
        assert identical(buffers, list(task.model.buffers()))
        assert torch.equal(random, torch.get_rng_state())

    def test_buffers_are_updated_once_without_any_step_in_one_phase(self, configuration):
        assert_free_of_side_effects(configuration, step_in_two_phases)


class Growing(nn.Module):
    """Keeps a table as long as the longest input, as rotary embeddings do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.length = 0

    def forward(self, input):
        if len(input) > self.length:
            self.length = len(input)
            self.register_buffer("table", torch.arange(self.length) / self.length)
        return self.linear(input[:, None])[:, 0] - self.table[: len(input)]


class TestModules:
    """Modules that an optimizer, which is given parameters, can only come to know by running."""

    def test_one_that_grows_its_buffers_trains(self, configuration):
        model = Growing()
        opt = configuration(model.parameters())
        for length in (2, 3, 7, 5, 9, 9, 30):
            opt.step(lambda length=length: model(torch.ones(length)).square().mean())
        assert opt.report.forwards > 1
        assert len(model.table) == 30

    @pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
    @pytest.mark.parametrize("kind", ["expanded", "lazy", "scripted", "ensemble"])
    def test_any_kind_trains(self, configuration, kind):
        task = noisy_classification()
        model, inputs, labels = task.model, task.inputs[:32], task.labels[:32]
        params = [*model.parameters()]
        if kind == "expanded":
            model[0].register_buffer("mask", torch.ones(1, 16).expand(32, 16))
        elif kind == "lazy":
            model[1] = nn.LazyBatchNorm1d(affine=False)
        elif kind == "scripted":
            model = torch.jit.script(model)
        elif kind == "ensemble":
            copies = [classification(seed=seed).model for seed in range(3)]
            for each in copies:
                each.register_buffer("scale", torch.ones(()))
            stacked, buffers = torch.func.stack_module_state(copies)
            params = [*stacked.values()]
            base = copies[0]

            def model(inputs):
                def one(stacked, buffers):
                    return torch.func.functional_call(base, (stacked, buffers), inputs)

                return torch.vmap(one)(stacked, buffers).mean(0)

        opt = configuration(params)
        losses = [
            float(opt.step(lambda: functional.cross_entropy(model(inputs), labels)))
            for _ in range(30)
        ]
        assert opt.report.counts.keys() - {Reason.REUSED}
        assert losses[-1] < losses[0]

    @pytest.mark.parametrize("name", [*CONFIGURATIONS, "another optimizer"])
    def test_those_reached_later_are_probed_without_side_effects(self, name):
        """A second head, of parameters known from the start or of a group that joins the base."""
        task = noisy_classification()
        head = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        params = [*task.model.parameters()]
        if name in CONFIGURATIONS:
            opt = CONFIGURATIONS[name]([*params, *head.parameters()])
            train(task, opt, range(3))
        else:
            base = torch.optim.AdamW(params)
            opt = LQA(base)
            train(task, opt, range(3))
            base.add_param_group({"params": [*head.parameters()]})
        inputs, labels = task.inputs[:32], task.labels[:32]
        for step in range(12):
            opt.step(lambda: functional.cross_entropy(head(task.model(inputs)), labels))
            assert head[1].num_batches_tracked == step + 1
            assert task.model[1].num_batches_tracked == step + 4

    def test_modules_of_a_group_that_joins_later_are_probed_without_side_effects(
        self, configuration
    ):
        task = noisy_classification()
        opt = configuration(task.model.parameters())
        opt.step(task.closure())
        head = nn.BatchNorm1d(3)
        opt.add_param_group({"params": list(head.parameters())})
        inputs, labels = task.inputs[:32], task.labels[:32]
        for step in range(4):
            opt.step(lambda: functional.cross_entropy(head(task.model(inputs)), labels))
            assert head.num_batches_tracked == step + 1


def test_what_a_closure_does_to_the_parameters_counts_once(configuration, monkeypatch):
    """As with any optimizer: the gradient pass may renormalize them, probes change nothing."""
    torch.manual_seed(0)
    table, index = nn.Embedding(6, 4, max_norm=0.5), torch.arange(6)
    pin_rate(monkeypatch, moves=False)
    renormed = copy.deepcopy(table)
    renormed(index)
    opt = configuration(table.parameters())
    opt.step(lambda: table(index).square().sum() + 1.0)
    assert torch.equal(table.weight, renormed.weight)


def test_an_embedding_that_renormalises_itself_trains(configuration):
    torch.manual_seed(0)
    table, head, index = nn.Embedding(6, 4, max_norm=1.0), nn.Linear(4, 6), torch.arange(6)
    opt = configuration([*table.parameters(), *head.parameters()])
    first = functional.cross_entropy(head(table(index)), index).item()
    for _ in range(100):
        loss = opt.step(lambda: functional.cross_entropy(head(table(index)), index))
    assert loss.item() < first


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_buffers_of_opaque_layouts():
    layer = nn.Linear(4, 1)
    layer.register_buffer("opaque", torch.ones(4).to_mkldnn())
    opt = LQA(layer.parameters())
    opt.step(lambda: layer(torch.ones(2, 4)).square().mean())
    assert torch.equal(layer.opaque.to_dense(), torch.ones(4))
