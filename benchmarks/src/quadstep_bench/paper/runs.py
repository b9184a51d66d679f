"""Runs of the paper's figures."""

from collections.abc import Sequence

from quadstep_bench.optimizers import settings
from quadstep_bench.runner.records import Config
from quadstep_bench.tasks import TASKS, Precision, check_name


def configs(
    figure: int,
    *,
    epochs: int | None = None,
    seeds: int | Sequence[int] = 1,
    subset: int | None = None,
    optimizers: Sequence[str] | None = None,
    precision: Precision = "float32",
) -> list[Config]:
    """Lists the runs of a figure, all optimizers for the first seed before the next seed.

    Args:
        figure: The paper's number.
        epochs: Epochs to train for; by default the paper's.
        seeds: How many seeds from 0 on, or which ones.
        subset: How many examples to keep of the training set; all by default.
        optimizers: Names of settings; all by default.
        precision: What the models compute in.

    Raises:
        ValueError: The figure or an optimizer is unknown, or a number is out of range.
    """
    tasks = {task.figure: name for name, task in TASKS.items() if task.figure is not None}
    if figure not in tasks:
        raise ValueError(f"unknown figure {figure}: choose from {', '.join(map(str, tasks))}")
    for name in optimizers or ():
        check_name("optimizer", name, settings())
    if isinstance(seeds, int) and seeds < 1:
        raise ValueError(f"seeds must be at least 1: got {seeds}")
    task = tasks[figure]
    length = TASKS[task].epochs if epochs is None else epochs
    return [
        Config(task, name, seed, length, subset=subset, precision=precision)
        for seed in (range(seeds) if isinstance(seeds, int) else seeds)
        for name in optimizers or settings()
    ]
