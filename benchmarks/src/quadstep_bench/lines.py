"""Lines: how much of the greatest possible reduction of the loss the rate of a step gives.

Before some steps of a run the line of the step is previewed and searched finely: the same batch,
the same random numbers, the direction that the optimizer steps along. All runs are rows of one
file, `lines.jsonl`, with the steps that have a line as columns.
"""

# Neither torch nor scipy is typed throughout.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

import math
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import minimize_scalar
from torch import Tensor

from quadstep import LQA
from quadstep_bench.optimizers import check_configuration
from quadstep_bench.paper.rules import share
from quadstep_bench.runner.environment import key
from quadstep_bench.runner.files import RecordError, Row, damaged, read_rows
from quadstep_bench.runner.records import Config, Epoch, Results, parse_config
from quadstep_bench.runner.training import Trial
from quadstep_bench.tasks import check_task
from quadstep_bench.tasks import data as data_sets

GRID = (0.0, *(10.0 ** (tick / 8) for tick in range(-32, 33)))
"""Where a line is searched first, in units of the rate of the step: zero, and four decades to
either side."""

PRECISION = 1e-4
"""How closely the best rate is then approached, relative to its neighbour on the grid."""

COLUMNS = ("rate", "best_rate", "reduction", "greatest")
"""The attributes of `Found`."""

HUGE = float(np.finfo(np.float32).max)
"""What a loss that overflows counts as."""


@dataclass(frozen=True)
class Found:
    """What a search of the line of one step found.

    Attributes:
        rate: The rate that the optimizer steps with.
        best_rate: The rate of the lowest loss.
        reduction: How much lower the loss is at `rate` than at zero.
        greatest: How much lower it is at `best_rate`.
    """

    rate: float
    best_rate: float
    reduction: float
    greatest: float

    @property
    def ratio(self) -> float | None:
        """The share of the greatest reduction; `None` where the loss cannot be reduced."""
        return share(self.reduction, self.greatest)


def search(optimizer: LQA, closure: Callable[[], Tensor]) -> Found | None:
    """Searches the line of the step that the optimizer is about to take, and moves nothing.

    Args:
        optimizer: The optimizer, in its state before the step.
        closure: Evaluates the loss on the batch of the step.

    Returns:
        What was found; `None` if the step has no positive rate.
    """
    preview = optimizer.preview(closure)
    rate = preview.rate
    if not rate > 0.0:
        return None
    losses: dict[float, float] = {}

    def evaluate(*rates: float) -> float:
        """Evaluates at rates and returns the last loss; one that overflows counts as huge."""
        found = np.nan_to_num(preview.losses(rates), nan=HUGE, posinf=HUGE, neginf=-HUGE)
        losses.update(zip(rates, found.tolist(), strict=True))
        return losses[rates[-1]]

    rates = [rate * factor for factor in GRID]
    evaluate(*rates)
    best = min(range(len(rates)), key=lambda index: losses[rates[index]])
    low, high = rates[max(best - 1, 0)], rates[min(best + 1, len(rates) - 1)]
    minimize_scalar(
        evaluate, bounds=(low, high), method="bounded", options={"xatol": PRECISION * high}
    )
    best_rate = float(min(losses, key=losses.__getitem__))
    return Found(rate, best_rate, losses[0.0] - losses[rate], losses[0.0] - losses[best_rate])


def path(results: Results) -> Path:
    """The file of all runs whose lines were searched."""
    return results.root / "lines.jsonl"


def run(
    config: Config,
    results: Results,
    *,
    steps: int,
    data_root: Path | None = None,
    device: str = "cpu",
    on_epoch: Callable[[Epoch], object] | None = None,
) -> Row:
    """Trains a run as `quadstep_bench.runner.training.run` does, and searches lines on the way.

    Nothing is done if the row is there already, and it is added only when all is done.

    Args:
        config: The run, of a configuration of LQA.
        results: Where its row belongs.
        steps: How many steps to search the lines of, spread evenly over the run.
        data_root: The folder of the data sets, see `quadstep_bench.tasks.data.load`.
        device: Where to train, in torch's words.
        on_epoch: Called after each evaluation, the first before training.

    Returns:
        The row: the configuration, how many `steps` were searched, how the run ended and after
        which epoch (`last`), the attributes of `Found` for each `step` that has a line, and how
        many have none because the parameters stay (`unmoved`).

    Raises:
        ValueError: A name is unknown, a number out of range, or the data set or file unusable.
        OSError: The file cannot be written.
    """
    check_task(config.task)
    check_configuration(config.optimizer)
    present = _find(config, results, steps)
    if present is not None:
        return present
    data = data_sets.load_for(config, data_root).to(device)
    total = config.epochs * math.ceil(len(data.train_labels) / config.batch_size)
    if not 1 <= steps <= total:
        raise ValueError(f"steps must be between 1 and {total}, all that the run has: got {steps}")
    # The middles of as many equal parts of the run.
    trial = _Searched(config, device, {total * (2 * i + 1) // (2 * steps) for i in range(steps)})
    trial.evaluate(data)
    while True:
        record = trial.record()
        if on_epoch is not None:
            on_epoch(record.epochs[-1])
        if record.status != "unfinished":
            break
        trial.train(data)
    found = {step: line for step, line in trial.found.items() if line is not None}
    row = {
        **asdict(config),
        "steps": steps,
        "status": record.status,
        "last": record.epochs[-1].epoch,
        "environment": key(record.environment),
        "unmoved": len(trial.found) - len(found),
        "step": [*found],
        **{name: [getattr(line, name) for line in found.values()] for name in COLUMNS},
    }
    results.merge(row, path(results), [record.environment])
    return row


class _Searched(Trial):
    """A run that searches the lines of some of its steps.

    Args:
        config: The run.
        device: Where to train.
        chosen: The numbers of the steps, from 0 on.
    """

    def __init__(self, config: Config, device: str, chosen: Collection[int]) -> None:
        super().__init__(config, device)
        self.chosen = chosen
        self.steps = 0
        self.found: dict[int, Found | None] = {}

    def _step(self, inputs: Tensor, labels: Tensor) -> Tensor:
        if self.steps in self.chosen and isinstance(self.optimizer, LQA):
            self.found[self.steps] = search(
                self.optimizer, lambda: self.loss(self._outputs(inputs), labels)
            )
        self.steps += 1
        return super()._step(inputs, labels)


def _find(config: Config, results: Results, steps: int) -> Row | None:
    """Finds the row of a run; raises a `RecordError` if it is of other steps."""
    for line, row in enumerate(read_rows(path(results)), start=1):
        try:
            present = parse_config(row)
            same = present == config and row["steps"] == steps
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(path(results), line, error) from error
        if present.task == config.task and present.identity == config.identity:
            if same:
                return row
            raise RecordError(
                f"{path(results)} holds {row['steps']} steps of another run, {present}, "
                f"{present.epochs} epochs: choose another folder for the results with --out, or "
                "delete the line to measure it again"
            )
    return None
