"""skorch's nets with `LQACallback`, against plain loops with a closure."""

import copy
import pickle
import re
import runpy
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from quadstep import LQA

pytest.importorskip("skorch", reason="skorch is not installed")

from accelerate import Accelerator
from sklearn.base import clone
from skorch import (
    NeuralNetBinaryClassifier,
    NeuralNetClassifier,
    NeuralNetRegressor,
)
from skorch.callbacks import Checkpoint, GradientNormClipping
from skorch.dataset import ValidSplit
from skorch.hf import AccelerateMixin

from quadstep.integrations.skorch import LQACallback

EXAMPLE = Path(__file__).parents[2] / "examples" / "skorch_classifier.py"
BATCH = 32


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, 10, generator=generator)
    return inputs, inputs[:, :3].argmax(1)


class Net(torch.nn.Module):
    """Counts its forward passes in training with and without gradients."""

    def __init__(self, outputs=3, dropout=0.2, last=None):
        super().__init__()
        torch.manual_seed(0)
        parts = [torch.nn.BatchNorm1d(32), torch.nn.ReLU(), torch.nn.Dropout(dropout)]
        layers = [torch.nn.Linear(10, 32), *parts, torch.nn.Linear(32, outputs)]
        self.layers = torch.nn.Sequential(*layers, *([] if last is None else [last]))
        self.passes = self.probes = 0

    def forward(self, x):
        if self.training:
            self.passes += torch.is_grad_enabled()
            self.probes += not torch.is_grad_enabled()
        return self.layers(x)


def net_of(kind=NeuralNetClassifier, callbacks=(), **options):
    defaults = {
        "criterion": torch.nn.CrossEntropyLoss,
        "max_epochs": 4,
        "batch_size": BATCH,
        "train_split": None,
        "verbose": 0,
    }
    own = {"optimizer": LQA, "lr": None, "callbacks": [LQACallback(), *callbacks]}
    return kind(Net, **(defaults | own | options))


def fit(net, inputs, labels):
    torch.manual_seed(1)
    net.initialize()
    torch.manual_seed(1)
    return net.partial_fit(inputs.numpy(), labels.numpy())


def loop(data, epochs=4, clip=None, **options):
    """The plain loop, with a closure or in two phases, left with the averaged weights."""
    model = Net(**options)
    torch.manual_seed(1)
    optimizer = LQA(model.parameters())
    for _ in range(epochs):
        for x, y in DataLoader(TensorDataset(*data), BATCH):
            loss = None
            if clip is not None:
                optimizer.zero_grad()
                loss = cross_entropy(model(x), y)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step(lambda x=x, y=y: cross_entropy(model(x), y), loss=loss)
    optimizer.eval()
    return model, optimizer


def are_equal(one, other):
    return all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


def test_a_net_takes_the_steps_of_a_plain_loop(data):
    net = fit(net_of(), *data)
    model, optimizer = loop(data)
    assert are_equal(net.module_, model)
    assert net.optimizer_.report == optimizer.report
    assert net.history[-1, "rate"] == optimizer.rate


def test_probes_run_no_backward_pass(data):
    net = fit(net_of(optimizer__every=1), *data)
    assert net.module_.passes == 4 * len(data[0]) // BATCH
    assert net.module_.probes >= net.module_.passes
    assert net.optimizer_.report.backwards == 1


def test_clipping(data):
    net = net_of(callbacks=[GradientNormClipping(0.1)], module__dropout=0.0)
    fit(net, *data)
    model, optimizer = loop(data, clip=0.1, dropout=0.0)
    assert net.optimizer_.report.counts == optimizer.report.counts
    for one, other in zip(net.module_.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_validation_sees_the_averaged_weights_and_changes_nothing(data):
    inputs, labels = data
    split = ValidSplit(4, stratified=False)
    net = fit(net_of(train_split=split, module__dropout=0.0), inputs, labels)
    _, held_out = split(TensorDataset(*data))
    x, y = (part[list(held_out.indices)] for part in data)
    validated = cross_entropy(net.forward(x), y).item()
    assert net.history[-1, "valid_loss"] == pytest.approx(validated, rel=1e-5)
    averages = copy.deepcopy(net.module_)
    net.optimizer_.train()
    assert not are_equal(net.module_, averages)
    kept = [part[torch.tensor([i not in held_out.indices for i in range(256)])] for part in data]
    model, _ = loop(kept, dropout=0.0)
    for one, other in zip(averages.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_partial_fit_goes_on(data):
    net = fit(net_of(max_epochs=2), *data)
    net.partial_fit(*(part.numpy() for part in data))
    assert are_equal(net.module_, loop(data)[0])


@pytest.mark.parametrize(
    ("kind", "options", "labels"),
    [
        (
            NeuralNetClassifier,
            {"criterion": torch.nn.NLLLoss, "module__last": torch.nn.Softmax(1)},
            lambda y: y,
        ),
        (
            NeuralNetBinaryClassifier,
            {"criterion": torch.nn.BCEWithLogitsLoss, "module__outputs": 1},
            lambda y: (y == 0).float(),
        ),
        (
            NeuralNetRegressor,
            {"criterion": torch.nn.MSELoss},
            lambda y: torch.eye(3)[y],
        ),
    ],
)
def test_losses_that_a_net_computes_itself_are_probed(kind, options, labels, data):
    inputs, classes = data
    net = fit(net_of(kind, optimizer__every=1, max_epochs=8, **options), inputs, labels(classes))
    assert net.optimizer_.report.backwards == 1
    assert net.module_.probes >= net.module_.passes
    assert net.history[-1, "train_loss"] < 0.7 * net.history[0, "train_loss"]


def test_saved_and_copied_nets(data, tmp_path):
    path = tmp_path / "net.pkl"
    saving = Checkpoint(
        monitor=None,
        f_params=None,
        f_optimizer=None,
        f_criterion=None,
        f_history=None,
        f_pickle=str(path),
    )
    net = fit(net_of(callbacks=[saving]), *data)
    saved = pickle.loads(path.read_bytes())
    assert are_equal(net.module_, saved.module_)
    arrays = [part.numpy() for part in data]
    torch.manual_seed(2)
    net.partial_fit(*arrays)
    torch.manual_seed(2)
    saved.partial_fit(*arrays)
    assert are_equal(net.module_, saved.module_)
    assert clone(net).fit(*arrays).score(*arrays) > 0.8


def test_accelerate(data):
    class Accelerated(AccelerateMixin, NeuralNetClassifier):
        pass

    net = net_of(Accelerated, accelerator=Accelerator(cpu=True), optimizer__every=1, max_epochs=8)
    fit(net, *data)
    assert net.module_.probes >= net.module_.passes
    assert net.history[-1, "train_loss"] < 0.5 * net.history[0, "train_loss"]


def test_errors_say_what_to_pass(data):
    with pytest.raises(TypeError, match="optimizer=LQA, lr=None"):
        fit(net_of(optimizer=torch.optim.SGD, lr=0.1), *data)
    with pytest.raises(ValueError, match="pass None"):
        fit(net_of(lr=0.1), *data)


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLE))
    assert float(re.findall(r"accuracy (\d\.\d+)", capsys.readouterr().out)[-1]) > 0.85
