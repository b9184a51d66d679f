import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from quadstep.parabola import (
    Agreement,
    Decision,
    Evidence,
    Exact,
    Ledger,
    Noise,
    Parabola,
    Points,
    Reason,
    Safeguarded,
    WaryLedger,
)

anything = st.floats(allow_nan=True, allow_infinity=True)
rates = st.floats(1e-30, 1e30)
coefficients = st.floats(0.01, 100.0)


def sample(parabola: Parabola, radius: float, floor: float = 1.0, resolution=2.0**-52) -> Points:
    """The losses of an exact parabola that is `floor` at rate zero."""

    def at(rate: float) -> float:
        return floor - parabola.slope * rate + parabola.curvature * rate**2

    return Points(radius, at(radius), at(0.0), at(-radius), resolution)


class Trusting:
    """Takes every vertex at its word."""

    share = 1.0

    def open(self, loss):
        return self

    def book(self, loss, rate, promise):
        return self

    def limit(self, rate, wish, bounded=True):
        return wish

    def trusted(self, parabola, level):
        return parabola.minimiser


def doubting() -> Safeguarded:
    return Safeguarded(smoothing=0.99, growth=1.1, ledger=Ledger.open(0.0))


def wary() -> Safeguarded:
    return Safeguarded(smoothing=0.9, growth=3.0, slowing=True, ledger=Evidence.open(0.0))


def heeding(checks=Agreement.FIRST) -> Safeguarded:
    """A search that has found so many times that gradients tell the slope."""
    agreement = Agreement(checks=checks, measured=1)
    return Safeguarded(smoothing=0.9, growth=3.0, ledger=Trusting(), agreement=agreement)


def book(kind, losses, promise):
    ledger = kind.open(losses[0])
    for loss in losses:
        ledger = ledger.book(loss, 1.0, promise)
    return ledger


def fresh() -> Safeguarded:
    return Safeguarded(smoothing=0.9, growth=2.0, ledger=Trusting())


@given(st.floats(-100, 100), st.floats(-100, 100), st.floats(0.01, 10))
def test_fit_recovers_the_coefficients_of_equations_6_and_7(slope, curvature, radius):
    fit = Parabola.fit(sample(Parabola(slope, curvature), radius))
    scale = 1.0 + abs(slope) * radius + abs(curvature) * radius**2
    assert math.isclose(fit.slope, slope, abs_tol=1e-14 * scale / radius)
    assert math.isclose(fit.curvature, curvature, abs_tol=1e-14 * scale / radius**2)


@given(coefficients, coefficients, st.floats(0.01, 100))
def test_the_minimiser_is_the_vertex_whatever_the_radius(slope, curvature, radius):
    vertex = slope / (2.0 * curvature)
    fit = Parabola.fit(sample(Parabola(slope, curvature), radius * vertex, slope * vertex))
    assert math.isclose(fit.minimiser, vertex, rel_tol=1e-9)


@pytest.mark.parametrize(
    ("parabola", "minimiser"),
    [
        (Parabola(1.0, 0.0), math.inf),
        (Parabola(-1.0, 0.0), -math.inf),
        (Parabola(1.0, -0.0), -math.inf),
        (Parabola(0.0, 0.0), math.nan),
        (Parabola(math.nan, 0.0), math.nan),
        (Parabola(0.0, 1.0), 0.0),
        (Parabola(-1.0, 1.0), -0.5),
    ],
)
def test_the_minimiser_divides_as_floating_point_does(parabola, minimiser):
    assert parabola.minimiser == minimiser or math.isnan(parabola.minimiser) == math.isnan(
        minimiser
    )


