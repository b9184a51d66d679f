"""Loops of Fabric, against plain loops with a closure."""

import copy
import re
import runpy
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from quadstep import LQA

pytest.importorskip("lightning", reason="lightning is not installed")

from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision

EXAMPLE = Path(__file__).parents[2] / "examples" / "fabric_loop.py"
CRITERION = torch.nn.CrossEntropyLoss()


@pytest.fixture(scope="module")
def loader():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, 10, generator=generator)
    return DataLoader(TensorDataset(inputs, inputs[:, :3].argmax(1)), 32)


def network():
    torch.manual_seed(0)
    hidden = [torch.nn.BatchNorm1d(32), torch.nn.ReLU(), torch.nn.Dropout(0.2)]
    return torch.nn.Sequential(torch.nn.Linear(10, 32), *hidden, torch.nn.Linear(32, 3))


def set_up(fabric, **options):
    """The optimizer is made before the model is wrapped, which casts what it returns."""
    model = network()
    optimizer = LQA(model.parameters(), model=model, criterion=CRITERION, **options)
    return fabric.setup(model, optimizer)


def train(fabric, model, optimizer, loader, epochs=4):
    torch.manual_seed(1)
    losses = []
    for _ in range(epochs):
        for x, y in fabric.setup_dataloaders(loader):
            optimizer.zero_grad()
            loss = CRITERION(model(x), y)
            fabric.backward(loss)
            optimizer.step()
            losses.append(loss.item())
    return losses


def are_equal(one, other):
    return all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


def test_a_loop_of_fabric_takes_the_steps_of_a_plain_loop(loader):
    fabric = Fabric(accelerator="cpu")
    model, optimizer = set_up(fabric)
    train(fabric, model, optimizer, loader)
    other = network()
    plain = LQA(other.parameters())
    torch.manual_seed(1)
    for _ in range(4):
        for x, y in loader:
            plain.step(lambda x=x, y=y: CRITERION(other(x), y))
    assert optimizer.report.counts == plain.report.counts
    with optimizer.averaged(), plain.averaged():
        assert are_equal(model.module, other)


@pytest.mark.parametrize(
    "options",
    [
        lambda: {"precision": "bf16-mixed"},
        lambda: {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))},
    ],
    ids=["bf16-mixed", "16-mixed"],
)
def test_mixed_precision_trains(options, loader):
    fabric = Fabric(accelerator="cpu", **options())
    model, optimizer = set_up(fabric, every=1)
    losses = train(fabric, model, optimizer, loader, epochs=8)
    assert losses[-1] < 0.6 * losses[0]
    assert optimizer.report.loss == pytest.approx(losses[-1], rel=0.01)
    assert optimizer.report.forwards >= 1
    assert optimizer.report.backwards == 0


def test_what_is_saved_is_resumed_bit_for_bit(loader, tmp_path):
    fabric = Fabric(accelerator="cpu")
    model, optimizer = set_up(fabric)
    train(fabric, model, optimizer, loader, epochs=2)
    fabric.save(tmp_path / "state.ckpt", {"model": model, "optimizer": optimizer})
    loaded = dict(zip(("model", "optimizer"), set_up(fabric), strict=True))
    fabric.load(tmp_path / "state.ckpt", loaded)
    train(fabric, model, optimizer, loader, epochs=2)
    train(fabric, loaded["model"], loaded["optimizer"], loader, epochs=2)
    assert are_equal(model, loaded["model"])


def test_the_wrapper_shares_the_mode_of_its_optimizer(loader):
    fabric = Fabric(accelerator="cpu")
    model, wrapper = set_up(fabric)
    train(fabric, model, wrapper, loader, epochs=1)
    training, state = copy.deepcopy(model.module), copy.deepcopy(wrapper.state_dict())
    wrapper.eval()
    assert not are_equal(model.module, training)
    wrapper.train()
    wrapper.load_state_dict(state)
    wrapper.optimizer.eval()
    wrapper.train()
    assert are_equal(model.module, training)
    assert wrapper.metrics() == pytest.approx(wrapper.optimizer.metrics(), nan_ok=True)


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLE))
    assert float(re.findall(r"accuracy (\d\.\d+)", capsys.readouterr().out)[-1]) > 0.9
