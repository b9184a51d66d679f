"""The parabola through losses on a line, its minimiser, and the rate that may be trusted.

Scalar mathematics on Python floats (float64): nothing here knows of parameters, models or devices.
Equation numbers are those of Zhu et al., "Automatic, Dynamic, and Nearly Optimal Learning Rate
Specification by Local Quadratic Approximation" (CIKM 2020).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, ClassVar

SMALLEST_RATE = 1e-30
LARGEST_RATE = 1e30

OVERFLOW = 3.4e38
"""Beyond this a rate is not finite in single precision."""


class Reason(StrEnum):
    """Why the rate of a step is what it is."""

    INITIAL = "initial"
    """No step was taken yet: the rate is the first one, or that of the state that was loaded."""
    MINIMUM = "minimum"
    """The rate is the minimiser of the parabola."""
    HELD = "held"
    """The step was not measured, not being due or all gradients being zero: the rate stays."""
    GROWN = "grown"
    """The minimiser lies beyond the growth limit, the rate went up to the limit."""
    SHRUNK = "shrunk"
    """The minimiser lies below the shrink limit, or promises were broken: the rate went down."""
    CONCAVE = "concave"
    """The parabola opens downwards (b <= 0) and has no minimum: the rate grew, if it may."""
    ASCENT = "ascent"
    """The loss rises along the direction (a <= 0): the rate shrank."""
    NOISE = "noise"
    """The losses differ by less than rounding resolves: the probes move further out."""
    NON_FINITE = "non_finite"
    """A loss, a gradient or the measured rate is infinite or not a number: the step was undone."""


@dataclass(frozen=True, slots=True)
class Points:
    """The losses at three points of a line, or at two and the slope there.

    Attributes:
        radius: distance of the outer points from the centre, in units of the rate (delta0).
        minus: loss at `theta - radius * d`, where a step of that rate would arrive.
        centre: loss at `theta`.
        plus: loss at `theta + radius * d`; None where it was not measured, or is not to count.
        resolution: relative rounding error of one loss, the epsilon of its dtype.
        path: the losses of the steps before, at most back to the last measurement.
        slope: the decrease of the loss per unit of rate at the centre, as the gradient tells it;
            not a number where it does not.
        own: whether nobody but autograd has had that gradient in hand, to clip or scale it.
    """

    radius: float
    minus: float
    centre: float
    plus: float | None
    resolution: float = 2.0**-52
    path: tuple[float, ...] = ()
    slope: float = math.nan
    own: bool = True

    MUCH: ClassVar[float] = 0.25
    """The part of the loss that is much of it."""

    @property
    def uphill(self) -> float:
        """The loss at `plus`, or where the parabola through the others has it by the slope told."""
        return self.minus + 2.0 * self.radius * self.slope if self.plus is None else self.plus

    @property
    def finite(self) -> bool:
        """Whether the losses are finite, and the slope where it stands in for one."""
        return all(map(math.isfinite, (self.minus, self.centre, self.uphill)))

    @property
    def rounding(self) -> float:
        """The rounding error to expect in a difference of two of the losses."""
        largest = max(abs(self.minus), abs(self.centre), abs(self.uphill))
        return 4.0 * self.resolution * largest

    @property
    def flat(self) -> bool:
        """Whether no slope shows: the outer losses differ by no more than rounding."""
        return abs(self.uphill - self.minus) <= self.rounding

    @property
    def blind(self) -> bool:
        """Whether no loss changes at all where the gradient tells that one changes by much."""
        still = self.minus == self.centre and self.plus in (None, self.centre)
        return still and abs(self.slope) * self.radius > self.MUCH * abs(self.centre) > 0.0

    @property
    def bend(self) -> float:
        """What the outer losses together exceed twice the centre's by."""
        return (self.uphill - self.centre) + (self.minus - self.centre)

    @property
    def straight(self) -> bool:
        """Whether no curvature shows: the bend is no more than rounding."""
        return abs(self.bend) <= self.rounding