class TestExact:
    @given(rates, anything, anything, anything)
    @example(1.0, 1.0, 1.0, 1e300)
    @example(1e30, 0.0, -1e-300, 1.0)
    def test_takes_the_vertex_or_stays_visibly(self, rate, minus, centre, plus):
        points = Points(rate, minus, centre, plus)
        search, decision = Exact().decide(rate, points)
        minimiser = Parabola.fit(points).minimiser
        if points.finite and abs(minimiser) <= 3.4e38:
            assert decision.rate == decision.step == minimiser
            assert decision.reason is not Reason.NON_FINITE
        else:
            assert decision == Decision(rate, 0.0, Reason.NON_FINITE)
            assert search == Exact()

    @pytest.mark.parametrize(
        ("parabola", "reason"),
        [
            (Parabola(1.0, 1.0), Reason.MINIMUM),
            (Parabola(-1.0, 1.0), Reason.ASCENT),
            (Parabola(1.0, -1.0), Reason.CONCAVE),
            (Parabola(1.0, 0.0), Reason.NON_FINITE),
        ],
    )
    def test_names_what_it_does_not_repair(self, parabola, reason):
        assert Exact().decide(0.5, sample(parabola, 0.5))[1].reason is reason

    def test_does_not_divide_by_a_zero_radius(self):
        _, decision = Exact().decide(0.0, Points(0.0, 1.0, 1.0, 1.0))
        assert decision == Decision(0.0, 0.0, Reason.NON_FINITE)


class TestNoise:
    @staticmethod
    def book(paths, promise=1.0, descent=1.0):
        noise = Noise()
        for path in paths:
            noise = noise.book(path, promise, descent)
        return noise

    @given(st.floats(0.5, 0.99), st.floats(-0.5, 0.5), st.floats(-10, 10), st.floats(1e-3, 1e3))
    def test_losses_on_one_curve_or_on_two_by_turns_are_quiet(self, fall, apart, floor, scale):
        """Whatever their offset and their scale."""
        losses = [scale * (floor + fall**step * (1 + apart * (-1) ** step)) for step in range(300)]
        paths = [losses[at : at + 11] for at in range(0, 200, 10)]
        assert self.book(paths, promise=scale, descent=2.0 * scale).quiet > 0.5

    @given(st.integers(0, 2**32), st.floats(0.3, 1e3), st.floats(-10, 10))
    def test_independent_losses_are_not(self, seed, spread, floor):
        generator = random.Random(seed)
        noise = Noise()
        for _ in range(50):
            path = [floor + generator.gauss(0, spread) for _ in range(11)]
            noise = noise.book(path, promise=1.0, descent=2.0)
            assert noise.quiet == 0.0

    @given(st.lists(st.lists(anything, max_size=12), max_size=30), anything, st.floats(0, 1e300))
    @example([[1.0] * 11] * 3, 1.0, 0.0)
    @example([[1.7e308, -1.7e308] * 6] * 3, math.inf, 0.0)
    def test_stays_a_share(self, paths, descent, promise):
        noise = self.book(paths, promise, descent)
        assert 0.0 <= noise.share <= 1.0
        assert 0.0 <= noise.quiet <= 1.0

    @pytest.mark.parametrize(
        "path",
        [[], [1.0] * 6, [1.0, 2.0, math.nan, 1.0, 1.0, 2.0, 1.0], [math.inf] * 11],
        ids=["none", "short", "nan", "inf"],
    )
    def test_says_nothing_of_paths_that_say_nothing(self, path):
        assert Noise().book(path, 1.0, 1.0) == Noise()

    def test_losses_that_stand_still_and_promise_nothing_are_noise(self):
        assert self.book([[1.0] * 11] * 30, promise=0.0, descent=0.0).quiet == 0.0

    @pytest.mark.parametrize(
        "path",
        [[1.0, 3.0, 0.0, 2.0, 5.0, 1.0, 4.0, 0.0, 1.0], [1.0 + 0.2 * step for step in range(11)]],
        ids=["noise", "overshoot"],
    )
    def test_what_disturbs_is_heard_at_the_next_measurement(self, path):
        noise = self.book([[1.0 - 0.01 * step for step in range(11)]] * 30)
        assert noise.quiet == 1.0
        assert noise.book(path, 1.0, 1.0).quiet == 0.0


