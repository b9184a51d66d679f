"""Rules: what it takes for a claim of the paper to hold, in words and as a measurement.

The rule of a claim on a figure is made of parts: each measures one thing on the loss curves and
says which values it accepts, and the claim holds if all are accepted. The words are made from the
numbers that decide.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quadstep_bench.curves import FIGURES, Array, Curve, best, display, gather
from quadstep_bench.optimizers import BASES, COMPETITORS, FAMILIES, RATES
from quadstep_bench.runner.records import Record

SHARE = 0.95
"""The least share of the epochs that counts as throughout."""

SIMILAR = 1.2
"""The largest ratio to the reference loss that counts as similar or comparable."""

UNCONVERGED = 2.0
"""The least ratio to the loss at the family's best rate that counts as a failure to converge."""

UNSTABLE = 0.01
"""The mean relative rise of the loss from one epoch to the next that separates unstable runs."""

COST = 1.10
"""The largest ratio to the base optimizer's own time a step that counts as ignorable."""

NEARLY = 0.9
"""The least share of the greatest possible reduction that counts as nearly the greatest."""

BELOW_ONE = math.nextafter(1.0, 0.0)
ABOVE_ONE = math.nextafter(1.0, 2.0)


class NotRunError(Exception):
    """The evidence does not hold what a claim needs."""


@dataclass(frozen=True)
class Check:
    """One measured quantity, for each subject it was measured on, and the range that decides."""

    name: str
    values: Mapping[str, float]
    low: float = -math.inf
    high: float = math.inf

    @property
    def passed(self) -> bool:
        """Whether every value lies in the range; nan does not."""
        return all(self.low <= value <= self.high for value in self.values.values())

    def __str__(self) -> str:
        """The value that decides: the one furthest out of the range or nearest to its edge."""

        def excess(subject: str) -> float:
            value = self.values[subject]
            return math.inf if math.isnan(value) else max(self.low - value, value - self.high)

        worst = max(self.values, key=excess)
        number = f"{self.values[worst]:.3g}".replace("inf", "∞").replace("nan", "undefined")
        return f"{self.name} {number}" + (f" ({display(worst)})" if len(self.values) > 1 else "")


@dataclass(frozen=True)
class Measurement:
    """What was measured for a claim, and the number of repetitions it rests on."""

    checks: Sequence[Check]
    n: int


@dataclass(frozen=True)
class Evidence:
    """All that claims are decided from.

    Attributes:
        records: The training runs.
        costs: Rows with `model`, `optimizer`, `base` and `ratio`, that of the time a step to the
            base's.
        lines: Rows with `task`, `optimizer` and `ratio`, that of the reduction that the rate gave
            to the greatest along the same line (`None` where there is none).
    """

    records: Sequence[Record]
    costs: Sequence[Mapping[str, Any]] = ()
    lines: Sequence[Mapping[str, Any]] = ()

    def curves(self, task: str) -> dict[str, Curve]:
        """The curves of a task, from the runs that have ended."""
        return gather((run for run in self.records if run.status != "unfinished"), task)


@dataclass(frozen=True)
class Rule:
    """What decides a claim.

    Attributes:
        words: The rule in a sentence.
        measure: Measures for the configuration named, or raises `NotRunError`.
        competitors: Whether it is about the competitors alone.
    """

    words: str
    measure: Callable[[Evidence, str], Measurement]
    competitors: bool = False


# Epochs -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """Some of a run's epochs: in words, and as a slice of the epochs from 1 on, given how many."""

    words: str
    of: Callable[[int], slice]


def first(count: int, *, out_of: int | None = None) -> Window:
    """The first epochs; with `out_of`, in proportion where fewer than those are recorded."""

    def of(epochs: int) -> slice:
        if out_of is not None and epochs < out_of:
            return slice(0, math.ceil(count * epochs / out_of))
        if epochs < count:
            raise NotRunError
        return slice(0, count)

    if out_of is None:
        return Window(f"the first {count} epochs", of)
    return Window(
        f"the first {count} of {out_of} epochs (in proportion where fewer are recorded)", of
    )


def after(epoch: int) -> Window:
    """The epochs after one."""

    def of(epochs: int) -> slice:
        if epochs <= epoch:
            raise NotRunError
        return slice(epoch, None)

    return Window(f"the epochs after {epoch}", of)