@dataclass(frozen=True, slots=True)
class Parabola:
    """The change of the loss with the rate, `-slope * rate + curvature * rate**2` (equation 2).

    Attributes:
        slope: the decrease of the loss per unit of rate at rate zero, a of equation (7).
        curvature: half the second derivative along the line, b of equation (6).
    """

    slope: float
    curvature: float

    @classmethod
    def fit(cls, points: Points) -> Parabola:
        """Passes a parabola through three points (equations 6 and 7).

        Through two and the slope there, if one was not measured.
        """
        return cls(
            slope=_divide(points.uphill - points.minus, 2.0 * points.radius),
            curvature=_divide(_divide(points.bend, 2.0 * points.radius), points.radius),
        )

    @property
    def minimiser(self) -> float:
        """The rate at the vertex, `slope / (2 * curvature)` (equation 3); infinite if flat."""
        return _divide(self.slope, 2.0 * self.curvature)

    @property
    def finite(self) -> bool:
        """Whether both coefficients are finite."""
        return math.isfinite(self.slope) and math.isfinite(self.curvature)

    @property
    def descends(self) -> bool:
        """Whether the parabola has a minimum at a positive rate."""
        return self.slope > 0.0 and self.curvature > 0.0

    def blend(self, other: Parabola, weight: float) -> Parabola:
        """Moves both coefficients towards another parabola's by a weight in [0, 1]."""
        return Parabola(
            slope=(1.0 - weight) * self.slope + weight * other.slope,
            curvature=(1.0 - weight) * self.curvature + weight * other.curvature,
        )


@dataclass(frozen=True, slots=True)
class Decision:
    """What a measurement decides.

    Attributes:
        rate: the rate in force from now on.
        step: the rate to step with now: `rate`, or zero where the line is not to be trusted yet.
        reason: why.
        settled: whether the rate may be held for a while, having found where it belongs or moving
            there slowly.
    """

    rate: float
    step: float
    reason: Reason
    settled: bool = False


@dataclass(frozen=True, slots=True)
class Exact:
    """Algorithm 1 as printed: the rate is the vertex, whatever it is.

    Attributes:
        parabola: the last fit.
    """

    parabola: Parabola = Parabola(0.0, 0.0)
    agreement: ClassVar[None] = None

    def loaded(self, state: dict[str, Any]) -> Exact:
        """Takes over a state that was saved with `asdict`."""
        return Exact(Parabola(**state["parabola"]))

    @property
    def quiet(self) -> float:
        """Nothing is known of the noise in the losses."""
        return 0.0

    def radius(self, rate: float) -> float:
        """The distance of the probes: delta0, the last minimiser (section 3.2)."""
        return rate

    def decide(self, rate: float, points: Points) -> tuple[Exact, Decision]:
        """Takes the vertex; one that is not finite leaves the parameters where they are."""
        fit = Parabola.fit(points)
        minimiser = fit.minimiser
        if not points.finite or not abs(minimiser) <= OVERFLOW:
            return self, Decision(rate, 0.0, Reason.NON_FINITE)
        if fit.curvature <= 0.0:
            reason = Reason.CONCAVE
        elif fit.slope <= 0.0:
            reason = Reason.ASCENT
        else:
            reason = Reason.MINIMUM
        return Exact(fit), Decision(minimiser, minimiser, reason)


@dataclass(frozen=True, slots=True)
class Trend:
    """Where the losses of about the last ten measurements lie.

    Attributes:
        mean: their running mean.
        spread: the running mean of their distance from it.
    """

    mean: float
    spread: float

    @classmethod
    def open(cls, loss: float) -> Trend:
        """Starts with the first loss, and with a spread that noise is unlikely to exceed."""
        return cls(loss, spread=0.1 * abs(loss))

    def book(self, loss: float, fading: float = 0.1) -> Trend:
        """Enters a loss; `fading` is its weight in the spread where that falls."""
        # Written so that equal losses leave equal means, to the last bit.
        mean = self.mean + 0.1 * (loss - self.mean)
        away = abs(loss - self.mean)
        spread = self.spread + (0.1 if away > self.spread else fading) * (away - self.spread)
        return Trend(mean, spread) if math.isfinite(mean + spread) else Trend.open(loss)


