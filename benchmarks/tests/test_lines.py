"""Lines: what the search of a step's line finds, and that the run does not notice."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import results_in
from torch import Tensor, nn
from torch.nn import functional

from quadstep import LQA
from quadstep.controllers import TrustRegionConfig, TrustRegionController
from quadstep.directions import Gradient
from quadstep_bench import lines
from quadstep_bench.lines import Found, search
from quadstep_bench.optimizers import CONFIGURATIONS, builders
from quadstep_bench.runner import training
from quadstep_bench.runner.files import RecordError, read_rows
from quadstep_bench.runner.records import Config, Epoch
from quadstep_bench.tasks import data

CONFIG = Config("mlp-digits", "lqa", seed=0, epochs=3, subset=100)
STEPS = 2
"""Steps an epoch: a batch of 64 and one of the 36 examples left."""


def regression() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A model and a loss that is exactly a parabola along every line."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(50, 4), torch.randn(50, 2)
    return nn.Linear(4, 2).double(), lambda model: functional.mse_loss(
        model(inputs.double()), targets.double()
    )


def noisy_network() -> tuple[nn.Module, Tensor, Tensor]:
    """A network with dropout and batch normalisation, and its data."""
    torch.manual_seed(0)
    layers = nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3)
    inputs = torch.randn(256, 8)
    return nn.Sequential(*layers, nn.Linear(16, 3)), inputs, inputs[:, :3].argmax(1)


def trace(model: nn.Module, optimizer: LQA) -> list[Tensor]:
    """All that a run goes on from."""
    state = [entry for own in optimizer.state.values() for entry in own.values()]
    tensors = [entry.clone() for entry in state if isinstance(entry, Tensor)]
    rate = torch.tensor(optimizer.rate, dtype=torch.float64)
    return [
        *map(torch.clone, model.state_dict().values()),
        *tensors,
        rate,
        torch.get_rng_state(),
        torch.rand(1),
    ]


def forbid(*_: Any, **__: Any) -> Any:
    raise AssertionError("measured again")


# One line ---------------------------------------------------------------------------------------


def test_the_measured_rate_of_a_quadratic_is_the_best() -> None:
    model, loss = regression()
    optimizer = LQA.paper(model.parameters())
    for _ in range(5):
        found = search(optimizer, lambda: loss(model))
        before = optimizer.step(lambda: loss(model))
        assert found is not None
        assert found.rate == optimizer.rate
        assert found.ratio == pytest.approx(1.0, abs=1e-6)
        assert found.best_rate == pytest.approx(found.rate, rel=1e-3)
        assert found.reduction == pytest.approx(float(before - loss(model).detach()))


@pytest.mark.parametrize("distance", [1e-3, 1e-2, 0.1])
def test_a_minimum_far_from_the_rate_is_found(distance: float) -> None:
    model, loss = regression()
    best = search(LQA.paper(model.parameters()), lambda: loss(model))
    assert best is not None
    # The first rate is a fraction of the minimizer.
    optimizer = LQA(
        model.parameters(),
        direction=Gradient(),
        averaging=None,
        delta0=distance * best.rate,
        controller=TrustRegionController(TrustRegionConfig(start=1.0 / distance)),
    )
    found = search(optimizer, lambda: loss(model))
    assert found is not None
    short = found.rate / best.rate
    assert short == pytest.approx(distance, rel=1e-6)
    assert found.best_rate == pytest.approx(best.best_rate, rel=1e-3)
    assert found.greatest == pytest.approx(best.greatest, rel=1e-6)
    assert found.ratio == pytest.approx(short * (2 - short), rel=1e-5)


def test_the_best_of_several_minima_is_found() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, 0.5)

    def loss(model: nn.Module) -> Tensor:
        (weight,) = model.parameters()
        return (-torch.exp(-weight.square()) - 2 * torch.exp(-(weight + 30).square() / 9)).sum()

    found = search(LQA.paper(model.parameters()), lambda: loss(model))
    assert found is not None
    slope = math.exp(-0.25)
    assert abs(0.5 - found.rate * slope) < 1.0
    assert 0.5 - found.best_rate * slope == pytest.approx(-30.0, abs=0.1)
    assert found.greatest == pytest.approx(2.0 - math.exp(-0.25), rel=1e-4)


def test_the_line_of_the_default_leads_from_where_gradients_are_taken() -> None:
    model, loss = regression()
    optimizer = LQA(model.parameters())
    fast = [param.detach().clone() for param in model.parameters()]
    for _ in range(15):
        there = copy.deepcopy(model)
        found = search(optimizer, lambda: loss(model))
        before = optimizer.step(lambda: loss(model))
        assert found is not None
        for index, (param, moved) in enumerate(
            zip(model.parameters(), there.parameters(), strict=True)
        ):
            z = optimizer.state[param]["z"].clone()
            # The fast iterate steps four times as far.
            moved.data -= (fast[index] - z) / 4
            fast[index] = z
        with torch.no_grad():
            assert found.reduction == pytest.approx(float(before - loss(there)), abs=1e-12)


def test_a_step_that_stays_has_no_line() -> None:
    model, loss = regression()
    assert search(LQA.paper(model.parameters()), lambda: -loss(model)) is None
    assert search(LQA.paper(model.parameters()), lambda: loss(model) / 0) is None


def test_a_loss_that_cannot_be_reduced_has_no_ratio() -> None:
    found = Found(rate=0.1, best_rate=0.0, reduction=-1.0, greatest=0.0)
    assert found.ratio is None


@pytest.mark.parametrize("name", [*CONFIGURATIONS, "lqa-adamw"])
def test_the_search_sees_what_the_step_sees_and_moves_nothing(name: str) -> None:
    """With dropout and batch normalisation, which use random numbers and buffers."""

    def states(searching: bool) -> Iterator[list[Tensor]]:
        model, inputs, labels = noisy_network()
        optimizer: Any = builders.build(name, model)
        for step in range(25):
            picked = torch.arange(step * 32, (step + 1) * 32) % len(inputs)

            def loss(model: nn.Module = model, picked: Tensor = picked) -> Tensor:
                return functional.cross_entropy(model(inputs[picked]), labels[picked])

            found = search(optimizer, loss) if searching else None
            random = torch.get_rng_state()
            before = optimizer.step(loss)
            if found is not None and name in ("lqa-paper", "lqa-adamw"):
                with torch.random.fork_rng(), torch.no_grad():
                    torch.set_rng_state(random)
                    reduction = float(before - loss(copy.deepcopy(model)))
                assert found.reduction == pytest.approx(reduction, abs=1e-6)
                assert found.reduction <= found.greatest
            yield trace(model, optimizer)

    # One after the other, for they share the random generators.
    searched, plain = list(states(True)), list(states(False))
    for one, other in zip(searched, plain, strict=True):
        assert all(map(torch.equal, one, other))


# A run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_run_is_the_same_with_the_search(tmp_path: Path, name: str) -> None:
    config = replace(CONFIG, optimizer=name)
    seen: list[Epoch] = []
    results = results_in(tmp_path)
    row = lines.run(config, results, steps=4, on_epoch=seen.append)
    plain = training.run(config, results.collection("records")).epochs
    assert [replace(row, seconds=0.0) for row in seen] == [
        replace(row, seconds=0.0) for row in plain
    ]
    assert read_rows(lines.path(results)) == [row]
    assert row == row | asdict(config) | {"steps": 4, "status": "finished", "last": 3}
    assert row["environment"] in results.environments()
    assert set(row["step"]) <= {0, 2, 3, 5}
    assert len(row["step"]) + row["unmoved"] == 4
    assert {len(row[column]) for column in lines.COLUMNS} == {len(row["step"])}
    for column in ("rate", "best_rate", "greatest"):
        assert all(number > 0.0 for number in row[column])
    assert all(map(float.__le__, row["reduction"], row["greatest"]))


def test_a_run_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = results_in(tmp_path)
    row = lines.run(CONFIG, results, steps=2)
    path = lines.path(results)
    before = path.read_bytes()
    monkeypatch.setattr(data, "load", forbid)
    assert lines.run(CONFIG, results, steps=2) == row
    for config, steps in ((CONFIG, 3), (replace(CONFIG, epochs=4), 2)):
        with pytest.raises(RecordError, match=r"2 steps of another run, .* with --out"):
            lines.run(config, results, steps=steps)
    assert path.read_bytes() == before
    path.write_text("{}\n")
    with pytest.raises(RecordError, match=r"lines\.jsonl, line 1: .* delete the line"):
        lines.run(CONFIG, results, steps=2)


def test_a_run_that_is_stopped_leaves_no_row(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        lines.run(CONFIG, results_in(tmp_path), steps=2, on_epoch=forbid)
    assert not list(tmp_path.iterdir())


def test_a_run_that_diverges_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(params: Iterable[nn.Parameter]) -> LQA:
        first, *rest = params
        optimizer = LQA([first, *rest])
        optimizer.register_step_post_hook(lambda *_: nn.init.constant_(first, math.nan))
        return optimizer

    monkeypatch.setitem(builders.BUILDERS, "lqa", lost)
    row = lines.run(replace(CONFIG, epochs=20), results_in(tmp_path), steps=40)
    assert (row["status"], row["last"]) == ("diverged", 1)
    assert row["step"] == [0]
    assert row["unmoved"] == 1


def test_what_cannot_be_searched_is_refused(tmp_path: Path) -> None:
    results = results_in(tmp_path)
    with pytest.raises(ValueError, match=r"unknown configuration 'sgd-0\.1': choose from"):
        lines.run(replace(CONFIG, optimizer="sgd-0.1"), results, steps=1)
    with pytest.raises(ValueError, match="unknown task 'mlp'"):
        lines.run(replace(CONFIG, task="mlp"), results, steps=1)
    for steps in (0, 3 * STEPS + 1):
        with pytest.raises(ValueError, match=f"steps must be between 1 and 6, .* got {steps}"):
            lines.run(CONFIG, results, steps=steps)
    assert not list(tmp_path.iterdir())
