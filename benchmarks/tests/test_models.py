"""Models and optimizers: the sizes the paper's models have, and what their names stand for."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop

from quadstep import LQA
from quadstep_bench.optimizers import (
    COMPETITORS,
    FAMILIES,
    PEERS,
    WARM_UP,
    builders,
    settings,
    suite_settings,
)
from quadstep_bench.runner.training import LOSSES
from quadstep_bench.tasks import SHAPES, SUITE, TASKS, data, models

CLASSES = {
    "sgd": SGD,
    "sgd-m": SGD,
    "sgd-nag": SGD,
    "adagrad": Adagrad,
    "rmsprop": RMSprop,
    "adam": Adam,
}


@pytest.mark.parametrize(
    ("task", "parameters"),
    [
        ("logistic-mnist", 7_850),
        ("mlp-mnist", 1_796_010),
        ("lenet-mnist", 61_706),
        ("lenet-cifar10", 62_006),
        ("lenet-cifar10-augmented", 62_006),
        ("resnet18-cifar10", 11_173_962),
        ("mlp-digits", 17_610),
        ("mlp-digits-dropout", 17_610),
        ("resnet8-cifar10", 78_042),
        ("gru-digits", 14_858),
    ],
)
def test_models_have_their_known_sizes(task: str, parameters: int) -> None:
    model = models.build(task)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    images = torch.rand(2, *SHAPES[TASKS[task].data])
    assert model(images).shape == (2, 10)


def test_resnet18_halves_the_image_three_times() -> None:
    body = models.build("resnet18-cifar10")[:-3]
    assert body(torch.rand(1, 3, 32, 32)).shape == (1, 512, 4, 4)


def test_the_transformer_sees_only_what_came_before() -> None:
    model = models.transformer()
    assert sum(parameter.numel() for parameter in model.parameters()) == 627_936
    text = torch.randint(models.CHARACTERS, (2, models.CONTEXT))
    other = text.clone()
    other[:, 40:] = 0
    output = model(text)
    assert output.shape == (2, models.CHARACTERS, models.CONTEXT)
    assert torch.equal(output[..., :40], model(other)[..., :40])
    assert not torch.equal(output, model(other))
    functional.cross_entropy(output, text).backward()
    assert all(parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("task", [task for task in SUITE if "mnist" not in task])
def test_a_task_of_the_suite_can_be_trained(task: str) -> None:
    row = TASKS[task]
    if row.data == "cifar10":
        inputs, labels = torch.rand(4, *SHAPES["cifar10"]), torch.arange(4)
    else:
        loaded = data.load(row.data)
        inputs, labels = next(data.batches(loaded.train_inputs, loaded.train_labels, 4))
        assert inputs.shape[1:] == SHAPES[row.data]
    model = models.build(task)
    LOSSES[row.loss](model(inputs), labels).backward()
    assert all(parameter.grad.any() for parameter in model.parameters())


def test_first_weights_can_be_scaled() -> None:
    torch.manual_seed(0)
    plain = models.build("mlp-digits")
    torch.manual_seed(0)
    scaled = models.build("mlp-digits-small-weights")
    for before, after in zip(plain.parameters(), scaled.parameters(), strict=True):
        assert torch.equal(0.01 * before, after)


def window(image: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """Cuts an image out of itself with a margin of four zeros."""
    padded = functional.pad(image, [4] * 4)
    return padded[:, down : down + image.shape[1], right : right + image.shape[2]]


def test_augmented_images_are_shifted_and_mirrored_in_training_alone() -> None:
    torch.manual_seed(0)
    images = torch.rand(200, 3, 32, 32)
    jitter = models.build("lenet-cifar10-augmented")[0]
    seen = [
        (mirrored, down, right)
        for image, shown in zip(images, jitter(images), strict=True)
        for mirrored in (False, True)
        for down, right in product(range(9), repeat=2)
        if torch.equal(shown, window(image.flip(2) if mirrored else image, down, right))
    ]
    assert len(seen) == len(images)
    mirrored, down, right = (set(values) for values in zip(*seen, strict=True))
    assert mirrored == {False, True}
    assert down == right == set(range(9))
    assert torch.equal(jitter.eval()(images), images)


def test_an_autoencoder_returns_images() -> None:
    assert models.autoencoder((1, 8, 8))(torch.rand(2, 1, 8, 8)).shape == (2, 1, 8, 8)


def test_every_figure_has_one_task() -> None:
    figures = [task.figure for task in TASKS.values() if task.figure is not None]
    assert sorted(figures) == [1, 2, 3, 4, 5]


def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown task 'mlp': choose from logistic-mnist, mlp-m"):
        models.build("mlp")


def train(model: nn.Module) -> dict[str, bool]:
    """Trains a few steps and tells which parameters moved."""
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    images, labels = torch.rand(64, 1, 8, 8), torch.arange(64) % 7
    for _ in range(10):
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return {name: not torch.equal(before[name], value) for name, value in model.named_parameters()}


def test_an_mlp_started_at_zero_moves_in_its_last_bias_alone() -> None:
    model = models.build("mlp-digits")
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    moved = train(model)
    assert [name for name in moved if moved[name]] == ["5.bias"]
    assert all(train(models.build("mlp-digits")).values())


def test_logistic_regression_starts_at_zero_and_trains() -> None:
    model = models.logistic((1, 8, 8))
    assert all(not parameter.any() for parameter in model.parameters())
    assert all(train(model).values())


def test_there_are_18_competitors_and_3_configurations() -> None:
    assert len(COMPETITORS) == 18
    assert {row.family for row in COMPETITORS.values()} == set(FAMILIES)
    assert COMPETITORS["sgd-nag-0.001"].rate == 0.001
    assert settings()[-4:] == ("lqa-paper", "lqa", "lqa-auto", "lqa-authors")
    assert set(builders.BUILDERS) == {*settings(), *suite_settings()} - {*PEERS}


@pytest.mark.parametrize("name", settings())
def test_settings_are_what_their_names_say(name: str) -> None:
    optimizer = builders.build(name, models.build("mlp-digits"))
    group = optimizer.param_groups[0]
    if name in COMPETITORS:
        row = COMPETITORS[name]
        assert type(optimizer) is CLASSES[row.family]
        assert group["lr"] == row.rate
        assert group.get("momentum", 0) == (0.9 if row.family in ("sgd-m", "sgd-nag") else 0)
        assert group.get("nesterov", False) == (row.family == "sgd-nag")
    else:
        assert type(optimizer) is LQA


@pytest.mark.parametrize(
    ("progress", "share"),
    [
        pytest.param(0.0, 0.0, id="start"),
        pytest.param(WARM_UP / 4, 0.25, id="warm-up"),
        pytest.param(WARM_UP, 1.0, id="highest"),
        pytest.param(WARM_UP + (1 - WARM_UP) / 3, 0.75, id="a third of the fall"),
        pytest.param(1.0, 0.0, id="end"),
    ],
)
def test_a_schedule_warms_up_and_falls(progress: float, share: float) -> None:
    optimizer = builders.build("adamw-cosine-0.01", models.build("mlp-digits"))
    assert isinstance(optimizer, AdamW)
    builders.schedule("adamw-cosine-0.01", optimizer, 40 * progress, 40)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * share)


def test_a_setting_without_a_schedule_keeps_its_rate() -> None:
    optimizer = builders.build("adamw-0.01", models.build("mlp-digits"))
    builders.schedule("adamw-0.01", optimizer, 20.0, 40)
    assert optimizer.param_groups[0]["lr"] == 0.01


def test_an_unknown_optimizer_is_refused_with_the_known_ones() -> None:
    model = models.build("mlp-digits")
    with pytest.raises(ValueError, match=r"unknown optimizer 'sgd': choose from sgd-0\.1, .*lqa"):
        builders.build("sgd", model)
