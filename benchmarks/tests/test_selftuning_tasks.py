"""The tasks: what each is made of, and the losses that are known in closed form."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import islice, product
from pathlib import Path

import pytest
import torch
from selftuning_stand_ins import skip_without_packages, stand_in
from torch import Tensor, nn

from quadstep_bench.selftuning import data
from quadstep_bench.selftuning.problem import GROUPS, SPLITS, Columns, Problem
from quadstep_bench.selftuning.tasks import TASKS, finetuning

Build = Callable[[str, int], Problem]

FRESH = {
    "cnn-classes": {"11.weight", "11.bias"},
    "cnn-classes-head": {"11.weight", "11.bias"},
    "gpt-prose": set[str](),
    "perceptron-shifted": set[str](),
    "minilm-lines": {"head.weight", "head.bias"},
    "efficientnet-cifar10": {"model._fc.weight"},
}
"""The values of fine-tuning tasks that are not pretrained and differ from seed to seed."""


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Build]:
    """Builds a task with the first weights of a seed, once."""

    @cache
    def built(name: str, seed: int) -> Problem:
        skip_without_packages(name)
        torch.manual_seed(seed)
        return TASKS[name].build(None)

    with pytest.MonkeyPatch.context() as monkeypatch:
        stand_in(monkeypatch, tmp_path_factory.mktemp("cache"))
        yield built


def rows(columns: Columns) -> list[bytes]:
    return [row.numpy().tobytes() for row in columns[0].flatten(1 if columns[0].dim() > 1 else 0)]


# The table ----------------------------------------------------------------------------------------


def test_there_are_three_groups_of_eight_and_a_third_of_the_tasks_confirms() -> None:
    assert Counter(task.group for task in TASKS.values()) == dict.fromkeys(GROUPS, 8)
    confirm = Counter(task.group for task in TASKS.values() if task.confirm)
    assert confirm == {"from scratch": 3, "fine-tuning": 3, "awkward": 2}
    assert [name for name, task in TASKS.items() if task.name != name] == []
    assert len({task.text for task in TASKS.values()}) == len(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_no_example_is_in_two_splits(name: str, build: Build) -> None:
    problem = build(name, 0)
    if "gpt" in name:
        # Passages recur in a text; test_selftuning_data.py shows that windows lie apart.
        return
    parts = [problem.training, problem.measured["validation"], problem.measured["test"]]
    found = [rows(part) for part in parts]
    shared = [set(found[a]) & set(found[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    # Two modules may have a line with the same words.
    most = 10 if name in ("rare-words", "minilm-lines") else 0
    assert all(len(both) <= most for both in shared)
    assert set(rows(problem.measured["train"])) <= set(found[0])


@pytest.mark.parametrize("name", TASKS)
def test_all_that_is_to_be_trained_has_a_gradient(name: str, build: Build) -> None:
    problem = build(name, 0)
    problem.model.train()
    batch = next(problem.batches(seed=0))
    if problem.draw is not None:
        batch = problem.draw(problem.model, batch)
    problem.model.zero_grad()
    loss = problem.train_loss(batch)
    assert loss.isfinite()
    loss.backward()
    trained = {name: p.grad for name, p in problem.model.named_parameters() if p.requires_grad}
    assert trained
    assert [name for name, grad in trained.items() if grad is None] == []
    assert any(grad.any() for grad in trained.values() if grad is not None)
    assert not any(p.grad is not None for p in problem.model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("name", TASKS)
def test_evaluations_repeat_themselves_and_draw_nothing(name: str, build: Build) -> None:
    problem = build(name, 0)
    some = {split: tuple(c[:40] for c in problem.measured[split]) for split in SPLITS}
    problem = replace(problem, measured=some)
    problem.model.eval()
    before = torch.get_rng_state()
    found = [problem.evaluate(split) for split in SPLITS for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert str(found[::2]) == str(found[1::2])
    assert all(math.isfinite(loss) for loss, _ in found)
    assert [math.isnan(error) for _, error in found] == [name == "diffusion-digits"] * 6


@pytest.mark.parametrize("name", TASKS)
def test_seeds_have_the_same_data_and_other_weights(name: str, build: Build) -> None:
    first, second = build(name, 0), build(name, 1)
    assert first.digest() == second.digest()
    weights = dict(first.model.named_parameters())
    differ = {
        name
        for name, weight in second.model.named_parameters()
        if not torch.equal(weight, weights[name])
    }
    if name.endswith("adapters"):
        assert differ == {name for name in weights if name.endswith("down.weight")}
    elif name in FRESH:
        assert differ >= FRESH[name]
        assert {part.replace("bias", "weight") for part in differ} == {
            part.replace("bias", "weight") for part in FRESH[name]
        }
    else:
        assert differ


@pytest.mark.parametrize("name", ["cnn-classes-head", *(n for n in TASKS if "adapters" in n)])
def test_a_part_of_the_weights_is_trained(name: str, build: Build) -> None:
    model = build(name, 0).model
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    if name == "cnn-classes-head":
        assert trained == ["11.weight", "11.bias"]
    else:
        layers = sum(isinstance(module, nn.Linear) for module in model.modules()) // 3
        assert len(trained) == 2 * layers
        assert all(name.endswith(("down.weight", "up.weight")) for name in trained)


# Pretraining --------------------------------------------------------------------------------------


def test_pretraining_is_done_once_and_draws_nothing_from_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, tmp_path)
    found: list[tuple[dict[str, Tensor], Tensor]] = []
    for _ in range(2):
        torch.manual_seed(5)
        model = TASKS["perceptron-shifted-adapters"].build(None).model
        found.append((model.state_dict(), torch.get_rng_state()))
        (kept,) = tmp_path.iterdir()
        # The second time it is read.
        monkeypatch.setattr(finetuning, "islice", None)
    (first, state), (second, again) = found
    assert torch.equal(state, again)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    loaded = torch.load(kept, weights_only=True)
    assert torch.equal(loaded["1.0.weight"], first["1.0.layer.weight"])


def test_pretrained_weights_of_packages_are_all_used(build: Build) -> None:
    """Neither a head that is not pretrained nor anything else is left at random."""
    first, second = build("efficientnet-cifar10", 0).model, build("efficientnet-cifar10", 1).model
    values, others = first.state_dict(), second.state_dict()
    differ = {name for name, value in values.items() if not torch.equal(value, others[name])}
    assert {name.rpartition(".")[0] for name in differ} == {"model._fc"}
    assert not any(
        module.training for module in first.train().modules() if isinstance(module, nn.BatchNorm2d)
    )


# Single tasks -------------------------------------------------------------------------------------


def test_a_text_is_read_once(build: Build) -> None:
    for name in ("gpt-text", "gpt-prose"):
        problem, task = build(name, 0), TASKS[name]
        problem = replace(problem, training=(torch.arange(len(problem.training[0])),))
        read = torch.cat([batch for (batch,) in islice(problem.batches(seed=0), task.steps)])
        assert len(read) == len(read.unique()) == 8 * task.steps


def test_three_tenths_of_the_labels_are_wrong_in_training_alone(build: Build) -> None:
    clean = data.split_fifths(data.digits())
    problem = build("noisy-labels", 0)
    assert torch.equal(problem.training[0], clean["train"][0])
    wrong = (problem.training[1] != clean["train"][1]).float().mean()
    assert float(wrong) == pytest.approx(0.3, abs=0.03)
    for split in ("validation", "test"):
        assert torch.equal(problem.measured[split][1], clean[split][1])


def test_columns_are_as_they_are_or_standardised(build: Build) -> None:
    unscaled, table = build("unscaled-inputs", 0), build("table-breast-cancer", 0)
    spread = unscaled.training[0].std(0)
    assert spread.max() > 1e4 * spread.min()
    assert table.training[0].std(0, correction=0).allclose(torch.ones(30), rtol=1e-3)
    for column in build("table-diabetes", 0).training:
        assert column.mean(0).abs().max() < 1e-5


def test_most_words_are_rare(build: Build) -> None:
    inputs, _ = build("rare-words", 0).training
    assert set(inputs.unique().tolist()) == {0.0, 1.0}
    assert (inputs.sum(0) <= 2).float().mean() > 0.5


def test_a_graph_has_few_labels_and_all_nodes(build: Build) -> None:
    problem = build("graph-digits", 0)
    features, neighbours = problem.model.features, problem.model.neighbours
    assert isinstance(features, Tensor)
    assert isinstance(neighbours, Tensor)
    assert len(problem.training[0]) == 200
    assert torch.equal(neighbours[:, 0], torch.arange(len(features)))
    ranked = torch.cdist(features[:1], features).argsort()[0, :8]
    assert set(ranked.tolist()) == set(neighbours[0].tolist())


class Heat(nn.Module):
    """Two waves that decay as heat does where the conductivity is as given."""

    def __init__(self, conductivity: float) -> None:
        super().__init__()
        self.conductivity = conductivity

    def forward(self, points: Tensor) -> Tensor:
        place, time = points[:, :1], points[:, 1:]
        waves = (
            weight
            * (number * math.pi * place).sin()
            * (-self.conductivity * (number * math.pi) ** 2 * time).exp()
            for weight, number in ((1.0, 1), (0.5, 3))
        )
        return sum(waves, torch.zeros(()))


def test_the_loss_of_the_heat_equation_is_zero_for_its_solution(build: Build) -> None:
    problem = build("heat-equation", 0)
    assert problem.loss is not None
    batch = next(problem.batches(seed=0))
    assert problem.loss(Heat(0.1), batch).item() < 1e-9
    assert problem.loss(Heat(0.11), batch).item() > 1e-3
    for split in SPLITS:
        error, relative = problem.measure(Heat(0.1), problem.measured[split])
        assert error.item() < 1e-12
        assert relative.item() < 1e-6
        _, none = problem.measure(nn.Threshold(9.0, 0.0), problem.measured[split])
        assert none.item() > 0.9


def test_a_policy_follows_the_gradient_of_the_expected_regret(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean over all actions, with the reward of an action itself in the mean that is taken off.

    That makes the gradient smaller by the share of one example.
    """
    problem = build("bandit-digits", 0)
    assert problem.draw is not None
    assert problem.loss is not None
    weights = list(problem.model.parameters())
    batch = tuple(column[:2] for column in problem.training)
    with torch.no_grad():
        chances = problem.model(batch[0]).softmax(1)
    expected = [torch.zeros_like(weight) for weight in weights]
    for actions in product(range(10), repeat=2):
        chosen = torch.tensor(actions).unsqueeze(1)
        monkeypatch.setattr(Tensor, "multinomial", lambda *_, chosen=chosen: chosen)
        drawn = problem.draw(problem.model, batch)
        gradients = torch.autograd.grad(problem.loss(problem.model, drawn), weights)
        chance = float(chances.gather(1, chosen).prod())
        for total, gradient in zip(expected, gradients, strict=True):
            total += chance * gradient
    regret, _ = problem.measure(problem.model, batch)
    for total, gradient in zip(expected, torch.autograd.grad(regret, weights), strict=True):
        assert total.allclose(0.5 * gradient, atol=1e-6)
        assert gradient.abs().max() > 1e-4


def test_what_a_denoiser_is_measured_with_is_always_the_same(build: Build) -> None:
    problem = build("diffusion-digits", 0)
    batch = next(problem.batches(seed=0))
    assert len(batch) == 1
    assert problem.train_loss(batch).item() != problem.train_loss(batch).item()
    inputs, noise, times = problem.measured["test"]
    assert float(inputs.min()) == -1.0
    assert float(noise.std()) == pytest.approx(1.0, abs=0.02)
    assert 0.0 < float(times.min()) < float(times.max()) < 1.0