@dataclass(frozen=True, slots=True)
class Ledger:
    """How far the vertex is to be believed, from whether the loss falls on the batches that follow.

    A batch vouches for itself: its own noise slopes down along a direction made from it, so its
    vertex lies too far out, hopelessly so where there is more noise than signal, as on the plateau
    on which deep networks start or in the dwell around an optimum. A rising loss is the proof.

    Attributes:
        trend: of the loss.
        slow: running mean of the loss over about 100 steps.
        height: the highest mean of the trend.
        promised: running mean of the decrease that the parabolas promised for a step.
        share: the share of the vertex to take, in [0.1, 1]: lowered while the loss rises.
        learned: whether the loss has once been clearly below its height.
    """

    trend: Trend
    slow: float
    height: float
    promised: float = 0.0
    share: float = 1.0
    learned: bool = False

    RISING, FALLING, LEAST = 0.98, 1.01, 0.1
    """What multiplies the share in a step, and its lower bound."""
    CLEARLY = 3.0
    """Spreads below its height at which the loss has clearly fallen."""
    PATIENCE = 50.0
    """Steps after which a kept promise would show."""
    CREDIT = 0.02
    """The part of the growth that is allowed while promises are not believed."""
    RETREAT = 0.9
    """What multiplies the rate in a step where the loss rises and the line has no vertex."""
    MOST = 2.0
    """Losses that the slope may promise: a vertex takes off half of what its slope alone would."""

    @classmethod
    def open(cls, loss: float) -> Ledger:
        """Starts with the first loss."""
        return cls(Trend.open(loss), slow=loss, height=loss)

    def book(self, loss: float, rate: float, promise: float) -> Ledger:
        """Enters the loss before a step at a rate, and the decrease that the step promises."""
        trend = self.trend.book(loss)
        slow = self.slow + 0.01 * (loss - self.slow)
        height = max(self.height, trend.mean)
        entered = replace(
            self,
            trend=trend,
            slow=slow,
            height=height,
            promised=0.9 * self.promised + 0.1 * promise,
            learned=self.learned or height - trend.mean > self.CLEARLY * trend.spread,
        )
        share = self.share * (self.RISING if entered.rising else self.FALLING)
        return replace(entered, share=min(max(share, self.LEAST), 1.0))

    @property
    def rising(self) -> bool:
        """Whether the last losses lie above the slow mean."""
        return self.trend.mean > self.slow

    @property
    def believed(self) -> bool:
        """Whether promises have once come true, or are too small to show beside the noise."""
        return self.learned or self.unseen

    @property
    def unseen(self) -> bool:
        """Whether promises are too small to show, and a rising loss says nothing of the rate."""
        return self.PATIENCE * self.promised <= self.trend.spread

    def limit(self, rate: float, wish: float, bounded: bool = True) -> float:
        """How far a rate may rise that would rise to `wish`, or that it has to fall.

        Along a line without a vertex there is nothing to take a share of. Where less than all would
        be taken the rate does not rise, and it falls while the loss rises, until its promises could
        not show.
        """
        if self.share < 1.0 and not (bounded or self.unseen):
            return self.RETREAT * rate if self.rising else rate
        return wish if self.believed else rate + self.CREDIT * (wish - rate)

    def trusted(self, parabola: Parabola, level: float) -> float:
        """How far out to go: a share of the vertex, and no further than there is loss to take off.

        The loss of a wrong example in a batch of few is steep and hardly curved. Once averaged it
        moves the vertex far out, where it promises many times the loss, for as long as the average
        remembers it.

        Args:
            parabola: the running one, with a vertex ahead.
            level: the running mean of the absolute loss.
        """
        loss = max(level, self.trend.spread)
        most = self.MOST * loss / parabola.slope if loss else math.inf
        return min(self.share * parabola.minimiser, most)


