"""Scores: how the entrants compare with the tuned baseline, from the records of their runs."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from quadstep_bench.ratios import CAP, FLOOR
from quadstep_bench.runner.files import RecordError, Row, number
from quadstep_bench.selftuning.problem import GROUPS
from quadstep_bench.selftuning.runs import TRIAL_SEED, Run, winner
from quadstep_bench.selftuning.tasks import TASKS

Array = NDArray[np.float64]

Measure = Literal["validation_loss", "validation_error", "train_loss"]

Clock = Literal["passes", "steps"]

FLOORS: Mapping[str, float] = {"train_loss": FLOOR, "loss": 1e-7, "error": 2e-3}
"""Lower values count as these: training losses that fit the data, held-out losses where rounding
decides, and errors of half an example of 250."""

MEASURES: Mapping[Measure, str] = {
    "validation_loss": "loss",
    "validation_error": "error",
    "train_loss": "train_loss",
}
"""What is compared, in the order of its weight, and which of `FLOORS` it has."""

EARLIEST = 0.01
"""A target that is reached earlier, in budgets, counts as reached then."""

HORIZON = 4.0
"""The time up to which the performance profile is integrated, in budgets of the baseline."""

RESAMPLES = 1000
"""How often tasks and seeds are drawn anew for an interval."""


@dataclass(frozen=True)
class Runs:
    """The runs of a setting on a task, one a seed."""

    rows: tuple[Row, ...]

    def final(self, measure: str) -> Array:
        """What each ends with; infinite where it has diverged."""
        return self._values(measure)[:, -1]

    def best(self, measure: str) -> Array:
        """The lowest value of each after any evaluation."""
        return self._values(measure)[:, 1:].min(axis=1)

    def test(self, what: Literal["final", "best"], kind: Literal["loss", "error"]) -> Array:
        """The test loss or error of each, at the end or where its validation loss was lowest."""
        values = [number(row["test"][what][kind == "error"]) for row in self.rows]
        lost = [row["status"] == "diverged" and what == "final" for row in self.rows]
        return np.where(lost, math.inf, np.array(values))

    def time(self, measure: str, target: float, clock: Clock) -> Array:
        """When each comes down to a target, interpolated between evaluations; infinite if never."""
        found: list[float] = []
        for row, values in zip(self.rows, self._values(measure), strict=True):
            times = elapsed(row, clock)
            below = np.flatnonzero(values <= target)
            if not len(below):
                found.append(math.inf)
                continue
            first = int(below[0])
            if first == 0:
                found.append(0.0)
                continue
            before, after = values[first - 1], values[first]
            share = (before - target) / (before - after) if math.isfinite(before) else 1.0
            found.append(times[first - 1] + share * (times[first] - times[first - 1]))
        return np.array(found)

    def total(self, clock: Clock) -> Array:
        """The time that each takes in all."""
        return np.array([elapsed(row, clock)[-1] for row in self.rows])

    def _values(self, measure: str) -> Array:
        """A row a run, infinite from where it diverged on; nan where a task has no error."""
        length = max(len(row[measure]) for row in self.rows)
        values = np.full((len(self.rows), length), math.inf)
        for index, row in enumerate(self.rows):
            values[index, : len(row[measure])] = [number(value) for value in row[measure]]
            if row["status"] == "diverged":
                values[index, len(row[measure]) - 1 :] = math.inf
        return values


def elapsed(row: Row, clock: Clock) -> Array:
    """The time at each evaluation of a run: steps, or forward passes; a backward one is two."""
    if clock == "steps":
        return np.array(row["step"], dtype=float)
    return np.array(row["forwards"], dtype=float) + 2.0 * np.array(row["backwards"], dtype=float)


@dataclass(frozen=True)
class TaskScores:
    """The runs of a task beside those of its baseline.

    Attributes:
        task: Its name.
        trial: The setting that won the baseline's trials.
        baseline: Its reruns.
        runs: Those of each setting recorded.
    """

    task: str
    trial: str
    baseline: Runs
    runs: Mapping[str, Runs]

    def target(self, measure: Measure) -> float:
        """The median over the reruns of the baseline of the lowest value of each."""
        return float(np.median(self.baseline.best(measure)))

    def budget(self, clock: Clock) -> float:
        """The time that a run of the baseline takes."""
        return float(np.median(self.baseline.total(clock)))


def gather(records: Mapping[Run, Row]) -> list[TaskScores]:
    """Sorts records by task, those of tasks whose baseline is recorded.

    Raises:
        RecordError: Runs of one task were trained on different data.
    """
    found: list[TaskScores] = []
    for task in sorted(TASKS, key=lambda name: GROUPS.index(TASKS[name].group)):
        trial = winner(records, task)
        own = {run: row for run, row in records.items() if run.task == task}
        digests = {row["data"] for row in own.values()}
        if len(digests) > 1:
            raise RecordError(
                f"the records of {task} rest on different data, {', '.join(sorted(digests))}: "
                "delete those of one to run them again"
            )
        by_setting = {
            setting: Runs(tuple(own[run] for run in sorted(own) if run.setting == setting))
            for setting in dict.fromkeys(run.setting for run in own)
        }
        if trial is None:
            continue
        # The trial itself has a separate seed, and was chosen by its result.
        reruns = tuple(row for run, row in sorted(own.items()) if _is_rerun(run, trial))
        if reruns:
            found.append(TaskScores(task, trial, Runs(reruns), by_setting))
    return found


def _is_rerun(run: Run, trial: str) -> bool:
    return run.setting == trial and run.seed != TRIAL_SEED


@dataclass(frozen=True)
class Estimate:
    """A number, and the interval that holds 95% of those of the resamples."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.value):
            return ""
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"


