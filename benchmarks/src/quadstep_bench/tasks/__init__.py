"""Tasks: what is trained on which data, by name, and how each is run in the suite.

Nothing here imports torch, so that reports can be written from records alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

DataName = Literal[
    "mnist",
    "cifar10",
    "digits",
    "digits-unscaled",
    "digits-noisy",
    "digits-pixels",
    "text",
    "diabetes",
    "breast-cancer",
]

Precision = Literal["float32", "bfloat16"]
"""What a model computes in; its weights are in float32 all the same."""

LossName = Literal["cross-entropy", "squared error"]
"""What is trained to be low: a mean over the examples, and over all outputs of an example."""

CLASSES = 10
"""How many classes images have."""

CHARACTERS = 96
"""How many characters a text is made of: the printable ones of ASCII, and the end of a line."""

CONTEXT = 64
"""How many of them are read at a time."""

SHAPES: dict[DataName, tuple[int, ...]] = {
    "mnist": (1, 28, 28),
    "cifar10": (3, 32, 32),
    "digits": (1, 8, 8),
    "digits-unscaled": (1, 8, 8),
    "digits-noisy": (1, 8, 8),
    "digits-pixels": (1, 8, 8),
    "text": (CONTEXT,),
    "diabetes": (10,),
    "breast-cancer": (30,),
}
"""The shape of one input of each data set: channels, height and width of an image."""


@dataclass(frozen=True)
class Part:
    """How a task is run in the suite.

    Attributes:
        group: What it is there for; the tasks of `STRESS` must be survived, no more.
        epochs: How many epochs to train for; those of the task if `None`.
        batch_size: Examples a step.
        subset: How many examples to keep of the training set; all of them if `None`.
    """

    group: str
    epochs: int | None = None
    batch_size: int = 64
    subset: int | None = None


STRESS = "stress"


@dataclass(frozen=True)
class Task:
    """A model trained on a data set: the subject of a figure, the demonstration or the suite.

    Attributes:
        data: The data set's name.
        model: The model's name in `quadstep_bench.tasks.models`.
        epochs: How many epochs it is trained for: as many as in the paper, where it has it.
        figure: The paper's figure that shows it, if any.
        loss: What is trained to be low.
        held_out: How many examples of the test set to evaluate; all of them if `None`.
        weight_scale: Multiplies all parameters before training.
        loss_scale: Multiplies the loss that is trained; what is recorded is the loss without it.
        suite: Its part in the suite, if it has one.
    """

    data: DataName
    model: str
    epochs: int
    figure: int | None = None
    loss: LossName = "cross-entropy"
    held_out: int | None = None
    weight_scale: float = 1.0
    loss_scale: float = 1.0
    suite: Part | None = None


_STRESS = Part(STRESS)

TASKS = {
    "logistic-mnist": Task(
        "mnist", "logistic", epochs=50, figure=1, suite=Part("paper", epochs=25, subset=12_800)
    ),
    "mlp-mnist": Task(
        "mnist", "mlp", epochs=25, figure=2, suite=Part("paper", epochs=10, subset=12_800)
    ),
    "lenet-mnist": Task(
        "mnist", "lenet", epochs=30, figure=3, suite=Part("paper", epochs=10, subset=12_800)
    ),
    "lenet-cifar10": Task(
        "cifar10", "lenet", epochs=40, figure=4, suite=Part("paper", epochs=12, subset=10_000)
    ),
    "resnet18-cifar10": Task("cifar10", "resnet18", epochs=50, figure=5, held_out=1000),
    "resnet8-cifar10": Task(
        "cifar10", "resnet8", epochs=6, held_out=1000, suite=Part("network", subset=5000)
    ),
    "transformer-text": Task(
        "text", "transformer", epochs=10, suite=Part("network", batch_size=32)
    ),
    "gru-digits": Task("digits", "gru", epochs=20, suite=Part("network")),
    "autoencoder-digits": Task(
        "digits-pixels", "autoencoder", epochs=25, loss="squared error", suite=Part("network")
    ),
    "mlp-diabetes": Task(
        "diabetes", "regressor", 25, loss="squared error", suite=Part("table", batch_size=16)
    ),
    "mlp-breast-cancer": Task(
        "breast-cancer", "classifier", epochs=20, suite=Part("table", batch_size=16)
    ),
    "lenet-cifar10-augmented": Task(
        "cifar10", "augmented-lenet", 12, held_out=1000, suite=Part("regularised", subset=5000)
    ),
    "mlp-digits-dropout": Task("digits", "dropout-mlp", epochs=20, suite=Part("regularised")),
    "mlp-digits": Task("digits", "small-mlp", epochs=20, suite=Part("batch")),
    "mlp-digits-batch16": Task("digits", "small-mlp", 15, suite=Part("batch", batch_size=16)),
    "mlp-digits-batch512": Task("digits", "small-mlp", 60, suite=Part("batch", batch_size=512)),
    "mlp-digits-batch1": Task(
        "digits", "small-mlp", epochs=10, suite=Part(STRESS, batch_size=1, subset=200)
    ),
    "mlp-digits-small-weights": Task("digits", "small-mlp", 20, weight_scale=1e-2, suite=_STRESS),
    "mlp-digits-large-weights": Task("digits", "small-mlp", 20, weight_scale=1e2, suite=_STRESS),
    "mlp-digits-small-loss": Task("digits", "small-mlp", 20, loss_scale=1e-3, suite=_STRESS),
    "mlp-digits-large-loss": Task("digits", "small-mlp", 20, loss_scale=1e3, suite=_STRESS),
    "mlp-digits-unscaled": Task("digits-unscaled", "small-mlp", epochs=20, suite=_STRESS),
    "mlp-digits-noisy": Task("digits-noisy", "small-mlp", epochs=20, suite=_STRESS),
}

SUITE = {name: task.suite for name, task in TASKS.items() if task.suite is not None}
"""The tasks of the suite, and how each is run."""


def check_task(name: str) -> None:
    """Raises a `ValueError` that lists the tasks unless `name` is one."""
    check_name("task", name, TASKS)


def check_name(what: str, name: str, known: Iterable[str]) -> None:
    """Raises a `ValueError` that lists the known names unless `name` is one."""
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}: choose from {', '.join(known)}")