def only(epoch: int) -> Window:
    """One epoch."""
    return Window(f"epoch {epoch}", lambda epochs: slice(after(epoch - 1).of(epochs).start, epoch))


EVERY = Window("the epochs from 1 on", lambda epochs: slice(0, epochs))
LAST_QUARTER = Window(
    "the last quarter of the epochs", lambda epochs: slice(epochs - math.ceil(epochs / 4), epochs)
)


# Parts of a rule on loss curves -------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One thing measured on LQA's curve and on the curves it is compared with."""

    words: str
    check: Callable[[Curve, Sequence[Curve]], Check]


def below(window: Window) -> Part:
    """LQA's loss is lower all along."""

    def share(ours: Array, theirs: Array) -> float:
        return float(np.mean(ours < theirs))

    return Part(
        f"LQA's loss is lower at {SHARE:.0%} or more of {window.words}",
        lambda ours, others: Check("share", _compare(share, window, ours, others), low=SHARE),
    )


def similar(window: Window) -> Part:
    """LQA's loss is about the other's, or lower."""

    def ratio(ours: Array, theirs: Array) -> float:
        # A median alone would pass over a run that diverges near its end.
        return float(np.median(_divide(ours, theirs))) if np.isfinite(ours).all() else math.inf

    return Part(
        f"the median ratio of LQA's loss to the other's over {window.words} is at most {SIMILAR}",
        lambda ours, others: Check("similar", _compare(ratio, window, ours, others), high=SIMILAR),
    )


def lower(window: Window) -> Part:
    """LQA's loss is lower on average."""

    def ratio(ours: Array, theirs: Array) -> float:
        return float(_divide(ours.mean(), theirs.mean()))

    return Part(
        f"LQA's mean loss over {window.words} is strictly lower",
        lambda ours, others: Check("lower", _compare(ratio, window, ours, others), high=BELOW_ONE),
    )


def at(epoch: int, level: float) -> Part:
    """LQA's loss at an epoch is about a level, or lower."""
    high = level * SIMILAR
    return Part(
        f"LQA's loss at epoch {epoch} is at most {high:g}",
        lambda ours, _: Check("loss", {ours.optimizer: _loss(ours, epoch)}, high=high),
    )


def within(epochs: int, level: float) -> Part:
    """LQA comes down to a level soon enough."""
    return Part(
        f"LQA's loss is at most {level} at some epoch up to {epochs}",
        lambda ours, _: Check(
            "epoch", {ours.optimizer: _reached(ours, level, by=epochs)}, high=epochs
        ),
    )


def unstable() -> Part:
    """The others' losses keep rising between epochs."""
    return Part(
        f"the others' losses rise by at least {UNSTABLE:.0%} an epoch on average",
        lambda _, others: Check(
            "rise", {curve.optimizer: _rise(curve) for curve in others}, low=UNSTABLE
        ),
    )


def smooth_late() -> Part:
    """LQA's loss ends up smooth."""
    return Part(
        f"LQA's loss rises by at most {UNSTABLE:.0%} an epoch on average in the second half",
        lambda ours, _: Check("late rise", {ours.optimizer: _rise(ours, 0.5)}, high=UNSTABLE),
    )


def calmer_late() -> Part:
    """LQA's loss is no less smooth in the second half than in the first."""

    def check(ours: Curve, _: Sequence[Curve]) -> Check:
        change = _rise(ours, 0.5, 1.0) - _rise(ours, 0.0, 0.5)
        return Check("change of rise", {ours.optimizer: change}, high=0.0)

    return Part(
        "LQA's loss rises by no more an epoch on average in the second half than in the first",
        check,
    )


# Rules --------------------------------------------------------------------------------------------


def against(task: str, others: Sequence[str], *parts: Part) -> Rule:
    """Compares LQA on a task with settings (`sgd-0.1`) or families at their best rates (`sgd`)."""

    def measure(evidence: Evidence, configuration: str) -> Measurement:
        curves = evidence.curves(task)
        ours = _need(curves, configuration)
        theirs = [
            _entrant(curves, name) if name in FAMILIES else _need(curves, name) for name in others
        ]
        return Measurement([part.check(ours, theirs) for part in parts], _seeds([ours, *theirs]))

    words = " and ".join(part.words for part in parts)
    if others:
        names = _listed([display(name) for name in others])
        rate = " at its best rate" if not FAMILIES.keys().isdisjoint(others) else ""
        words = f"against {names}{rate}: {words}"
    return Rule(f"{words[0].upper()}{words[1:]}.", measure)


