"""Hindsight: a setting beside the best of several others, which only their losses tell."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quadstep_bench.ratios import geometric_mean, ratio


@dataclass(frozen=True)
class Ratios:
    """Losses of a setting over those of another one.

    Attributes:
        by_task: The ratio on each task; inf if the setting has diverged and the other has not.
        mean: Their geometric mean, see `quadstep_bench.ratios.geometric_mean`.
        level: On how many tasks the ratio is at most 1.
    """

    by_task: Mapping[str, float]
    mean: float
    level: int


@dataclass(frozen=True)
class Hindsight:
    """How a subject compares with the best of several candidates.

    Attributes:
        best: The candidate with the lowest loss on each task, known afterwards.
        to_best: The losses of the subject over those of `best`.
        means: Of each candidate the geometric mean of its ratios to `best`.
        single: The candidate for which that mean is lowest.
        to_single: The losses of the subject over those of `single`.
    """

    best: Mapping[str, str]
    to_best: Ratios
    means: Mapping[str, float]
    single: str
    to_single: Ratios


def compare(
    subject: str, candidates: Sequence[str], losses: Mapping[str, Mapping[str, float]]
) -> Hindsight:
    """Compares a subject with the best candidate on each task, and with the best on all together.

    Args:
        subject: Who is compared.
        candidates: With whom; of those that are level the first is the best.
        losses: For each task the loss of each setting; one that is inf or nan has diverged. Tasks
            that lack one of the settings do not count, nor do other settings.

    Raises:
        ValueError: No task has all of the settings.

    Example:
        >>> losses = {"digits": {"measured": 0.2, "low": 0.1, "high": 0.4}}
        >>> found = compare("measured", ["low", "high"], losses)
        >>> found.best, found.to_best.mean
    """
    names = (subject, *candidates)
    known = {
        task: {name: _finite_or_inf(row[name]) for name in names}
        for task, row in losses.items()
        if row.keys() >= set(names)
    }
    if not known:
        raise ValueError(f"losses must have a task with all of {', '.join(names)}: got none")
    best = {task: min(candidates, key=row.__getitem__) for task, row in known.items()}
    means = {
        name: geometric_mean(ratio(row[name], row[best[task]]) for task, row in known.items())
        for name in candidates
    }
    single = min(candidates, key=means.__getitem__)

    def to(others: Mapping[str, str]) -> Ratios:
        ratios = {task: ratio(row[subject], row[others[task]]) for task, row in known.items()}
        level = sum(value <= 1.0 for value in ratios.values())
        return Ratios(ratios, geometric_mean(ratios.values()), level)

    return Hindsight(best, to(best), means, single, to(dict.fromkeys(known, single)))


def _finite_or_inf(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