@dataclass(frozen=True, slots=True)
class WaryLedger(Ledger):
    """The same along the steps of another optimizer, which remembers gradients or makes them alike.

    There the vertex of a noisy batch lies too far out for good: the loss falls and rises by turns,
    and only one that falls nine times of ten earns a share back.
    """

    FALLING = 1.002


@dataclass(frozen=True, slots=True)
class Evidence:
    """Whether training makes progress, without which no rate may rise.

    A batch vouches for itself, see `Ledger`; averaged iterates bear the vertex of a batch all the
    same, but not a rate that rises on such words alone. So a rate may rise freely only while what
    its steps promise could not show beside the noise of the losses, and after that by a factor each
    time that the loss has clearly fallen below where it was at the last such proof. The smaller
    the batches, the more steps a proof takes, and the more warily the rate rises.

    Steps that promised ten times what would be a proof, with none in sight, only shake the
    parameters about: the rate falls until its promises could not show.

    So it does, more slowly, where the loss has risen since the last proof and that is long ago, as
    it may where every batch meets other parameters.

    Where a model fits all its data the loss falls for ever, and would prove rate after rate until
    one destroys everything. A constant rate serves there: so with all but a hundredth of the loss
    gone, a proof only confirms the rate that there is.

    Attributes:
        trend: of the loss.
        recent: running mean of about the last three losses.
        highest: the largest size that the mean of the trend had, slowly forgotten.
        lowest: where the loss was at the last proof, or the highest mean of the first ten.
        promised: running mean of the decrease that the parabolas promised for a step.
        owed: the sum of what they promised.
        booked: how many losses have been entered.
        proved: how many had been at the last proof.
        ceiling: how far the rate may rise; zero before the first proof.
    """

    trend: Trend
    recent: float
    highest: float
    lowest: float
    promised: float = 0.0
    owed: float = 0.0
    booked: int = 0
    proved: int = 0
    ceiling: float = 0.0
    share: ClassVar[float] = 1.0

    CLEARLY = 1.0
    """Spreads by which the loss falls in a proof."""
    FADING = 0.03
    """Weight of a small step in the spread: ten losses near zero in a row are luck, not proof."""
    PATIENCE = 12.0
    """Steps after which a kept promise would show."""
    BROKEN, FALL = 10.0, 0.95
    """Spreads that are owed before the first proof when the rate falls, and its factor a step."""
    FORGETTING = 0.01
    """Of where the last proof was, in a step, so that no lucky streak is asked for again."""
    OVERDUE, WANING = 20, 3.0
    """Losses after which a proof is overdue, and the power of all losses that the rate falls by."""
    RISE = 1.7
    """The factor by which the rate may rise for each proof."""
    LEARNED = 0.01
    """The part of the highest loss below which the rate may rise no more."""
    FADED = 0.999
    """What is left of the highest loss after a step, so that one that was a fault passes."""

    @classmethod
    def open(cls, loss: float) -> Evidence:
        """Starts with the first loss."""
        return cls(Trend.open(loss), recent=loss, highest=abs(loss), lowest=loss)

    def book(self, loss: float, rate: float, promise: float) -> Evidence:
        """Enters the loss before a step at a rate, and the decrease that the step promises."""
        trend = self.trend.book(loss, self.FADING)
        booked = self.booked + 1
        lowest = self.lowest + self.FORGETTING * max(0.0, trend.mean - self.lowest)
        if booked < 10:
            lowest = max(self.lowest, trend.mean)
        entered = replace(
            self,
            trend=trend,
            recent=self.recent + 0.3 * (loss - self.recent),
            highest=max(self.FADED * self.highest, abs(trend.mean)),
            lowest=lowest,
            promised=0.9 * self.promised + 0.1 * promise,
            owed=self.owed + promise,
            booked=booked,
        )
        if not trend.mean < lowest - self.CLEARLY * trend.spread:
            return entered
        ceiling = rate if entered.fitted else self.RISE * rate
        # The mean has yet to come down as far as the loss, which then would be proof a second time.
        lowest = min(trend.mean, entered.recent)
        return replace(entered, lowest=lowest, proved=booked, ceiling=ceiling)

    @property
    def fitted(self) -> bool:
        """Whether hardly anything is left of the loss."""
        return abs(self.trend.mean) < self.LEARNED * self.highest

    @property
    def stalled(self) -> bool:
        """Whether the loss is higher than at the last proof, and that is long ago."""
        overdue = self.booked - self.proved > self.OVERDUE
        return overdue and not self.fitted and self.trend.mean > self.lowest

    def limit(self, rate: float, wish: float, bounded: bool = True) -> float:
        """How far a rate may rise that would rise to `wish`, or that it has to fall.

        A rise is earned by the loss alone, so whether the line is `bounded` does not matter.
        """
        unseen = rate * _divide(self.trend.spread, self.PATIENCE * self.promised)
        if self.ceiling:
            most = max(rate, self.ceiling)
            least = rate * (1.0 - self.WANING / self.booked) if self.stalled else most
            return min(wish, max(least, min(unseen, most)))
        broken = self.owed > self.BROKEN * self.trend.spread
        least = self.FALL * rate if broken else rate
        return min(wish, max(least, unseen))

    def trusted(self, parabola: Parabola, level: float) -> float:
        """How far out to go: averaged iterates bear the whole vertex."""
        return parabola.minimiser


