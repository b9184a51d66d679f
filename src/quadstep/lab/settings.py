"""What the experiments are made of, by name: data sets, tasks, optimizers.

Nothing here imports torch, so that figures and claims can be drawn from records alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

DataName = Literal["mnist", "cifar10", "digits"]

SHAPES: dict[DataName, tuple[int, int, int]] = {
    "mnist": (1, 28, 28),
    "cifar10": (3, 32, 32),
    "digits": (1, 8, 8),
}
"""Channels, height and width of the images of each data set. All have ten classes."""

CLASSES = 10


@dataclass(frozen=True)
class Task:
    """A model trained on a data set: the subject of one figure, or of the demonstration.

    Attributes:
        data: The data set's name.
        model: The model's name in `quadstep.lab.models`.
        epochs: How many epochs the paper trains it for.
        figure: The paper's figure that shows it, if any.
    """

    data: DataName
    model: str
    epochs: int
    figure: int | None = None


TASKS = {
    "logistic-mnist": Task("mnist", "logistic", epochs=50, figure=1),
    "mlp-mnist": Task("mnist", "mlp", epochs=25, figure=2),
    "lenet-mnist": Task("mnist", "lenet", epochs=30, figure=3),
    "lenet-cifar10": Task("cifar10", "lenet", epochs=40, figure=4),
    "resnet18-cifar10": Task("cifar10", "resnet18", epochs=50, figure=5),
    "mlp-digits": Task("digits", "small-mlp", epochs=20),
}


@dataclass(frozen=True)
class Competitor:
    """An optimizer of the paper's comparison at one of its learning rates."""

    family: str
    rate: float


FAMILIES = {
    "sgd": "SGD",
    "sgd-m": "SGD-M",
    "sgd-nag": "SGD-NAG",
    "adagrad": "AdaGrad",
    "rmsprop": "RMSProp",
    "adam": "Adam",
}
"""The competitors' families and how the paper writes them."""

RATES = (0.1, 0.01, 0.001)

COMPETITORS = {
    f"{family}-{rate}": Competitor(family, rate) for family in FAMILIES for rate in RATES
}

CONFIGURATIONS = ("lqa-paper", "lqa", "lqa-auto")

BASES = {"lqa-paper": "sgd", "lqa": "sgd", "lqa-auto": "adamw"}
"""The optimizer of torch that takes steps of the same kind, and that costs are compared with."""


def settings() -> tuple[str, ...]:
    """Names every optimizer setting, the competitors first."""
    return (*COMPETITORS, *CONFIGURATIONS)


def check_task(name: str) -> None:
    """Raises a `ValueError` that lists the tasks unless `name` is one."""
    check_name("task", name, TASKS)


def check_optimizer(name: str) -> None:
    """Raises a `ValueError` that lists the optimizers unless `name` is one."""
    check_name("optimizer", name, settings())


def check_configuration(name: str) -> None:
    """Raises a `ValueError` that lists the configurations of LQA unless `name` is one."""
    check_name("configuration", name, CONFIGURATIONS)


def check_name(what: str, name: str, known: Iterable[str]) -> None:
    """Raises a `ValueError` that lists the known names unless `name` is one."""
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}: choose from {', '.join(known)}")