class TestAgreement:
    def book(self, agreement, *slopes):
        """Enters measurements whose losses show a slope of one."""
        for slope in slopes:
            points = replace(sample(Parabola(1.0, 1.0), 0.1), slope=slope)
            seen = points if agreement.due else replace(points, plus=None)
            agreement = agreement.book(seen, share=1.0)
        return agreement

    def checked(self, agreement, slope, count):
        """Which of the next measurements take two probes."""
        due = []
        for _ in range(count):
            due.append(agreement.due)
            agreement = self.book(agreement, slope)
        return due

    @pytest.mark.parametrize("slope", [0.9, 1.0, 1.15])
    def test_one_measurement_in_ten_is_checked_where_the_slopes_agree(self, slope):
        assert (
            self.checked(Agreement(), slope, 40)
            == [True] * 11 + ([False] * 9 + [True]) * 2 + [False] * 9
        )

    @pytest.mark.parametrize("slope", [-1.0, 0.0, 0.1, 0.8, 1.25, 10.0])
    def test_each_measurement_is_checked_where_they_do_not(self, slope):
        assert all(self.checked(Agreement(), slope, 40))

    def test_a_check_that_fails_is_followed_by_others(self):
        """Gradients that are clipped all of a sudden are soon no longer heeded."""
        agreement = self.book(Agreement(), *[1.0] * 20)
        assert agreement.due
        agreement = self.book(agreement, 0.1)
        assert agreement.holds
        assert agreement.due
        assert self.book(agreement, 1.0, *[1.0] * 3).holds
        assert not self.book(agreement, *[0.1] * 3).holds

    def test_it_comes_back(self):
        agreement = self.book(Agreement(), *[0.1] * 50)
        assert not agreement.holds
        assert self.book(agreement, *[1.0] * 20).holds

    @pytest.mark.parametrize("slope", [math.nan, math.inf])
    def test_it_starts_over_where_the_gradient_tells_nothing(self, slope):
        agreement = self.book(Agreement(), *[1.0] * 20)
        assert self.book(agreement, slope) == Agreement()

    def test_differences_that_drown_in_rounding_are_no_checks(self):
        flat = Points(1e-20, 1.0, 1.0, 1.0, slope=1.0)
        assert Agreement().book(flat, share=1.0) == Agreement(measured=1)

    @pytest.mark.parametrize(("share", "told", "agrees"), [(1.0, 1.1, True), (0.1, 1.1, False)])
    def test_the_less_of_the_vertex_is_believed_the_better_must_they_agree(
        self, share, told, agrees
    ):
        """Near in, a slope that is off by little puts the curvature off by much."""
        points = replace(sample(Parabola(1.0, 1.0), 0.5 * share), slope=told)
        agreement = Agreement()
        for _ in range(Agreement.FIRST):
            agreement = agreement.book(points, share)
        assert agreement.holds == agrees

    def test_a_vertex_far_beyond_the_probe_may_be_told_anywhere(self):
        """There the rate is limited by what has been proved, and not by the parabola."""
        points = replace(sample(Parabola(1.0, 1.0), 0.001), slope=1.1)
        assert Agreement().book(points, share=1.0).newest < 0.3

    def test_gradients_that_a_caller_had_in_hand_are_not_heeded(self):
        agreement = self.book(Agreement(), *[1.0] * 20)
        clipped = replace(sample(Parabola(1.0, 1.0), 0.1), slope=1.0, own=False)
        assert agreement.book(clipped, share=1.0) == Agreement()

    @given(coefficients, st.floats(-100.0, 100.0), st.floats(0.01, 10.0))
    def test_a_slope_told_stands_in_for_a_probe(self, curvature, slope, radius):
        parabola = Parabola(slope, curvature)
        whole = replace(sample(parabola, radius), slope=slope)
        told = replace(whole, plus=None)
        scale = abs(whole.plus) + abs(whole.minus) + 1.0
        assert told.uphill == pytest.approx(whole.plus, rel=0, abs=1e-14 * scale)
        fit = Parabola.fit(told)
        assert fit.slope == pytest.approx(slope, rel=0, abs=1e-13 * scale / radius)
        assert fit.curvature == pytest.approx(curvature, rel=0, abs=1e-13 * scale / radius**2)

    def test_it_is_heeded_once_it_holds_and_not_before(self):
        """The probes show a slope of one, the gradient tells one of 1.1."""
        line = replace(sample(Parabola(1.0, 1.0), 0.4), slope=1.1)
        for checks, slope in ((Agreement.FIRST, 1.1), (Agreement.FIRST - 2, 1.0)):
            search, _ = heeding(checks).decide(0.4, line)
            assert search.parabola.slope == pytest.approx(slope)

    def test_what_is_not_finite_is_not_overlooked(self):
        line = replace(sample(Parabola(1.0, 1.0), 0.4), slope=1.0, plus=math.nan)
        search, decision = heeding().decide(0.4, line)
        assert decision.reason is Reason.NON_FINITE
        search, decision = heeding().decide(0.4, replace(line, plus=None, slope=math.inf))
        assert decision.reason is Reason.NON_FINITE
        assert search.agreement == Agreement()


