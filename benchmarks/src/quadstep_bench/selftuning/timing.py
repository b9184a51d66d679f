"""Timing: what a step of each entrant takes beside one of AdamW, on each task."""

# Torch is not typed throughout.
# pyright: reportUnknownMemberType=false

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.progress import track

from quadstep_bench.runner.environment import environment
from quadstep_bench.runner.files import Row, read_json, write_json
from quadstep_bench.runner.records import Results
from quadstep_bench.runner.training import take_step
from quadstep_bench.selftuning.entrants import ENTRANTS, Setting
from quadstep_bench.selftuning.problem import Task
from quadstep_bench.selftuning.runs import select_available, select_tasks
from quadstep_bench.selftuning.tasks import TASKS

BASE = "adamw"
"""The setting that times are relative to: a step of it is one of the baseline."""

WARM_UP = 60
"""How many steps are taken before any is timed; LQA measures more often at first."""

ROUND = 20
"""How many steps are timed together: two measurements of the default."""


def path(results: Results) -> Path:
    """The file of the record."""
    return results.root / "bench" / "selftuning-time.json"


def read(results: Results) -> dict[str, dict[str, float]]:
    """Reads the time of a step over that of AdamW's, by setting and task."""
    found: defaultdict[str, dict[str, float]] = defaultdict(dict)
    rows: list[Row] = read_json(path(results))["rows"] if path(results).exists() else []
    for row in rows:
        found[row["setting"]][row["task"]] = row["ratio"]
    return found


def measure(
    results: Results,
    console: Console,
    *,
    tasks: Sequence[str] | None = None,
    confirm: bool = False,
    rounds: int = 7,
    data_root: Path | None = None,
) -> Path:
    """Times the steps of all entrants that are installed, in interleaved rounds.

    Args:
        results: The folder for `bench/selftuning-time.json`. Tasks that it has with all entrants,
            the same environment and number of rounds are kept; all else is measured again.
        console: Where to print.
        tasks: Names of `TASKS`; by default all whose packages are installed.
        confirm: Whether to add the tasks that only confirm a decision, where none are named.
        rounds: How often each entrant is timed on a task.
        data_root: The folder of the data sets.

    Returns:
        The file. Its `rows` hold the median `ratio` of the time of a step to that of `BASE` in the
        same round, for each `task` and `setting`, and the median `milliseconds`.

    Raises:
        ValueError: A task is unknown.
        RecordError: What is there already cannot be read.
        OSError: The file cannot be written.
    """
    torch.set_num_threads(1)
    here = results.remember(environment(threads=1, device="cpu"))
    record: Row = {"environment": here, "rounds": rounds, "rows": []}
    file = path(results)
    present: Row = read_json(file) if file.exists() else record
    rows: list[Row] = present["rows"] if present | {"rows": []} == record else []
    settings = select_available("setting", None, ENTRANTS, console)
    timed = {(row["task"], row["setting"]) for row in rows}
    chosen = [
        name
        for name in select_tasks(tasks, confirm, console)
        if not timed >= {(name, setting) for setting in settings}
    ]
    for name in track(chosen, "tasks", console=console, transient=True):
        rows = [row for row in rows if row["task"] != name]
        times = _time(TASKS[name], {key: ENTRANTS[key] for key in settings}, rounds, data_root)
        rows += [
            {
                "task": name,
                "setting": setting,
                "ratio": median(a / b for a, b in zip(own, times[BASE], strict=True)),
                "milliseconds": 1000.0 * median(own) / ROUND,
            }
            for setting, own in times.items()
        ]
        write_json(record | {"rows": rows}, file)
    return file


def _time(
    task: Task, settings: Mapping[str, Setting], rounds: int, root: Path | None
) -> dict[str, list[float]]:
    """The seconds of each round of each setting."""
    steppers = {name: _steps(task, setting, root) for name, setting in settings.items()}
    for stepper in steppers.values():
        for _ in range(WARM_UP):
            next(stepper)
    times: dict[str, list[float]] = {name: [] for name in settings}
    for _ in range(rounds):
        for name, stepper in steppers.items():
            started = time.perf_counter()
            for _ in range(ROUND):
                next(stepper)
            times[name].append(time.perf_counter() - started)
    return times


def _steps(task: Task, setting: Setting, root: Path | None) -> Iterator[None]:
    """Takes a step of a run each time that it is asked to."""
    torch.manual_seed(0)
    problem = task.build(root)
    optimizer = setting.build(problem.model, task.steps)
    for batch in problem.batches(0):
        drawn = problem.draw(problem.model, batch) if problem.draw else batch
        take_step(optimizer, lambda drawn=drawn: problem.train_loss(drawn))
        yield