def best_rates(task: str, expected: Mapping[float, Sequence[str]]) -> Rule:
    """The best rate of each family is the one that the paper finds."""

    def measure(evidence: Evidence, configuration: str) -> Measurement:
        curves = evidence.curves(task)
        found = {
            family: (rate, _best(curves, family))
            for rate, families in expected.items()
            for family in families
        }
        checks = [
            Check(FAMILIES[family], {"best rate": COMPETITORS[curve.optimizer].rate}, rate, rate)
            for family, (rate, curve) in found.items()
        ]
        return Measurement(checks, _seeds(curve for _, curve in found.values()))

    return Rule(
        "In every family the rate with the lowest mean loss over the last quarter of the epochs is "
        "the paper's.",
        measure,
        competitors=True,
    )


def unconverged(task: str, rate: float, families: Sequence[str]) -> Rule:
    """Families can fail to converge at a rate."""

    def measure(evidence: Evidence, configuration: str) -> Measurement:
        curves = evidence.curves(task)
        runs = [_need(curves, f"{family}-{rate}") for family in families]
        bests = [_best(curves, family) for family in families]
        ratios = {
            run.optimizer: float(_divide(run.tail(), least.tail()))
            for run, least in zip(runs, bests, strict=True)
        }
        return Measurement([Check("ratio", ratios, low=UNCONVERGED)], _seeds([*runs, *bests]))

    return Rule(
        f"For each, the mean loss over the last quarter of the epochs is at least {UNCONVERGED:g} "
        "times that of the family's best rate, or the run diverges.",
        measure,
        competitors=True,
    )


def takes(task: str, optimizer: str, epochs: int, level: float) -> Rule:
    """A competitor needs about so many epochs to come down to a level."""
    low, high = round(epochs * (2 - SIMILAR)), round(epochs * SIMILAR)

    def measure(evidence: Evidence, configuration: str) -> Measurement:
        curve = _need(evidence.curves(task), optimizer)
        check = Check("epoch", {optimizer: _reached(curve, level, by=high)}, low, high)
        return Measurement([check], _seeds([curve]))

    return Rule(
        f"The loss of {display(optimizer)} first is at most {level} between epochs {low} and "
        f"{high} ({epochs} within 20%).",
        measure,
        competitors=True,
    )


def costs() -> Rule:
    """Finding the rate costs next to nothing."""

    def measure(evidence: Evidence, configuration: str) -> Measurement:
        ratios = {
            str(row["model"]): float(row["ratio"])
            for row in evidence.costs
            if row["optimizer"] == configuration and row["base"] == BASES.get(configuration)
        }
        if not ratios:
            raise NotRunError
        return Measurement([Check("time ratio", ratios, high=COST)], len(ratios))

    return Rule(
        f"On every model measured a step takes at most {COST:.2f} times as long as the base "
        "optimizer's own, which is SGD for lqa-paper and lqa and AdamW for lqa-auto (n is the "
        "number of models).",
        measure,
    )


def falling_rates() -> Rule:
    """Rates are larger early than late."""

    def measure(evidence: Evidence, configuration: str) -> Measurement:
        curves = {
            task: found[configuration]
            for task in FIGURES.values()
            if configuration in (found := evidence.curves(task))
        }
        if not curves:
            raise NotRunError
        ratios = {task: fall(curve) for task, curve in curves.items()}
        return Measurement(
            [Check("early over late", ratios, low=ABOVE_ONE)], _seeds(curves.values())
        )

    def fall(curve: Curve) -> float:
        if any(run.status == "diverged" for run in curve.runs):
            return math.nan
        rates = curve.rates("median")
        tenth = math.ceil(len(rates) / 10)
        return float(_divide(np.median(rates[:tenth]), np.median(rates[-tenth:])))

    return Rule(
        "In every task recorded no run diverges and the median rate of the first tenth of the "
        "epochs over that of the last tenth is above 1.",
        measure,
    )