class TestBlindness:
    """Losses that were computed before the closure was called do not change with a probe."""

    still = Points(1.0, 2.0, 2.0, 2.0, slope=1.0)

    @pytest.mark.parametrize(
        ("points", "blind"),
        [
            (still, True),
            (replace(still, plus=None), True),
            (replace(still, slope=-1.0, own=False), True),
            (replace(still, minus=2.0 + 1e-15), False),
            (replace(still, plus=2.0 + 1e-15), False),
            (replace(still, slope=0.1), False),
            (replace(still, slope=math.nan), False),
            (Points(1.0, 0.0, 0.0, 0.0, slope=1.0), False),
        ],
    )
    def test_is_told_where_the_gradient_tells_a_large_change(self, points, blind):
        assert points.blind == blind

    def test_does_not_raise_the_rate(self):
        search, rates = fresh(), [1e-4]
        for _ in range(20):
            points = replace(self.still, radius=search.radius(rates[-1]))
            search, decision = search.decide(rates[-1], points)
            rates.append(decision.rate)
        assert 0.01 < rates[-1] < 1.0
        assert search.reach > 1e10, "but the probes go on looking"


class TestSafeguarded:
    @given(
        st.sampled_from([fresh, doubting, wary, heeding]),
        rates,
        st.lists(st.tuples(anything, anything, anything, anything), max_size=20),
    )
    @example(fresh, 1.0, [(1e308, -1e308, 1e308, 0.0)])
    @example(fresh, 1e-30, [(0.0, 0.0, 0.0, 0.0)])
    def test_the_rate_is_finite_positive_and_inside_its_clamp(self, make, rate, losses):
        search = make()
        for minus, centre, plus, slope in losses:
            radius = search.radius(rate)
            seen = plus if search.agreement.due else None
            points = Points(radius, minus, centre, seen, slope=slope)
            search, decision = search.decide(rate, points)
            assert 0.0 < decision.rate < math.inf
            assert 0.0 <= decision.step <= min(decision.rate, max(radius, search.growth * rate))
            upper = search.growth * rate
            if decision.reason is Reason.NOISE:
                upper = radius
            elif decision.reason is Reason.GROWN:
                upper = math.inf
            lower = 0.1 * rate * (1.0 - 1e-15)
            assert max(lower, 1e-30) <= decision.rate <= min(max(upper, rate), 1e30)
            rate = decision.rate

    @settings(max_examples=300)
    @example(1e-12, [(0.0, 0.0, 0.0)] * 2 + [(0.0, 9e-62, 1.0)], 8.0, 0.5, 1.0, 2.0**-23, 0.9)
    @given(
        st.floats(1e-12, 1e12),
        st.lists(st.tuples(*[st.floats(-1e6, 1e6) | st.sampled_from([math.nan, math.inf])] * 3)),
        st.floats(1e-4, 1e2),
        st.floats(0.01, 1.0),
        st.floats(0.01, 100.0),
        st.sampled_from([2.0**-52, 2.0**-23]),
        st.sampled_from([0.0, 0.9, 0.99]),
    )
    def test_recovers_within_100_measurements(
        self, rate, faults, vertex, gain, loss, resolution, smoothing
    ):
        """From any rate and after any faults: no state latches."""
        search = Safeguarded(smoothing, growth=2.0, ledger=Trusting())
        for losses in faults:
            search, decision = search.decide(rate, Points(search.radius(rate), *losses, resolution))
            rate = decision.rate
        curvature = gain * loss / vertex**2
        line = Parabola(2.0 * curvature * vertex, curvature)
        for _ in range(100):
            points = sample(line, search.radius(rate), loss, resolution)
            search, decision = search.decide(rate, points)
            rate = decision.rate
        # Faults that look like a sane line of the same scale fade in the average, slowly.
        assert 0.09 * vertex <= rate <= 11.0 * vertex

    @pytest.mark.parametrize("start", [1e-30, 1e-12, 1e-3, 1.0, 1e3, 1e12, 1e30])
    def test_finds_the_vertex_from_any_start(self, start):
        search, rate, line = fresh(), start, Parabola(1.0, 2.0)
        for _ in range(100):
            search, decision = search.decide(rate, sample(line, search.radius(rate)))
            rate = decision.rate
        # The first measurements, at the edge of rounding, fade in the average.
        assert rate == pytest.approx(line.minimiser, rel=1e-4)
        assert decision.reason is Reason.MINIMUM

    @pytest.mark.parametrize(
        ("rate", "line", "expected"),
        [
            (1.0, Parabola(2.0, 1.0), Decision(1.0, 1.0, Reason.MINIMUM)),
            (1.0, Parabola(2.8, 1.0), Decision(1.4, 1.4, Reason.MINIMUM)),
            (1.0, Parabola(8.0, 1.0), Decision(2.0, 2.0, Reason.GROWN)),
            (1.0, Parabola(1.0, -1.0), Decision(2.0, 2.0, Reason.CONCAVE)),
            (1.0, Parabola(-0.1, 0.5), Decision(0.5, 0.0, Reason.ASCENT)),
            (1.0, Parabola(0.02, 0.5), Decision(0.1, 0.0, Reason.SHRUNK)),
            (1.0, Parabola(0.8, 1.0), Decision(0.4, 0.0, Reason.MINIMUM)),
            (1.0, Parabola(1.0, 100.0), Decision(0.1, 0.0, Reason.SHRUNK)),
            (1.0, Parabola(30.0, 100.0), Decision(0.15, 0.0, Reason.SHRUNK)),
            (1.0, Parabola(1.0, math.nan), Decision(0.1, 0.0, Reason.NON_FINITE)),
            (1.0, Parabola(0.0, 0.0), Decision(1.0, 1.0, Reason.NOISE)),
        ],
        ids=[
            "at the vertex", "within the clamp", "vertex beyond the growth limit", "no minimum",
            "uphill", "vertex below the shrink limit", "cut by more than half: not stepped with",
            "loss blown up", "loss blown up, vertex as a hint", "not finite", "flat",
        ],
    )  # fmt: skip
    def test_each_safeguard(self, rate, line, expected):
        _, decision = fresh().decide(rate, sample(line, rate))
        assert decision.rate == pytest.approx(expected.rate)
        assert decision.step == pytest.approx(expected.step)
        assert decision.reason is expected.reason

    def test_the_probes_stay_out_where_a_tiny_rate_drowns_in_rounding(self):
        """In float32 a rate of 1e-8 changes this loss by less than an ulp."""
        search, line, resolution = fresh(), Parabola(2e-8, 1.0), 2.0**-23
        rate, reasons = 1e-8, []
        for _ in range(20):
            points = sample(line, search.radius(rate), 1.0, resolution)
            search, decision = search.decide(rate, points)
            reasons.append(decision.reason)
            rate = decision.rate
        assert Reason.NOISE in reasons
        assert search.radius(rate) > 1e-3
        assert search.radius(rate) > 100.0 * rate

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_losses_in_a_coarse_type_are_measured_where_they_differ(self, dtype):
        """Far enough out, and not so far that the loss blows up, again and again."""
        search, rate, reasons = wary(), 1e-4, []
        for step in range(120):
            radius = search.radius(rate)
            exact = sample(Parabola(1.0, 1.0), radius, 2.3 * 0.99**step)
            losses = torch.tensor([exact.minus, exact.centre, exact.plus]).to(dtype).tolist()
            search, decision = search.decide(rate, Points(radius, *losses, torch.finfo(dtype).eps))
            reasons.append(decision.reason)
            rate = decision.rate
        assert set(reasons[60:]) <= {Reason.MINIMUM, Reason.GROWN}
        assert rate == pytest.approx(0.5, rel=0.2)

    def test_the_probes_stay_within_what_single_precision_can_multiply_a_step_by(self):
        far = replace(fresh(), reach=1e30)
        assert far.radius(1.0) == 1e30
        assert far.radius(1e-30) == 1.0

    def test_probes_that_went_too_far_do_not_condemn_the_rate(self):
        far = replace(fresh(), reach=1e3)
        search, decision = far.decide(0.1, Points(1e3, math.inf, 1.0, math.inf))
        assert decision.rate == 0.1
        assert search.radius(decision.rate) == 0.1

    def test_smoothing_averages_slope_and_curvature_one_by_one(self):
        search = replace(fresh(), smoothing=0.5)
        search, _ = search.decide(1.0, sample(Parabola(2.0, 1.0), 1.0))
        search, decision = search.decide(1.0, sample(Parabola(4.0, 3.0), 1.0))
        assert search.parabola.slope == pytest.approx(3.0)
        assert search.parabola.curvature == pytest.approx(2.0)
        assert decision.rate == pytest.approx(0.75)

    def test_an_outlier_is_averaged_and_many_in_a_row_are_believed(self):
        search, _ = fresh().decide(1.0, sample(Parabola(2.0, 1.0), 1.0))
        outlier = sample(Parabola(2e-6, 1e-4), 0.01)
        for _ in range(9):
            search, _ = search.decide(0.01, outlier)
            assert search.parabola.minimiser == pytest.approx(1.0, rel=1e-3)
        search, _ = search.decide(0.01, outlier)
        assert search.parabola.minimiser == pytest.approx(0.01)


