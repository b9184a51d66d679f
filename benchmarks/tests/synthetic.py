"""Records made up for the tests of what is drawn and decided from records."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from quadstep_bench.optimizers import COMPETITORS, CONFIGURATIONS
from quadstep_bench.runner.records import Collection, Config, Epoch, Outcome, Record, Results
from quadstep_bench.tasks import TASKS

ENVIRONMENT = {
    "revision": None,
    "dirty": False,
    "sources": "0123456789ab",
    "versions": {"python": "3.11.7"},
    "machine": {"processor": "made up", "cores": 2, "threads": 1, "device": "cpu"},
}

Shape = Callable[[str, int], float]


def results_in(root: Path) -> Results:
    """Results and runs in a folder of a test."""
    return Results(root / "results", root / "runs")


def collection_in(root: Path, name: str = "records") -> Collection:
    """A collection of such results."""
    return results_in(root).collection(name)


def record(
    task: str,
    optimizer: str,
    losses: Sequence[float],
    *,
    seed: int = 0,
    epochs: int | None = None,
    subset: int | None = None,
    rates: Sequence[float] | None = None,
    status: Outcome | None = "finished",
) -> Record:
    """A run with these training losses from epoch 0 on, and these median rates from epoch 1 on."""
    config = Config(task, optimizer, seed, epochs or len(losses) - 1, subset=subset)
    rows = tuple(
        Epoch(
            epoch=epoch,
            train_loss=loss,
            test_loss=loss,
            test_accuracy=0.5,
            seconds=float(epoch),
            forwards=epoch,
            backwards=epoch,
            rate=_spread(0.1 if rates is None else rates[epoch - 1]) if epoch else None,
            reasons={},
        )
        for epoch, loss in enumerate(losses)
    )
    return Record(config, rows, status or "unfinished", ENVIRONMENT)


def grid(
    figure: int,
    shape: Shape,
    *,
    seeds: int = 1,
    epochs: int | None = None,
    subset: int | None = None,
) -> Iterator[Record]:
    """A figure's full grid, with `shape(optimizer, epoch)` as the loss; inf ends a run there."""
    task = next(name for name in TASKS if TASKS[name].figure == figure)
    epochs = epochs or TASKS[task].epochs
    for optimizer in (*COMPETITORS, *CONFIGURATIONS):
        losses = [shape(optimizer, epoch) for epoch in range(epochs + 1)]
        end = next((epoch for epoch, loss in enumerate(losses) if loss == math.inf), epochs)
        status: Outcome = "diverged" if losses[end] == math.inf else "finished"
        losses = [*losses[:end], math.nan if status == "diverged" else losses[end]]
        rates = [0.1 / epoch for epoch in range(1, epochs + 1)]
        for seed in range(seeds):
            yield record(
                task,
                optimizer,
                [loss * (1 + 0.02 * seed) for loss in losses],
                seed=seed,
                epochs=epochs,
                subset=subset,
                rates=rates,
                status=status,
            )


def _spread(rate: float) -> dict[str, float]:
    return {"min": rate / 4, "q10": rate / 2, "median": rate, "q90": rate * 2, "max": rate * 4}