@dataclass(frozen=True, slots=True)
class Noise:
    """How much of what the losses do from step to step is the noise of the batches.

    Without noise they lie on a smooth curve, or on two by turns where the steps lead across a
    valley and back. Either way every second loss continues those before it: third differences are
    small beside what a step promises and what the steps together achieve. With the batches of a
    data set, of up to thousands of examples, they are not.

    Attributes:
        share: the running mean of that ratio, in [0, 1].
        samples: how many ratios are in it.
    """

    share: float = 1.0
    samples: int = 0

    WEIGHT = 0.2
    """Of the newest ratio."""
    QUIET, LOUD = 0.02, 0.06
    """The shares below which there is no noise, and above which there is nothing but noise."""

    def book(self, path: Sequence[float], promise: float, descent: float) -> Noise:
        """Enters a path, whose end counts as noise where it rises further than steps can explain.

        Args:
            path: the losses of successive steps.
            promise: the decrease that the last of them promises.
            descent: the same by its slope alone.
        """
        bends = [
            last - 3.0 * third + 3.0 * second - first
            for first, second, third, last in zip(path, path[2:], path[4:], path[6:], strict=False)
        ]
        if not bends or not all(map(math.isfinite, path)):
            return self
        # Third differences of independent numbers have twenty times their variance.
        spread = math.hypot(*bends) / math.sqrt(20.0 * len(bends))
        rise = path[-1] - path[0]
        ratio = _divide(spread, promise + abs(rise)) if rise < descent else 1.0
        # Also where it overflows, or is zero over zero.
        ratio = ratio if ratio < 1.0 else 1.0
        samples = self.samples + 1
        weight = max(self.WEIGHT, 1.0 / (samples + 1))
        return Noise(self.share + weight * (ratio - self.share), samples)

    @property
    def quiet(self) -> float:
        """How free of noise the losses are, from 0 to 1."""
        return min(max((self.LOUD - self.share) / (self.LOUD - self.QUIET), 0.0), 1.0)


