"""Runs: a task trained with a setting, its record, and all that are missing, several at a time."""

# Torch is not typed throughout.
# pyright: reportUnknownMemberType=false

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.optim import Optimizer

from quadstep import LQA
from quadstep_bench.optimizers.peers import Peer
from quadstep_bench.runner.environment import environment, key, version
from quadstep_bench.runner.files import Row, damaged, number, read_rows
from quadstep_bench.runner.parallel import worker_pool
from quadstep_bench.runner.records import Results
from quadstep_bench.runner.training import passes_of, take_step
from quadstep_bench.selftuning.entrants import (
    BASELINE,
    CONSTANTS,
    ENTRANTS,
    SETTINGS,
    Setting,
    constant,
)
from quadstep_bench.selftuning.problem import GROUPS, Columns, Problem, Task, check_task
from quadstep_bench.selftuning.tasks import TASKS
from quadstep_bench.tasks import check_name

EVALUATIONS = 12
"""How often a run is evaluated, at equal distances, beside the evaluation before its first step."""

SEEDS = 3
"""How many runs an entrant has on a task, and the winner of the baseline's trials."""

TRIAL_SEED = 100
"""The seed of the trials, which no run that is compared has."""

DIGITS = 6
"""With how many digits a loss is recorded."""

MEASURED = ("train_loss", "validation_loss", "validation_error")
"""What is recorded of each evaluation; test losses and errors are recorded twice a run."""


@dataclass(frozen=True, order=True)
class Run:
    """What determines a run.

    Attributes:
        task: A name of `TASKS`.
        setting: A name of `SETTINGS`.
        seed: Determines the first weights and the order of the batches.
    """

    task: str
    setting: str
    seed: int

    def __str__(self) -> str:
        return f"{self.task} {self.setting} seed {self.seed}"


def entrant_runs(tasks: Sequence[str], settings: Sequence[str], seeds: int = SEEDS) -> list[Run]:
    """Lists the runs of settings, all for one seed before the next seed.

    Those of a task come together: what else the machine does then slows all settings equally.
    """
    return [Run(task, name, seed) for seed in range(seeds) for task in tasks for name in settings]


def trial_runs(tasks: Sequence[str]) -> list[Run]:
    """Lists the runs of the baseline's trials."""
    return [Run(task, name, TRIAL_SEED) for task in tasks for name in BASELINE]


@dataclass(frozen=True)
class Records:
    """The records of all runs, a file a group of tasks."""

    results: Results

    def path(self, group: str) -> Path:
        """The file of a group of tasks."""
        return self.results.root / "selftuning" / f"{group.replace(' ', '-')}.jsonl"

    def read(self) -> dict[Run, Row]:
        """Reads the records of the tasks at their present lengths.

        Raises:
            RecordError: A file holds something else; names the line and how to fix it.
        """
        found: dict[Run, Row] = {}
        for group in GROUPS:
            path = self.path(group)
            for line, row in enumerate(read_rows(path), start=1):
                try:
                    run, steps = Run(*_identify(row)), row["steps"]
                    # `winner` needs a final loss.
                    final(row)
                    if steps == TASKS[run.task].steps and run.setting in SETTINGS:
                        found[run] = row
                except (KeyError, TypeError) as error:
                    raise damaged(path, line, error) from error
        return found

    def add(self, row: Row, environment: Row) -> None:
        """Adds the record of a run that has ended."""
        path = self.path(TASKS[row["task"]].group)
        self.results.merge(row, path, [environment], _identify)


def _identify(row: Row) -> tuple[Any, ...]:
    return row["task"], row["setting"], row["seed"]


def winner(records: Mapping[Run, Row], task: str) -> str | None:
    """The trial with the lowest final validation loss; `None` before all have ended."""
    runs = {name: records.get(Run(task, name, TRIAL_SEED)) for name in BASELINE}
    losses = {name: final(row) for name, row in runs.items() if row is not None}
    return min(sorted(losses), key=losses.__getitem__) if len(losses) == len(BASELINE) else None


def final(row: Row, name: str = "validation_loss") -> float:
    """The last value of a run, infinite where it has diverged."""
    value = number(row[name][-1])
    return value if math.isfinite(value) and row["status"] == "finished" else math.inf


