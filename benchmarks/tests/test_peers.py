"""Peers: each trains, is told what it wants, and goes on from where it was stopped."""

from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from synthetic import collection_in
from torch import nn
from torch.nn import functional

from quadstep_bench.optimizers import PEERS, builders, peers
from quadstep_bench.runner import environment
from quadstep_bench.runner.records import Config, Epoch, Record
from quadstep_bench.runner.training import run

pytestmark = pytest.mark.filterwarnings("default")


def installed(name: str) -> None:
    try:
        metadata.version(PEERS[name])
    except metadata.PackageNotFoundError:
        pytest.skip(f"{PEERS[name]} is not installed")


class Stop(BaseException):
    """Stands for whatever ends a process."""


def stop(row: Epoch) -> None:
    if row.epoch == 2:
        raise Stop


def rows(record: Record) -> list[str]:
    return [str(asdict(replace(row, seconds=0.0))) for row in record.epochs]


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_trains_and_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    installed(name)
    # Seven steps an epoch: the run stops between two fits of GeN.
    config = Config("mlp-digits", name, seed=0, epochs=8, batch_size=16, subset=100)
    full = run(config, collection_in(tmp_path / "full"))
    assert full.epochs[-1].train_loss < full.epochs[0].train_loss
    assert PEERS[name] in full.environment["versions"]
    assert full.epochs[-1].backwards == 56
    assert full.epochs[-1].forwards == 56 + (3 * 14 if name == "gen" else 0)
    with pytest.raises(Stop):
        run(config, collection_in(tmp_path / "parts"), on_epoch=stop)
    assert rows(run(config, collection_in(tmp_path / "parts"))) == rows(full)


@pytest.mark.parametrize("name", ["schedulefree-adamw", "dog"])
def test_an_average_has_statistics_of_its_own_and_leaves_the_parameters(name: str) -> None:
    installed(name)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    peer = peers.build(name, model, functional.cross_entropy)
    inputs, labels = 5 + torch.randn(8, 3), torch.arange(8) % 2
    peer.begin((inputs, labels) for _ in range(9))
    for _ in range(3):
        peer.step(lambda: functional.cross_entropy(model(inputs), labels))
    before = [parameter.clone() for parameter in model.parameters()]
    seen = model[1].num_batches_tracked.item()
    peer.eval()
    assert not all(map(torch.equal, before, model.parameters()))
    assert model[1].num_batches_tracked.item() == seen + (9 if name != "dog" else 0)
    peer.train()
    assert all(map(torch.allclose, before, model.parameters()))


def test_a_missing_package_is_named_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "version", lambda package: None)
    fix = r'^prodigyopt not installed: run pip install "quadstep-bench\[peers\]", or leave out p'
    with pytest.raises(ValueError, match=fix):
        builders.build("prodigy", nn.Linear(1, 1))
    environment.check_installed(["sgd-0.1", "lqa-auto"])
