"""The demonstration: LQA beside the paper's competitors on the digits that scikit-learn ships."""

from collections.abc import Iterable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from quadstep_bench import figures
from quadstep_bench.curves import display, title
from quadstep_bench.optimizers import CONFIGURATIONS, settings
from quadstep_bench.runner import training
from quadstep_bench.runner.records import Config, Record, Results
from quadstep_bench.tasks import TASKS

TASK = "mlp-digits"


def run(out: Path, console: Console) -> Path:
    """Trains every setting on the digits, prints how they end and draws how they got there.

    Args:
        out: The folder for records and picture; what is recorded there is not trained again.
        console: Where to print.

    Returns:
        The picture.
    """
    # More threads than that only wait for each other in a model as small as this.
    torch.set_num_threads(1)
    epochs = TASKS[TASK].epochs
    configs = [Config(TASK, name, seed=0, epochs=epochs) for name in settings()]
    collection = Results(out, out / "runs").collection("records")
    records: list[Record] = []
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(configs) * epochs)
        for index, config in enumerate(configs):
            progress.update(bar, description=display(config.optimizer), completed=index * epochs)
            records.append(
                training.run(
                    config,
                    collection,
                    on_epoch=lambda epoch, done=index * epochs: progress.update(
                        bar, completed=done + epoch.epoch
                    ),
                )
            )
    console.print(_table(records))
    return figures.summarise(records, TASK, out / "demo.png")


def _table(records: Iterable[Record]) -> Table:
    def loss(record: Record) -> float:
        return float("inf") if record.status == "diverged" else record.epochs[-1].train_loss

    epochs = TASKS[TASK].epochs
    table = Table(title=f"{title(TASK)}, {epochs} epochs, the lowest training loss first")
    table.add_column("optimizer")
    for heading in ("training loss", "test accuracy", "seconds"):
        table.add_column(heading, justify="right")
    for record in sorted(records, key=loss):
        last = record.epochs[-1]
        diverged = record.status == "diverged"
        table.add_row(
            display(record.config.optimizer),
            "diverged" if diverged else f"{last.train_loss:.5f}",
            f"{last.test_accuracy:.1%}",
            f"{last.seconds:.1f}",
            style="bold" if record.config.optimizer in CONFIGURATIONS else None,
        )
    return table