@dataclass(frozen=True)
class Score:
    """How an entrant does on some tasks by one measure, relative to the baseline.

    Attributes:
        tasks: How many tasks have the measure.
        reached: How many targets it reaches, in the median run.
        profile: The performance profile, integrated from 0 to `HORIZON` and divided by that.
        speed_up: The geometric mean of the baseline's time to its target over the entrant's; one
            that is not reached counts as `HORIZON` budgets.
        final: The geometric mean of the last values over those of the baseline.
        best: The same of the lowest values of each run.
    """

    tasks: int
    reached: Estimate
    profile: Estimate
    speed_up: Estimate
    final: Estimate
    best: Estimate


@dataclass(frozen=True)
class Comparison:
    """An entrant beside the baseline, on tasks that it is recorded on.

    Attributes:
        setting: The entrant.
        scores: The tasks.
    """

    setting: str
    scores: Sequence[TaskScores]

    def score(self, measure: Measure, step_times: Mapping[str, float] | None = None) -> Score:
        """Scores it by a measure, with intervals.

        Args:
            measure: What is compared.
            step_times: The time of its step over that of the baseline's on each task, to score by
                wall-clock; without them passes are counted.
        """
        clock = "passes" if step_times is None else "steps"
        scores = [each for each in self.scores if math.isfinite(each.target(measure))]
        resampling = _Resampling(len(scores))
        times: list[Array] = []
        baseline_times: list[Array] = []
        ratios: dict[str, list[Array]] = {"final": [], "best": []}
        for index, each in enumerate(scores):
            runs, baseline = each.runs[self.setting], each.baseline
            draw = partial(resampling.draw, index)
            draw_baseline = partial(draw, is_baseline=True)
            targets, budget = draw_baseline(baseline.best(measure)), each.budget(clock)
            step_time = 1.0 if step_times is None else step_times[each.task]
            time = _times(runs, targets, measure, clock, draw) / budget
            times.append(step_time * time)
            baseline_times.append(_times(baseline, targets, measure, clock, draw_baseline) / budget)
            for what, value in (("final", Runs.final), ("best", Runs.best)):
                values, others = draw(value(runs, measure)), draw_baseline(value(baseline, measure))
                ratios[what].append(log_ratio(values, others, MEASURES[measure]))
        reached = np.isfinite(np.array(times)) * float(len(scores))
        time, other = (
            np.clip(np.array(found), EARLIEST, HORIZON) for found in (times, baseline_times)
        )
        speed = np.log(other / time)
        return Score(
            len(scores),
            resampling.estimate(reached),
            resampling.estimate(1.0 - time / HORIZON),
            resampling.estimate(speed, np.exp),
            resampling.estimate(np.array(ratios["final"]), np.exp),
            resampling.estimate(np.array(ratios["best"]), np.exp),
        )

    def times(self, measure: Measure) -> Array:
        """When the median run reaches each target, in budgets; infinite if never."""
        return np.array(
            [
                np.median(each.runs[self.setting].time(measure, each.target(measure), "passes"))
                / each.budget("passes")
                for each in self.scores
                if math.isfinite(each.target(measure))
            ]
        )

    def test(self, what: Literal["final", "best"], kind: Literal["loss", "error"]) -> Estimate:
        """The geometric mean of test losses or errors over those of the baseline."""
        pairs = [
            (each.runs[self.setting].test(what, kind), each.baseline.test(what, kind))
            for each in self.scores
        ]
        pairs = [(values, others) for values, others in pairs if not np.isnan(others).any()]
        resampling = _Resampling(len(pairs))
        logs = [
            log_ratio(
                resampling.draw(i, values), resampling.draw(i, others, is_baseline=True), kind
            )
            for i, (values, others) in enumerate(pairs)
        ]
        return resampling.estimate(np.array(logs), np.exp)

    def passes(self) -> float:
        """The geometric mean of the passes of a run over those of the baseline."""
        ratios = [
            np.median(each.runs[self.setting].total("passes")) / each.budget("passes")
            for each in self.scores
        ]
        return float(np.exp(np.mean(np.log(ratios))))