@dataclass(frozen=True, slots=True)
class Agreement:
    """Whether the slope that the gradient tells is the one that the losses show.

    Then one probe is enough for a parabola. Where gradients flow straight through a rounding, or
    are not those of the loss for other reasons, it is not; so two probes tell first, and now and
    then for as long as they agree.

    A wrong slope puts the curvature off, the more the nearer in the probe is, and by that the
    vertex. So what is compared are the curvatures: relative to the larger one, or to the one that
    would have the share of the vertex that is believed where the probe is, if that is larger still
    and the vertex too far out to be taken at all.

    Attributes:
        apart: the running mean of their difference, so compared.
        newest: the last of these differences.
        checks: how many differences are in it.
        measured: how many measurements there were.
    """

    apart: float = 0.0
    newest: float = 0.0
    checks: int = 0
    measured: int = 0

    FIRST, EVERY = 10, 10
    """How many measurements are checked at first, and one of how many later unless it fails."""
    WEIGHT = 0.1
    """Of the newest difference."""
    MOST = 0.3
    """The difference up to which they agree: at the vertex 0.15 of the slope."""

    @property
    def holds(self) -> bool:
        """Whether one probe is enough."""
        return self.checks >= self.FIRST and self.apart <= self.MOST

    @property
    def due(self) -> bool:
        """Whether the next measurement takes two probes."""
        return not self.holds or self.newest > self.MOST or self.measured % self.EVERY == 0

    def book(self, points: Points, share: float) -> Agreement:
        """Enters a measurement, and a difference where it has both a second probe and a slope.

        Args:
            points: what was measured.
            share: the share of the vertex that is believed.
        """
        if not (points.own and math.isfinite(points.slope)):
            return Agreement()
        entered = replace(self, measured=self.measured + 1)
        if points.plus is None or points.flat:
            return entered
        shown, told = Parabola.fit(points), Parabola.fit(replace(points, plus=None))
        steepest = max(abs(shown.slope), abs(told.slope))
        largest = max(abs(shown.curvature), abs(told.curvature))
        scale = max(largest, share * _divide(steepest, 2.0 * points.radius))
        newest = abs(_divide(shown.curvature - told.curvature, scale))
        if math.isnan(newest):
            return entered
        newest = min(newest, 2.0)
        checks = self.checks + 1
        apart = self.apart + max(self.WEIGHT, 1.0 / checks) * (newest - self.apart)
        return replace(entered, apart=apart, newest=newest, checks=checks)


