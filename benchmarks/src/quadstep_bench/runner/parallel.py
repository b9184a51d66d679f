"""Training many runs, those that are missing, several at a time."""

import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import TypeAlias

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from quadstep_bench.runner.records import Collection, Config, Epoch, Record
from quadstep_bench.runner.training import run
from quadstep_bench.tasks import data

Reports: TypeAlias = "SimpleQueue[tuple[Config, int]]"


def execute(
    wanted: Iterable[Config],
    collection: Collection,
    *,
    workers: int = 1,
    data_root: Path | None = None,
    device: str = "cpu",
) -> int:
    """Trains the runs that are missing and shows how far they are.

    Whatever ends this early, the next call goes on from the last epochs kept. A run that fails does
    not keep the others from going on.

    Args:
        wanted: The runs.
        collection: Where their records belong.
        workers: How many to train at a time; they share the processor's cores.
        data_root: The folder of the data sets, see `quadstep_bench.tasks.data.load`.
        device: Where to train, in torch's words.

    Returns:
        How many runs failed.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1: got {workers}")
    todo = collection.missing(wanted)
    if not todo:
        return 0
    # Here first, where an error stops everything at once; the workers find it decoded.
    for config in {(config.task, config.subset): config for config in todo}.values():
        data.load_for(config, data_root)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs"),
        TimeRemainingColumn(),
    )
    # An epoch may take minutes: the speed is not to be forgotten between two of them.
    with (
        Progress(*columns, speed_estimate_period=3600) as progress,
        worker_pool(workers) as (pool, reports),
    ):
        display = _ProgressDisplay(progress, todo)
        pending = {
            pool.submit(_work, config, collection, data_root, device): config for config in todo
        }
        failures = 0
        while pending:
            done, _ = wait(pending, timeout=0.25, return_when=FIRST_COMPLETED)
            while not reports.empty():
                display.report(*reports.get())
            for future in done:
                failures += not display.end(pending.pop(future), future)
    return failures


class _ProgressDisplay:
    """The progress shown: a bar for all that is left to train, and one for each run under way."""

    def __init__(self, progress: Progress, todo: Sequence[Config]) -> None:
        self._progress = progress
        self._left = sum(config.epochs for config in todo)
        self._all = progress.add_task("all runs", total=self._left)
        self._bars: dict[Config, TaskID] = {}
        self._reached: dict[Config, int] = {}

    def report(self, config: Config, epoch: int) -> None:
        """Shows that a run has reached an epoch; the first report is where it starts from."""
        if config in self._bars:
            self._progress.update(self._bars[config], completed=epoch)
            self._progress.advance(self._all, epoch - self._reached[config])
        else:
            self._bars[config] = self._progress.add_task(
                str(config), total=config.epochs, completed=epoch
            )
            self._skip(epoch)
        self._reached[config] = epoch

    def end(self, config: Config, future: Future[Record]) -> bool:
        """Shows how a run ended, and tells whether well."""
        if config in self._bars:
            self._progress.remove_task(self._bars[config])
        self._skip(config.epochs - self._reached.get(config, 0))
        error = future.exception()
        if error is None:
            last = future.result().epochs[-1]
            outcome = (
                f"{future.result().status} at epoch {last.epoch}, "
                f"training loss {last.train_loss:.4g}, test loss {last.test_loss:.4g}"
            )
            if not math.isnan(last.test_accuracy):
                outcome += f", test accuracy {last.test_accuracy:.2%}"
        else:
            outcome = f"failed: {type(error).__name__}: {error}"
            if not isinstance(error, (OSError, ValueError)):
                outcome += f"\n{error.__cause__}"
        self._progress.console.print(
            f"{config}: {outcome}", markup=False, highlight=False, soft_wrap=True
        )
        return error is None

    def _skip(self, epochs: int) -> None:
        # Epochs that nobody trains leave the total, or they would pass for speed.
        self._left -= epochs
        self._progress.update(self._all, total=self._left)


@contextmanager
def worker_pool(workers: int) -> Generator[tuple[ProcessPoolExecutor, Reports]]:
    """Keeps worker processes that end when this one does, and at once when it is interrupted."""
    context = multiprocessing.get_context("spawn")
    reports: Reports = context.SimpleQueue()
    threads = max(1, torch.get_num_threads() // workers)
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(workers, context, _start_worker, (reports, threads))
    try:
        yield pool, reports
    except BaseException:
        for child in multiprocessing.active_children():
            if child not in others:
                child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


_reports: "Reports | None" = None
"""Where a worker process reports to; a queue can be handed over only as a process starts."""


def _start_worker(reports: Reports, threads: int) -> None:
    global _reports
    _reports = reports
    torch.set_num_threads(threads)
    # The parent is interrupted too, and ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        # An orphan would go on writing into the files of the next attempt.
        os._exit(1)


def _work(config: Config, collection: Collection, data_root: Path | None, device: str) -> Record:
    def report(epoch: Epoch) -> None:
        if _reports is not None:
            _reports.put((config, epoch.epoch))

    return run(config, collection, data_root=data_root, device=device, on_epoch=report)