def execute(
    results: Results,
    console: Console,
    *,
    tasks: Sequence[str] | None = None,
    settings: Sequence[str] | None = None,
    confirm: bool = False,
    seeds: int = SEEDS,
    workers: int = 1,
    data_root: Path | None = None,
) -> int:
    """Trains the runs that are missing.

    First come the settings and the baseline's trials, then reruns of the winners. Whatever ends
    this early, the next call goes on with the runs that have no record.

    Args:
        results: The folder for the records.
        console: Where to print.
        tasks: Names of `TASKS`; by default all whose packages are installed.
        confirm: Whether to add the tasks that only confirm a decision, where none are named.
        settings: Names of `ENTRANTS` and `CONSTANTS`, or "baseline" for the trials and reruns; all
            that can be had by default.
        seeds: How many runs of each setting.
        workers: How many to train at a time.
        data_root: The folder of the data sets.

    Returns:
        How many runs failed.

    Raises:
        ValueError: A name is unknown, or a package named is not installed.
    """
    records = Records(results)
    others = {name: SETTINGS[name] for name in (*ENTRANTS, *CONSTANTS)}
    for name in settings or ():
        check_name("setting", name, (*others, "baseline"))
    chosen = select_tasks(tasks, confirm, console)
    named = None if settings is None else [name for name in settings if name != "baseline"]
    compared = select_available("setting", named, others, console)
    wanted = entrant_runs(chosen, compared, seeds)
    if settings is None or "baseline" in settings:
        wanted += trial_runs(chosen)
    failures = _train(wanted, records, console, workers, data_root)
    if settings is None or "baseline" in settings:
        found = records.read()
        winners = {task: winner(found, task) for task in chosen}
        reruns = [
            Run(task, name, seed)
            for task, name in winners.items()
            if name is not None
            for seed in range(seeds)
        ]
        failures += _train(reruns, records, console, workers, data_root)
    return failures


def select_tasks(names: Sequence[str] | None, confirm: bool, console: Console) -> list[str]:
    """The tasks that are named, or all whose packages are installed, to confirm a decision or not.

    Raises:
        ValueError: A name is unknown, or a package that it needs is not installed.
    """
    for name in names or ():
        check_task(name)
    known = {name: task for name, task in TASKS.items() if names or confirm or not task.confirm}
    return select_available("task", names, known, console)


def select_available(
    what: str,
    names: Sequence[str] | None,
    known: Mapping[str, Task] | Mapping[str, Setting],
    console: Console,
) -> list[str]:
    """The names asked for, or all whose packages are installed, with a message on the others."""
    missing = {
        name: [package for package in known[name].needs if version(package) is None]
        for name in (known if names is None else names)
    }
    absent = {name: packages for name, packages in missing.items() if packages}
    for name, packages in absent.items():
        text = f"{what} {name} needs {', '.join(packages)}, {_INSTALL}"
        if names is not None:
            raise ValueError(text)
        console.print(f"skipped: {text}", markup=False, highlight=False, soft_wrap=True)
    return [name for name in missing if name not in absent]


_INSTALL = 'which is not installed: run pip install "quadstep-bench[peers,pretrained]"'


# Training -----------------------------------------------------------------------------------------


def _train(
    wanted: Iterable[Run], records: Records, console: Console, workers: int, root: Path | None
) -> int:
    """Trains the runs that have no record, and returns how many failed."""
    found = records.read()
    todo = [run for run in dict.fromkeys(wanted) if run not in found]
    if not todo:
        return 0
    # Here first, where an error stops everything at once; the workers find all that is cached.
    for task in {run.task for run in todo}:
        TASKS[task].build(root)
    failures = 0
    with (
        Progress(console=console, transient=True, speed_estimate_period=3600) as progress,
        worker_pool(workers) as (pool, _),
    ):
        bar = progress.add_task("runs", total=len(todo))
        pending = {pool.submit(_work, run, records, root): run for run in todo}
        for future in as_completed(pending):
            progress.advance(bar)
            error = future.exception()
            if error is not None:
                failures += 1
                line = f"{pending[future]} failed: {type(error).__name__}: {error}"
                console.print(line, markup=False, highlight=False, soft_wrap=True)
    return failures