@dataclass(frozen=True, slots=True)
class Safeguarded:
    """The vertex of a running parabola, kept within what the probes can vouch for.

    Slope and curvature are averaged one by one and then divided: a batch with a steep line counts
    for more than one with a flat line, and no single ratio of small differences decides.

    Attributes:
        smoothing: weight of the past in the averages, in [0, 1); 0 trusts each batch by itself. The
            first fits weigh alike: the slope at the start is many times that of later, and would
            set the rate for as long as the average remembers it.
        growth: the largest factor by which one measurement raises the rate.
        slowing: whether that factor falls towards one with the measurements since the last cut, so
            that the rate rises with a power of their number: warily where training starts, and
            hardly where a model fits all data, whose loss flattens out without a bound.
        ledger: what is known of kept promises.
        parabola: the running parabola, per unit of rate.
        fits: how many fits are in it.
        calm: measurements since the last cut of the rate.
        level: the running mean of the absolute loss, the scale of what is a large change.
        reach: the least distance of the probes at which the losses differ by more than rounding.
        strikes: how many fits in a row contradicted the running parabola.
        noise: of the losses, where there are steps between two measurements.
        agreement: of the gradient's slope with the losses.
    """

    smoothing: float
    growth: float
    ledger: Ledger | Evidence
    slowing: bool = False
    parabola: Parabola = Parabola(0.0, 0.0)
    fits: int = 0
    calm: int = 0
    level: float = 0.0
    reach: float = 0.0
    strikes: int = 0
    noise: Noise = Noise()
    agreement: Agreement = Agreement()

    SHRINK = 0.1
    """The smallest factor by which one measurement lowers the rate."""
    TRAIL = 300.0
    """However slowly it grows, the rate stays within this factor of the minimiser."""
    SLOWLY = 1.1
    """A rate that rises by no more than this factor need not be measured again at once."""
    STRIKES = 10
    """Fits in a row, with vertices off by more than a factor of ten, that end an average."""
    SIGNAL = 1e3
    """Probes go out to where the curvature shows this many times above rounding."""
    OUTERMOST = Points.MUCH
    """But not to where it is more than this part of the loss, as coarse types would have it."""

    def loaded(self, state: dict[str, Any]) -> Safeguarded:
        """Takes over a state that was saved with `asdict`."""
        saved: dict[str, Any] = state["ledger"]
        state = state | {
            "parabola": Parabola(**state["parabola"]),
            "noise": Noise(**state["noise"]),
            "agreement": Agreement(**state["agreement"]),
            "ledger": replace(self.ledger, **saved | {"trend": Trend(**saved["trend"])}),
        }
        return Safeguarded(**state)

    @property
    def quiet(self) -> float:
        """How free of noise the losses are, from 0 to 1."""
        return self.noise.quiet

    def radius(self, rate: float) -> float:
        """The distance of the probes: the rate in force, or further where that drowns in rounding.

        Without this a tiny rate would be measured from differences of rounding errors. The ratio of
        the two is what a wrapped optimizer's step is multiplied by, in single precision.
        """
        return _clamp(max(rate, min(self.reach, LARGEST_RATE * rate)))

    def decide(self, rate: float, points: Points) -> tuple[Safeguarded, Decision]:
        """Chooses the next rate: positive, finite, in [0.1 * rate, growth * rate].

        A step is taken only with a rate that the line was measured at: after a cut by more than
        half, on a rising line or on a non-finite one, the parameters wait for the next measurement.
        """
        rate = _clamp(rate)
        agreement = self.agreement.book(points, self.ledger.share)
        search = replace(self, agreement=agreement)
        if agreement.holds and points.finite:
            # Checks included, the fits that are averaged are of one kind.
            points = replace(points, plus=None)
        fit, drowned = Parabola.fit(points), points.straight
        if math.isfinite(points.centre):
            search = search._book(points, rate, Parabola(0.0, 0.0) if drowned else fit)
        if not (points.finite and fit.finite):
            return search._retreat(rate, points, 0.0, Reason.NON_FINITE)
        if points.minus - points.centre > max(abs(points.centre), self.level):
            # So far out the fit is no parabola: its vertex is a hint, not a place to go.
            hint = fit.minimiser if fit.descends else 0.0
            return search._retreat(rate, points, hint, Reason.SHRUNK)
        if drowned:
            return search._beyond_rounding(rate, points)

        averaged = search._average(fit)
        parabola = averaged.parabola
        level = self._level(abs(points.centre))
        most = self.OUTERMOST * max(abs(points.centre), level)
        signal = min(self.SIGNAL * points.rounding, most)
        reach = points.radius * math.sqrt(signal / abs(points.bend))
        calm = self.calm + 1
        tracked = replace(averaged, calm=calm, level=level, reach=reach)
        cut = replace(tracked, calm=0)
        growth = 1.0 + (self.growth - 1.0) / (calm if self.slowing else 1)
        wish = _clamp(rate * growth)
        ledger = search.ledger
        bounded = parabola.curvature > 0.0
        limit = _clamp(ledger.limit(rate, wish, bounded))
        lowered = Reason.SHRUNK if limit < rate else None
        settled = growth <= self.SLOWLY
        if parabola.slope <= 0.0:
            return cut, Decision(_clamp(rate / self.growth), 0.0, Reason.ASCENT)
        if not bounded:
            return tracked, Decision(limit, limit, lowered or Reason.CONCAVE)
        minimiser = _clamp(ledger.trusted(parabola, level))
        if minimiser > limit:
            # The step is one that the probes can vouch for, the next probes go further.
            trailing = ledger.limit(rate, minimiser / self.TRAIL) if limit == wish else 0.0
            return tracked, Decision(max(limit, trailing), limit, lowered or Reason.GROWN, settled)
        if minimiser < rate * self.SHRINK:
            return cut, Decision(_clamp(rate * self.SHRINK), 0.0, Reason.SHRUNK)
        if minimiser < 0.5 * rate:
            return cut, Decision(minimiser, 0.0, Reason.MINIMUM)
        return tracked, Decision(minimiser, minimiser, Reason.MINIMUM, settled=True)

    def _book(self, points: Points, rate: float, fit: Parabola) -> Safeguarded:
        """Enters a loss, and the decrease that a step promises there, in the ledger."""
        loss = points.centre
        ledger = self.ledger if self.level else self.ledger.open(loss)
        promise = rate * (fit.slope - fit.curvature * rate)
        promise = max(0.0, promise) if math.isfinite(promise) else 0.0
        noise = self.noise
        if points.finite:
            noise = noise.book((*points.path, loss), promise, rate * abs(fit.slope))
        return replace(self, noise=noise, ledger=ledger.book(loss, rate, promise))

    def _retreat(
        self, rate: float, points: Points, hint: float, reason: Reason
    ) -> tuple[Safeguarded, Decision]:
        """The loss blew up at the probes: draws them in and takes no step.

        Probes beyond the rate in force say nothing of the rate itself, which then stays.
        """
        if points.radius <= rate:
            rate = _clamp(rate * min(max(hint / rate, self.SHRINK), 0.5))
        return replace(self, reach=0.0, calm=0), Decision(rate, 0.0, reason)

    def _beyond_rounding(self, rate: float, points: Points) -> tuple[Safeguarded, Decision]:
        """No curvature shows: sends the probes further out.

        A step whose whole effect drowns in rounding is too small and harmless, so the first rate
        follows the probes; where a slope does show, or once did, it does not. Nor does it where the
        gradient tells that a slope should have shown long ago.
        """
        if not self.fits and points.flat and not points.blind:
            rate = max(rate, _clamp(points.radius))
        return (
            replace(self, reach=_clamp(10.0 * points.radius)),
            Decision(rate, rate, Reason.NOISE),
        )

    def _average(self, fit: Parabola) -> Safeguarded:
        """Averages a fit into the running parabola, or lets a fit replace it.

        A single fit that contradicts the running parabola may be an outlier, or a batch with hardly
        a loss; many in a row mean that the running one is the remains of a fault.
        """
        past, strikes = self.parabola, 0
        if fit.descends and self.fits:
            near, far = sorted((past.minimiser, fit.minimiser))
            strikes = self.strikes + 1 if far > 10.0 * near or not past.descends else 0
            if strikes == self.STRIKES:
                return replace(self, parabola=fit, fits=1, strikes=0)
        fits = self.fits + 1
        parabola = past.blend(fit, max(1.0 - self.smoothing, 1.0 / fits))
        return replace(self, parabola=parabola, fits=fits, strikes=strikes)

    def _level(self, loss: float) -> float:
        """Averages the loss; a single huge one counts for no more than ten times the mean."""
        if self.level == 0.0:
            return loss
        return self.smoothing * self.level + (1.0 - self.smoothing) * min(loss, 10.0 * self.level)


def _clamp(rate: float) -> float:
    return min(max(rate, SMALLEST_RATE), LARGEST_RATE)


def _divide(numerator: float, denominator: float) -> float:
    """IEEE division: x / 0 is infinite and 0 / 0 is not a number, neither an exception."""
    if denominator != 0.0:
        return numerator / denominator
    if numerator == 0.0 or math.isnan(numerator):
        return math.nan
    return math.copysign(math.inf, numerator) * math.copysign(1.0, denominator)