def _times(
    runs: Runs, targets: Array, measure: Measure, clock: Clock, draw: Callable[[Array], Array]
) -> Array:
    """The median time to the target of each resample."""
    found = np.empty_like(targets)
    # The median of three runs is one of them: few targets differ.
    for target in np.unique(targets):
        at = targets == target
        found[at] = draw(runs.time(measure, float(target), clock))[at]
    return found


def compare(scores: Sequence[TaskScores], settings: Iterable[str]) -> dict[str, Comparison]:
    """Compares the settings that have as many runs as the baseline on all of the tasks."""

    def is_complete(name: str, each: TaskScores) -> bool:
        return name in each.runs and len(each.runs[name].rows) >= len(each.baseline.rows)

    return {
        name: Comparison(name, scores)
        for name in settings
        if scores and all(is_complete(name, each) for each in scores)
    }


def log_ratio(values: Array, others: Array, kind: str) -> Array:
    """The logarithms of ratios, with floors and caps; two runs that diverged are level."""
    floor = FLOORS[kind]
    # What overflowed is recorded as no number.
    first, second = (
        np.nan_to_num(each, nan=math.inf, posinf=math.inf) for each in (values, others)
    )
    with np.errstate(invalid="ignore"):
        logs = np.log(np.maximum(first, floor)) - np.log(np.maximum(second, floor))
    return np.clip(np.nan_to_num(logs, nan=0.0), -math.log(CAP), math.log(CAP))


class _Resampling:
    """Draws tasks and seeds with replacement, always the same ones; the first draw is all."""

    def __init__(self, tasks: int) -> None:
        self._tasks = tasks
        if tasks:
            counts = np.random.default_rng(0).multinomial(tasks, [1 / tasks] * tasks, RESAMPLES)
            self._weights = np.concatenate([np.ones((1, tasks)), counts]) / tasks

    def draw(self, task: int, values: Array, is_baseline: bool = False) -> Array:
        """The median over the seeds of a task, in each resample."""
        # The same seeds for all that is measured of the same runs.
        dice = np.random.default_rng([task, is_baseline])
        chosen = dice.integers(len(values), size=(RESAMPLES, len(values)))
        return np.concatenate([[np.median(values)], np.median(values[chosen], axis=1)])

    def estimate(self, values: Array, transform: Callable[[Array], Array] = np.asarray) -> Estimate:
        """The mean over the tasks, given a row a task."""
        if not self._tasks:
            return Estimate(math.nan, math.nan, math.nan)
        means = transform((self._weights * values.T).sum(axis=1))
        low, high = np.quantile(means[1:], [0.025, 0.975])
        return Estimate(float(means[0]), float(low), float(high))
