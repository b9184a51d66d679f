import math
import random
from dataclasses import replace
from statistics import fmean

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from lines import sample_line

from quadstep.quadratic import LineSamples, Quadratic
from quadstep.statistics import Ema, LossStatistics, NoiseEstimate, SlopeCheck

anything = st.floats(allow_nan=True, allow_infinity=True)
moderate = st.floats(-1e6, 1e6)
MEMORY = 10.0


def after(losses, memory=MEMORY):
    """The statistics of losses."""
    statistics = LossStatistics()
    for loss in losses:
        statistics = statistics.update(loss, memory)
    return statistics


class TestEma:
    @given(st.lists(moderate, min_size=1, max_size=10))
    def test_starts_as_the_plain_mean(self, values):
        average = Ema()
        for value in values:
            average = average.update(value, MEMORY)
        assert average.mean == pytest.approx(fmean(values), rel=1e-9, abs=1e-6)
        assert average.count == len(values)

    def test_then_forgets_at_the_rate_of_its_memory(self):
        average = Ema(1.0, count=10)
        for _ in range(20):
            average = average.update(0.0, MEMORY)
        assert average.mean == pytest.approx(0.9**20)

    @given(moderate, st.integers(1, 50))
    def test_equal_values_leave_it_equal_to_the_last_bit(self, value, count):
        average = Ema()
        for _ in range(count):
            average = average.update(value, MEMORY)
        assert average.mean == value


class TestLossStatistics:
    @given(st.lists(moderate, min_size=2, max_size=30), st.floats(-1e3, 1e3))
    def test_a_constant_added_to_all_losses_leaves_the_spread(self, losses, constant):
        plain, shifted = after(losses), after([loss + constant for loss in losses])
        rounding = 1e-12 * (1e3 + max(map(abs, losses)))
        assert shifted.spread == pytest.approx(plain.spread, rel=1e-12, abs=rounding)
        assert shifted.mean.mean - constant == pytest.approx(plain.mean.mean, abs=rounding)

    @given(st.lists(moderate, min_size=1, max_size=30), st.integers(-30, 30))
    def test_scales_with_the_losses(self, losses, exponent):
        scale = 2.0**exponent
        plain, scaled = after(losses), after([scale * loss for loss in losses])
        for name in ("spread", "gap", "lowest", "peak"):
            assert getattr(scaled, name) == scale * getattr(plain, name)

    def test_the_gap_is_that_to_zero_or_to_a_lower_loss(self):
        falling = [4.0, 3.0, 2.0, 1.0]
        for losses, gap, peak in (
            (falling, 2.5, 4.0),
            ([*falling, 0.0], 2.0, 4.0),
            ([*falling, -5.0], 6.0, 9.0),
            ([*falling, -5.0, 7.0], 7.0, 9.0),
        ):
            assert (after(losses).gap, after(losses).peak) == (gap, peak)

    @given(st.lists(st.floats(0.0, 1e3), min_size=1, max_size=30), st.floats(-1e3, 0.0))
    def test_below_zero_a_constant_added_to_all_losses_leaves_gap_and_peak(self, losses, constant):
        plain, shifted = (after([loss - 2e3 + each for loss in losses]) for each in (0.0, constant))
        assert shifted.gap == pytest.approx(plain.gap, abs=1e-9)
        assert shifted.peak == pytest.approx(plain.peak, abs=1e-9)

    def test_the_gap_is_no_smaller_than_the_spread(self):
        """Losses that jump between zero and a peak may be at either."""
        statistics = after([0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
        assert statistics.gap == statistics.spread > statistics.mean.mean

    @given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1))
    @example([1.7e308, -1.7e308])
    def test_stays_finite(self, losses):
        statistics = after(losses)
        assert math.isfinite(statistics.mean.mean)
        assert 0.0 <= statistics.spread < math.inf
        assert statistics.lowest == min(losses)