class TestLedger:
    def book(self, losses, promise=0.0):
        return book(Ledger, losses, promise)

    def test_a_falling_loss_earns_the_whole_vertex(self):
        ledger = self.book([2.0 * 0.99**step for step in range(200)], promise=1.0)
        assert ledger.share == 1.0
        assert ledger.learned
        assert ledger.believed

    def test_a_rising_loss_costs_a_share_of_it_down_to_a_bound(self):
        assert 0.1 < self.book([1.0 + 0.01 * step for step in range(30)]).share < 0.7
        assert self.book([1.0 + 0.01 * step for step in range(300)]).share == 0.1

    def test_the_wary_want_a_loss_that_falls_nine_times_of_ten(self):
        waves = [2.0, *(([1.5] * 10 + [1.0] * 90) * 30)]
        descent = [1.0 * 0.99**step for step in range(1200)]
        assert book(Ledger, waves, 0.0).share == 1.0
        assert book(WaryLedger, waves, 0.0).share < 0.2
        assert book(WaryLedger, waves + descent, 0.0).share == 1.0

    def test_unkept_promises_are_not_believed_on_a_plateau(self):
        plateau = [2.3 + 0.01 * (-1) ** step for step in range(300)]
        assert not self.book(plateau, promise=0.01).believed

    def test_promises_too_small_to_show_are_believed(self):
        plateau = [2.3 + 0.01 * (-1) ** step for step in range(300)]
        assert self.book(plateau, promise=1e-6).believed

    @given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0.0, 1e6))
    def test_the_share_stays_in_its_bounds(self, losses, promise):
        assert 0.1 <= self.book(losses, promise).share <= 1.0

    def test_doubt_slows_growth_on_a_plateau_only(self):
        def grown(losses):
            search, rate = doubting(), 0.1
            for loss in losses:
                points = sample(Parabola(1.0, 0.05), search.radius(rate), loss)
                search, decision = search.decide(rate, points)
                rate = decision.rate
            return rate

        assert grown([12.3] * 200) < 0.2
        assert grown([10.0 + 2.3 * 0.97**step for step in range(200)]) > 1.0

    def test_along_lines_without_a_vertex_no_rate_rises_while_the_loss_does(self):
        """There is nothing to take a share of, and growth at every step would never end."""
        fallen = [2.0 * 0.97**step for step in range(200)]
        risen = [*fallen, *(fallen[-1] * 1.1**step for step in range(80))]
        dwelling = [*risen, *(risen[-1] * 0.97**step for step in range(100))]
        assert self.book(fallen, 10.0).limit(1.0, 1.1, bounded=False) == 1.1
        assert self.book(risen, 10.0).limit(1.0, 1.1, bounded=False) == 0.9
        assert self.book(risen, 10.0).limit(1.0, 1.1) == 1.1
        wary = book(WaryLedger, dwelling, 10.0)
        assert wary.share < 1.0
        assert not wary.rising
        assert wary.limit(1.0, 1.1, bounded=False) == 1.0

    def test_a_rising_loss_does_not_condemn_a_rate_whose_promises_could_not_show(self):
        risen = [*(2.0 * 0.97**step for step in range(200)), *(1.1**step for step in range(40))]
        assert self.book(risen, 1e-6).share < 1.0
        assert self.book(risen, 1e-6).limit(1.0, 1.1, bounded=False) == 1.1

    @given(coefficients, coefficients, st.floats(1.0, 100.0))
    def test_the_vertex_of_a_line_that_stays_above_zero_is_trusted(self, slope, curvature, factor):
        parabola = Parabola(slope, curvature)
        loss = factor * slope**2 / (4.0 * curvature)
        trusted = Ledger.open(loss).trusted(parabola, loss)
        assert trusted == pytest.approx(parabola.minimiser)

    @given(coefficients, st.floats(1e-6, 1.0), st.floats(1e-9, 1e-3))
    def test_no_vertex_takes_off_more_than_there_is(self, slope, loss, curvature):
        trusted = Ledger.open(loss).trusted(Parabola(slope, curvature), loss)
        assert 0.5 * slope * trusted <= loss * (1.0 + 1e-12)

    def test_a_loss_of_nothing_bounds_nothing(self):
        """Losses may start at zero and fall from there."""
        assert Ledger.open(0.0).trusted(Parabola(1.0, 0.5), 0.0) == 1.0

    def test_the_search_backs_off_to_where_promises_could_not_show(self):
        search, rate, rates, reasons = doubting(), 0.1, [], set()
        for step in range(300):
            points = sample(Parabola(1.0, -0.05), search.radius(rate), 2.0 + 0.01 * step)
            search, decision = search.decide(rate, points)
            rate = decision.rate
            rates.append(rate)
            reasons.add(decision.reason)
        assert reasons == {Reason.CONCAVE, Reason.SHRUNK}
        assert rate == pytest.approx(search.ledger.trend.spread / 50.0, rel=0.3)
        assert rate < 0.1 * max(rates)