def _work(run: Run, records: Records, root: Path | None) -> None:
    packages = (*TASKS[run.task].needs, *SETTINGS[run.setting].needs)
    here = environment(threads=torch.get_num_threads(), device="cpu", packages=packages)
    row = train(run, root)
    records.add(row | {"environment": key(here)}, here)


def train(run: Run, root: Path | None = None) -> Row:
    """Trains a run and returns its record, all but the environment.

    Args:
        run: The run.
        root: The folder of the data sets, see `quadstep_bench.tasks.data.load`.
    """
    torch.manual_seed(run.seed)
    task, setting = TASKS[run.task], SETTINGS[run.setting]
    problem = task.build(root)
    optimizer = setting.build(problem.model, task.steps)
    rates = [group["lr"] for group in optimizer.param_groups]
    progress = _Progress(problem, optimizer)
    progress.evaluate(0)
    at = {round(task.steps * share / EVALUATIONS) for share in range(1, EVALUATIONS + 1)}
    for step, batch in enumerate(islice(problem.batches(run.seed), task.steps), start=1):
        if setting.schedule is not constant:
            # In the middle of the step, so that neither the first nor the last is lost.
            factor = setting.schedule((step - 0.5) / task.steps)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = factor * rate
        progress.step(batch)
        if step in at:
            progress.evaluate(step)
            if progress.is_lost:
                break
    return {
        "task": run.task,
        "setting": run.setting,
        "seed": run.seed,
        "steps": task.steps,
        "status": "diverged" if progress.is_lost else "finished",
        "data": problem.digest(),
        **progress.columns,
        "test": progress.test(),
    }


class _Progress:
    """A run between two steps, and what it has recorded."""

    def __init__(self, problem: Problem, optimizer: Optimizer | Peer) -> None:
        self.problem = problem
        self.optimizer = optimizer
        self.columns: defaultdict[str, list[float]] = defaultdict(list)
        self._seconds, self._forwards, self._backwards = 0.0, 0, 0
        self._best_loss = math.inf
        self._best: dict[str, Tensor] = {}
        self._last: dict[str, Tensor] = {}

    @property
    def is_lost(self) -> bool:
        """Whether a loss is not a finite number any more."""
        return not all(math.isfinite(self.columns[name][-1]) for name in MEASURED[:2])

    def step(self, batch: Columns) -> None:
        """Takes a step."""
        started = time.perf_counter()
        if self.problem.draw is not None:
            batch = self.problem.draw(self.problem.model, batch)
        take_step(self.optimizer, lambda: self.problem.train_loss(batch))
        forwards, backwards = passes_of(self.optimizer)
        self._forwards += forwards
        self._backwards += backwards
        self._seconds += time.perf_counter() - started

    def evaluate(self, step: int) -> None:
        """Records the losses after a step, and keeps the weights if none were better."""
        model = self.problem.model
        if isinstance(self.optimizer, (LQA, Peer)):
            self.optimizer.eval()
        model.eval()
        train_loss, _ = self.problem.evaluate("train")
        loss, error = self.problem.evaluate("validation")
        self._last = {name: value.clone() for name, value in model.state_dict().items()}
        if loss < self._best_loss or not self._best:
            self._best_loss, self._best = loss, self._last
        model.train()
        if isinstance(self.optimizer, (LQA, Peer)):
            self.optimizer.train()
        values = (train_loss, loss, error)
        for name, value in zip(MEASURED, values, strict=True):
            self.columns[name].append(_rounded(value))
        self.columns["step"].append(step)
        self.columns["forwards"].append(self._forwards)
        self.columns["backwards"].append(self._backwards)
        self.columns["seconds"].append(round(self._seconds, 4))

    def test(self) -> dict[str, tuple[float, float]]:
        """The test loss and error at the end, and where the validation loss was lowest."""
        model = self.problem.model
        model.eval()
        found: dict[str, tuple[float, float]] = {}
        for name, weights in (("final", self._last), ("best", self._best)):
            model.load_state_dict(weights)
            loss, error = self.problem.evaluate("test")
            found[name] = _rounded(loss), _rounded(error)
        return found


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
