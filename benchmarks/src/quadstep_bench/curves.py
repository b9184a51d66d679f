"""Curves: the records of one task gathered by optimizer, with the seeds side by side."""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from quadstep_bench.optimizers import FAMILIES, HAND_TUNED, SCHEDULED
from quadstep_bench.runner.records import Epoch, Record
from quadstep_bench.tasks import TASKS, DataName, Precision

_MODELS = {
    "logistic": "Logistic regression",
    "mlp": "Multilayer perceptron",
    "lenet": "LeNet-5",
    "augmented-lenet": "LeNet-5 with augmentation",
    "resnet18": "ResNet-18",
    "small-mlp": "Small multilayer perceptron",
    "dropout-mlp": "Small multilayer perceptron with dropout",
    "resnet8": "ResNet-8",
    "transformer": "Transformer",
    "gru": "Recurrent network (GRU)",
    "autoencoder": "Autoencoder",
    "regressor": "Small regression perceptron",
    "classifier": "Small perceptron",
}
_DATA: dict[DataName, str] = {
    "mnist": "MNIST",
    "cifar10": "CIFAR-10",
    "digits": "scikit-learn's digits",
    "digits-unscaled": "scikit-learn's digits, pixels from 0 to 255",
    "digits-noisy": "scikit-learn's digits, a fifth of the training labels wrong",
    "digits-pixels": "scikit-learn's digits",
    "text": "the sources of Python's standard library",
    "diabetes": "diabetes",
    "breast-cancer": "breast cancer",
}

