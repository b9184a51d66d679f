import json

import pytest
import torch
from rich.console import Console
from synthetic import results_in

pytest.importorskip("transformers")

from quadstep_bench import report, trainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


def measure(results, seeds):
    path = trainer.measure(results, Console(quiet=True), seeds=seeds)
    return json.loads(path.read_text())["runs"]


def test_trainer(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "EPOCHS", 1)
    results = results_in(tmp_path)
    runs = measure(results, seeds=1)
    losses = {run["setting"]: run["loss"] for run in runs}
    assert [*losses] == [*trainer.SETTINGS]
    assert len(set(losses.values())) == len(losses)
    assert all(0.0 < loss < 1.0 for loss in losses.values())
    assert report.write(results, tmp_path / "pages").files[-1].name == "TRAINER.md"
    page = (tmp_path / "pages" / "TRAINER.md").read_text()
    for setting, loss in losses.items():
        on_plateau = int(loss > report.PLATEAU)
        assert f"| {setting} | {loss:.2g} | {loss:.2g} | {on_plateau} of 1 |" in page


def test_the_plateau_is_below_the_loss_of_guessing():
    share = trainer.data()[1].float().mean()
    guessing = torch.distributions.Bernoulli(share).entropy().item()
    assert f"{guessing:.2f}" == "0.68"
    assert guessing > report.PLATEAU


def test_it_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    started = []

    def train(seed):
        started.append(seed)
        if len(started) == 2:
            raise KeyboardInterrupt
        return trainer.bert()

    monkeypatch.setattr(trainer, "SETTINGS", {"LQA": train})
    results = results_in(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        measure(results, seeds=3)
    assert [run["seed"] for run in measure(results, seeds=3)] == [0, 1, 2]
    assert started == [0, 1, 1, 2]
    # With other lengths all are trained again.
    monkeypatch.setattr(trainer, "EPOCHS", 2)
    measure(results, seeds=1)
    assert started == [0, 1, 1, 2, 0]


def test_the_seed_decides_batches_and_masks_alone(monkeypatch):
    monkeypatch.setattr(trainer, "EPOCHS", 1)
    train = trainer.SETTINGS["LQA, closure"]
    first, again, other = (train(seed).classifier.bias for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    weights = (trainer.bert().classifier.weight for _ in range(2))
    assert torch.equal(*weights)