class TestEvidence:
    def book(self, losses, promise=1.0):
        return book(Evidence, losses, promise)

    def test_no_rate_rises_on_promises_that_are_not_kept(self):
        plateau = [2.3 + 0.01 * (-1) ** step for step in range(300)]
        assert self.book(plateau[:2]).limit(1.0, 3.0) == 1.0
        assert self.book(plateau).limit(1.0, 3.0) < 1.0
        assert self.book(plateau, promise=1e-6).limit(1.0, 3.0) == 3.0

    def test_a_rate_falls_that_promises_ten_times_what_would_be_a_proof(self):
        plateau = [2.0 + 0.1 * (-1) ** step for step in range(100)]
        owing = self.book(plateau, promise=0.009)
        assert owing.limit(1.0, 3.0) == max(1.0, owing.trend.spread / (12.0 * owing.promised))
        broken = self.book(plateau, promise=0.1)
        assert broken.limit(1.0, 3.0) == 0.95

    @pytest.mark.parametrize("line", [Parabola(1.0, 0.05), Parabola(1.0, -0.05)])
    def test_a_rate_that_falls_for_broken_promises_says_so(self, line):
        search, rate, falls = wary(), 0.1, []
        for step in range(300):
            points = sample(line, search.radius(rate), 2.0 + 0.01 * (-1) ** step)
            search, decision = search.decide(rate, points)
            if decision.rate < rate:
                falls.append(decision.reason)
            rate = decision.rate
        assert set(falls) == {Reason.SHRUNK}

    def test_each_proof_lets_the_rate_rise_once(self):
        proven = self.book([2.3] * 12 + [1.0] * 10)
        assert proven.limit(1.0, 3.0) == 1.7
        assert proven.limit(1.7, 3.0) == 1.7
        assert proven.limit(0.1, 0.3) == 0.3
        assert proven.limit(2.0, 3.0) == 2.0
        waiting = proven
        for _ in range(300):
            waiting = waiting.book(1.0, 1.7, 0.0)
        assert waiting.limit(1.7, 3.0) == pytest.approx(1.7 * 1.7)

    def test_a_loss_that_has_fallen_is_no_proof_once_more_when_its_mean_follows(self):
        fallen = self.book([2.3] * 12 + [1.0] * 10)
        assert fallen.trend.mean > 1.4
        assert fallen.lowest < 1.25
        for _ in range(20):
            fallen = fallen.book(1.0, 1.0, 1.0)
        assert fallen.trend.mean < 1.06
        assert fallen.proved < 22

    def test_a_rate_falls_where_the_loss_has_risen_since_the_last_proof(self):
        def after(loss, promise, steps=60):
            evidence = self.book([2.3] * 12 + [1.0] * 60)
            for _ in range(steps):
                evidence = evidence.book(loss, 1.0, promise)
            return evidence

        risen = after(1.5, 1.0)
        assert risen.limit(1.0, 3.0) == 1.0 - 3.0 / risen.booked
        assert after(1.5, 1.0, steps=5).limit(1.0, 3.0) == 1.7
        assert after(0.9, 1.0).limit(1.0, 3.0) >= 1.7
        # A rate whose promises are too small to show is not to blame, and may rise.
        assert after(1.5, 1e-6).limit(1.0, 3.0) == 1.7

    def test_a_fitted_model_keeps_its_rate_though_the_loss_rises(self):
        fitted = self.book([2.0 * 0.9**step for step in range(120)])
        assert fitted.fitted
        for _ in range(60):
            fitted = fitted.book(5e-3, 1.0, 1.0)
        assert fitted.trend.mean > fitted.lowest
        assert fitted.limit(1.0, 3.0) >= 1.0

    @settings(deadline=None, max_examples=20)
    @given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0.0, 1e6))
    def test_no_loss_stays_in_it_for_good(self, losses, promise):
        evidence = self.book(losses, promise)
        for _ in range(15_000):
            evidence = evidence.book(2.0, 7.0, promise)
        for step in range(1000):
            evidence = evidence.book(2.0 * 0.999**step, 7.0, promise)
        assert evidence.ceiling == 1.7 * 7.0

    def test_no_rate_rises_once_all_but_a_hundredth_of_the_loss_is_gone(self):
        falling = self.book([2.0 * 0.99**step for step in range(450)])
        assert falling.ceiling == 1.7
        learned = falling
        for step in range(450, 2000):
            learned = learned.book(2.0 * 0.99**step, 1.2, 1.0)
        assert learned.ceiling == 1.2

    def test_a_rate_that_was_cut_may_rise_to_where_it_was_proven(self):
        evidence = self.book([2.3] * 12 + [1.0] * 30)
        assert evidence.limit(1e-3, 3e-3) == 3e-3
        assert evidence.limit(1.4, 3.0) == 1.7

    def test_the_search_waits_for_a_loss_that_falls(self):
        """Where it does not, each batch vouches for itself alone."""

        def found(losses):
            search, rate = wary(), 1e-3
            for loss in losses:
                points = sample(Parabola(1.0, 1.0), search.radius(rate), loss)
                search, decision = search.decide(rate, points)
                rate = decision.rate
            return rate

        assert found([2.3 + 0.01 * (-1) ** step for step in range(500)]) < 0.05
        assert found([2.3 * 0.98**step for step in range(500)]) == pytest.approx(0.5)