def nearly_greatest() -> Rule:
    """The rate gives nearly the greatest reduction along its direction."""

    def measure(evidence: Evidence, configuration: str) -> Measurement:
        ratios: defaultdict[str, list[float]] = defaultdict(list)
        for row in evidence.lines:
            if row["optimizer"] == configuration and row["ratio"] is not None:
                ratios[str(row["task"])].append(float(row["ratio"]))
        if not ratios:
            raise NotRunError

        def quantiles(level: float) -> dict[str, float]:
            # The lowest median first: that is the model to be shown.
            tasks = sorted(ratios, key=lambda task: np.median(ratios[task]))
            return {task: float(np.quantile(ratios[task], level)) for task in tasks}

        checks = [
            Check("reduction", quantiles(0.5), low=NEARLY),
            Check("10% quantile", quantiles(0.1)),
            Check("90% quantile", quantiles(0.9)),
        ]
        return Measurement(checks, min(map(len, ratios.values())))

    return Rule(
        "On every model measured the median over steps of (l(0) - l(rate)) / (l(0) - min l), the "
        f"minimum found by a fine search, is at least {NEARLY} (n is the fewest steps of a model).",
        measure,
    )


def share(reduction: float, greatest: float) -> float | None:
    """The share that a reduction has of the greatest; `None` where there is none to be had."""
    return reduction / greatest if greatest > 0.0 else None


# Arithmetic ---------------------------------------------------------------------------------------


def _need(curves: Mapping[str, Curve], optimizer: str) -> Curve:
    if optimizer not in curves:
        raise NotRunError
    return curves[optimizer]


def _best(curves: Mapping[str, Curve], family: str) -> Curve:
    return best(_need(curves, f"{family}-{rate}") for rate in RATES)


def _entrant(curves: Mapping[str, Curve], family: str) -> Curve:
    """The curve of a family that LQA is compared with: that of its best rate.

    On the full training set all rates are to be there; on a part of it one that was chosen
    elsewhere is enough.
    """
    rivals = [name for name, row in COMPETITORS.items() if row.family == family]
    recorded = [curves[name] for name in rivals if name in curves]
    # The curves of a task rest on one training set.
    part = any(curve.runs[0].config.subset for curve in recorded)
    return best(recorded) if part else _best(curves, family)


def _seeds(curves: Iterable[Curve]) -> int:
    return min(len(curve.runs) for curve in curves)


def _compare(
    statistic: Callable[[Array, Array], float],
    window: Window,
    ours: Curve,
    others: Sequence[Curve],
) -> dict[str, float]:
    """Applies a statistic to LQA's losses and each other's in the epochs that both have."""

    def value(other: Curve) -> float:
        mine, theirs = ours.trained, other.trained
        epochs = window.of(min(len(mine), len(theirs)))
        return statistic(mine[epochs], theirs[epochs])

    return {other.optimizer: value(other) for other in others}


def _loss(curve: Curve, epoch: int) -> float:
    losses = curve.trained
    return float(losses[only(epoch).of(len(losses))][0])


def _reached(curve: Curve, level: float, *, by: int) -> float:
    """The first epoch with a loss of at most `level`; inf if there is none up to epoch `by`."""
    reached = np.flatnonzero(curve.trained <= level)
    if len(reached):
        return float(reached[0] + 1)
    if curve.length < by:
        raise NotRunError
    return math.inf


def _rise(curve: Curve, start: float = 0.0, stop: float = 1.0) -> float:
    """The mean relative rise of the loss an epoch, between two fractions of the run."""

    def rise(losses: Array) -> float:
        if not np.isfinite(losses).all():
            return math.inf
        return float(np.maximum(_divide(losses[1:], losses[:-1]) - 1, 0).mean())

    epochs = curve.length
    part = slice(math.floor(start * epochs), math.ceil(stop * epochs))
    if part.stop - part.start < 2:
        raise NotRunError
    return float(np.median([rise(row[1:][part]) for row in curve.losses]))


def _divide(numerator: Array | float, denominator: Array | float) -> Array:
    """Divides as IEEE 754 has it: inf over inf is nan, which passes no check."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.divide(numerator, denominator)


def _listed(names: Sequence[str]) -> str:
    *rest, last = names
    return f"each of {', '.join(rest)} and {last}" if rest else last