FIGURES = {task.figure: name for name, task in TASKS.items() if task.figure is not None}
"""The task that each figure of the paper shows."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Losses:
    """How the runs of an optimizer on a task ended: medians over the seeds, inf if diverged.

    Attributes:
        training: The last training loss.
        held_out: The last held-out loss.
        best_checkpoint: The held-out loss after the epoch where it is lowest in each run.
        seeds: How many runs there are.
    """

    training: float
    held_out: float
    best_checkpoint: float
    seeds: int


@dataclass(frozen=True)
class Curve:
    """The runs of one optimizer on one task, a seed each."""

    optimizer: str
    runs: tuple[Record, ...]

    @property
    def losses(self) -> Array:
        """Training losses, a row a seed and a column an epoch from 0: inf once a run diverged."""
        return self._losses(lambda epoch: epoch.train_loss)

    @property
    def held_out(self) -> Array:
        """Losses over the test set, in the same form."""
        return self._losses(lambda epoch: epoch.test_loss)

    def _losses(self, loss: Callable[[Epoch], float]) -> Array:
        def row(run: Record) -> list[float]:
            losses = [loss(epoch) for epoch in run.epochs]
            if run.status != "diverged":
                return losses
            # A run that the records end at epoch k was given up there: k and all that would follow.
            return [*losses[:-1], *[math.inf] * (run.config.epochs + 2 - len(losses))]

        return _table(row(run) for run in self.runs)

    @property
    def median(self) -> Array:
        """The median loss at each epoch, over the seeds; nan beyond the shortest run."""
        return np.median(self.losses, axis=0)

    @property
    def trained(self) -> Array:
        """The median losses from epoch 1 to the last that every seed has."""
        losses = self.median[1:]
        return losses[~np.isnan(losses)]

    @property
    def length(self) -> int:
        """How many epochs all seeds have been trained for."""
        return len(self.trained)

    @property
    def seeds(self) -> frozenset[int]:
        """Those of the runs."""
        return frozenset(run.config.seed for run in self.runs)

    def of(self, seeds: Collection[int]) -> "Curve":
        """The runs of these seeds alone."""
        return replace(self, runs=tuple(run for run in self.runs if run.config.seed in seeds))

    @property
    def final(self) -> Losses:
        """How the runs ended; what is not a number counts as infinite."""
        # Before the first epoch nothing has been trained.
        lowest = _finite_or_inf(self.held_out[:, 1:]).min(axis=1)
        return Losses(
            training=float(np.median(_finite_or_inf(self.losses[:, -1]))),
            held_out=float(np.median(_finite_or_inf(self.held_out[:, -1]))),
            best_checkpoint=float(np.median(lowest)),
            seeds=len(self.runs),
        )

    def tail(self, length: int | None = None) -> float:
        """The mean of the median loss over the last quarter of the epochs; inf before epoch 1.

        Args:
            length: How many epochs to look at; by default all.
        """
        losses = self.trained[:length]
        return float(losses[-math.ceil(len(losses) / 4) :].mean()) if len(losses) else math.inf

    def rates(self, quantile: str) -> Array:
        """A quantile of the rate within each epoch from 1 on: the median over the seeds.

        It is nan at epochs in which no seed has one.
        """

        def rate(epoch: Epoch) -> float:
            return math.nan if epoch.rate is None else epoch.rate[quantile]

        table = _table([rate(epoch) for epoch in run.epochs[1:]] for run in self.runs)
        known = [column[np.isfinite(column)] for column in table.T]
        return np.array([np.median(column) if len(column) else math.nan for column in known])


def gather(records: Iterable[Record], task: str) -> dict[str, Curve]:
    """Gathers the runs of a task into curves, by optimizer.

    Runs on the full training set and on subsets of it, or in other precisions, do not compare: of
    these the most numerous are taken, and the larger training set where two are equally many.
    """
    groups: defaultdict[tuple[int | None, Precision], list[Record]] = defaultdict(list)
    for record in records:
        if record.config.task == task and record.epochs:
            groups[record.config.subset, record.config.precision].append(record)
    if not groups:
        return {}
    chosen = max(groups, key=lambda group: (len(groups[group]), group[0] or math.inf))
    runs: defaultdict[str, list[Record]] = defaultdict(list)
    for record in groups[chosen]:
        runs[record.config.optimizer].append(record)
    return {optimizer: Curve(optimizer, tuple(runs[optimizer])) for optimizer in runs}


def best(curves: Iterable[Curve]) -> Curve:
    """The curve that ends lowest: of a family's, the one at its best rate.

    One that was trained for longer is judged by the epochs that all have.
    """
    curves = list(curves)
    length = min(filter(None, (curve.length for curve in curves)), default=None)
    return min(curves, key=lambda curve: curve.tail(length))


def describe(curves: Mapping[str, Curve]) -> str:
    """Says on how much the curves of a task rest: training set, epochs and seeds of each."""
    runs = [run for curve in curves.values() for run in curve.runs]
    subset, precision = runs[0].config.subset, runs[0].config.precision
    images = "the full training set" if subset is None else f"{subset:,} of the training images"
    if precision != "float32":
        images += f" in {precision}"
    epochs = _count([run.config.epochs for run in runs], "epoch")
    seeds = _count([len(curve.runs) for curve in curves.values()], "seed")
    return f"{images}, {epochs}, {seeds}"


def title(task: str) -> str:
    """Writes what a task trains on what: `LeNet-5 on MNIST`."""
    row = TASKS[task]
    words = f"{_MODELS[row.model]} on {_DATA[row.data]}"
    if row.weight_scale != 1.0:
        words += f", first weights times {row.weight_scale:g}"
    if row.loss_scale != 1.0:
        words += f", loss times {row.loss_scale:g}"
    return words


def display(optimizer: str) -> str:
    """Writes an optimizer's name as the paper does, with its rate: `SGD-M 0.01`."""
    if optimizer in FAMILIES:
        return FAMILIES[optimizer]
    if optimizer in HAND_TUNED:
        competitor = HAND_TUNED[optimizer]
        return f"{FAMILIES.get(competitor.family, 'AdamW')} {competitor.rate}"
    if optimizer in SCHEDULED:
        return f"AdamW, cosine {SCHEDULED[optimizer].rate}"
    return optimizer


def _finite_or_inf(losses: Array) -> Array:
    return np.nan_to_num(losses, nan=math.inf, posinf=math.inf)


def _count(numbers: Sequence[int], noun: str) -> str:
    least, most = min(numbers), max(numbers)
    number = str(most) if least == most else f"{least} to {most}"
    return f"{number} {noun}" if most == 1 else f"{number} {noun}s"


def _table(rows: Iterable[list[float]]) -> Array:
    """Stacks rows of unequal lengths, the missing ends filled with nan."""
    rows = list(rows)
    table = np.full((len(rows), max(map(len, rows))), math.nan)
    for index, row in enumerate(rows):
        table[index, : len(row)] = row
    return table
