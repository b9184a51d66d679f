"""Problems: a model with its data and its loss, and the table of tasks that build them."""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from quadstep_bench.runner.training import shuffle
from quadstep_bench.tasks import check_name

Group = Literal["from scratch", "fine-tuning", "awkward"]

GROUPS: tuple[Group, ...] = ("from scratch", "fine-tuning", "awkward")

SPLITS = ("train", "validation", "test")

Columns = tuple[Tensor, ...]
"""Tensors with the examples along their first axis."""

Splits = dict[str, Columns]
"""The columns of each of `SPLITS`."""

CHUNK = 250
"""How many examples are evaluated at a time."""

TRAINING_EXAMPLES = 250
"""How many of the training examples are evaluated, at most, unless a task has more."""


def classification(model: nn.Module, batch: Columns) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy of a batch, and the share of it that is classified wrongly."""
    *inputs, labels = batch
    outputs = model(*inputs)
    return functional.cross_entropy(outputs, labels), (outputs.argmax(1) != labels).float().mean()


def regression(model: nn.Module, batch: Columns) -> tuple[Tensor, Tensor]:
    """The mean squared error of a batch, and its mean absolute error."""
    *inputs, targets = batch
    outputs = model(*inputs)
    return functional.mse_loss(outputs, targets), functional.l1_loss(outputs, targets)


@dataclass(frozen=True)
class Problem:
    """A model with its data and its loss.

    Attributes:
        model: What is trained; parameters that need no gradient stay as they are.
        training: The examples that batches are drawn from.
        measured: The examples that are evaluated, by split.
        measure: The mean loss of a batch and its mean error, nan where a task has none.
        loss: What is trained to be low, a mean over a batch; the first of `measure` if `None`.
        draw: What the model itself adds to a batch before a step, as the actions that it takes.
        batch_size: Examples a step; all of them if `None`.
    """

    model: nn.Module
    training: Columns
    measured: Splits
    measure: Callable[[nn.Module, Columns], tuple[Tensor, Tensor]] = classification
    loss: Callable[[nn.Module, Columns], Tensor] | None = None
    draw: Callable[[nn.Module, Columns], Columns] | None = None
    batch_size: int | None = 32

    def batches(self, seed: int) -> Iterator[Columns]:
        """Yields batches without end, all examples in a new order before any comes again."""
        size = len(self.training[0])
        length = self.batch_size or size
        epoch = 0
        while True:
            order = shuffle(size, seed, epoch)
            # A smaller last batch would be a step of another kind.
            for start in range(0, size - length + 1, length):
                chosen = order[start : start + length]
                yield tuple(column[chosen] for column in self.training)
            epoch += 1

    def train_loss(self, batch: Columns) -> Tensor:
        """The loss of a batch, with a graph."""
        return self.loss(self.model, batch) if self.loss else self.measure(self.model, batch)[0]

    @torch.no_grad()
    def evaluate(self, split: str) -> tuple[float, float]:
        """The mean loss and the mean error over a split."""
        columns = self.measured[split]
        size, totals = len(columns[0]), [0.0, 0.0]
        for start in range(0, size, CHUNK):
            chunk = tuple(column[start : start + CHUNK] for column in columns)
            for index, value in enumerate(self.measure(self.model, chunk)):
                totals[index] += float(value) * len(chunk[0]) / size
        return totals[0], totals[1]

    def digest(self) -> str:
        """Identifies the data by their SHA-256."""
        digest = hashlib.sha256()
        for columns in (self.training, *(self.measured[split] for split in SPLITS)):
            for column in columns:
                digest.update(str(tuple(column.shape)).encode())
                digest.update(column.contiguous().numpy().data)
        return digest.hexdigest()


def from_splits(model: nn.Module, splits: Splits, **options: Any) -> Problem:
    """Makes a problem of a model and its splits; options are further attributes of it."""
    training = splits["train"]
    measured = {**splits, "train": tuple(column[:TRAINING_EXAMPLES] for column in training)}
    return Problem(model, training, measured, **options)


@dataclass(frozen=True)
class Task:
    """A row of the table of tasks.

    Attributes:
        name: Its name.
        group: What it stands for.
        build: Makes the problem with fresh weights from torch's random state, given the folder of
            the data sets.
        steps: How many steps a run takes.
        confirm: Whether it is there only to confirm a decision, never to make one.
        needs: Distributions that must be installed.
    """

    name: str
    group: Group
    build: Callable[[Path | None], Problem] = field(repr=False)
    steps: int
    confirm: bool = False
    needs: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """What it is, in a line."""
        return (self.build.__doc__ or "").split("\n")[0].rstrip(".")


TASKS: dict[str, Task] = {}
"""All tasks, by name."""


def task(
    group: Group, *, steps: int, confirm: bool = False, needs: tuple[str, ...] = ()
) -> Callable[[Callable[[Path | None], Problem]], Callable[[Path | None], Problem]]:
    """Adds a function that builds a problem to `TASKS`, under its name with hyphens."""

    def add(build: Callable[[Path | None], Problem]) -> Callable[[Path | None], Problem]:
        name = build.__name__.replace("_", "-")
        TASKS[name] = Task(name, group, build, steps, confirm, needs)
        return build

    return add


def check_task(name: str) -> None:
    """Raises a `ValueError` that lists the tasks unless `name` is one."""
    check_name("task", name, TASKS)


NO_ERROR = torch.tensor(math.nan)
"""The error of a batch where a task has none."""