class TestNoise:
    @staticmethod
    def update(paths, reduction=1.0, linear=1.0):
        noise = NoiseEstimate()
        for losses in paths:
            noise = noise.update(losses, reduction, linear)
        return noise

    @given(st.floats(0.5, 0.99), st.floats(-0.5, 0.5), st.floats(-10, 10), st.floats(1e-3, 1e3))
    def test_losses_on_one_curve_or_on_two_by_turns_are_deterministic(
        self, fall, apart, floor, scale
    ):
        """At any offset and at any scale."""
        losses = [scale * (floor + fall**step * (1 + apart * (-1) ** step)) for step in range(300)]
        paths = [losses[at : at + 11] for at in range(0, 200, 10)]
        assert self.update(paths, reduction=scale, linear=2.0 * scale).determinism > 0.5

    @given(st.integers(0, 2**32), st.floats(0.3, 1e3), st.floats(-10, 10))
    def test_independent_losses_are_not(self, seed, spread, floor):
        generator = random.Random(seed)
        noise = NoiseEstimate()
        for _ in range(50):
            losses = [floor + generator.gauss(0, spread) for _ in range(11)]
            noise = noise.update(losses, reduction=1.0, linear=2.0)
            assert noise.determinism == 0.0

    @given(st.lists(st.lists(anything, max_size=12), max_size=30), anything, st.floats(0, 1e300))
    @example([[1.0] * 11] * 3, 1.0, 0.0)
    @example([[1.7e308, -1.7e308] * 6] * 3, math.inf, 0.0)
    def test_stays_a_ratio(self, paths, linear, reduction):
        noise = self.update(paths, reduction, linear)
        assert 0.0 <= noise.ratio.mean <= 1.0
        assert 0.0 <= noise.determinism <= 1.0

    @pytest.mark.parametrize(
        "losses",
        [[], [1.0] * 6, [1.0, 2.0, math.nan, 1.0, 1.0, 2.0, 1.0], [math.inf] * 11],
        ids=["none", "short", "nan", "inf"],
    )
    def test_losses_without_information_leave_it_unchanged(self, losses):
        assert NoiseEstimate().update(losses, 1.0, 1.0) == NoiseEstimate()

    def test_constant_losses_without_a_predicted_reduction_are_noise(self):
        assert self.update([[1.0] * 11] * 30, reduction=0.0, linear=0.0).determinism == 0.0

    @pytest.mark.parametrize(
        "losses",
        [[1.0, 3.0, 0.0, 2.0, 5.0, 1.0, 4.0, 0.0, 1.0], [1.0 + 0.2 * step for step in range(11)]],
        ids=["noise", "overshoot"],
    )
    def test_what_disturbs_is_heard_at_the_next_measurement(self, losses):
        noise = self.update([[1.0 - 0.01 * step for step in range(11)]] * 30)
        assert noise.determinism == 1.0
        assert noise.update(losses, 1.0, 1.0).determinism == 0.0


class TestSlopeCheck:
    def update(self, check, *slopes):
        """Adds measurements whose losses show a slope of one."""
        for slope in slopes:
            samples = replace(sample_line(Quadratic(1.0, 1.0), 0.1), slope=slope)
            check = check.update(samples if check.due else replace(samples, loss_behind=None))
        return check

    def due(self, check, slope, count):
        """Which of the next measurements take two probes."""
        due = []
        for _ in range(count):
            due.append(check.due)
            check = self.update(check, slope)
        return due

    @pytest.mark.parametrize("slope", [0.9, 1.0, 1.15])
    def test_one_measurement_in_ten_is_checked_where_the_slopes_agree(self, slope):
        assert (
            self.due(SlopeCheck(), slope, 40)
            == [True] * 11 + ([False] * 9 + [True]) * 2 + [False] * 9
        )

    @pytest.mark.parametrize("slope", [-1.0, 0.0, 0.1, 0.8, 1.25, 10.0])
    def test_each_measurement_is_checked_where_they_do_not(self, slope):
        assert all(self.due(SlopeCheck(), slope, 40))

    def test_a_check_that_fails_is_followed_by_others(self):
        """Gradients that are clipped all of a sudden are soon no longer used."""
        check = self.update(SlopeCheck(), *[1.0] * 20)
        assert check.due
        check = self.update(check, 0.1)
        assert check.passes
        assert check.due
        assert self.update(check, 1.0, *[1.0] * 3).passes
        assert not self.update(check, *[0.1] * 3).passes

    def test_it_recovers(self):
        check = self.update(SlopeCheck(), *[0.1] * 50)
        assert not check.passes
        assert self.update(check, *[1.0] * 20).passes

    @pytest.mark.parametrize("slope", [math.nan, math.inf])
    def test_it_starts_over_where_the_slope_is_not_finite(self, slope):
        check = self.update(SlopeCheck(), *[1.0] * 20)
        assert self.update(check, slope) == SlopeCheck()

    def test_differences_below_rounding_are_no_checks(self):
        flat = LineSamples(1e-20, 1.0, 1.0, 1.0, slope=1.0)
        assert SlopeCheck().update(flat) == SlopeCheck(measurements=1)

    @pytest.mark.parametrize(
        ("distance", "slope", "passes"),
        [(0.05, 1.15, True), (0.05, 1.25, False), (5.0, 1.25, True), (5.0, -4.0, False)],
    )
    def test_an_error_counts_beside_what_the_losses_change_by(self, distance, slope, passes):
        """The slope near the center, the curvature far beyond the vertex, which is at 0.5."""
        samples = replace(sample_line(Quadratic(1.0, 1.0), distance), slope=slope)
        check = SlopeCheck()
        for _ in range(SlopeCheck.INITIAL_CHECKS):
            check = check.update(samples)
        assert check.passes == passes

    def test_a_vertex_far_beyond_the_probe_may_be_anywhere(self):
        """There the trust region bounds the rate, and not the quadratic."""
        samples = replace(sample_line(Quadratic(1.0, 1.0), 0.001), slope=1.1)
        assert SlopeCheck().update(samples).last_difference < 0.3

    def test_modified_gradients_are_not_used(self):
        check = self.update(SlopeCheck(), *[1.0] * 20)
        line = sample_line(Quadratic(1.0, 1.0), 0.1)
        clipped = replace(line, slope=1.0, gradient_unmodified=False)
        assert check.update(clipped) == SlopeCheck()
